// The one place that chooses among the builds of the kernels.
#include <atomic>

#include "cpu/conv/kernels.h"
#include "cpu/isa/isa.h"
#include "cpu/peak/kernels.h"
#include "cpu/pool/kernels.h"
#include "cpu/quantize/kernels.h"
#include "cpu/tile/kernels.h"

namespace pykernels {
namespace {

struct Choice {
  std::atomic<int> isa;
  const char* error;
  Choice() { isa = static_cast<int>(choose_isa(&error)); }
};

Choice& choice() {
  static Choice c;
  return c;
}

}  // namespace

Isa current_isa() { return static_cast<Isa>(choice().isa.load(std::memory_order_relaxed)); }
void set_isa(Isa isa) { choice().isa = static_cast<int>(isa); }
const char* isa_error() { return choice().error; }

PYKERNELS_DISPATCH(DepthwiseKernels, depthwise_kernels)
PYKERNELS_DISPATCH(DotKernels, dot_kernels)
PYKERNELS_DISPATCH(EpilogueKernels, epilogue_kernels)
PYKERNELS_DISPATCH(PeakKernels, peak_kernels)
PYKERNELS_DISPATCH(PoolKernels, pool_kernels)
PYKERNELS_DISPATCH(QuantizeKernels, quantize_kernels)

}  // namespace pykernels
