#include "cpu/conv/depthwise_driver.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace pykernels {
namespace {

constexpr int64_t kMost = int64_t{1} << 60;  // bytes that no machine has
constexpr int64_t kMostRows = 32;            // of a kernel over words

// Pixels of `valid` bytes, `from_pixel` apart, to pixels of whole panels.
void copy_pixels(const uint8_t* from, int64_t from_pixel, int64_t valid, uint8_t* to, int64_t pixel, int64_t pixels,
                 uint8_t flip) {
  if (from_pixel == pixel && valid == pixel) valid = from_pixel = pixel = pixels * pixel, pixels = 1;
  for (int64_t i = 0; i < pixels; ++i, from += from_pixel, to += pixel) {
    if (flip)
      for (int64_t k = 0; k < valid; ++k) to[k] = from[k] ^ flip;
    else
      std::memcpy(to, from, valid);
    if (valid < pixel) std::memset(to + valid, 0, pixel - valid);
  }
}

}  // namespace

// Where the taps of a piece stand, for a range of panels.
class DepthwiseSource {
 public:
  int64_t pixel;  // bytes from one pixel to the next

  DepthwiseSource() = default;
  DepthwiseSource(const DepthwiseDriver& d, const DepthwiseDriver::Piece& piece, int64_t first_panel, int64_t panels,
                  uint8_t* memory)
      : d_(&d), piece_(&piece), ring_(memory), channel_(first_panel * kColumns) {
    const ConvShape& s = d.s;
    begin_ = piece.first * s.sw - s.left;
    pixel = piece.in_place ? s.c * d.element : panels * kColumns * d.element;
    if (piece.in_place) return;
    valid_ = std::min(s.c - channel_, panels * kColumns) * d.element;
    row_ = piece.columns * pixel;
    from_ = std::clamp<int64_t>(begin_, 0, s.w);
    to_ = std::clamp<int64_t>(begin_ + piece.columns, from_, s.w);
    for (int64_t slot = 0; slot <= d.slots; ++slot) {
      const bool blank = slot == d.slots || from_ == to_;
      const int64_t before = blank ? row_ : (from_ - begin_) * pixel, after = (to_ - begin_) * pixel;
      std::memset(ring_ + slot * row_, d.fill, before);
      if (!blank) std::memset(ring_ + slot * row_ + after, d.fill, row_ - after);
    }
  }

  // The taps of the piece's first pixel in the line whose first row is y of the image (negative: padding). Within an
  // image the lines come in order: row y stays in slot y % slots for as long as a later line may need it.
  void find_taps(int64_t image, int64_t y, const uint8_t** taps) {
    const ConvShape& s = d_->s;
    if (!piece_->in_place) bring(image, y, y + (s.kh - 1) * s.dh + 1);
    for (int64_t ky = 0, t = 0; ky < s.kh; ++ky) {
      const int64_t at = y + ky * s.dh;
      const bool outside = at < 0 || at >= s.h;
      const uint8_t* row;
      if (!piece_->in_place)
        row = ring_ + (outside ? d_->slots : at % d_->slots) * row_;
      else if (outside)
        row = d_->blank.data();
      else
        row = d_->x + ((image * s.h + at) * s.w + begin_) * pixel + channel_ * d_->element;
      for (int64_t kx = 0; kx < s.kw; ++kx) taps[t++] = row + kx * s.dw * pixel;
    }
  }

 private:
  const DepthwiseDriver* d_;
  const DepthwiseDriver::Piece* piece_;
  uint8_t* ring_;
  int64_t channel_, begin_;  // the piece's first channel and column of x
  int64_t valid_, row_;      // bytes of a pixel in x, and of a row
  int64_t from_, to_;        // the columns of x that a row holds
  int64_t image_ = -1, next_ = 0;

  void bring(int64_t image, int64_t first, int64_t last) {
    if (image != image_) image_ = image, next_ = 0;
    const int64_t x_pixel = d_->s.c * d_->element;
    for (next_ = std::max(next_, first); next_ < std::min(last, d_->s.h); ++next_)
      copy_pixels(d_->x + ((image * d_->s.h + next_) * d_->s.w + from_) * x_pixel + channel_ * d_->element, x_pixel,
                  valid_, ring_ + next_ % d_->slots * row_ + (from_ - begin_) * pixel, pixel, to_ - from_, d_->flip);
  }
};

