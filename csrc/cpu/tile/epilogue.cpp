// Epilogues: accumulators of a tile to output (formula in kernels.h). Columns outside, rows inside, so that per-channel
// parameters are loaded once; a tail of columns goes through partial loads and stores.
#include "cpu/isa/math.h"
#include "cpu/isa/requantize.h"
#include "cpu/tile/kernels.h"

namespace pykernels::PYKERNELS_ISA_NS {
namespace {

PK_INLINE f32 load_residual(const Epilogue& e, int64_t at, int n) {
  const f32 scale = set1(e.residual_scale);
  const i32 zero_point = set1_i32(e.residual_zero_point);
  switch (e.residual_dtype) {
    case Dtype::f32: return load(static_cast<const float*>(e.residual) + at, n);
    case Dtype::bf16: return load(static_cast<const bfloat16*>(e.residual) + at, n);
    case Dtype::u8: return dequantize(load_i32(static_cast<const uint8_t*>(e.residual) + at, n), zero_point, scale);
    case Dtype::s8: return dequantize(load_i32(static_cast<const int8_t*>(e.residual) + at, n), zero_point, scale);
    case Dtype::s32: break;  // no residual is s32
  }
  return set1(0.0f);
}

template <Dtype kOut>
PK_INLINE void store_out(const Epilogue& e, const Requantize& q, int64_t at, f32 f, int n) {
  if constexpr (kOut == Dtype::f32)
    store(static_cast<float*>(e.out) + at, f, n);
  else if constexpr (kOut == Dtype::bf16)
    store(static_cast<bfloat16*>(e.out) + at, f, n);
  else if constexpr (kOut == Dtype::u8)
    store_i32(static_cast<uint8_t*>(e.out) + at, requantize(q, f), n);
  else
    store_i32(static_cast<int8_t*>(e.out) + at, requantize(q, f), n);
}

// One column block of n columns, all rows. kPlain: neither residual nor per-row scales, and an activation that only
// clamps; it is most layers' epilogue, and has no branch in its loop.
template <bool kInteger, Dtype kOut, bool kPlain>
PK_INLINE void block(const Epilogue& e, const EpilogueArgs& t, int64_t j, int n) {
  const int32_t lowest = kOut == Dtype::s8 ? -128 : 0;
  const Requantize q = requantizer(e.inverse_scale, e.zero_point, lowest, lowest + 255);
  const f32 bias = e.bias ? load(e.bias + t.packed + j, n) : set1(-0.0f);  // x + -0 is x, whatever x
  const f32 low = set1(e.activation == Activation::none ? -__builtin_inff() : 0.0f);
  const f32 high = set1(e.activation == Activation::relu6 ? 6.0f : __builtin_inff());
  f32 weight_scale = set1(1.0f), scale = set1(1.0f);
  i32 sum = set1_i32(0), shift = set1_i32(0);
  if constexpr (kInteger) {
    weight_scale = load(e.scale + t.packed + j, n);
    sum = load_i32(e.sum + t.packed + j, n);
    scale = mul(set1(e.x_scale), weight_scale);
    shift = mul(set1_i32(e.x_zero_point), sum);
  }
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t at = (t.row + r) * e.out_stride + t.channel + j;
    f32 f;
    if constexpr (kInteger) {
      if (!kPlain && e.row_scale) {
        scale = mul(set1(e.row_scale[t.row + r]), weight_scale);
        shift = mul(set1_i32(e.row_zero_point[t.row + r]), sum);
      }
      const i32 acc = sub(load_i32(static_cast<const int32_t*>(t.c) + r * t.ldc + j), shift);
      if constexpr (kOut == Dtype::s32) {
        store_i32(static_cast<int32_t*>(e.out) + at, acc, n);
        continue;
      }
      f = mul(to_f32(acc), scale);
    } else {
      f = load(static_cast<const float*>(t.c) + r * t.ldc + j, kLanes);
    }
    f = add(f, bias);
    if constexpr (kPlain) {
      f = min(high, max(low, f));
    } else {
      if (e.residual && !e.residual_after) f = add(f, load_residual(e, at, n));
      f = activate(e.activation, f);
      if (e.residual && e.residual_after) f = add(f, load_residual(e, at, n));
    }
    store_out<kOut>(e, q, at, f, n);
  }
}

template <bool kInteger, Dtype kOut, bool kPlain>
void run(const Epilogue& e, const EpilogueArgs& t) {
  int64_t j = 0;
  for (; j + kLanes <= t.columns; j += kLanes) block<kInteger, kOut, kPlain>(e, t, j, kLanes);
  if (j < t.columns) block<kInteger, kOut, kPlain>(e, t, j, static_cast<int>(t.columns - j));
}

template <bool kInteger, Dtype kOut>
void choose(const Epilogue& e, const EpilogueArgs& t) {
  if (!e.residual && !e.row_scale && e.activation <= Activation::relu6)
    run<kInteger, kOut, true>(e, t);
  else
    run<kInteger, kOut, false>(e, t);
}

template <bool kInteger>
void epilogue(const Epilogue& e, const EpilogueArgs& t) {
  switch (e.out_dtype) {
    case Dtype::f32: return choose<kInteger, Dtype::f32>(e, t);
    case Dtype::bf16: return choose<kInteger, Dtype::bf16>(e, t);
    case Dtype::u8: return choose<kInteger, Dtype::u8>(e, t);
    case Dtype::s8: return choose<kInteger, Dtype::s8>(e, t);
    case Dtype::s32: return run<true, Dtype::s32, true>(e, t);
  }
}

}  // namespace

extern const EpilogueKernels epilogue_kernels = {&epilogue<true>, &epilogue<false>};

}  // namespace pykernels::PYKERNELS_ISA_NS
