#include "cpu/tile/driver.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>

namespace pykernels {
namespace {

constexpr int64_t kMaxBlock = 16;
// Rows of one panel group that wait for one call of the epilogue; they stay in L1.
constexpr int64_t kMaxRun = 128 * kColumns;

// Rows so far apart share their places in L1, fewer than a tile has rows.
constexpr int64_t kAlias = 4096;

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

struct Range {
  int64_t first, last;
};

// The output pixels whose taps all lie in the image.
Range inside(int64_t count, int64_t size, int64_t stride, int64_t before, int64_t reach) {
  const int64_t room = size - 1 - reach + before;  // where the last of them may begin
  const int64_t last = room < 0 ? 0 : std::min(count, room / stride + 1);
  return {std::min(ceil_div(before, stride), last), last};
}

void plan_walk(const TileProblem& p, TilePlan& plan) {
  const auto section = [&](int64_t pixels) { return Section{pixels, ceil_div(pixels, p.max_rows())}; };
  if (plan.staged) {
    plan.sections[0] = section(p.columns);
    return;
  }
  const Range y = inside(p.rows, p.height, p.sh, p.top, (p.kh - 1) * p.dh);
  const Range x = inside(p.columns, p.width, p.sw, p.left, (p.kw - 1) * p.dw);
  plan.walk[0] = {0, y.first, 0, x.last, false};
  plan.walk[1] = {0, y.last, x.last, p.columns, true};
  plan.walk[TilePlan::kInside] = {y.first, y.last, x.first, x.last, false};
  plan.walk[3] = {y.last, p.rows, x.first, p.columns, false};
  plan.walk[4] = {y.first, p.rows, 0, x.first, true};
  plan.sections[0] = section(plan.walk[0].pixels() + plan.walk[1].pixels());
  plan.sections[1] = section(plan.walk[TilePlan::kInside].pixels());
  plan.sections[2] = section(plan.walk[3].pixels() + plan.walk[4].pixels());
}

// The pixels of its line that a tile takes.
Range pixels_of(const TilePlan& plan, int64_t tile) {
  int64_t first = 0;
  const Section* s = plan.sections;
  for (; tile >= s->tiles; tile -= s++->tiles) first += s->pixels;
  return {first + part(s->pixels, s->tiles, tile), first + part(s->pixels, s->tiles, tile + 1)};
}

// Where taps lie in the input or in a patch. With one group and a kernel row that is one run of memory, that row is one
// tap of kw times the words.
void plan_taps(const TileProblem& p, TilePlan& plan) {
  const int64_t words = p.weights.words(), widened = plan.staged ? p.dot->word_bytes / 4 : 1;
  plan.patch_pixel = p.pixel * widened;
  if (p.kw == 1 && plan.patch_pixel % kAlias == 0) plan.patch_pixel += kBlockBytes;
  plan.group_stride = p.group_stride * widened;
  plan.by_rows = p.dw == 1 && p.sw <= p.kw;
  plan.whole_rows = p.weights.h.groups == 1 && (p.kw == 1 || (plan.staged ? plan.by_rows : p.dw == 1));
  plan.words = words * (plan.whole_rows ? p.kw : 1);
  const int64_t pixels = std::min(plan.block, plan.tiles_per_line) * plan.most_rows;
  plan.patch_line = plan.by_rows ? (pixels - 1) * p.sw + p.kw : pixels;
  plan.patch_bytes = round_up(plan.patch_line * p.kh * (plan.by_rows ? 1 : p.kw) * plan.patch_pixel, kBlockBytes);
  for (int64_t y = 0; y < p.kh; ++y)
    for (int64_t x = 0; x < (plan.whole_rows ? 1 : p.kw); ++x) {
      const int64_t at = !plan.staged   ? y * p.dh * p.row_stride + x * p.dw * p.pixel
                         : plan.by_rows ? (y * plan.patch_line + x) * plan.patch_pixel
                                        : (y * p.kw + x) * plan.patch_line * plan.patch_pixel;
      plan.taps.push_back({at, (y * p.kw + x) * words * kBlockBytes});
    }
}

// `count` pixels of input line y from column x on, which may lie in the padding; `bytes` apart in the patch.
void stage_line(const TileProblem& p, const uint8_t* image, int64_t y, int64_t x, int64_t count, int64_t bytes,
                uint8_t* to) {
  const int64_t words = p.pixel / 4;
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
  const uint8_t* from = image + y * p.row_stride + (x + first) * p.pixel;
  if (last > first && words > 0) {
    if (bytes == words * p.dot->word_bytes)
      p.dot->stage(from, (last - first) * words, p.flip, to + first * bytes);
    else
      for (int64_t i = first; i < last; ++i, from += p.pixel) p.dot->stage(from, words, p.flip, to + i * bytes);
  }
  blank(last, count);
}

// The patch of a run of `pixels` output pixels, the first tap of whose first reads input pixel (y, x).
void stage_patch(const TileProblem& p, const TilePlan& plan, const uint8_t* image, int64_t y, int64_t x, int64_t pixels,
                 uint8_t* to) {
  const int64_t pixel = plan.patch_pixel, line = plan.patch_line * pixel;
  for (int64_t ky = 0; ky < p.kh; ++ky, y += p.dh) {
    if (plan.by_rows) {
      stage_line(p, image, y, x, (pixels - 1) * p.sw + p.kw, pixel, to);
      to += line;
      continue;
    }
    for (int64_t kx = 0; kx < p.kw; ++kx, to += line) {
      const int64_t at = x + kx * p.dw;
      if (p.sw == 1)
        stage_line(p, image, y, at, pixels, pixel, to);
      else
        for (int64_t r = 0; r < pixels; ++r) stage_line(p, image, y, at + r * p.sw, 1, pixel, to + r * pixel);
    }
  }
}

struct Tile {
  const uint8_t* pixel[kMaxRows];
  DotArgs dot;              // all but what depends on the panels
  int64_t row, rows;        // the first of the output, and how many
  bool run;                 // they follow one another
  int64_t place[kMaxRows];  // of each in the output, in elements
};

// The tiles [first, first + count) of patches, one for each run of them along a line of the output.
void locate_staged(const TileProblem& p, const TilePlan& plan, int64_t first, int64_t count, uint8_t* patch,
                   Tile* tiles) {
  const int64_t step = (plan.by_rows ? p.sw : 1) * plan.patch_pixel;
  for (int64_t i = 0; i < count; patch += plan.patch_bytes) {
    const int64_t line = (first + i) / plan.tiles_per_line, piece = (first + i) % plan.tiles_per_line;
    const int64_t end = std::min(plan.tiles_per_line, piece + count - i);
    const int64_t x = pixels_of(plan, piece).first, last = pixels_of(plan, end - 1).last;
    stage_patch(p, plan, p.x + line / p.rows * p.image_stride, line % p.rows * p.sh - p.top, x * p.sw - p.left,
                last - x, patch);
    for (int64_t k = piece; k < end; ++k, ++i) {
      Tile& t = tiles[i];
      const Range at = pixels_of(plan, k);
      t.rows = at.last - at.first;
      t.row = line * p.columns + at.first;
      t.run = true;
      for (int64_t r = 0; r < t.rows; ++r) {
        t.pixel[r] = patch + (at.first - x + r) * step;
        t.place[r] = (t.row + r) * p.e.out_stride;
      }
      t.dot = {t.pixel, 0, 0, plan.taps.data(), static_cast<int64_t>(plan.taps.size()), plan.words};
    }
  }
}

// A pixel of the walk.
struct Step {
  const Stretch* stretch;
  int64_t y, x;

