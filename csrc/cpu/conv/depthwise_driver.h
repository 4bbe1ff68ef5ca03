// A depthwise convolution moves about as many bytes as it computes sums, so its input is never copied as a whole. The
// pixels of a line whose taps all lie inside x read x itself; those at the borders (or all, where x needs more than
// padding) read padded rows that each task keeps in a ring, only as many as one line of output needs. Torch-free.
#pragma once

#include <vector>

#include "cpu/conv/driver.h"
#include "cpu/conv/kernels.h"

namespace pykernels {

class DepthwiseSource;

// Operands: x (channels_last, without holes), residual.
class DepthwiseDriver final : public Driver {
 public:
  // Padding is `fill` (as a byte for 8 bit, after the flip that makes u8 of s8; zero for floats).
  DepthwiseDriver(const ConvShape& shape, const PackedView& weights, const Epilogue& e, uint8_t fill, uint8_t flip,
                  int64_t threads);
  void bind(const uint8_t* const* in, uint8_t* out) override;
  void run(int64_t task, uint8_t* memory) const override;

 private:
  friend class DepthwiseSource;

  // Output columns [first, last) of every line, and the `columns` columns of the padded input that they read.
  struct Piece {
    int64_t first, last, columns;
    bool in_place;
  };

  int64_t taps() const { return round_up(s.kh * s.kw, 4); }
  int64_t first_panel(int64_t split) const {
    return std::min(units() * split / panel_splits * unit, weights.panels_per_group());
  }
  int64_t units() const { return ceil_div(weights.panels_per_group(), unit); }
  int64_t first_line(int64_t split) const { return s.n * s.oh * split / line_splits; }
  void add_piece(int64_t first, int64_t last, bool in_place);
  int64_t ring_bytes(const Piece& piece, int64_t panels) const;
  void split(int64_t threads);
  void order_words();
  void run_panels(int64_t line, int64_t first, int64_t last, const DepthwiseSource* sources,
                  const uint8_t* const* taps) const;
  void run_words(int64_t line, int64_t first, int64_t last, const DepthwiseSource* sources,
                 const uint8_t* const* taps) const;

  ConvShape s;
  PackedView weights;
  Epilogue e;
  Folded folded;
  uint8_t fill, flip;
  const uint8_t* x = nullptr;
  std::vector<uint8_t> blank;  // a row of padding
  void (*kernel)(const DepthwiseArgs&);
  void (*words)(const DepthwiseWordsArgs&) = nullptr;  // instead, where it can
  std::vector<uint8_t> words_weights;                  // of each block of channels, as those kernels read them
  std::vector<int32_t> words_start;
  std::vector<float> words_multiplier, words_addend;
  int64_t unit = 1;  // panels that are not divided between threads
  void (*epilogue)(const Epilogue&, const EpilogueArgs&);
  int64_t element;  // bytes
  int64_t slots;    // rows of a ring
  Piece pieces[3];
  int pieces_count = 0;
  int64_t line_splits, panel_splits;
  bool direct;  // the kernel writes the output itself: fp32 with bias and clamp, bytes by the scaled epilogue
};

}  // namespace pykernels
