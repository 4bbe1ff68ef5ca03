#include "cpu/tile/driver.h"

#include <unistd.h>

#include <algorithm>

namespace pykernels {
namespace {

// Bytes of A that a block of tiles may hold: half of L2, the rest is for the weights, which each block reads anew.
int64_t block_bytes() {
  static const int64_t bytes = std::clamp<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE) / 2, 128 << 10, 1 << 20);
  return bytes;
}
constexpr int64_t kMaxBlock = 16;
// Rows of one panel group that wait for one call of the epilogue; they stay in L1.
constexpr int64_t kMaxRun = 128 * kColumns;

int64_t part(int64_t total, int64_t parts, int64_t i) { return total * i / parts; }

void fold_rows(TileProblem& p) {
  const bool pointwise = p.kh == 1 && p.kw == 1 && p.sh == 1 && p.sw == 1 && p.rows == p.height &&
                         p.columns == p.width && p.top == 0 && p.left == 0;
  if (!pointwise || (p.rows > 1 && p.row_stride != p.columns * p.pixel)) return;
  p.columns = p.width = p.columns * p.rows;
  p.rows = p.height = 1;
  if (p.images > 1 && p.image_stride != p.columns * p.pixel) return;
  p.columns = p.width = p.columns * p.images;
  p.images = 1;
}

// Where taps lie in the input and in a patch. With one group and a kernel row that is one run of memory, that row is
// one tap of kw times the words.
void plan_views(const TileProblem& p, TilePlan& plan) {
  const int64_t widened = p.dot->word_bytes / 4, pixel = p.pixel * widened;
  const int64_t pixels = std::min(plan.block, plan.tiles_per_row) * ceil_div(p.columns, plan.tiles_per_row);
  plan.by_rows = p.dw == 1 && p.sw <= p.kw;
  const bool whole_rows = p.weights->h.groups == 1 && (plan.by_rows || p.kw == 1);
  plan.patch_line = plan.by_rows ? (pixels - 1) * p.sw + p.kw : pixels;
  plan.patch_bytes = round_up(plan.patch_line * p.kh * (plan.by_rows ? 1 : p.kw) * pixel, kBlockBytes);
  plan.direct.lda = p.sw * p.pixel;
  plan.direct.group_stride = p.group_stride;
  plan.patch.lda = (plan.by_rows ? p.sw : 1) * pixel;
  plan.patch.group_stride = p.group_stride * widened;
  for (int64_t y = 0; y < p.kh; ++y)
    for (int64_t x = 0; x < (whole_rows ? 1 : p.kw); ++x) {
      plan.direct.tap_offset.push_back(y * p.dh * p.row_stride + x * p.dw * p.pixel);
      plan.patch.tap_offset.push_back((plan.by_rows ? y * plan.patch_line + x : (y * p.kw + x) * plan.patch_line) *
                                      pixel);
    }
  plan.taps = static_cast<int64_t>(plan.direct.tap_offset.size());
  plan.words = p.weights->words() * (whole_rows ? p.kw : 1);
}

// `count` pixels of input line y from column x on, which may lie in the padding.
void stage_line(const TileProblem& p, const uint8_t* image, int64_t y, int64_t x, int64_t count, uint8_t* to) {
  const int64_t words = p.pixel / 4, bytes = words * p.dot->word_bytes;
  const auto blank = [&](int64_t first, int64_t last) {
    if (p.dot->word_bytes == 8)
      std::fill(reinterpret_cast<uint16_t*>(to + first * bytes), reinterpret_cast<uint16_t*>(to + last * bytes),
                p.fill);
    else
      std::fill(to + first * bytes, to + last * bytes, p.fill);
  };
  const bool inside = y >= 0 && y < p.height;
  const int64_t first = inside ? std::clamp<int64_t>(-x, 0, count) : count;
  const int64_t last = inside ? std::clamp<int64_t>(p.width - x, first, count) : count;
  blank(0, first);
  if (last > first && words > 0)
    p.dot->stage(image + y * p.row_stride + (x + first) * p.pixel, (last - first) * words, p.flip, to + first * bytes);
  blank(last, count);
}

