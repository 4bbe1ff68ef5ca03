// The dense codecs, once per isa: v of a record is gathered into a buffer that stays in the caches nearest to the core,
// its scale is found, then its codes and its error are written, so that memory is passed over once.
#include "cpu/compress/kernels.h"

#include "cpu/compress/codes.h"

namespace pykernels::PYKERNELS_ISA_NS {
namespace {

constexpr float kSmallestNormal = 1.17549435e-38f;
constexpr int32_t kNaN = 0x7fc00000, kMagnitude = 0x7fffffff;
constexpr float kSteps = 32767.0f;  // means are sums of whole steps, so that the order of the sum cannot matter

PK_INLINE int32_t greatest_lane(i32 v) {
  int32_t lanes[kLanes];
  store_i32(lanes, v);
  int32_t greatest = lanes[0];
  for (int i = 1; i < kLanes; ++i) greatest = lanes[i] > greatest ? lanes[i] : greatest;
  return greatest;
}

// v[i] = f(x[i]) (+ residual[i]) for the `count` elements of a record, zero up to `block`; returns the greatest bits of
// abs(v), which put NaN above infinity and infinity above every number.
template <bool kResidual, class X, class F>
PK_INLINE int32_t gather_into(float* v, const X* x, const float* residual, int64_t count, int64_t block, const F& f) {
  const i32 magnitude = set1_i32(kMagnitude);
  i32 top0 = set1_i32(0), top1 = top0;
  const auto at = [&](int64_t i, int n) PK_LAMBDA {
    f32 a = f(load(x + i, n));
    if (kResidual) a = add(a, load(residual + i, n));
    store(v + i, a);
    return bit_and(cast_i32(a), magnitude);
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    top0 = max(top0, at(i, kLanes));
    top1 = max(top1, at(i + kLanes, kLanes));
  }
  for (; i < count; i += kLanes) {
    const int n = lanes_left(count - i);
    f32 a = f(load(x + i, n));
    if (kResidual) a = add(a, load(residual + i, n));
    store(v + i, a, n);
    for (int lane = n; lane < kLanes; ++lane) v[i + lane] = 0.0f;
    top0 = max(top0, bit_and(cast_i32(load(v + i)), magnitude));
  }
  for (; i < block; i += kLanes) store(v + i, set1(0.0f));
  return greatest_lane(max(top0, top1));
}

// Where the error is not a finite number, the residual stays as it was.
PK_INLINE void keep_finite(const float* error, int64_t count, float* residual) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = lanes_left(count - i);
    const f32 e = load(error + i, n);
    store(residual + i, select_lt(abs(e), set1(kInfinite), e, load(residual + i, n)), n);
  }
}

template <bool kError>
PK_INLINE void encode_record_codes(const Records& r, const Encoding& e, int32_t top, uint8_t* codes) {
  switch (r.codec) {
    case Codec::int8:
      return r.stochastic ? encode_codes<Codec::int8, true, kError>(e, codes)
                          : encode_codes<Codec::int8, false, kError>(e, codes);
    case Codec::int4:
      return r.stochastic ? encode_codes<Codec::int4, true, kError>(e, codes)
                          : encode_codes<Codec::int4, false, kError>(e, codes);
    case Codec::int2:
      return r.stochastic ? encode_codes<Codec::int2, true, kError>(e, codes)
                          : encode_codes<Codec::int2, false, kError>(e, codes);
    case Codec::onebit: return encode_codes<Codec::onebit, false, kError>(e, codes);
    case Codec::fp8: return encode_codes<Codec::fp8, false, kError>(e, codes);
    case Codec::bf16: return encode_numbers<kError>(e.v, e.error, r.block, top, reinterpret_cast<bfloat16*>(codes));
    case Codec::fp16: return encode_numbers<kError>(e.v, e.error, r.block, top, reinterpret_cast<float16*>(codes));
    case Codec::fp32: return encode_numbers<kError>(e.v, e.error, r.block, top, reinterpret_cast<float*>(codes));
  }
}

// What the maximum of a record is divided by, and the greatest multiple of the scale that a code stands for.
PK_INLINE float level_of(Codec codec) {
  switch (codec) {
    case Codec::int8: return kLevel<Codec::int8>;
    case Codec::int4: return kLevel<Codec::int4>;
    case Codec::fp8: return kLevel<Codec::fp8>;
    default: return 1.0f;
  }
}

