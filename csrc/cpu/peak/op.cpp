// _peak and _bandwidth: every thread of the host framework runs the loop; Python holds the watch
// (pykernels/bench/machine.py).
#include <atomic>
#include <numeric>

#include "common/stable.h"
#include "cpu/peak/kernels.h"

namespace pykernels {
namespace {

double peak(std::string dtype, int64_t steps) {
  const PeakKernels& kernels = peak_kernels();
  double (*loop)(int64_t) = dtype == "int8"   ? kernels.int8
                            : dtype == "bf16" ? kernels.bf16
                            : dtype == "fp32" ? kernels.fp32
                                              : nullptr;
  PK_CHECK(loop != nullptr, "_peak: dtype must be int8, bf16 or fp32, not '", dtype, "'");
  PK_CHECK(steps >= 0, "_peak: steps must not be negative, not ", steps);
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<double> done(threads, 0.0);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) done[t] = loop(steps);
  });
  return std::accumulate(done.begin(), done.end(), 0.0);
}

double bandwidth(Tensor target, Tensor source, std::string kind, int64_t rounds) {
  PK_CHECK(kind == "read" || kind == "copy", "_bandwidth: kind must be read or copy, not '", kind, "'");
  PK_CHECK(rounds >= 0, "_bandwidth: rounds must not be negative, not ", rounds);
  check_byte("_bandwidth", "target", target);
  check_byte("_bandwidth", "source", source);
  PK_CHECK(target.is_contiguous() && source.is_contiguous(), "_bandwidth: target and source must be contiguous");
  PK_CHECK(target.numel() == source.numel(), "_bandwidth: target and source must be equally long, not ", target.numel(),
           " and ", source.numel());
  const int64_t threads = torch::stable::get_num_threads(), bytes = source.numel();
  const int64_t slice = (bytes / threads + 4095) / 4096 * 4096;
  const uint8_t* from = pointer<uint8_t>(source);
  uint8_t* to = mutable_pointer<uint8_t>(target);
  const PeakKernels& kernels = peak_kernels();
  std::vector<double> moved(threads, 0.0);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = std::min(bytes, t * slice), n = std::min(bytes - first, slice);
      if (n == 0) continue;
      uint8_t sink;
      moved[t] = kind == "copy" ? kernels.copy(to + first, from + first, n, rounds)
                                : kernels.read(from + first, n, rounds, &sink);
    }
  });
  return std::accumulate(moved.begin(), moved.end(), 0.0);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CompositeExplicitAutograd, m) {
  m.impl("_peak", TORCH_BOX(&peak));
  m.impl("_bandwidth", TORCH_BOX(&bandwidth));
}

}  // namespace pykernels
