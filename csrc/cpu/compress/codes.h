// The codes of one record, once per isa: fp32 values to codes and their errors, and codes to values.
#pragma once

#include "cpu/compress/kernels.h"
#include "cpu/isa/loops.h"

namespace pykernels::PYKERNELS_ISA_NS {

constexpr float kInfinite = __builtin_huge_valf();
constexpr int32_t kInfinity = 0x7f800000;  // its bits

PK_INLINE float float_of(int32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

template <Codec codec>
constexpr int kBits = kCodeBits[static_cast<int>(codec)];
// The greatest code, and what the maximum of a record is divided by (for int2, if it is rounded stochastically).
template <Codec codec>
constexpr float kLevel = codec == Codec::int8   ? 127.0f
                         : codec == Codec::int4 ? 7.0f
                         : codec == Codec::fp8  ? 448.0f
                                                : 1.0f;

// ---- stochastic rounding: uniform numbers that depend on a record's key and the place in the record ----

// The 32-bit mixer lowbias32 (C. Wellons, "Prospecting for hash functions").
PK_INLINE uint32_t mix(uint32_t h) {
  h = (h ^ h >> 16) * 0x7feb352du;
  h = (h ^ h >> 15) * 0x846ca68bu;
  return h ^ h >> 16;
}
PK_INLINE i32 mix(i32 h) {
  h = mul(bit_xor(h, shift_right<16>(h)), set1_i32(0x7feb352d));
  h = mul(bit_xor(h, shift_right<15>(h)), set1_i32(static_cast<int32_t>(0x846ca68bu)));
  return bit_xor(h, shift_right<16>(h));
}
PK_INLINE uint32_t key_of(uint64_t position, uint64_t seed) {
  const uint32_t h = mix(static_cast<uint32_t>(position) ^ mix(static_cast<uint32_t>(position >> 32)));
  return mix(static_cast<uint32_t>(seed) ^ mix(static_cast<uint32_t>(seed >> 32) ^ h));
}
PK_INLINE f32 uniform(uint32_t key, int64_t place) {
  const i32 places = add(set1_i32(static_cast<int32_t>(place)), lane_index());
  const i32 h =
      mix(bit_xor(set1_i32(static_cast<int32_t>(key)), mul(places, set1_i32(static_cast<int32_t>(0x9e3779b9u)))));
  return mul(to_f32(shift_right<8>(h)), set1(0x1p-24f));
}

// ---- fp8 e4m3fn: 4 bits of exponent (bias 7), 3 of fraction; no infinity, 0x7f is NaN ----

PK_INLINE i32 select_lt(f32 a, f32 b, i32 x, i32 y) { return cast_i32(select_lt(a, b, cast_f32(x), cast_f32(y))); }

struct E4m3 {
  i32 code;
  f32 value;
};
// Half to even; |t| <= 448. Numbers of exponent e (at least -6) are whole steps of 2^(e-3): adding 1.5 * 2^(e+20)
// rounds to them and leaves the count of steps in the lowest bits, which is the code but for the exponent.
PK_INLINE E4m3 to_e4m3(f32 t) {
  const f32 magnitude = abs(t);
  const i32 exponent = max(bit_and(cast_i32(magnitude), set1_i32(0x7f800000)), set1_i32(121 << 23));
  const i32 shifter = add(exponent, set1_i32((20 << 23) + 0x400000));
  const f32 shifted = add(magnitude, cast_f32(shifter));
  const i32 steps = sub(cast_i32(shifted), shifter);
  const i32 code = add(steps, sub(shift_right<20>(exponent), set1_i32(121 * 8)));
  const i32 sign = bit_and(cast_i32(t), set1_i32(INT32_MIN));
  const f32 value = sub(shifted, cast_f32(shifter));
  return {bit_or(code, shift_right<24>(sign)), cast_f32(bit_or(cast_i32(value), sign))};
}
PK_INLINE f32 from_e4m3(i32 code) {
  const i32 magnitude = bit_and(code, set1_i32(0x7f));
  const f32 number = to_f32(magnitude);
  const f32 normal = cast_f32(add(shift_left<20>(magnitude), set1_i32(120 << 23)));
  f32 v = select_lt(number, set1(8.0f), mul(number, set1(0x1p-9f)), normal);
  v = select_lt(number, set1(126.5f), v, set1(__builtin_nanf("")));
  return cast_f32(bit_or(cast_i32(v), shift_left<24>(bit_and(code, set1_i32(0x80)))));
}

// ---- encode ----

struct Encoding {
  const float* v;
  float* error;  // v - decoded(v) goes here; may be v
  int64_t plane;
  f32 scale, inverse;
  uint32_t key;
};

template <Codec codec, bool kStochastic>
PK_INLINE i32 integer_of(f32 t, const Encoding& e, int64_t i) {
  if constexpr (kStochastic) {
    const f32 low = floor(t);
    t = add(low, select_lt(uniform(e.key, i), sub(t, low), set1(1.0f), set1(0.0f)));
  }
  // A scale that is the maximum divided by the level leaves nothing above the level that would not round to it.
  if constexpr (kStochastic || codec == Codec::int2) t = min(set1(kLevel<codec>), max(set1(-kLevel<codec>), t));
  return to_i32(t);
}

// The code of the vector at place i, in the lowest bits; its error is written.
template <Codec codec, bool kStochastic, bool kError>
PK_INLINE i32 encode_vector(const Encoding& e, int64_t i, int n) {
  const f32 v = load(e.v + i, n);
  i32 code;
  f32 decoded;
  if constexpr (codec == Codec::onebit) {
    code = select_lt(v, set1(0.0f), set1_i32(1), set1_i32(0));
    decoded = cast_f32(bit_xor(cast_i32(e.scale), shift_left<31>(code)));
  } else if constexpr (codec == Codec::fp8) {
    const E4m3 number = to_e4m3(min(set1(448.0f), max(set1(-448.0f), mul(v, e.inverse))));
    code = number.code;
    decoded = mul(number.value, e.scale);
  } else {
    code = integer_of<codec, kStochastic>(mul(v, e.inverse), e, i);
    decoded = mul(to_f32(code), e.scale);
    if constexpr (kBits<codec> < 8) code = bit_and(code, set1_i32((1 << kBits<codec>)-1));
  }
  if constexpr (kError) store(e.error + i, sub(v, decoded), n);
  return code;
}

// The byte j of all planes from the p-th on.
template <Codec codec, bool kStochastic, bool kError, int p = 0>
PK_INLINE i32 encode_planes(const Encoding& e, int64_t j, int n) {
  const i32 code = shift_left<p * kBits<codec>>(encode_vector<codec, kStochastic, kError>(e, j + p * e.plane, n));
  if constexpr ((p + 1) * kBits<codec> < 8)
    return bit_or(code, encode_planes<codec, kStochastic, kError, p + 1>(e, j, n));
  else
    return code;
}

template <Codec codec, bool kStochastic, bool kError>
__attribute__((noinline)) static void encode_codes(const Encoding& given, uint8_t* codes) {
  const Encoding e = given;  // of which no store can be thought to change anything
  const auto bytes = [&](int64_t j, int n) PK_LAMBDA { return encode_planes<codec, kStochastic, kError>(e, j, n); };
  if constexpr (codec == Codec::int8)
    each_byte(reinterpret_cast<int8_t*>(codes), e.plane, bytes);
  else
    each_byte(codes, e.plane, bytes);
}

// ---- decode ----

template <Codec codec, int p>
PK_INLINE f32 decode_vector(i32 bytes, f32 scale) {
  constexpr int kAbove = 32 - (p + 1) * kBits<codec>;  // bits above the code
  if constexpr (codec == Codec::onebit)
    return cast_f32(bit_xor(cast_i32(scale), bit_and(shift_left<kAbove>(bytes), set1_i32(INT32_MIN))));
  else if constexpr (codec == Codec::fp8)
    return mul(from_e4m3(bytes), scale);
  else if constexpr (codec == Codec::int8)
    return mul(to_f32(bytes), scale);
  else
    return mul(to_f32(shift_right_signed<32 - kBits<codec>>(shift_left<kAbove>(bytes))), scale);
}

// sum[i] (+)= (weight *) d
template <bool kAdd, bool kWeighted>
PK_INLINE void sum_up(float* sum, f32 d, f32 weight, int n) {
  if constexpr (kWeighted) d = mul(weight, d);
  if constexpr (kAdd) d = add(load(sum, n), d);
  store(sum, d, n);
}

template <Codec codec, bool kAdd, bool kWeighted, int p = 0>
PK_INLINE void decode_planes(i32 bytes, f32 scale, f32 weight, float* sum, int64_t plane, int n) {
  sum_up<kAdd, kWeighted>(sum, decode_vector<codec, p>(bytes, scale), weight, n);
  if constexpr ((p + 1) * kBits<codec> < 8)
    decode_planes<codec, kAdd, kWeighted, p + 1>(bytes, scale, weight, sum + plane, plane, n);
}

// sum[i] (+)= (weight *) the value of code i.
template <Codec codec, bool kAdd, bool kWeighted>
__attribute__((noinline)) static void decode_codes(const uint8_t* codes, float scale, float weight, int64_t block,
                                                   float* sum) {
  const int64_t plane = block * kBits<codec> / 8;
  const auto at = [&](int64_t j, int n) PK_LAMBDA {
    i32 bytes;
    if constexpr (codec == Codec::int8)
      bytes = load_i32(reinterpret_cast<const int8_t*>(codes) + j, n);
    else
      bytes = load_i32(codes + j, n);
    decode_planes<codec, kAdd, kWeighted>(bytes, set1(scale), set1(weight), sum + j, plane, n);
  };
  int64_t j = 0;
  for (; j + kLanes <= plane; j += kLanes) at(j, kLanes);
  if (j < plane) at(j, static_cast<int>(plane - j));
}

// ---- bf16, fp16, fp32: the code is the number ----

// Numbers beyond the dtype become its greatest, infinities stay, NaNs become the positive quiet one.
PK_INLINE f32 bounded(f32 v, float greatest) {
  const f32 infinite = set1(kInfinite);
  v = select_lt(abs(v), infinite, min(set1(greatest), max(set1(-greatest), v)), v);
  return select_over(v, infinite, set1(__builtin_nanf("")), v);
}
PK_INLINE float greatest_of(const float*) { return 3.4028234663852886e38f; }
PK_INLINE float greatest_of(const bfloat16*) { return 3.3895313892515355e38f; }
PK_INLINE float greatest_of(const float16*) { return 65504.0f; }

// `top` is the greatest bits of abs(v).
template <bool kError, class T>
__attribute__((noinline)) static void encode_numbers(const float* v, float* error, int64_t block, int32_t top,
                                                     T* codes) {
  const float greatest = greatest_of(codes);
  const bool fits = top < kInfinity && float_of(top) <= greatest;
  for (int64_t i = 0; i < block; i += kLanes) {
    const f32 x = load(v + i);
    store(codes + i, fits ? x : bounded(x, greatest));
    if (kError) store(error + i, sub(x, load(codes + i)));
  }
}
template <bool kAdd, bool kWeighted, class T>
__attribute__((noinline)) static void decode_numbers(const T* codes, float weight, int64_t block, float* sum) {
  for (int64_t i = 0; i < block; i += kLanes) sum_up<kAdd, kWeighted>(sum + i, load(codes + i), set1(weight), kLanes);
}

}  // namespace pykernels::PYKERNELS_ISA_NS
