// A depthwise convolution moves about as many bytes as it computes sums, so its input is never copied as a whole. The
// pixels of a line whose taps all lie inside x read x itself; those at the borders (or all, where x needs more than
// padding) read padded rows that each task keeps in a ring, only as many as one line of output needs.
#include "cpu/conv/depthwise_op.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/conv/kernels.h"
#include "cpu/tile/op.h"

namespace pykernels {
namespace {

// Output columns [first, last) of every line, and the `columns` columns of the padded input that they read.
struct Piece {
  int64_t first, last, columns;
  bool in_place;
};

// What all tasks share.
struct Depthwise {
  ConvShape s;
  const uint8_t* x;      // channels_last
  const uint8_t* blank;  // a row of padding
  const PackedView* weights;
  void (*kernel)(const DepthwiseArgs&);
  void (*epilogue)(const Epilogue&, const EpilogueArgs&);
  const Epilogue* e;
  uint8_t zero_point, flip;
  int64_t element;  // bytes
  int64_t slots;    // rows of a ring
  Piece pieces[3];
  int pieces_count;
  int64_t line_splits, panel_splits;
  bool direct;  // the epilogue only adds the bias and clamps to [low, high]: the kernel writes fp32 output itself
  float low, high;

  int64_t taps() const { return round_up(s.kh * s.kw, 4); }
  int64_t first_panel(int64_t split) const { return weights->panels_per_group() * split / panel_splits; }
  int64_t first_line(int64_t split) const { return s.n * s.oh * split / line_splits; }

  void add_piece(int64_t first, int64_t last, bool in_place) {
    if (first < last)
      pieces[pieces_count++] = {first, last, (last - 1 - first) * s.sw + (s.kw - 1) * s.dw + 1, in_place};
  }
  // A ring of `panels` panels: its rows and one of padding.
  int64_t ring_bytes(const Piece& p, int64_t panels) const {
    return p.in_place ? 0 : (slots + 1) * p.columns * panels * kColumns * element;
  }
  int64_t scratch_bytes() const {
    int64_t bytes = pieces_count * taps() * static_cast<int64_t>(sizeof(const uint8_t*)) + kBlockBytes;
    for (int i = 0; i < pieces_count; ++i)
      bytes += ring_bytes(pieces[i], ceil_div(weights->panels_per_group(), panel_splits));
    return round_up(bytes, kBlockBytes);
  }
};

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

// Where the taps of a piece stand, for a range of panels.
class Source {
 public:
  int64_t pixel;  // bytes from one pixel to the next

  Source() = default;
  Source(const Depthwise& d, const Piece& piece, int64_t first_panel, int64_t panels, uint8_t* memory)
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
      std::memset(ring_ + slot * row_, d.zero_point, before);
      if (!blank) std::memset(ring_ + slot * row_ + after, d.zero_point, row_ - after);
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
        row = d_->blank;
      else
        row = d_->x + ((image * s.h + at) * s.w + begin_) * pixel + channel_ * d_->element;
      for (int64_t kx = 0; kx < s.kw; ++kx) taps[t++] = row + kx * s.dw * pixel;
    }
  }

 private:
  const Depthwise* d_;
  const Piece* piece_;
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

void run_task(const Depthwise& d, int64_t task, uint8_t* scratch) {
  constexpr int64_t kRun = 64;  // pixels whose accumulators (4 KiB) stay in L1 until the epilogue
  alignas(64) uint8_t c[kRun * kBlockBytes];
  const ConvShape& s = d.s;
  const int64_t first_panel = d.first_panel(task % d.panel_splits);
  const int64_t last_panel = d.first_panel(task % d.panel_splits + 1);
  auto* taps = reinterpret_cast<const uint8_t**>(scratch);
  scratch += d.pieces_count * d.taps() * static_cast<int64_t>(sizeof(*taps));
  Source sources[3];
  for (int i = 0; i < d.pieces_count; ++i) {
    sources[i] = Source(d, d.pieces[i], first_panel, last_panel - first_panel, scratch);
    scratch += d.ring_bytes(d.pieces[i], last_panel - first_panel);
  }
  for (int64_t line = d.first_line(task / d.panel_splits); line < d.first_line(task / d.panel_splits + 1); ++line) {
    for (int i = 0; i < d.pieces_count; ++i) {
      const uint8_t** t = taps + i * d.taps();
      sources[i].find_taps(line / s.oh, line % s.oh * s.sh - s.top, t);
      for (int64_t k = s.kh * s.kw; k < d.taps(); ++k) t[k] = t[0];
    }
    for (int64_t x = 0; x < s.ow; x += kRun) {
      const int64_t end = std::min(x + kRun, s.ow);
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const int64_t channel = panel * kColumns, channels = std::min(kColumns, s.c - channel);
        const bool direct = d.direct && channels == kColumns;
        DepthwiseArgs g{};
        g.words = d.weights->words(), g.kh = s.kh, g.kw = s.kw;
        g.panel = d.weights->panels + panel * d.weights->panel_bytes();
        g.bias = direct && d.e->bias ? d.e->bias + channel : nullptr;
        g.low = direct ? d.low : -HUGE_VALF, g.high = direct ? d.high : HUGE_VALF;
        g.ldc = direct ? s.c : kColumns;
        auto* to = direct ? static_cast<uint8_t*>(d.e->out) + ((line * s.ow + x) * s.c + channel) * 4 : c;
        for (int i = 0; i < d.pieces_count; ++i) {
          const Piece& piece = d.pieces[i];
          const int64_t first = std::max(x, piece.first), last = std::min(end, piece.last);
          if (first >= last) continue;
          g.tap = taps + i * d.taps();
          g.x_stride = s.sw * sources[i].pixel;
          g.at = (first - piece.first) * g.x_stride + (panel - first_panel) * kColumns * d.element;
          g.pixels = last - first;
          g.c = to + (first - x) * g.ldc * 4;
          d.kernel(g);
        }
        if (!direct) d.epilogue(*d.e, {c, kColumns, line * s.ow + x, end - x, channel, channel, channels});
      }
    }
  }
}