  static Step at(const Stretch* s, int64_t pixel) {
    for (; pixel >= s->pixels(); ++s) pixel -= s->pixels();
    const int64_t side = s->down ? s->y1 - s->y0 : s->x1 - s->x0;
    return s->down ? Step{s, s->y0 + pixel % side, s->x0 + pixel / side}
                   : Step{s, s->y0 + pixel / side, s->x0 + pixel % side};
  }
  // How many pixels follow one another along x, this one included.
  int64_t along() const { return stretch->down ? 1 : stretch->x1 - x; }
  // `count` pixels on, at most along().
  void advance(int64_t count) {
    if (stretch->down ? ++y < stretch->y1 : (x += count) < stretch->x1) return;
    if (stretch->down ? ++x < stretch->x1 : ++y < stretch->y1) {
      (stretch->down ? y : x) = stretch->down ? stretch->y0 : stretch->x0;
      return;
    }
    do ++stretch;
    while (stretch->pixels() == 0);
    y = stretch->y0, x = stretch->x0;
  }
};

// The taps of a tile that reaches into the padding, row by row: the address of a pixel or of `fill`. A tap that every
// row reads in the padding adds nothing to a float; to bytes it adds the zero point's share. y, x: of each row's first
// tap. Returns what is left of `scratch`.
uint8_t* locate_taps(const TileProblem& p, const TilePlan& plan, const uint8_t* image, const int64_t* y,
                     const int64_t* x, const uint8_t* fill, uint8_t* scratch, Tile& t) {
  const auto within = [](int64_t at, int64_t size) { return static_cast<uint64_t>(at) < static_cast<uint64_t>(size); };
  bool whole = plan.whole_rows;
  for (int64_t r = 0; r < t.rows; ++r) whole &= x[r] >= 0 && x[r] + (p.kw - 1) * p.dw < p.width;
  auto* tap = reinterpret_cast<DotTap*>(scratch);
  auto* pixel = reinterpret_cast<const uint8_t**>(tap + p.kh * p.kw);
  const int64_t words = p.weights.words();
  t.dot = {pixel, t.rows, 0, tap, 0, whole ? plan.words : words};
  for (int64_t ky = 0; ky < p.kh; ++ky)
    for (int64_t kx = 0; kx < (whole ? 1 : p.kw); ++kx) {
      bool any = p.weights.h.element == Element::s8;
      for (int64_t r = 0; r < t.rows; ++r) {
        const int64_t iy = y[r] + ky * p.dh, ix = x[r] + kx * p.dw;
        const bool in = within(iy, p.height) && within(ix, p.width);
        pixel[r] = in ? image + iy * p.row_stride + ix * p.pixel : fill;
        any |= in;
      }
      if (!any) continue;
      tap[t.dot.taps++] = {0, (ky * p.kw + kx) * words * kBlockBytes};
      pixel += t.rows;
    }
  return reinterpret_cast<uint8_t*>(pixel);
}

// The tiles [first, first + count) of pixels where they stand; `scratch` begins with fill_bytes of `fill`.
void locate_in_place(const TileProblem& p, const TilePlan& plan, int64_t first, int64_t count, uint8_t* scratch,
                     Tile* tiles) {
  const uint8_t* fill = scratch;
  scratch += plan.fill_bytes;
  Step step{};
  int64_t behind = 0;  // pixels that the step is yet to advance by
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = (first + i) / plan.tiles_per_line, piece = (first + i) % plan.tiles_per_line;
    const Range at = pixels_of(plan, piece);
    const uint8_t* image = p.x + n * p.image_stride;
    Tile& t = tiles[i];
    t.rows = at.last - at.first;
    t.run = true;
    int64_t y[kMaxRows], x[kMaxRows];
    bool inside = true;
    if (i == 0 || piece == 0) step = Step::at(plan.walk, at.first), behind = 0;
    for (int64_t r = 0; r < t.rows; r += behind) {
      if (behind > 0) step.advance(behind);
      behind = std::min(step.along(), t.rows - r);
      inside &= step.stretch == plan.walk + TilePlan::kInside;
      const int64_t row = (n * p.rows + step.y) * p.columns + step.x;
      const int64_t first_y = step.y * p.sh - p.top, first_x = step.x * p.sw - p.left;
      const uint8_t* pixel = image + first_y * p.row_stride + first_x * p.pixel;
      if (r == 0) t.row = row;
      t.run &= row == t.row + r;
      for (int64_t k = 0; k < behind; ++k) {
        t.place[r + k] = (row + k) * p.e.out_stride;
        t.pixel[r + k] = pixel + k * p.sw * p.pixel;
        y[r + k] = first_y, x[r + k] = first_x + k * p.sw;
      }
    }
    if (inside) {
      t.dot = {t.pixel, 0, 0, plan.taps.data(), static_cast<int64_t>(plan.taps.size()), plan.words};
    } else {
      scratch = locate_taps(p, plan, image, y, x, fill, scratch, t);
    }
  }
}

// Whether tiles of these columns can write their output themselves.
bool finishes(const TileProblem& p, int64_t columns) {
  return p.dot->finishes && p.e.out_dtype == p.dot->out && columns % kColumns == 0 &&
         p.e.activation <= Activation::relu6 && (p.e.scaled || !is_byte(p.e.out_dtype)) &&
         (!p.e.residual || (!p.e.residual_after && p.e.residual_dtype == p.dot->out));
}

// Sums that wait for one call of the epilogue, as long as their rows follow one another.
struct Held {
  const TileProblem& p;
  uint8_t* c;
  EpilogueArgs out;
  int64_t rows = 0;