DepthwiseDriver::DepthwiseDriver(const ConvShape& shape, const PackedView& packed, const Epilogue& epilogue_,
                                 uint8_t padding, uint8_t flipped, int64_t threads)
    : s(shape), weights(packed), e(epilogue_), fill(padding), flip(flipped) {
  const Element type = weights.h.element;
  const DepthwiseKernels& k = depthwise_kernels();
  kernel = type == Element::s8 ? k.s8 : type == Element::bf16 ? k.bf16 : type == Element::f16 ? k.f16 : k.f32;
  epilogue = epilogue_kernel(type);
  element = element_bytes(type);
  folded.fold(e, weights);
  slots = std::min((s.kh - 1) * s.dh + 1, s.h);

  const DepthwiseWordsKernels& w = depthwise_words_kernels();
  if (type == Element::s8 && w.channels > 0 && s.dh == 1 && s.dw == 1 && s.sw <= 2 && s.kw % 2 == 1 && s.kw >= 3 &&
      s.kw <= 7 && s.kh <= kMostRows) {
    words = w.run[(s.kw - 3) / 2][s.sw - 1];
    unit = w.channels / kColumns;
    order_words();
  }

  // Pixels are read where they lie, if more than a few and if what kernels read of them is all there.
  constexpr int64_t kWorthwhile = 16;
  const int64_t room = s.w - 1 - (s.kw - 1) * s.dw + s.left;
  const int64_t first = ceil_div(s.left, s.sw), last = room < 0 ? 0 : std::min(room / s.sw + 1, s.ow);
  if (!flip && s.c % (unit * kColumns) == 0 && last - first >= kWorthwhile) {
    add_piece(0, first, false);
    add_piece(first, last, true);
    add_piece(last, s.ow, false);
    if (s.top || s.bottom) blank.assign(s.w * s.c * element, fill);
  } else {
    add_piece(0, s.ow, false);
  }

  if (s.n == 0) return;
  const double work = static_cast<double>(s.n * s.oh * s.ow * s.c) * static_cast<double>(s.kh * s.kw);
  split(static_cast<int64_t>(std::clamp<double>(work / (1 << 15), 1, static_cast<double>(threads))));
  tasks = line_splits * panel_splits;
  scratch = pieces_count * taps() * static_cast<int64_t>(sizeof(const uint8_t*)) + unit * kColumns;  // read beyond
  for (int i = 0; i < pieces_count; ++i) scratch += ring_bytes(pieces[i], ceil_div(units(), panel_splits) * unit);
}

void DepthwiseDriver::bind(const uint8_t* const* in, uint8_t* out) {
  x = in[0];
  e.residual = in[1];
  e.out = out;
  direct = words ? e.scaled && !e.residual && e.out_dtype == Dtype::u8
                 : weights.h.element == Element::f32 && !e.residual && e.activation <= Activation::relu6;
}

void DepthwiseDriver::order_words() {
  const DepthwiseWordsKernels& k = depthwise_words_kernels();
  const int64_t block = k.channels, blocks = units(), bytes = k.weight_bytes(s.kh, s.kw, s.sw);
  words_weights.resize(blocks * bytes);
  words_start.resize(blocks * block), words_multiplier.resize(blocks * block), words_addend.resize(blocks * block);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t channel = b * block, channels = std::min(block, s.c - channel);
    k.order_weights(weights.panels + b * unit * weights.panel_bytes(), weights.panel_bytes(), channels, s.kh, s.kw,
                    s.sw, words_weights.data() + b * bytes);
    k.order_channels(e.start + channel, channels, words_start.data() + channel);
    k.order_channels(e.multiplier + channel, channels, words_multiplier.data() + channel);
    k.order_channels(e.addend + channel, channels, words_addend.data() + channel);
  }
}

void DepthwiseDriver::add_piece(int64_t first, int64_t last, bool in_place) {
  if (first < last) pieces[pieces_count++] = {first, last, (last - 1 - first) * s.sw + (s.kw - 1) * s.dw + 1, in_place};
}

// Bytes of a ring of `panels` panels: its rows and one of padding.
int64_t DepthwiseDriver::ring_bytes(const Piece& p, int64_t panels) const {
  int64_t bytes = 0;
  const bool many = __builtin_mul_overflow((slots + 1) * panels * kColumns * element, p.columns, &bytes);
  return p.in_place ? 0 : many ? kMost : std::min(bytes, kMost);
}

// The split of least work for the slowest thread; a piece of lines begins with rows that its neighbour brings, too.
void DepthwiseDriver::split(int64_t threads) {
  const int64_t lines = s.n * s.oh, panels = units();
  int64_t best = INT64_MAX;
  for (int64_t m = std::min(threads, lines); m >= 1; --m) {
    const int64_t n = std::min(threads / m, panels);
    const int64_t slowest = (ceil_div(lines, m) + (m > 1)) * ceil_div(panels, n);
    if (slowest < best) best = slowest, line_splits = m, panel_splits = n;
  }
}

