// compress_encode, compress_decode, compress_reduce: the records of all segments are split evenly over the threads.
#include "cpu/compress/op.h"

namespace pykernels {
namespace {

constexpr auto on_torchs_threads = [](int64_t n, int64_t grain, const auto& body) {
  torch::stable::parallel_for(0, n, grain, body);
};

void compress_encode(const Tensor& x, const Optional& residual, const Tensor& payload, const Tensor& segments,
                     std::string codec, int64_t block, bool stochastic, int64_t seed) {
  const char* op = "compress_encode";
  encode(coding_of(op, codec, block, stochastic, seed), elements_of(op, "x", x), state_of(op, "residual", residual),
         bytes_of(op, "payload", payload, 1), segments_of(op, segments), on_torchs_threads);
}

void compress_decode(const Tensor& payloads, const Tensor& out, const Tensor& segments, std::string codec,
                     int64_t block, double factor, const Optional& weights) {
  const char* op = "compress_decode";
  decode(coding_of(op, codec, block), bytes_of(op, "payloads", payloads, 2), elements_of(op, "out", out),
         segments_of(op, segments), factor, weights_of(op, weights), on_torchs_threads);
}

void compress_reduce(const Tensor& payloads, const Optional& residual, const Tensor& payload, const Tensor& segments,
                     std::string codec, int64_t block, double factor, bool stochastic, int64_t seed) {
  const char* op = "compress_reduce";
  PK_CHECK(!residual || residual->dim() == 1, op, ": residual must be flat, not of shape ", shape_of(*residual));
  reduce(coding_of(op, codec, block, stochastic, seed), bytes_of(op, "payloads", payloads, 2),
         state_of(op, "residual", residual), bytes_of(op, "payload", payload, 1), segments_of(op, segments), factor,
         on_torchs_threads);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("compress_encode", TORCH_BOX(&compress_encode));
  m.impl("compress_decode", TORCH_BOX(&compress_decode));
  m.impl("compress_reduce", TORCH_BOX(&compress_reduce));
}

}  // namespace pykernels