// The patch of a run of `pixels` output pixels, the first tap of whose first reads input pixel (y, x).
void stage_patch(const TileProblem& p, const TilePlan& plan, const uint8_t* image, int64_t y, int64_t x, int64_t pixels,
                 uint8_t* to) {
  const int64_t pixel = p.pixel / 4 * p.dot->word_bytes, line = plan.patch_line * pixel;
  for (int64_t ky = 0; ky < p.kh; ++ky, y += p.dh) {
    if (plan.by_rows) {
      stage_line(p, image, y, x, (pixels - 1) * p.sw + p.kw, to);
      to += line;
      continue;
    }
    for (int64_t kx = 0; kx < p.kw; ++kx, to += line) {
      const int64_t at = x + kx * p.dw;
      if (p.sw == 1)
        stage_line(p, image, y, at, pixels, to);
      else
        for (int64_t r = 0; r < pixels; ++r) stage_line(p, image, y, at + r * p.sw, 1, to + r * pixel);
    }
  }
}

struct Tile {
  const uint8_t* a;
  const TileView* view;
  int64_t row, rows;  // of the output
};

// Where tiles [first, first + count) read: in place, or in patches, one for each run of them along a line of the
// output.
void locate(const TileProblem& p, const TilePlan& plan, int64_t first, int64_t count, uint8_t* patch, Tile* tiles) {
  const auto pixel_of = [&](int64_t piece) { return part(p.columns, plan.tiles_per_row, piece); };
  for (int64_t i = 0; i < count;) {
    const int64_t line = (first + i) / plan.tiles_per_row, piece = (first + i) % plan.tiles_per_row;
    const int64_t y = line % p.rows * p.sh - p.top, x = pixel_of(piece);
    const uint8_t* image = p.x + line / p.rows * p.image_stride;
    const bool tall = !plan.stage_all && y >= 0 && y + (p.kh - 1) * p.dh < p.height;
    const auto in_place = [&](int64_t k) {
      return tall && pixel_of(k) * p.sw - p.left >= 0 &&
             (pixel_of(k + 1) - 1) * p.sw - p.left + (p.kw - 1) * p.dw < p.width;
    };
    const bool direct = in_place(piece);
    int64_t end = piece + 1;
    while (end < std::min(plan.tiles_per_row, piece + count - i) && in_place(end) == direct) ++end;

    const TileView& view = direct ? plan.direct : plan.patch;
    const uint8_t* a = patch;
    if (direct) {
      a = image + y * p.row_stride + (x * p.sw - p.left) * p.pixel;
    } else {
      stage_patch(p, plan, image, y, x * p.sw - p.left, pixel_of(end) - x, patch);
      patch += plan.patch_bytes;
    }
    for (int64_t k = piece; k < end; ++k, ++i) {
      const int64_t at = pixel_of(k);
      tiles[i] = {a + (at - x) * view.lda, &view, line * p.columns + at, pixel_of(k + 1) - at};
    }
  }
}

}  // namespace

