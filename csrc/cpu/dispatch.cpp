// The one place that chooses among the builds of the kernels.
#include <atomic>

#include "cpu/arithmetic/kernels.h"
#include "cpu/attention/kernels.h"
#include "cpu/compress/kernels.h"
#include "cpu/compress/sparse.h"
#include "cpu/conv/kernels.h"
#include "cpu/conv/winograd.h"
#include "cpu/isa/isa.h"
#include "cpu/normalize/kernels.h"
#include "cpu/peak/kernels.h"
#include "cpu/pool/kernels.h"
#include "cpu/quantize/kernels.h"
#include "cpu/tile/kernels.h"
#include "cpu/upsample/kernels.h"

namespace pykernels {
namespace {

// Chosen once; what was wrong with PYKERNELS_ISA is told at import (pykernels/ops/_load.py), not here.
std::atomic<int>& choice() {
  static std::atomic<int> isa = [] {
    const char* complaint = nullptr;
    return static_cast<int>(choose_isa(&complaint));
  }();
  return isa;
}

}  // namespace

Isa current_isa() { return static_cast<Isa>(choice().load(std::memory_order_relaxed)); }
void set_isa(Isa isa) { choice() = static_cast<int>(isa); }

PYKERNELS_DISPATCH(PK_ISA_BASES, CompressKernels, compress_kernels)
#ifndef PYKERNELS_HOST  // the module without torch has no other kernels
PYKERNELS_DISPATCH(PK_ISA_BASES, ArithmeticKernels, arithmetic_kernels)
PYKERNELS_DISPATCH(PK_ISA_BASES, AttentionKernels, attention_kernels)
PYKERNELS_DISPATCH(PK_ISAS, DepthwiseKernels, depthwise_kernels)
PYKERNELS_DISPATCH(PK_ISA_BASES, DepthwiseWordsKernels, depthwise_words_kernels)
PYKERNELS_DISPATCH(PK_ISAS, DotKernels, dot_kernels)
PYKERNELS_DISPATCH(PK_ISA_BASES, EpilogueKernels, epilogue_kernels)
PYKERNELS_DISPATCH(PK_ISA_BASES, NormalizeKernels, normalize_kernels)
PYKERNELS_DISPATCH(PK_ISAS, PeakKernels, peak_kernels)
PYKERNELS_DISPATCH(PK_ISA_BASES, PoolKernels, pool_kernels)
PYKERNELS_DISPATCH(PK_ISA_BASES, QuantizeKernels, quantize_kernels)
PYKERNELS_DISPATCH(PK_ISA_BASES, SparseKernels, sparse_kernels)
PYKERNELS_DISPATCH(PK_ISA_BASES, UpsampleKernels, upsample_kernels)
PYKERNELS_DISPATCH(PK_ISA_BASES, WinogradKernels, winograd_kernels)
#endif

}  // namespace pykernels