  void* next() { return c + rows * out.ldc * 4; }
  void flush() {
    if (out.rows > 0) p.epilogue(p.e, out);
    out.rows = 0;
  }
  void add(int64_t row, int64_t count) {
    if (row != out.row + out.rows) flush();
    if (out.rows == 0) out.row = row, out.c = next();
    out.rows += count;
    rows += count;
  }
  void add(const Tile& t) {
    if (t.run)
      add(t.row, t.rows);
    else
      for (int64_t r = 0; r < t.rows; ++r) add(t.place[r] / p.e.out_stride, 1);
    if ((rows + p.dot->max_rows) * out.ldc > kMaxRun) flush(), rows = 0;
  }
};

}  // namespace

const std::array<float, kMaxPanels * kColumns> kNoAddend = [] {
  std::array<float, kMaxPanels * kColumns> zeros;
  zeros.fill(-0.0f);
  return zeros;
}();

int64_t l2_bytes() {  // within bounds, since a virtual machine may say anything
  static const int64_t bytes = std::clamp<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 256 << 10, 2 << 20);
  return bytes;
}

int64_t block_bytes() { return l2_bytes() / 2; }

const DotKernel& dot_kernel(const PackedView& weights) {
  constexpr int64_t kLong = 256;  // words of one sum
  const DotKernels& k = dot_kernels();
  switch (weights.h.element) {
    case Element::s8: return weights.words() * weights.taps() >= kLong ? k.long_s8 : k.s8;
    case Element::bf16: return k.bf16;
    case Element::f16: return k.f16;
    default: return k.f32;
  }
}