TilePlan plan_tiles(TileProblem& p, int64_t threads) {
  fold_rows(p);
  TilePlan plan;
  plan.tiles_per_row = ceil_div(p.columns, p.dot->max_rows);
  plan.tiles = p.images * p.rows * plan.tiles_per_row;
  plan.panels = p.weights->h.groups * p.weights->panels_per_group();

  // The split of least work for the slowest thread; among equals, of least memory read by it.
  const int64_t tile_rows = ceil_div(p.columns, plan.tiles_per_row);
  const int64_t tile_bytes =
      p.kh * std::min(p.kw * tile_rows, (tile_rows - 1) * p.sw + p.kw) * p.pixel / 4 * p.dot->word_bytes;
  int64_t least_work = INT64_MAX, least_bytes = INT64_MAX;
  for (int64_t m = std::min(threads, plan.tiles); m >= 1; --m) {
    const int64_t n = std::min(std::max<int64_t>(threads / m, 1), plan.panels);
    const int64_t tiles = ceil_div(plan.tiles, m), panels = ceil_div(plan.panels, n);
    const int64_t work = tiles * panels, bytes = tiles * tile_bytes + panels * p.weights->panel_bytes();
    if (work < least_work || (work == least_work && bytes < least_bytes)) {
      least_work = work;
      least_bytes = bytes;
      plan.tile_splits = m;
      plan.panel_splits = n;
    }
  }
  plan.tasks = plan.tile_splits * plan.panel_splits;
  plan.block = std::clamp<int64_t>(block_bytes() / std::max<int64_t>(tile_bytes, 1), 1,
                                   std::min(kMaxBlock, ceil_div(plan.tiles, plan.tile_splits)));
  plan_views(p, plan);

  // A block touches so many lines at most, and each has one run of staged tiles, or one at either end.
  const bool padded = p.top > 0 || p.left > 0 || (p.rows - 1) * p.sh + (p.kh - 1) * p.dh - p.top >= p.height ||
                      (p.columns - 1) * p.sw + (p.kw - 1) * p.dw - p.left >= p.width;
  plan.stage_all = p.dot->word_bytes != 4 || p.flip != 0;
  const int64_t lines = (plan.block + plan.tiles_per_row - 2) / plan.tiles_per_row + 1;
  const int64_t runs = plan.stage_all ? lines : padded ? 2 * lines : 0;
  plan.scratch = std::min(plan.block, runs) * plan.patch_bytes;
  return plan;
}

void run_tiles(const TileProblem& p, const TilePlan& plan, int64_t task, uint8_t* scratch) {
  alignas(64) uint8_t c[kMaxRun * 4];
  Tile tiles[kMaxBlock];
  const int64_t tile_part = task / plan.panel_splits, panel_part = task % plan.panel_splits;
  const int64_t first_tile = part(plan.tiles, plan.tile_splits, tile_part);
  const int64_t last_tile = part(plan.tiles, plan.tile_splits, tile_part + 1);
  const int64_t first_panel = part(plan.panels, plan.panel_splits, panel_part);
  const int64_t last_panel = part(plan.panels, plan.panel_splits, panel_part + 1);
  const PackedView& w = *p.weights;
  const int64_t per_group = w.panels_per_group(), panel_bytes = w.panel_bytes();
  const int64_t most_panels = p.dot->max_panels[ceil_div(p.columns, plan.tiles_per_row)];

  for (int64_t block = first_tile; block < last_tile; block += plan.block) {
    const int64_t count = std::min(plan.block, last_tile - block);
    locate(p, plan, block, count, scratch, tiles);
    for (int64_t panel = first_panel; panel < last_panel;) {
      const int64_t group = panel / per_group;
      const int64_t left = std::min(last_panel, (group + 1) * per_group) - panel;
      const int64_t panels = ceil_div(left, ceil_div(left, most_panels));  // even pieces
      const int64_t column = (panel % per_group) * kColumns, ldc = panels * kColumns;
      DotArgs dot{nullptr, 0, nullptr, plan.taps, plan.words, w.panels + panel * panel_bytes, panel_bytes, c};
      EpilogueArgs out{
          c, ldc, tiles[0].row, 0, panel * kColumns, group * w.h.n + column, std::min(ldc, w.h.n - column)};
      for (int64_t i = 0; i < count; ++i) {
        const Tile& t = tiles[i];
        dot.a = t.a + group * t.view->group_stride;
        dot.lda = t.view->lda;
        dot.tap_offset = t.view->tap_offset.data();
        dot.c = c + out.rows * ldc * 4;
        p.dot->tile[t.rows][panels](dot);
        out.rows += t.rows;
        if (i + 1 == count || (out.rows + p.dot->max_rows) * ldc > kMaxRun) {
          p.epilogue(p.e, out);
          out.row += out.rows;
          out.rows = 0;
        }
      }
      panel += panels;
    }
  }
}

}  // namespace pykernels
