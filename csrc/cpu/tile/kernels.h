// The micro-kernels under every GEMM and convolution: a dot tile, and the epilogue that turns its accumulators into
// output.
#pragma once

#include "common/activation.h"
#include "common/packed.h"
#include "cpu/isa/isa.h"

namespace pykernels {

// A tap of a tile: bytes from the address of a row to its words, and from a panel's first block to the tap's.
struct DotTap {
  int64_t a, b;
};

// Where a tile writes its output itself, to out[place[r] + column]: of floats, in fp32 and in this order,
//   min(high, max(low, sum + addend + residual))
// and of bytes, u8 in and out, what `scaled` of Epilogue says.
struct Finish {
  const int64_t* place;
  const float *multiplier, *addend;  // of the tile's columns; floats are not multiplied
  const void* residual;              // of out's dtype, indexed like it, or null
  float residual_factor;
  void* out;
  float low, high;
};

// One tile:  sum[r][p * 16 + j] = sum over t < taps, w < words of dot(word w at a[t * a_step + r] + a_offset +
// tap[t].a, word w of the blocks at panels + p * panel_bytes + tap[t].b, column j) where a word is 4 bytes: 4 u8
// against 4 s8 (s32 sums, which begin at start[p * 16 + j]), 2 bf16 or fp16, or 1 fp32 (fp32 sums). On an isa whose
// word_bytes is 8, A's words are the widened ones that stage() makes. The caller guarantees that every word is
// readable.
struct DotArgs {
  const uint8_t* const* a;
  int64_t a_step, a_offset;
  const DotTap* tap;
  int64_t taps, words;
  const uint8_t* panels = nullptr;
  int64_t panel_bytes = 0;
  const int32_t* start = nullptr;  // of bytes
  void* c = nullptr;               // [rows][panels * 16], s32 or fp32, 64-byte aligned: the sums
  const Finish* finish = nullptr;  // instead of c where the kernel finishes, or null
};

inline constexpr int kMaxRows = 16;
inline constexpr int kMaxPanels = 8;
inline constexpr int kMaxTile = 32 * 16;  // accumulators of one tile, any isa

enum class Dtype : int32_t { PK_DTYPES(PK_NAME) };
inline bool is_byte(Dtype t) { return t == Dtype::u8 || t == Dtype::s8; }
inline bool is_real(Dtype t) { return t == Dtype::f32 || t == Dtype::bf16 || t == Dtype::f16; }
inline int64_t dtype_bytes(Dtype t) {
  return t == Dtype::u8 || t == Dtype::s8 ? 1 : t == Dtype::bf16 || t == Dtype::f16 ? 2 : 4;
}

struct DotKernel {
  int max_rows, word_bytes;
  bool finishes;  // a tile can write an output of dtype `out` itself
  Dtype out;
  // `words` words of 4 bytes as tile() reads them, each byte's bits flipped where `flip` has them (s8 to u8: 0x80).
  void (*stage)(const uint8_t* from, int64_t words, uint8_t flip, uint8_t* to);
  int max_panels[kMaxRows + 1];  // by rows
  void (*tile[kMaxRows + 1][kMaxPanels + 1])(const DotArgs&);
};

struct DotKernels {
  DotKernel s8, bf16, f16, f32;
  DotKernel long_s8;  // for sums of many products
  // `panels` panels of columns of an s8 matrix, whose rows are row_bytes apart, as `blocks` blocks of four rows each;
  // their sums are added to `sums`, 16 a panel.
  void (*pack_columns)(const uint8_t* matrix, int64_t row_bytes, int64_t blocks, int64_t panels, int64_t panel_bytes,
                       uint8_t* to, int32_t* sums);
};
PYKERNELS_TABLE(DotKernels, dot_kernels)

// What happens to a tile on its way out. The sums of bytes are those of x - x_zero_point, exact: they begin at
// start[n] = -x_zero_point * sum[n]. In fp32, every step rounded by itself and fma() once:
//
//   scaled: bytes become bytes, and all that is linear is folded (fold() of driver.h). Bytes are unsigned here: a
//   signed one, of in- and output alike, counts as its value + 128.
//     t = fma(float(acc), multiplier[n], addend[n]);  t = fma(float(residual), residual_factor, t)
//     out = rint(min(high, max(low, t)))
//   else:
//     f = bytes ? fma(float(acc), multiplier[n], addend[n]) : acc + addend[n]
//     f += residual (order "before");  f = activation(f);  f += residual (order "after")
//     out = 8 bit ? requantize(f) of cpu/isa/requantize.h : f
//
// An s32 out takes acc as it is. With a scale for each row, acc is acc - row_zero_point * sum[n] and multiplier[n]
// row_scale * scale[n]. The per-channel arrays are indexed by packed channel, residual and out by [row][out channel].
struct Epilogue {
  float x_scale;
  int32_t x_zero_point;
  const float* row_scale;  // per row instead of x_scale and x_zero_point, or null
  const int32_t* row_zero_point;
  const float* scale;
  const int32_t* sum;
  const float* bias;  // or null
  Activation activation;
  bool adds;             // a residual,
  const void* residual;  // or null
  Dtype residual_dtype;
  bool residual_after;
  float residual_scale;
  int32_t residual_zero_point;
  void* out;
  Dtype out_dtype;
  float inverse_scale;
  int32_t zero_point;
  int64_t out_stride;  // elements from one row of out (and of residual) to the next

  // What follows from it.
  bool scaled;
  const int32_t* start;
  const float *multiplier, *addend;  // addend: or null
  float residual_factor, low, high;
};

// Writes rows x columns of a tile: c is [rows][ldc]; the first row is output row `row`, the first column is packed
// channel `packed` and output channel `channel`.
struct EpilogueArgs {
  const void* c;
  int64_t ldc, row, rows, packed, channel, columns;
};

struct EpilogueKernels {
  void (*s32)(const Epilogue&, const EpilogueArgs&);
  void (*f32)(const Epilogue&, const EpilogueArgs&);
};
PYKERNELS_TABLE(EpilogueKernels, epilogue_kernels)

}  // namespace pykernels
