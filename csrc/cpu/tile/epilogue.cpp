// Epilogues: accumulators of a tile to output (formula in kernels.h). Columns outside, rows inside, so that per-channel
// parameters are loaded once; a tail of columns goes through partial loads and stores.
#include "cpu/isa/math.h"
#include "cpu/isa/requantize.h"
#include "cpu/tile/element.h"
#include "cpu/tile/kernels.h"

namespace pykernels::PYKERNELS_ISA_NS {
namespace {

constexpr int kVectors = 16 / kLanes;  // of a panel's columns

// What an epilogue has to do: most layers' only clamps, perhaps after adding a residual (8 bit for 8 bit, the same
// float for a float), and has no branch in its loop. `any` asks the Epilogue in every step.
enum class Path { clamp, add_u8, add_s8, add_float, any };

template <Dtype kOut>
constexpr bool is_byte_out = kOut == Dtype::u8 || kOut == Dtype::s8;

PK_INLINE f32 load_residual(const Epilogue& e, Dtype dtype, int64_t at, int n) {
  const f32 scale = set1(e.residual_scale);
  const i32 zero_point = set1_i32(e.residual_zero_point);
  switch (dtype) {
    case Dtype::f32: return load(static_cast<const float*>(e.residual) + at, n);
    case Dtype::bf16: return load(static_cast<const bfloat16*>(e.residual) + at, n);
    case Dtype::f16: return load(static_cast<const float16*>(e.residual) + at, n);
    case Dtype::u8: return dequantize(load_i32(static_cast<const uint8_t*>(e.residual) + at, n), zero_point, scale);
    case Dtype::s8: return dequantize(load_i32(static_cast<const int8_t*>(e.residual) + at, n), zero_point, scale);
    case Dtype::s32: break;  // no residual is s32
  }
  return set1(0.0f);
}

template <int kCount, class Q>
PK_INLINE void store_bytes(Q* out, const i32* bytes, int n) {
  if (kCount == kVectors && n == kLanes)
    store16(out, bytes);
  else
    store_i32(out, bytes[0], n);
}

// Output of count vectors at element `at`, n valid lanes in each.
template <Dtype kOut, int kCount>
PK_INLINE void store_out(const Epilogue& e, const Requantize& q, int64_t at, const f32* f, int n) {
  if constexpr (kOut == Dtype::f32) {
    PK_FOR (v, kCount) store(static_cast<float*>(e.out) + at + v * kLanes, f[v], n);
  } else if constexpr (kOut == Dtype::bf16) {
    PK_FOR (v, kCount) store(static_cast<bfloat16*>(e.out) + at + v * kLanes, f[v], n);
  } else if constexpr (kOut == Dtype::f16) {
    PK_FOR (v, kCount) store(static_cast<float16*>(e.out) + at + v * kLanes, f[v], n);
  } else {
    i32 bytes[kCount];
    PK_FOR (v, kCount) bytes[v] = requantize(q, f[v]);
    if constexpr (kOut == Dtype::u8)
      store_bytes<kCount>(static_cast<uint8_t*>(e.out) + at, bytes, n);
    else
      store_bytes<kCount>(static_cast<int8_t*>(e.out) + at, bytes, n);
  }
}

// kCount vectors of columns from j on, n valid lanes in each, all rows. The parameters are copies: a store of bytes
// might otherwise have changed them, and they would be loaded again in every row.
template <bool kInteger, Dtype kOut, Path kPath, int kCount>
PK_INLINE void block(const Epilogue e, const EpilogueArgs t, int64_t j, int n) {
  const int32_t lowest = kOut == Dtype::s8 ? -128 : 0;
  Requantize q = requantizer(e.inverse_scale, e.zero_point, lowest, lowest + 255);
  f32 low = set1(e.activation == Activation::none ? -__builtin_inff() : 0.0f);
  f32 high = set1(e.activation == Activation::relu6 ? 6.0f : __builtin_inff());
  if constexpr (is_byte_out<kOut> && kPath != Path::any) {  // min(f, 6) * inverse = min(f * inverse, 6 * inverse)
    q.low = max(q.low, low);
    q.high = min(q.high, mul(high, q.inverse));
  }
  f32 bias[kCount], weight_scale[kCount], scale[kCount];
  i32 sum[kCount], shift[kCount];
  PK_FOR (v, kCount) {
    const int64_t at = t.packed + j + v * kLanes;
    bias[v] = e.bias ? load(e.bias + at, n) : set1(-0.0f);  // x + -0 is x, whatever x
    if constexpr (kInteger) {
      weight_scale[v] = load(e.scale + at, n);
      sum[v] = load_i32(e.sum + at, n);
      scale[v] = mul(set1(e.x_scale), weight_scale[v]);
      shift[v] = mul(set1_i32(e.x_zero_point), sum[v]);
    }
  }
  int64_t at = t.row * e.out_stride + t.channel + j, from = j;
  for (int64_t r = 0; r < t.rows; ++r, at += e.out_stride, from += t.ldc) {
    f32 f[kCount];
    PK_FOR (v, kCount) {
      const int64_t place = at + v * kLanes;
      if constexpr (kInteger) {
        if (kPath == Path::any && e.row_scale) {
          scale[v] = mul(set1(e.row_scale[t.row + r]), weight_scale[v]);
          shift[v] = mul(set1_i32(e.row_zero_point[t.row + r]), sum[v]);
        }
        const i32 acc = sub(load_i32(static_cast<const int32_t*>(t.c) + from + v * kLanes), shift[v]);
        if constexpr (kOut == Dtype::s32) {
          store_i32(static_cast<int32_t*>(e.out) + place, acc, n);
          continue;
        }
        f[v] = mul(to_f32(acc), scale[v]);
      } else {
        f[v] = load(static_cast<const float*>(t.c) + from + v * kLanes, kLanes);
      }
      f[v] = add(f[v], bias[v]);
      if constexpr (kPath == Path::add_u8) f[v] = add(f[v], load_residual(e, Dtype::u8, place, n));
      if constexpr (kPath == Path::add_s8) f[v] = add(f[v], load_residual(e, Dtype::s8, place, n));
      if constexpr (kPath == Path::add_float) f[v] = add(f[v], load_residual(e, kOut, place, n));
      if constexpr (kPath == Path::any) {
        if (e.residual && !e.residual_after) f[v] = add(f[v], load_residual(e, e.residual_dtype, place, n));
        f[v] = activate(e.activation, f[v]);
        if (e.residual && e.residual_after) f[v] = add(f[v], load_residual(e, e.residual_dtype, place, n));
      } else if constexpr (!is_byte_out<kOut>) {
        f[v] = min(high, max(low, f[v]));
      }
    }
    if constexpr (kOut != Dtype::s32) store_out<kOut, kCount>(e, q, at, f, n);
  }
}

template <bool kInteger, Dtype kOut, Path kPath>
void run(const Epilogue& e, const EpilogueArgs& t) {
  int64_t j = 0;
  for (; j + 16 <= t.columns; j += 16) block<kInteger, kOut, kPath, kVectors>(e, t, j, kLanes);
  for (; j + kLanes <= t.columns; j += kLanes) block<kInteger, kOut, kPath, 1>(e, t, j, kLanes);
  if (j < t.columns) block<kInteger, kOut, kPath, 1>(e, t, j, static_cast<int>(t.columns - j));
}

template <bool kInteger, Dtype kOut>
void choose(const Epilogue& e, const EpilogueArgs& t) {
  const bool clamps = !e.row_scale && e.activation <= Activation::relu6;
  if (clamps && !e.residual) return run<kInteger, kOut, Path::clamp>(e, t);
  if (clamps && !e.residual_after) {
    if constexpr (is_byte_out<kOut>) {
      if (e.residual_dtype == Dtype::u8) return run<kInteger, kOut, Path::add_u8>(e, t);
      if (e.residual_dtype == Dtype::s8) return run<kInteger, kOut, Path::add_s8>(e, t);
    } else if (e.residual_dtype == kOut) {
      return run<kInteger, kOut, Path::add_float>(e, t);
    }
  }
  run<kInteger, kOut, Path::any>(e, t);
}

template <bool kInteger>
void epilogue(const Epilogue& e, const EpilogueArgs& t) {
  switch (e.out_dtype) {
    case Dtype::f32: return choose<kInteger, Dtype::f32>(e, t);
    case Dtype::bf16: return choose<kInteger, Dtype::bf16>(e, t);
    case Dtype::f16: return choose<kInteger, Dtype::f16>(e, t);
    case Dtype::u8: return choose<kInteger, Dtype::u8>(e, t);
    case Dtype::s8: return choose<kInteger, Dtype::s8>(e, t);
    case Dtype::s32: return run<true, Dtype::s32, Path::clamp>(e, t);
  }
}

}  // namespace

extern const EpilogueKernels epilogue_kernels = {&epilogue<true>, &epilogue<false>};

}  // namespace pykernels::PYKERNELS_ISA_NS
