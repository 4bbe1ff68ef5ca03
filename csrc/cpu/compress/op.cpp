// compress_encode, compress_decode, compress_reduce: the records of all segments are split evenly over the threads.
#include "common/stable.h"
#include "cpu/compress/driver.h"

namespace pykernels {
namespace {

using Optional = std::optional<Tensor>;

// Elements worth a thread of their own.
constexpr int64_t kGrain = int64_t{1} << 15;
// An output of more bytes than this is written past the caches, which could not hold it.
constexpr int64_t kStreamed = int64_t{4} << 20;

Real checked_real(const char* op, const char* name, const Tensor& t) {
  check_cpu(op, name, t);
  PK_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
  switch (t.scalar_type()) {
    case ScalarType::Float: return Real::fp32;
    case ScalarType::BFloat16: return Real::bf16;
    case ScalarType::Half: return Real::fp16;
    default:
      PK_CHECK(false, op, ": ", name, " must be float32, bfloat16 or float16, not ", dtype_name(t.scalar_type()));
  }
}

float* checked_residual(const char* op, const Optional& residual) {
  if (!residual) return nullptr;
  check_cpu(op, "residual", *residual);
  PK_CHECK(residual->scalar_type() == ScalarType::Float, op, ": residual must be float32, not ",
           dtype_name(residual->scalar_type()));
  PK_CHECK(residual->is_contiguous(), op, ": residual must be contiguous");
  return mutable_pointer<float>(*residual);
}

void check_bytes(const char* op, const char* name, const Tensor& t, int64_t dim) {
  check_cpu(op, name, t);
  PK_CHECK(t.scalar_type() == ScalarType::Byte, op, ": ", name, " must be uint8, not ", dtype_name(t.scalar_type()));
  check_dim(op, name, t, dim);
  PK_CHECK(t.size(dim - 1) <= 1 || t.stride(dim - 1) == 1, op, ": the bytes of ", name, " must be contiguous");
}

uint8_t* checked_payload(const char* op, const Tensor& payload) {
  check_bytes(op, "payload", payload, 1);
  check_alignment(op, "payload", payload.const_data_ptr());
  return mutable_pointer<uint8_t>(payload);
}

Shards checked_payloads(const char* op, const Tensor& payloads, double factor) {
  check_bytes(op, "payloads", payloads, 2);
  PK_CHECK(payloads.size(0) > 0, op, ": payloads must have a row for each rank, not shape ", shape_of(payloads));
  const int64_t stride = payloads.size(0) == 1 ? 0 : payloads.stride(0);
  check_alignment(op, "payloads", payloads.const_data_ptr(), stride);
  return {pointer<uint8_t>(payloads), stride, payloads.size(0), static_cast<float>(factor)};
}

Segments checked(const char* op, const Tensor& segments, const Coding& coding, Extent elements,
                 std::initializer_list<Extent> payloads) {
  check_cpu(op, "segments", segments);
  PK_CHECK(segments.scalar_type() == ScalarType::Long, op, ": segments must be int64, not ",
           dtype_name(segments.scalar_type()));
  PK_CHECK(segments.dim() == 2 && segments.size(1) == 3, op, ": segments must have shape [segments, 3], not ",
           shape_of(segments));
  PK_CHECK(segments.is_contiguous(), op, ": segments must be contiguous");
  return checked_segments(op, pointer<int64_t>(segments), segments.size(0), coding, elements, payloads);
}

template <class F>
void parallel_runs(const Coding& coding, const Segments& segments, const F& f) {
  if (segments.records == 0) return;
  torch::stable::parallel_for(0, segments.records, std::max<int64_t>(1, kGrain / coding.block),
                              [&](int64_t begin, int64_t end) { each_run(coding, segments, begin, end, f); });
}

void compress_encode(const Tensor& x, const Optional& residual, const Tensor& payload, const Tensor& segments,
                     std::string codec, int64_t block, bool stochastic, int64_t seed) {
  const char* op = "compress_encode";
  const Coding coding = coding_of(op, codec, block, stochastic, seed);
  const Real type = checked_real(op, "x", x);
  float* kept = checked_residual(op, residual);
  PK_CHECK(!residual || residual->numel() == x.numel(), op, ": residual must have as many elements as x, ", x.numel(),
           ", not ", residual->numel());
  uint8_t* to = checked_payload(op, payload);
  const Segments s = checked(op, segments, coding, {"x", x.numel()}, {{"payload", payload.numel()}});
  const uint8_t* from = static_cast<const uint8_t*>(x.const_data_ptr());
  const int64_t size = element_size(x.scalar_type());
  const auto kernel = compress_kernels().encode;
  parallel_runs(coding, s, [&](const Records& r, int64_t byte) {
    kernel(r, from + size * r.first, type, kept == nullptr ? nullptr : kept + r.first, to + byte);
  });
}

void compress_decode(const Tensor& payloads, const Tensor& out, const Tensor& segments, std::string codec,
                     int64_t block, double factor) {
  const char* op = "compress_decode";
  const Coding coding = coding_of(op, codec, block);
  const Shards shards = checked_payloads(op, payloads, factor);
  const Real type = checked_real(op, "out", out);
  const Segments s = checked(op, segments, coding, {"out", out.numel()}, {{"payloads", payloads.size(1)}});
  uint8_t* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const int64_t size = element_size(out.scalar_type());
  const bool stream = s.records * block * size > kStreamed;
  const auto kernel = compress_kernels().decode;
  parallel_runs(coding, s, [&](const Records& r, int64_t byte) {
    kernel(r, {shards.data + byte, shards.stride, shards.ranks, shards.factor}, to + size * r.first, type, stream);
  });
}

void compress_reduce(const Tensor& payloads, const Optional& residual, const Tensor& payload, const Tensor& segments,
                     std::string codec, int64_t block, double factor, bool stochastic, int64_t seed) {
  const char* op = "compress_reduce";
  const Coding coding = coding_of(op, codec, block, stochastic, seed);
  const Shards shards = checked_payloads(op, payloads, factor);
  float* kept = checked_residual(op, residual);
  PK_CHECK(!residual || residual->dim() == 1, op, ": residual must be flat, not of shape ", shape_of(*residual));
  uint8_t* to = checked_payload(op, payload);
  // Without a residual, only the payloads bound the segments.
  const Extent elements{kept == nullptr ? "what payloads can hold" : "residual",
                        kept == nullptr ? INT64_MAX / 2 : residual->numel()};
  const Segments s =
      checked(op, segments, coding, elements, {{"payloads", payloads.size(1)}, {"payload", payload.numel()}});
  const auto kernel = compress_kernels().reduce;
  parallel_runs(coding, s, [&](const Records& r, int64_t byte) {
    kernel(r, {shards.data + byte, shards.stride, shards.ranks, shards.factor},
           kept == nullptr ? nullptr : kept + r.first, to + byte);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("compress_encode", TORCH_BOX(&compress_encode));
  m.impl("compress_decode", TORCH_BOX(&compress_decode));
  m.impl("compress_reduce", TORCH_BOX(&compress_reduce));
}

}  // namespace pykernels