auto epilogue_kernel(Element element) -> void (*)(const Epilogue&, const EpilogueArgs&) {
  return element == Element::s8 ? epilogue_kernels().s32 : epilogue_kernels().f32;
}

Epilogue make_epilogue(const PackedView& weights, Activation activation) {
  Epilogue e{};
  e.x_scale = 1.0f;
  e.scale = weights.scale;
  e.sum = weights.sum;
  e.bias = weights.bias;
  e.activation = activation;
  e.inverse_scale = 1.0f;
  return e;
}

void set_out(Epilogue& e, Dtype dtype, double scale, int64_t zero_point) {
  e.out_dtype = dtype;
  if (!is_byte(dtype)) return;
  e.inverse_scale = 1.0f / static_cast<float>(scale);
  e.zero_point = static_cast<int32_t>(zero_point);
}

void set_residual(Epilogue& e, Dtype dtype, bool after_activation, double scale, int64_t zero_point) {
  e.adds = true;
  e.residual_dtype = dtype;
  e.residual_after = after_activation;
  e.residual_scale = static_cast<float>(scale);
  e.residual_zero_point = static_cast<int32_t>(zero_point);
}

void Folded::fold(Epilogue& e, const PackedView& w) {
  e.addend = e.bias;
  e.low = e.activation == Activation::none ? -INFINITY : 0.0f;
  e.high = e.activation == Activation::relu6 ? 6.0f : INFINITY;
  if (w.h.element != Element::s8) return;
  e.scaled = is_byte(e.out_dtype) && !e.row_scale && e.activation <= Activation::relu6 &&
             (!e.adds || (!e.residual_after && is_byte(e.residual_dtype)));
  const int64_t channels = w.h.groups * round_up(w.h.n, kColumns);
  start_.resize(channels);
  float zero_point = 0.0f, offset = 0.0f;
  if (e.scaled) {
    const auto unsigned_zero = [](Dtype t, int32_t zero) {
      return static_cast<float>(zero + (t == Dtype::s8 ? 128 : 0));
    };
    offset = zero_point = unsigned_zero(e.out_dtype, e.zero_point);
    e.low = e.activation == Activation::none ? 0.0f : zero_point;
    e.high =
        e.activation == Activation::relu6 ? std::min(std::rint(6.0f * e.inverse_scale) + zero_point, 255.0f) : 255.0f;
    if (e.adds) {
      e.residual_factor = std::min(e.residual_scale * e.inverse_scale, FLT_MAX);
      offset -= unsigned_zero(e.residual_dtype, e.residual_zero_point) * e.residual_factor;
    }
  }
  for (int64_t n = 0; e.sum && n < channels; ++n)
    start_[n] = static_cast<int32_t>(0u - static_cast<uint32_t>(e.x_zero_point) * static_cast<uint32_t>(e.sum[n]));
  e.start = start_.data();
  if (e.out_dtype == Dtype::s32) return;  // the sums themselves
  multiplier_.resize(channels), addend_.resize(channels);
  for (int64_t n = 0; n < channels; ++n) {
    const float scale = e.row_scale ? e.scale[n] : e.x_scale * e.scale[n], bias = e.bias ? e.bias[n] : 0.0f;
    if (e.scaled) {  // neither may make a NaN of a sum
      multiplier_[n] = std::min(scale * e.inverse_scale, FLT_MAX);
      addend_[n] = bias * e.inverse_scale + offset;
      if (std::isnan(addend_[n])) multiplier_[n] = 0.0f, addend_[n] = zero_point;
    } else {
      multiplier_[n] = scale;
      addend_[n] = bias;
    }
  }
  e.multiplier = multiplier_.data(), e.addend = addend_.data();
}

