// compress_encode, compress_decode, compress_reduce: the records of all segments are split evenly over the threads.
#include "common/stable.h"
#include "cpu/compress/driver.h"

namespace pykernels {
namespace {

using Optional = std::optional<Tensor>;

Elements elements_of(const char* op, const char* name, const Tensor& t) {
  check_cpu(op, name, t);
  PK_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
  const ScalarType dtype = t.scalar_type();
  PK_CHECK(is_real(dtype) || dtype == ScalarType::Half, op, ": ", name, " must be float32, bfloat16 or float16, not ",
           dtype_name(dtype));
  const Real type = dtype == ScalarType::Float ? Real::fp32 : dtype == ScalarType::Half ? Real::fp16 : Real::bf16;
  return {name, t.data_ptr(), type, t.numel()};
}

Residual residual_of(const char* op, const Optional& residual) {
  if (!residual) return {nullptr, 0};
  check_cpu(op, "residual", *residual);
  PK_CHECK(residual->scalar_type() == ScalarType::Float, op, ": residual must be float32, not ",
           dtype_name(residual->scalar_type()));
  PK_CHECK(residual->is_contiguous(), op, ": residual must be contiguous");
  return {mutable_pointer<float>(*residual), residual->numel()};
}

Bytes bytes_of(const char* op, const char* name, const Tensor& t, int64_t dim) {
  check_cpu(op, name, t);
  PK_CHECK(t.scalar_type() == ScalarType::Byte, op, ": ", name, " must be uint8, not ", dtype_name(t.scalar_type()));
  check_dim(op, name, t, dim);
  PK_CHECK(t.size(dim - 1) <= 1 || t.stride(dim - 1) == 1, op, ": the bytes of ", name, " must be contiguous");
  Bytes bytes{name, static_cast<uint8_t*>(t.data_ptr()), t.size(dim - 1)};
  if (dim == 2) bytes.rows = t.size(0), bytes.stride = t.stride(0);
  return bytes;
}

Segments segments_of(const char* op, const Tensor& segments) {
  check_cpu(op, "segments", segments);
  PK_CHECK(segments.scalar_type() == ScalarType::Long, op, ": segments must be int64, not ",
           dtype_name(segments.scalar_type()));
  PK_CHECK(segments.dim() == 2 && segments.size(1) == 3, op, ": segments must have shape [segments, 3], not ",
           shape_of(segments));
  PK_CHECK(segments.is_contiguous(), op, ": segments must be contiguous");
  return {pointer<int64_t>(segments), segments.size(0)};
}

constexpr auto on_torchs_threads = [](int64_t n, int64_t grain, const auto& body) {
  torch::stable::parallel_for(0, n, grain, body);
};

void compress_encode(const Tensor& x, const Optional& residual, const Tensor& payload, const Tensor& segments,
                     std::string codec, int64_t block, bool stochastic, int64_t seed) {
  const char* op = "compress_encode";
  encode(coding_of(op, codec, block, stochastic, seed), elements_of(op, "x", x), residual_of(op, residual),
         bytes_of(op, "payload", payload, 1), segments_of(op, segments), on_torchs_threads);
}

void compress_decode(const Tensor& payloads, const Tensor& out, const Tensor& segments, std::string codec,
                     int64_t block, double factor) {
  const char* op = "compress_decode";
  decode(coding_of(op, codec, block), bytes_of(op, "payloads", payloads, 2), elements_of(op, "out", out),
         segments_of(op, segments), factor, on_torchs_threads);
}

void compress_reduce(const Tensor& payloads, const Optional& residual, const Tensor& payload, const Tensor& segments,
                     std::string codec, int64_t block, double factor, bool stochastic, int64_t seed) {
  const char* op = "compress_reduce";
  PK_CHECK(!residual || residual->dim() == 1, op, ": residual must be flat, not of shape ", shape_of(*residual));
  reduce(coding_of(op, codec, block, stochastic, seed), bytes_of(op, "payloads", payloads, 2),
         residual_of(op, residual), bytes_of(op, "payload", payload, 1), segments_of(op, segments), factor,
         on_torchs_threads);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("compress_encode", TORCH_BOX(&compress_encode));
  m.impl("compress_decode", TORCH_BOX(&compress_decode));
  m.impl("compress_reduce", TORCH_BOX(&compress_reduce));
}

}  // namespace pykernels
