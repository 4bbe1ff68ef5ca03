// Gradients to the bytes that go on the wire, and back. pykernels/reference/compress.py specifies the formats; the
// bytes are the same on every isa, since every step is one fp32 operation (no FMA) or an integer one.
//
// A segment is a run of n elements. It becomes ceil(n / block) records, the last one filled up with zeros: [scale,
// fp32] [codes]; bf16, fp16 and fp32 have no scale. Codes of fewer than 8 bits lie in planes: byte j of the B code
// bytes holds the codes of the elements j + p * B, the p-th from its lowest bits up.
#pragma once

#include <cstdint>

#include "common/real.h"
#include "cpu/isa/isa.h"

namespace pykernels {

enum class Codec : int { PK_CODECS(PK_NAME) };
#define PK_BITS(name, bits, ...) bits,
inline constexpr int kCodeBits[] = {PK_CODECS(PK_BITS)};
#undef PK_BITS
inline constexpr int64_t kMaxBlock = 32768;

// A run of consecutive records of one segment.
struct Records {
  Codec codec;
  int64_t block;  // elements of a record: a multiple of 32, at most kMaxBlock
  int64_t bytes;  // of a record: 4 for the scale, if the codec has one, and block * bits / 8
  int64_t n;      // elements of the run, > 0; its last record may be short
  int64_t first;  // position of the first of them in the whole tensor: with `seed` the key of stochastic rounding
  bool stochastic;
  uint64_t seed;
};

// The same run in the payload of every rank: rank r's records begin at data + r * stride.
struct Shards {
  const uint8_t* data;
  int64_t stride;
  int64_t ranks;         // > 0
  const float* weights;  // [ranks], of decode alone; null: none
  float factor;
};

// encode  v = x + residual into the records at `payload`; the residual becomes v - d, d what v decodes to, where finite
// decode  out = factor * ((d0 + d1) + ...), dr what rank r sent, times weights[r]; `stream`: past the caches
// reduce  v = factor * ((d0 + d1) + ...) + residual encoded again, as encode does
// `residual`, as long as the run, may be null. No argument overlaps another; payloads lie at multiples of 4 bytes.
struct CompressKernels {
  void (*encode)(const Records&, const void* x, Real type, float* residual, uint8_t* payload);
  void (*decode)(const Records&, const Shards&, void* out, Real type, bool stream);
  void (*reduce)(const Records&, const Shards&, float* residual, uint8_t* payload);
};
PYKERNELS_TABLE(CompressKernels, compress_kernels)

}  // namespace pykernels