TilePlan plan_tiles(TileProblem& p, int64_t threads) {
  fold_rows(p);
  TilePlan plan{};
  plan.staged = p.dot->word_bytes != 4 || p.flip != 0 ||
                (p.kh * p.kw == 1 && p.pixel % kAlias == 0 && p.images * p.rows * p.columns >= p.dot->max_rows);
  plan_walk(p, plan);
  for (const Section& s : plan.sections) {
    plan.tiles_per_line += s.tiles;
    if (s.tiles > 0) plan.most_rows = std::max(plan.most_rows, ceil_div(s.pixels, s.tiles));
  }
  plan.tiles = p.images * (plan.staged ? p.rows : 1) * plan.tiles_per_line;
  plan.panels = p.weights.h.groups * p.weights.panels_per_group();

  // The split of least work for the slowest thread; among equals, of least memory read by it.
  const int64_t tile_rows = plan.most_rows;
  const int64_t tile_bytes =
      p.kh * std::min(p.kw * tile_rows, (tile_rows - 1) * p.sw + p.kw) * p.pixel / 4 * p.dot->word_bytes;
  int64_t least_work = INT64_MAX, least_bytes = INT64_MAX;
  const int64_t forced = std::min(p.tiling.splits, plan.tiles);
  for (int64_t m = forced > 0 ? forced : std::min(threads, plan.tiles); m >= std::max<int64_t>(forced, 1); --m) {
    const int64_t n = std::min(std::max<int64_t>(threads / m, 1), plan.panels);
    const int64_t tiles = ceil_div(plan.tiles, m), panels = ceil_div(plan.panels, n);
    const int64_t work = tiles * panels, bytes = tiles * tile_bytes + panels * p.weights.panel_bytes();
    if (work < least_work || (work == least_work && bytes < least_bytes)) {
      least_work = work;
      least_bytes = bytes;
      plan.tile_splits = m;
      plan.panel_splits = n;
    }
  }
  plan.tasks = plan.tile_splits * plan.panel_splits;
  plan.block = p.tiling.block > 0 ? p.tiling.block : block_bytes() / std::max<int64_t>(tile_bytes, 1);
  plan.block = std::clamp<int64_t>(plan.block, 1, std::min(kMaxBlock, ceil_div(plan.tiles, plan.tile_splits)));
  plan_taps(p, plan);
  if (plan.staged) {
    // A block touches so many lines at most, each with one patch.
    plan.scratch = ((plan.block + plan.tiles_per_line - 2) / plan.tiles_per_line + 1) * plan.patch_bytes;
    plan.scratch = std::min(plan.scratch, plan.block * plan.patch_bytes);
  } else if (plan.sections[0].tiles + plan.sections[2].tiles > 0) {
    const int64_t row_bytes = static_cast<int64_t>(sizeof(uint8_t*)) * p.dot->max_rows;
    plan.fill_bytes = round_up((plan.whole_rows ? p.kw : 1) * p.pixel, kBlockBytes);
    plan.scratch = plan.fill_bytes +
                   round_up(plan.block * p.kh * p.kw * (static_cast<int64_t>(sizeof(DotTap)) + row_bytes), kBlockBytes);
  }
  return plan;
}