// The split of least work for the slowest thread; a piece of lines begins with rows that its neighbour brings, too.
void split(Depthwise& d, int64_t threads) {
  const int64_t lines = d.s.n * d.s.oh, panels = d.weights->panels_per_group();
  int64_t best = INT64_MAX;
  for (int64_t m = std::min(threads, lines); m >= 1; --m) {
    const int64_t n = std::min(threads / m, panels);
    const int64_t slowest = (ceil_div(lines, m) + (m > 1)) * ceil_div(panels, n);
    if (slowest < best) best = slowest, d.line_splits = m, d.panel_splits = n;
  }
}

}  // namespace

void run_depthwise(const ConvShape& s, const Tensor& input, uint8_t zero_point, const PackedView& weights,
                   const Epilogue& e) {
  const Tensor x = to_channels_last(input);
  const Element element = weights.h.element;
  const DepthwiseKernels& k = depthwise_kernels();
  Depthwise d{};
  d.s = s;
  d.x = static_cast<const uint8_t*>(x.const_data_ptr());
  d.weights = &weights;
  d.kernel = element == Element::s8     ? k.s8
             : element == Element::bf16 ? k.bf16
             : element == Element::f16  ? k.f16
                                        : k.f32;
  d.epilogue = element == Element::s8 ? epilogue_kernels().s32 : epilogue_kernels().f32;
  d.e = &e;
  d.zero_point = zero_point;
  d.flip = x.scalar_type() == ScalarType::Char ? 0x80 : 0;
  d.element = element_bytes(element);
  d.direct = element == Element::f32 && !e.residual && e.activation <= Activation::relu6;
  d.low = e.activation == Activation::none ? -HUGE_VALF : 0.0f;
  d.high = e.activation == Activation::relu6 ? 6.0f : HUGE_VALF;
  d.slots = std::min((s.kh - 1) * s.dh + 1, s.h);

  // Copying bytes costs little beside their products, unless a stride leaves fewer of these; the rest is read where it
  // lies, if by more than a few pixels.
  constexpr int64_t kWorthwhile = 16;
  const int64_t room = s.w - 1 - (s.kw - 1) * s.dw + s.left;
  const int64_t low = ceil_div(s.left, s.sw), high = room < 0 ? 0 : std::min(room / s.sw + 1, s.ow);
  if ((element != Element::s8 || (s.sw > 1 && !d.flip)) && s.c % kColumns == 0 && high - low >= kWorthwhile) {
    d.add_piece(0, low, false);
    d.add_piece(low, high, true);
    d.add_piece(high, s.ow, false);
  } else {
    d.add_piece(0, s.ow, false);
  }

  const int64_t work = s.n * s.oh * s.ow * s.c * s.kh * s.kw;
  split(d, std::clamp<int64_t>(work >> 15, 1, torch::stable::get_num_threads()));
  const int64_t tasks = d.line_splits * d.panel_splits, each = d.scratch_bytes();
  const int64_t blank = s.top || s.bottom ? s.w * s.c * d.element : 0;
  const Tensor scratch = empty({tasks * each + blank}, ScalarType::Byte);
  auto* memory = mutable_pointer<uint8_t>(scratch);
  d.blank = memory + tasks * each;
  std::memset(memory + tasks * each, d.zero_point, blank);
  parallel(tasks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) run_task(d, task, memory + task * each);
  });
}

}  // namespace pykernels
