// Epilogues: accumulators of a tile to output (formula in kernels.h). Columns outside, rows inside, so that per-channel
// parameters are loaded once; a tail of columns goes through partial loads and stores.
#include "cpu/isa/loops.h"
#include "cpu/isa/math.h"
#include "cpu/isa/requantize.h"
#include "cpu/tile/element.h"
#include "cpu/tile/kernels.h"

namespace pykernels::PYKERNELS_ISA_NS {
namespace {

constexpr int kVectors = 16 / kLanes;  // of a panel's columns

// What an epilogue that goes through reals has to do. Those of most layers have no branch in their loop: they clamp,
// perhaps after adding a residual of the same float, or apply one of the usual activations. `any` asks the Epilogue in
// every step.
enum class Path { clamp, add, hardswish, silu, any };

template <int n>
struct Count {
  static constexpr int value = n;
};

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

// Rows whose curves are computed side by side: one alone is a chain of dependent steps that leaves the units idle.
template <Path kPath>
constexpr int kRowsAtOnce = kPath == Path::hardswish || kPath == Path::silu ? (kVectors < 4 ? 4 / kVectors : 1) : 1;

// kCount vectors of columns from j on, n valid lanes in each, all rows. The parameters are copies: a store of bytes
// might otherwise have changed them, and they would be loaded again in every row.
template <bool kInteger, Dtype kOut, Path kPath, int kCount>
PK_INLINE void block(const Epilogue e, const EpilogueArgs t, int64_t j, int n) {
  const int32_t lowest = kOut == Dtype::s8 ? -128 : 0;
  const Requantize q = requantizer(e.inverse_scale, e.zero_point, lowest, lowest + 255);
  const f32 low = set1(e.activation == Activation::none ? -__builtin_inff() : 0.0f);
  const f32 high = set1(e.activation == Activation::relu6 ? 6.0f : __builtin_inff());
  f32 addend[kCount], multiplier[kCount];
  i32 sum[kCount];
  PK_FOR (v, kCount) {
    const int64_t at = t.packed + j + v * kLanes;
    addend[v] = e.addend ? load(e.addend + at, n) : set1(-0.0f);  // x + -0 is x, whatever x
    if constexpr (kInteger) {
      if constexpr (kOut != Dtype::s32) multiplier[v] = load(e.multiplier + at, n);
      if constexpr (kPath == Path::any) sum[v] = load_i32(e.sum + at, n);
    }
  }
  int64_t at = t.row * e.out_stride + t.channel + j, from = j;
  const auto rows = [&](int64_t r, auto count) PK_LAMBDA {
    constexpr int kRows = decltype(count)::value;
    f32 f[kRows * kCount];
    PK_FOR (k, kRows) {
      PK_FOR (v, kCount) {
        const int64_t place = at + k * e.out_stride + v * kLanes, source = from + k * t.ldc + v * kLanes;
        f32& x = f[k * kCount + v];
        if constexpr (kInteger) {
          i32 acc = load_i32(static_cast<const int32_t*>(t.c) + source);
          if constexpr (kOut == Dtype::s32) {
            store_i32(static_cast<int32_t*>(e.out) + place, acc, n);
            continue;
          }
          f32 factor = multiplier[v];
          if constexpr (kPath == Path::any)
            if (e.row_scale) {
              acc = sub(acc, mul(set1_i32(e.row_zero_point[t.row + r + k]), sum[v]));
              factor = mul(set1(e.row_scale[t.row + r + k]), factor);
            }
          x = fma(to_f32(acc), factor, addend[v]);
        } else {
          x = add(load(static_cast<const float*>(t.c) + source, kLanes), addend[v]);
        }
        if constexpr (kPath == Path::add) x = add(x, load_residual(e, kOut, place, n));
        if constexpr (kPath == Path::any) {
          if (e.residual && !e.residual_after) x = add(x, load_residual(e, e.residual_dtype, place, n));
          x = activate(e.activation, x);
          if (e.residual && e.residual_after) x = add(x, load_residual(e, e.residual_dtype, place, n));
        } else if constexpr (kPath == Path::clamp || kPath == Path::add) {
          x = min(high, max(low, x));
        }
      }
    }
    if constexpr (kPath == Path::hardswish)
      PK_FOR (i, kRows * kCount) f[i] = activate(Activation::hardswish, f[i]);
    if constexpr (kPath == Path::silu)
      PK_FOR (i, kRows * kCount) f[i] = activate(Activation::silu, f[i]);
    if constexpr (kOut != Dtype::s32)
      PK_FOR (k, kRows) store_out<kOut, kCount>(e, q, at + k * e.out_stride, f + k * kCount, n);
    at += kRows * e.out_stride, from += kRows * t.ldc;
  };
  int64_t r = 0;
  constexpr int kAtOnce = kRowsAtOnce<kPath>;
  for (; r + kAtOnce <= t.rows; r += kAtOnce) rows(r, Count<kAtOnce>{});
  for (; r < t.rows; ++r) rows(r, Count<1>{});
}

// An 8-bit residual that the scaled epilogue adds.
enum class Added { nothing, u8, s8 };

// As block(), of the scaled epilogue.
template <class Q, Added kAdded, int kCount>
PK_INLINE void scaled_block(const Epilogue e, const EpilogueArgs t, int64_t j, int n) {
  constexpr bool kSigned = static_cast<Q>(-1) < Q{};
  const i32 half = set1_i32(128);
  const f32 low = set1(e.low), high = set1(e.high), residual_factor = set1(e.residual_factor);
  f32 multiplier[kCount], addend[kCount];
  PK_FOR (v, kCount) {
    multiplier[v] = load(e.multiplier + t.packed + j + v * kLanes, n);
    addend[v] = load(e.addend + t.packed + j + v * kLanes, n);
  }
  int64_t at = t.row * e.out_stride + t.channel + j, from = j;
  for (int64_t r = 0; r < t.rows; ++r, at += e.out_stride, from += t.ldc) {
    i32 bytes[kCount];
    PK_FOR (v, kCount) {
      const int64_t place = at + v * kLanes;
      f32 f = to_f32(load_i32(static_cast<const int32_t*>(t.c) + from + v * kLanes));
      f = fma(f, multiplier[v], addend[v]);
      if constexpr (kAdded == Added::u8)
        f = fma(to_f32(load_i32(static_cast<const uint8_t*>(e.residual) + place, n)), residual_factor, f);
      if constexpr (kAdded == Added::s8)
        f = fma(to_f32(add(load_i32(static_cast<const int8_t*>(e.residual) + place, n), half)), residual_factor, f);
      bytes[v] = to_i32(min(high, max(low, f)));
      if constexpr (kSigned) bytes[v] = sub(bytes[v], half);
    }
    store_bytes<kCount>(static_cast<Q*>(e.out) + at, bytes, n);
  }
}

// panel(j) for whole panels of columns, part(j, n) for what is left of them.
template <class Panel, class Part>
PK_INLINE void each_columns(int64_t columns, const Panel& panel, const Part& part) {
  int64_t j = 0;
  for (; j + 16 <= columns; j += 16) panel(j);
  for (; j < columns; j += kLanes) part(j, lanes_left(columns - j));
}

template <bool kInteger, Dtype kOut, Path kPath>
void run(const Epilogue& e, const EpilogueArgs& t) {
  each_columns(
      t.columns, [&](int64_t j) PK_LAMBDA { block<kInteger, kOut, kPath, kVectors>(e, t, j, kLanes); },
      [&](int64_t j, int n) PK_LAMBDA { block<kInteger, kOut, kPath, 1>(e, t, j, n); });
}

template <class Q, Added kAdded>
void run_scaled(const Epilogue& e, const EpilogueArgs& t) {
  each_columns(
      t.columns, [&](int64_t j) PK_LAMBDA { scaled_block<Q, kAdded, kVectors>(e, t, j, kLanes); },
      [&](int64_t j, int n) PK_LAMBDA { scaled_block<Q, kAdded, 1>(e, t, j, n); });
}

// Whether the epilogue was that of a usual activation, and is done.
template <bool kInteger, Dtype kOut>
bool activated(const Epilogue& e, const EpilogueArgs& t) {
  if (e.row_scale || e.residual) return false;
  if (e.activation == Activation::hardswish)
    run<kInteger, kOut, Path::hardswish>(e, t);
  else if (e.activation == Activation::silu)
    run<kInteger, kOut, Path::silu>(e, t);
  else
    return false;
  return true;
}

template <bool kInteger, Dtype kOut>
void choose(const Epilogue& e, const EpilogueArgs& t) {
  if (activated<kInteger, kOut>(e, t)) return;
  const bool clamps = !e.row_scale && e.activation <= Activation::relu6;
  if (clamps && !e.residual) return run<kInteger, kOut, Path::clamp>(e, t);
  if (clamps && !e.residual_after && e.residual_dtype == kOut) return run<kInteger, kOut, Path::add>(e, t);
  run<kInteger, kOut, Path::any>(e, t);
}

template <class Q>
void choose_bytes(const Epilogue& e, const EpilogueArgs& t) {
  constexpr Dtype kOut = static_cast<Q>(-1) < Q{} ? Dtype::s8 : Dtype::u8;
  if (!e.scaled) {
    if (!activated<true, kOut>(e, t)) run<true, kOut, Path::any>(e, t);
    return;
  }
  if (!e.residual) return run_scaled<Q, Added::nothing>(e, t);
  if (e.residual_dtype == Dtype::u8) return run_scaled<Q, Added::u8>(e, t);
  run_scaled<Q, Added::s8>(e, t);
}

template <bool kInteger>
void epilogue(const Epilogue& e, const EpilogueArgs& t) {
  switch (e.out_dtype) {
    case Dtype::f32: return choose<kInteger, Dtype::f32>(e, t);
    case Dtype::bf16: return choose<kInteger, Dtype::bf16>(e, t);
    case Dtype::f16: return choose<kInteger, Dtype::f16>(e, t);
    default: break;
  }
  if constexpr (kInteger) {  // floats yield no bytes
    if (e.out_dtype == Dtype::u8) return choose_bytes<uint8_t>(e, t);
    if (e.out_dtype == Dtype::s8) return choose_bytes<int8_t>(e, t);
    run<true, Dtype::s32, Path::clamp>(e, t);
  }
}

}  // namespace

extern const EpilogueKernels epilogue_kernels = {&epilogue<true>, &epilogue<false>};

}  // namespace pykernels::PYKERNELS_ISA_NS