TileDriver::TileDriver(const TileProblem& problem, int64_t threads) : problem_(problem) {
  if (problem.images * problem.rows * problem.columns == 0 || problem.weights.h.n == 0) return;
  folded_.fold(problem_.e, problem.weights);
  plan_ = plan_tiles(problem_, threads);
  tasks = plan_.tasks;
  scratch = plan_.scratch;
}

void TileDriver::bind(const uint8_t* const* in, uint8_t* out) {
  problem_.x = in[0];
  problem_.e.residual = in[1];
  problem_.e.out = out;
}

void TileDriver::run(int64_t task, uint8_t* memory) const {
  const TileProblem& p = problem_;
  const TilePlan& plan = plan_;
  alignas(64) uint8_t c[kMaxRun * 4];
  Tile tiles[kMaxBlock];
  const int64_t tile_part = task / plan.panel_splits, panel_part = task % plan.panel_splits;
  const int64_t first_tile = part(plan.tiles, plan.tile_splits, tile_part);
  const int64_t last_tile = part(plan.tiles, plan.tile_splits, tile_part + 1);
  const int64_t first_panel = part(plan.panels, plan.panel_splits, panel_part);
  const int64_t last_panel = part(plan.panels, plan.panel_splits, panel_part + 1);
  const PackedView& w = p.weights;
  const int64_t per_group = w.panels_per_group(), panel_bytes = w.panel_bytes();
  const int64_t most_panels = p.dot->max_panels[plan.most_rows];
  const int64_t out_bytes = dtype_bytes(p.e.out_dtype);
  std::fill(memory, memory + plan.fill_bytes, p.fill);

  for (int64_t block = first_tile; block < last_tile; block += plan.block) {
    const int64_t count = std::min(plan.block, last_tile - block);
    (plan.staged ? locate_staged : locate_in_place)(p, plan, block, count, memory, tiles);
    for (int64_t panel = first_panel; panel < last_panel;) {
      const int64_t group = panel / per_group;
      const int64_t left = std::min(last_panel, (group + 1) * per_group) - panel;
      const int64_t panels = ceil_div(left, ceil_div(left, most_panels));  // even pieces
      const int64_t column = (panel % per_group) * kColumns, ldc = panels * kColumns;
      const int64_t columns = std::min(ldc, w.h.n - column), channel = group * w.h.n + column;
      const bool finish = finishes(p, columns);
      Finish f{};
      if (finish) {
        f.multiplier = p.e.multiplier ? p.e.multiplier + panel * kColumns : nullptr;
        f.addend = p.e.addend ? p.e.addend + panel * kColumns : kNoAddend.data();
        f.residual_factor = p.e.residual_factor;
        f.residual = p.e.residual ? static_cast<const uint8_t*>(p.e.residual) + channel * out_bytes : nullptr;
        f.out = static_cast<uint8_t*>(p.e.out) + channel * out_bytes;
        f.low = p.e.low, f.high = p.e.high;
      }
      Held held{p, c, {c, ldc, 0, 0, panel * kColumns, channel, columns}};
      for (int64_t i = 0; i < count; ++i) {
        Tile& t = tiles[i];
        t.dot.a_offset = group * plan.group_stride;
        t.dot.panels = w.panels + panel * panel_bytes;
        t.dot.panel_bytes = panel_bytes;
        t.dot.start = p.e.start ? p.e.start + panel * kColumns : nullptr;
        t.dot.c = held.next();
        t.dot.finish = finish ? &f : nullptr;
        f.place = t.place;
        p.dot->tile[t.rows][panels](t.dot);
        if (!finish) held.add(t);
      }
      held.flush();
      panel += panels;
    }
  }
}

}  // namespace pykernels