// The sum of round(abs(v) / scale), which are whole numbers up to kSteps.
PK_INLINE int32_t sum_steps(const float* v, int64_t block, float inverse) {
  i32 sum = set1_i32(0);
  for (int64_t i = 0; i < block; i += kLanes) sum = add(sum, to_i32(mul(abs(load(v + i)), set1(inverse))));
  return sum_lanes(sum);
}

// One record: v [block], zero from `count` on, is overwritten; `top` is the greatest bits of abs(v).
PK_INLINE void encode_record(const Records& r, float* v, int64_t count, int32_t top, int64_t position, float* residual,
                             uint8_t* record) {
  const bool finite = top < kInfinity;
  // Errors go straight to the residual where there is room for all of them and none can be infinite.
  bool in_place = residual != nullptr && (count < r.block || !finite);
  Encoding e{v, nullptr, r.bytes - 4, set1(0.0f), set1(0.0f), 0};
  if (r.codec < Codec::bf16) {
    const bool mean = r.codec == Codec::onebit || (r.codec == Codec::int2 && !r.stochastic);
    float scale = float_of(finite ? top : 0) / (mean ? kSteps : level_of(r.codec));
    if (mean && scale >= kSmallestNormal) {
      const float steps = static_cast<float>(sum_steps(v, r.block, 1.0f / scale));
      scale = scale * (steps / static_cast<float>(count));
      if (r.codec == Codec::int2) scale = scale * 1.5f;
    }
    const bool zeros = scale < kSmallestNormal;  // nothing is sent, and v stays in the residual
    if (zeros) scale = finite ? 0.0f : float_of(kNaN);
    std::memcpy(record, &scale, 4);
    record += 4;
    if (zeros) {
      std::memset(record, 0, r.bytes - 4);
      if (finite && residual != nullptr) std::memcpy(residual, v, 4 * count);
      return;
    }
    in_place |= residual != nullptr && !(level_of(r.codec) * scale < kInfinite);
    e.scale = set1(scale);
    e.inverse = set1(1.0f / scale);
    if (r.stochastic) e.key = key_of(static_cast<uint64_t>(position), r.seed);
  }
  e.error = in_place ? v : residual;
  if (residual != nullptr)
    encode_record_codes<true>(r, e, top, record);
  else
    encode_record_codes<false>(r, e, top, record);
  if (in_place) keep_finite(v, count, residual);
}

template <bool kAdd, bool kWeighted>
PK_INLINE void decode_record(Codec codec, const uint8_t* record, float weight, int64_t block, float* sum) {
  if (codec >= Codec::bf16) {
    const auto numbers = [&](auto* codes) PK_LAMBDA { decode_numbers<kAdd, kWeighted>(codes, weight, block, sum); };
    if (codec == Codec::bf16) return numbers(reinterpret_cast<const bfloat16*>(record));
    if (codec == Codec::fp16) return numbers(reinterpret_cast<const float16*>(record));
    return numbers(reinterpret_cast<const float*>(record));
  }
  float scale;
  std::memcpy(&scale, record, 4);
  const uint8_t* codes = record + 4;
  switch (codec) {
    case Codec::int8: return decode_codes<Codec::int8, kAdd, kWeighted>(codes, scale, weight, block, sum);
    case Codec::int4: return decode_codes<Codec::int4, kAdd, kWeighted>(codes, scale, weight, block, sum);
    case Codec::int2: return decode_codes<Codec::int2, kAdd, kWeighted>(codes, scale, weight, block, sum);
    case Codec::onebit: return decode_codes<Codec::onebit, kAdd, kWeighted>(codes, scale, weight, block, sum);
    default: return decode_codes<Codec::fp8, kAdd, kWeighted>(codes, scale, weight, block, sum);
  }
}

// sum[block] = (d0 + d1) + ... of the record at `offset` of every rank's run, each (weighted) by its rank's weight.
template <bool kWeighted>
PK_INLINE void sum_shards(const Records& r, const Shards& s, int64_t offset, float* sum) {
  const auto weight = [&](int64_t rank) PK_LAMBDA { return kWeighted ? s.weights[rank] : 1.0f; };
  decode_record<false, kWeighted>(r.codec, s.data + offset, weight(0), r.block, sum);
  for (int64_t rank = 1; rank < s.ranks; ++rank)
    decode_record<true, kWeighted>(r.codec, s.data + rank * s.stride + offset, weight(rank), r.block, sum);
}

