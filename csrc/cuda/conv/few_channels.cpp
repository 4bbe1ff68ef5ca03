#include "cuda/conv/few_channels.h"

#include <algorithm>
#include <cstdint>

namespace pykernels::few_channels {

extern const Config sm80_3x3x32;
extern const Config sm80_3x3x16;
extern const Config sm80_5x5x32;
extern const Config sm80_5x5x16;
extern const Config sm80_7x7x32;
extern const Config sm80_7x7x16;

namespace {
// Tables of pykernels/cuda/tuned name them. Of those that fit, the first is taken where nothing was measured.
const Config* const kConfigs[] = {&sm80_3x3x32, &sm80_3x3x16, &sm80_5x5x32, &sm80_5x5x16, &sm80_7x7x32, &sm80_7x7x16};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Instructions of a warp, as machine code for sm_90 has them (tests/cuda/test_cuda_library.py): for a row of a unit,
// bytes out; for four pixels of a thread to shared memory; and what waiting for these is taken for.
int64_t unit_cost(const Shape& shape) {
  const int tiles = shape.channels / 8, steps = (shape.size * ((shape.size + 3) / 4) + 1) / 2;
  return steps * (4 + tiles) + 24 * tiles + 30;
}
constexpr int64_t kStageCost = 65, kWaitCost = 600;
}  // namespace

int config_count() { return static_cast<int>(sizeof(kConfigs) / sizeof(kConfigs[0])); }
const Config& config(int index) { return *kConfigs[index]; }

Tiling tiling(const Problem& p, const Shape& shape, int multiprocessors) {
  Tiling t{};
  const int64_t parts = ceil_div(p.out_channels, shape.channels);
  t.groups = parts % 4 == 0 ? 4 : parts % 2 == 0 ? 2 : 1;
  t.grid[1] = static_cast<int>(parts / t.groups);
  const int64_t resident = std::max<int64_t>(1, int64_t{multiprocessors} * shape.blocks / t.grid[1]);
  const int taps = (shape.size + 3) / 4 * 4, slots = kWarps / t.groups;
  const int most_rows = (kMaxRows - shape.size) / p.stride[0] + 1;
  const int most_units = ((kPitch - taps) / p.stride[1] + 1) / 16;
  int64_t least = INT64_MAX;
  for (int rows = slots; rows <= most_rows; rows += slots)
    for (int units = 1; units <= most_units; ++units) {
      const int64_t down = ceil_div(p.out_height, rows), across = ceil_div(ceil_div(p.out_width, 16), units);
      const int64_t pixels = ((rows - 1) * p.stride[0] + shape.size) * ((16 * units - 1) * p.stride[1] + taps);
      const int64_t tile =
          rows / slots * units * unit_cost(shape) + ceil_div(pixels, 4 * 32 * kWarps) * kStageCost + kWaitCost;
      const int64_t cost = ceil_div(p.images * down * across, resident) * tile;
      if (cost >= least) continue;
      least = cost;
      t.rows = rows, t.units = units, t.down = static_cast<int>(down), t.across = static_cast<int>(across);
      t.grid[0] = static_cast<int>(std::min(p.images * down * across, resident));
    }
  return t;
}

}  // namespace pykernels::few_channels
