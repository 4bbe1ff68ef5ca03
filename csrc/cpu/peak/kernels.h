// What this machine could do at most, measured: the ceiling that benchmarks hold every kernel against.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/isa/isa.h"

namespace pykernels {

// Each arithmetic loop runs `steps` rounds of independent multiply-accumulates that never leave the registers and
// returns the operations it did (a multiply and an add are two). Its instruction is the best one by which this isa sums
// exactly:
//   fp32   FMA (mulps + addps before AVX2)
//   bf16   tdpbf16ps, vdpbf16ps, or the fp32 loop where bf16 is widened
//   int8   u8 x s8 into s32: tdpbusd, vpdpbusd, or vpmaddwd + vpaddd on operands already widened to 16 bits
// Each memory loop goes `rounds` times over its own slice and returns the bytes it moved.
//   read   loads and combines; `sink` receives a byte so that the loads are not removed
//   copy   loads and stores: two bytes moved for each byte copied
struct PeakKernels {
  double (*fp32)(int64_t steps);
  double (*bf16)(int64_t steps);
  double (*int8)(int64_t steps);
  double (*read)(const uint8_t* source, int64_t bytes, int64_t rounds, uint8_t* sink);
  double (*copy)(uint8_t* target, const uint8_t* source, int64_t bytes, int64_t rounds);
};
PYKERNELS_TABLE(PeakKernels, peak_kernels)

}  // namespace pykernels
