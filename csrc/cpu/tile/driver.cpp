#include "cpu/tile/driver.h"

#include <algorithm>

namespace pykernels {
namespace {

// Words of A that a block of tiles may hold: about half of a small L2, the other half is for the weights.
constexpr int64_t kBlockBytesOfA = 96 << 10;

int64_t part(int64_t total, int64_t parts, int64_t i) { return total * i / parts; }

}  // namespace

TilePlan plan_tiles(TileProblem& p, int64_t threads) {
  if (p.rows == 1 || p.row_stride == p.columns * p.lda) {
    p.columns *= p.rows;
    p.rows = 1;
    if (p.images == 1 || p.image_stride == p.columns * p.lda) {
      p.columns *= p.images;
      p.images = 1;
    }
  }
  TilePlan plan;
  plan.tiles_per_row = ceil_div(p.columns, p.dot->max_rows);
  plan.tiles = p.images * p.rows * plan.tiles_per_row;
  plan.panels = p.weights->h.groups * p.weights->panels_per_group();

  // The split of least work for the slowest thread; among equals, more splits of tiles: panels are then shared in
  // cache.
  int64_t best = INT64_MAX;
  plan.tile_splits = plan.panel_splits = 1;
  for (int64_t m = std::min(threads, plan.tiles); m >= 1; --m) {
    const int64_t n = std::min(std::max<int64_t>(threads / m, 1), plan.panels);
    const int64_t work = ceil_div(plan.tiles, m) * ceil_div(plan.panels, n);
    if (work < best) {
      best = work;
      plan.tile_splits = m;
      plan.panel_splits = n;
    }
  }
  plan.tasks = plan.tile_splits * plan.panel_splits;
  const int64_t tile_bytes = ceil_div(p.columns, plan.tiles_per_row) * p.taps * p.words * 4;
  plan.block = std::clamp<int64_t>(kBlockBytesOfA / std::max<int64_t>(tile_bytes, 1), 1, 16);
  return plan;
}

void run_tiles(const TileProblem& p, const TilePlan& plan, int64_t task) {
  alignas(64) uint8_t c[kMaxTile * 4];
  const int64_t tile_part = task / plan.panel_splits, panel_part = task % plan.panel_splits;
  const int64_t first_tile = part(plan.tiles, plan.tile_splits, tile_part);
  const int64_t last_tile = part(plan.tiles, plan.tile_splits, tile_part + 1);
  const int64_t first_panel = part(plan.panels, plan.panel_splits, panel_part);
  const int64_t last_panel = part(plan.panels, plan.panel_splits, panel_part + 1);
  const PackedView& w = *p.weights;
  const int64_t per_group = w.panels_per_group(), panel_bytes = w.panel_bytes();
  const int64_t most_panels = p.dot->max_panels[ceil_div(p.columns, plan.tiles_per_row)];

  for (int64_t block = first_tile; block < last_tile; block += plan.block) {
    const int64_t block_end = std::min(block + plan.block, last_tile);
    for (int64_t panel = first_panel; panel < last_panel;) {
      const int64_t group = panel / per_group;
      const int64_t left = std::min(last_panel, (group + 1) * per_group) - panel;
      const int64_t panels = ceil_div(left, ceil_div(left, most_panels));  // even pieces
      const int64_t column = (panel % per_group) * kColumns;
      EpilogueArgs out;
      out.c = c;
      out.ldc = panels * kColumns;
      out.packed = panel * kColumns;
      out.channel = group * w.h.n + column;
      out.columns = std::min(panels * kColumns, w.h.n - column);
      DotArgs dot;
      dot.lda = p.lda;
      dot.tap_offset = p.tap_offset;
      dot.taps = p.taps;
      dot.words = p.words;
      dot.panels = w.panels + panel * panel_bytes;
      dot.panel_bytes = panel_bytes;
      dot.c = c;
      for (int64_t tile = block; tile < block_end; ++tile) {
        const int64_t line = tile / plan.tiles_per_row, piece = tile % plan.tiles_per_row;
        const int64_t x0 = part(p.columns, plan.tiles_per_row, piece),
                      x1 = part(p.columns, plan.tiles_per_row, piece + 1);
        dot.a = p.a + (line / p.rows) * p.image_stride + (line % p.rows) * p.row_stride + x0 * p.lda +
                group * p.group_stride;
        out.row = line * p.columns + x0;
        out.rows = x1 - x0;
        p.dot->tile[out.rows][panels](dot);
        p.epilogue(p.e, out);
      }
      panel += panels;
    }
  }
}

}  // namespace pykernels
