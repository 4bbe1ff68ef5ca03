// Packed weights: the layout every dot kernel reads, the same bytes on every isa. Torch-free.
//
//   header   128 bytes: what was packed, so that a wrong tensor is refused and never run
//   panels   [groups][ceil(n / 16)][taps][words][16 columns][4 bytes]
//   scale    float   [groups][round_up(n, 16)]   per output channel (1 for floats)
//   bias     float   [groups][round_up(n, 16)]
//   sum      int32_t [groups][round_up(n, 16)]   sum over taps and k of the weights (0 for floats)
//
// A block of 64 bytes holds 16 output channels times one 4-byte word of K: 4 s8, 2 bf16 or fp16, or 1 fp32; words =
// ceil(k / that). For a convolution taps = kh*kw and k = input channels of the group; for a linear taps = 1. Depthwise
// weights have no reduction over channels: there one "group" holds 16 channels of columns and the taps run along the
// words. Everything beyond n, k is zero.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/lists.h"

namespace pykernels {

enum class Element : int32_t { PK_ELEMENTS(PK_NAME) };  // its number stands in the header
inline int64_t element_bytes(Element e) { return e == Element::s8 ? 1 : e == Element::f32 ? 4 : 2; }
inline const char* element_name(Element e) {  // the dtype's, as torch calls it
#define PK_DTYPE(name, dtype, ...) #dtype,
  constexpr const char* names[] = {PK_ELEMENTS(PK_DTYPE)};
#undef PK_DTYPE
  return names[static_cast<int>(e)];
}

enum class PackKind : int32_t { dot, depthwise };  // 2 and 3 are the CUDA device's: pykernels/ops/packed.py

inline constexpr int64_t kColumns = 16;     // output channels of a panel
inline constexpr int64_t kBlockBytes = 64;  // 16 columns times one word
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct PackedHeader {
  char magic[8];
  int32_t version;
  PackKind kind;
  Element element;
  int32_t has_bias;
  int64_t groups, n, k;  // per group: output channels, input channels
  int64_t kh, kw;
  int64_t scale_offset, bias_offset, sum_offset, bytes;  // from the header's first byte
  int64_t reserved[3];
  uint64_t hash;  // of all that stands before it
};
static_assert(sizeof(PackedHeader) == 128);

// Geometry derived from the header.
struct PackedView {
  PackedHeader h;
  const uint8_t* panels;
  const float* scale;
  const float* bias;  // null without bias
  const int32_t* sum;

  int64_t taps() const { return h.kh * h.kw; }
  int64_t padded_n() const { return round_up(h.n, kColumns); }
  int64_t panels_per_group() const { return ceil_div(h.n, kColumns); }
  int64_t words() const;        // words of one tap (dot), or of all taps (depthwise)
  int64_t panel_bytes() const;  // one panel, all taps
};

// The header for these weights, offsets and total size filled in. For depthwise: groups = 1, n = channels, k = 1.
PackedHeader make_header(PackKind kind, Element element, int64_t groups, int64_t n, int64_t k, int64_t kh, int64_t kw,
                         bool has_bias);

// Reads and checks a packed tensor; null, or why it is refused (a static string).
const char* read_packed(const void* data, int64_t bytes, PackedView* view);

// Writes the header and zeroes the rest of `out` (header.bytes bytes).
void write_header(const PackedHeader& header, void* out);

// Writes output channels [first, last) of all groups * n: their columns of the panels and their scale, bias and sum.
// weight is [groups * n][k][kh * kw], row-major, in the element's own dtype; scale (s8 only) and bias, or null, are
// [groups * n].
void pack_channels(const PackedHeader& header, const void* weight, const float* scale, const float* bias, void* out,
                   int64_t first, int64_t last);

}  // namespace pykernels