void DepthwiseDriver::run(int64_t task, uint8_t* memory) const {
  const int64_t panel_begin = first_panel(task % panel_splits);
  const int64_t panel_end = first_panel(task % panel_splits + 1);
  auto* pointers = reinterpret_cast<const uint8_t**>(memory);
  memory += pieces_count * taps() * static_cast<int64_t>(sizeof(*pointers));
  DepthwiseSource sources[3];
  for (int i = 0; i < pieces_count; ++i) {
    sources[i] = DepthwiseSource(*this, pieces[i], panel_begin, panel_end - panel_begin, memory);
    memory += ring_bytes(pieces[i], panel_end - panel_begin);
  }
  for (int64_t line = first_line(task / panel_splits); line < first_line(task / panel_splits + 1); ++line) {
    for (int i = 0; i < pieces_count; ++i) {
      const uint8_t** t = pointers + i * taps();
      sources[i].find_taps(line / s.oh, line % s.oh * s.sh - s.top, t);
      for (int64_t k = s.kh * s.kw; k < taps(); ++k) t[k] = t[0];
    }
    if (words)
      run_words(line, panel_begin, panel_end, sources, pointers);
    else
      run_panels(line, panel_begin, panel_end, sources, pointers);
  }
}

void DepthwiseDriver::run_panels(int64_t line, int64_t panel_begin, int64_t panel_end, const DepthwiseSource* sources,
                                 const uint8_t* const* pointers) const {
  constexpr int64_t kRun = 64;  // pixels whose accumulators (4 KiB) stay in L1 until the epilogue
  alignas(64) uint8_t c[kRun * kBlockBytes];
  for (int64_t x = 0; x < s.ow; x += kRun) {
    const int64_t end = std::min(x + kRun, s.ow);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      const int64_t channel = panel * kColumns, channels = std::min(kColumns, s.c - channel);
      const bool whole = direct && channels == kColumns;
      DepthwiseArgs g{};
      g.words = weights.words(), g.kh = s.kh, g.kw = s.kw;
      g.panel = weights.panels + panel * weights.panel_bytes();
      g.start = e.start ? e.start + channel : nullptr;
      g.bias = whole && e.bias ? e.bias + channel : nullptr;
      g.low = whole ? e.low : -HUGE_VALF, g.high = whole ? e.high : HUGE_VALF;
      g.ldc = whole ? e.out_stride : kColumns;
      auto* to = whole ? static_cast<uint8_t*>(e.out) + ((line * s.ow + x) * e.out_stride + channel) * 4 : c;
      for (int i = 0; i < pieces_count; ++i) {
        const Piece& piece = pieces[i];
        const int64_t first = std::max(x, piece.first), last = std::min(end, piece.last);
        if (first >= last) continue;
        g.tap = pointers + i * taps();
        g.x_stride = s.sw * sources[i].pixel;
        g.at = (first - piece.first) * g.x_stride + (panel - panel_begin) * kColumns * element;
        g.pixels = last - first;
        g.c = to + (first - x) * g.ldc * 4;
        kernel(g);
      }
      if (!whole) epilogue(e, {c, kColumns, line * s.ow + x, end - x, channel, channel, channels});
    }
  }
}

void DepthwiseDriver::run_words(int64_t line, int64_t panel_begin, int64_t panel_end, const DepthwiseSource* sources,
                                const uint8_t* const* pointers) const {
  constexpr int64_t kSums = 1024;  // sums that stay in L1 until the epilogue
  alignas(64) int32_t c[kSums];
  const uint8_t* rows[kMostRows];
  const int64_t block = unit * kColumns, run = direct ? s.ow : kSums / block;
  const int64_t bytes = depthwise_words_kernels().weight_bytes(s.kh, s.kw, s.sw);
  for (int64_t channel = panel_begin * kColumns; channel < std::min(panel_end * kColumns, s.c); channel += block) {
    DepthwiseWordsArgs g{};
    g.row = rows, g.kh = s.kh;
    g.channels = static_cast<int>(std::min(block, s.c - channel));
    g.weights = words_weights.data() + channel / block * bytes;
    g.start = words_start.data() + channel;
    g.multiplier = words_multiplier.data() + channel, g.addend = words_addend.data() + channel;
    g.low = e.low, g.high = e.high;
    g.finishes = direct;
    g.out_step = e.out_stride;
    for (int64_t x = 0; x < s.ow; x += run) {
      const int64_t end = std::min(x + run, s.ow);
      for (int i = 0; i < pieces_count; ++i) {
        const Piece& piece = pieces[i];
        const int64_t first = std::max(x, piece.first), last = std::min(end, piece.last);
        if (first >= last) continue;
        g.pixel = sources[i].pixel;
        g.pixels = last - first;
        const int64_t at = (first - piece.first) * s.sw * g.pixel + channel - panel_begin * kColumns;
        for (int64_t y = 0; y < s.kh; ++y) rows[y] = pointers[i * taps() + y * s.kw] + at;
        g.out = direct
                    ? static_cast<void*>(static_cast<uint8_t*>(e.out) + (line * s.ow + first) * e.out_stride + channel)
                    : c + (first - x) * block;
        words(g);
      }
      if (!direct) epilogue(e, {c, block, line * s.ow + x, end - x, channel, channel, g.channels});
    }
  }
}

}  // namespace pykernels