// f(first element in the run, elements, offset of the record)
template <class F>
PK_INLINE void each_record(const Records& r, const F& f) {
  for (int64_t i = 0, offset = 0; i < r.n; i += r.block, offset += r.bytes)
    f(i, r.n - i < r.block ? r.n - i : r.block, offset);
}

template <class X>
PK_INLINE void encode_run(const Records& r, const X* x, float* residual, uint8_t* payload) {
  alignas(64) float v[kMaxBlock];
  const auto same = [](f32 a) PK_LAMBDA { return a; };
  each_record(r, [&](int64_t i, int64_t count, int64_t offset) PK_LAMBDA {
    float* kept = residual == nullptr ? nullptr : residual + i;
    const int32_t top = kept == nullptr ? gather_into<false>(v, x + i, kept, count, r.block, same)
                                        : gather_into<true>(v, x + i, kept, count, r.block, same);
    encode_record(r, v, count, top, r.first + i, kept, payload + offset);
  });
}

void encode_kernel(const Records& r, const void* x, Real type, float* residual, uint8_t* payload) {
  switch (type) {
    case Real::fp32: return encode_run(r, static_cast<const float*>(x), residual, payload);
    case Real::bf16: return encode_run(r, static_cast<const bfloat16*>(x), residual, payload);
    case Real::fp16: return encode_run(r, static_cast<const float16*>(x), residual, payload);
  }
}

void reduce_kernel(const Records& r, const Shards& s, float* residual, uint8_t* payload) {
  alignas(64) float v[kMaxBlock];
  const f32 factor = set1(s.factor);
  const auto scaled = [&](f32 a) PK_LAMBDA { return mul(a, factor); };
  each_record(r, [&](int64_t i, int64_t count, int64_t offset) PK_LAMBDA {
    float* kept = residual == nullptr ? nullptr : residual + i;
    sum_shards<false>(r, s, offset, v);
    const int32_t top = kept == nullptr ? gather_into<false>(v, v, kept, count, r.block, scaled)
                                        : gather_into<true>(v, v, kept, count, r.block, scaled);
    encode_record(r, v, count, top, r.first + i, kept, payload + offset);
  });
}

// out[i] = factor * sum[i]
template <class X>
PK_INLINE void write_out(const float* sum, f32 factor, int64_t n, X* out, bool past_caches) {
  int64_t i = 0;
  if (past_caches) {
    const int64_t width = kLanes * sizeof(X), over = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % width);
    if (over != 0) {
      i = (width - over) / static_cast<int64_t>(sizeof(X));
      if (i > n) i = n;
      store(out, mul(load(sum, static_cast<int>(i)), factor), static_cast<int>(i));
    }
    for (; i + kLanes <= n; i += kLanes) stream(out + i, mul(load(sum + i), factor));
  }
  for (; i + kLanes <= n; i += kLanes) store(out + i, mul(load(sum + i), factor));
  if (i < n) store(out + i, mul(load(sum + i, lanes_left(n - i)), factor), lanes_left(n - i));
}

template <class X>
PK_INLINE void decode_run(const Records& r, const Shards& s, X* out, bool past_caches) {
  alignas(64) float sum[kMaxBlock];
  each_record(r, [&](int64_t i, int64_t count, int64_t offset) PK_LAMBDA {
    if (s.weights == nullptr)
      sum_shards<false>(r, s, offset, sum);
    else
      sum_shards<true>(r, s, offset, sum);
    write_out(sum, set1(s.factor), count, out + i, past_caches);
  });
  if (past_caches) fence();
}

void decode_kernel(const Records& r, const Shards& s, void* out, Real type, bool past_caches) {
  switch (type) {
    case Real::fp32: return decode_run(r, s, static_cast<float*>(out), past_caches);
    case Real::bf16: return decode_run(r, s, static_cast<bfloat16*>(out), past_caches);
    case Real::fp16: return decode_run(r, s, static_cast<float16*>(out), past_caches);
  }
}

}  // namespace

const CompressKernels compress_kernels = {encode_kernel, decode_kernel, reduce_kernel};

}  // namespace pykernels::PYKERNELS_ISA_NS
