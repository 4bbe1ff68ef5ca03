// The thin vector layer the kernels are written on: one set of names, defined once per isa in namespace
// pykernels::<isa>. Only kernel sources compiled per isa include it (CMake defines PYKERNELS_ISA_NS there, and
// PYKERNELS_ISA_<NAME> for the isa and those that it includes). Every function is static and always inlined: nothing
// compiled under an isa's flags may be merged by the linker with another isa's copy. For the same reason kernel sources
// use no std:: function templates.
//
// Types: f32 and i32 hold kLanes 32-bit lanes; u8 holds kBytes bytes. `n` is a number of valid elements, 1..kLanes
// (or kBytes): loads leave zero in the rest and never touch memory past n; stores write n elements.
//   f32  load(const float*|bfloat16*|float16*, n)  store(float*|bfloat16*|float16*, f32, n) (half to even)
//        stream(float*|bfloat16*|float16*, f32): a whole vector past the caches; the address is a multiple of the bytes
//        stored, and fence() makes such stores visible to other threads
//        set1(float)  add sub mul div min max  fma(a,b,c)=a*b+c, rounded once  round (half to even)  floor  abs
//        sqrt
//        min(a,b)/max(a,b) yield b when a or b is NaN: max(zero, x) keeps the NaN of x.
//        max_or_zero(a, b) = 0 where a is NaN, else max(a, b)
//        select_lt(a, b, x, y) = a < b ? x : y, lane by lane
//        select_over(v, m, x, y) = v > m or v is NaN ? x : y; max_nan(v, m) = select_over(v, m, v, m): a running
//        maximum that keeps the first of equals and any NaN, as torch's pools do
//   i32  load_i32(const int32_t*|uint8_t*|int8_t*, n)  store_i32(int32_t*|uint8_t*|int8_t*, i32, n) (8-bit: saturating)
//        store4(uint8_t*|int8_t*, a, b, c, d): 4 kLanes bytes, saturating; store16(uint8_t*|int8_t*, v):
//        v[0] .. v[16 / kLanes - 1], which must fit, as 16 bytes
//        set1_i32  add sub mul min max  to_f32(i32)  to_i32(f32) (half to even; the caller clamps first)
//        sum_lanes(f32|i32), by halves: lane i + lane i + kLanes/2 first
//        shift_left<k>  shift_right<k> (zeros come in)  shift_right_signed<k>  bit_and  bit_or  bit_xor
//        lane_index(): 0, 1, .. kLanes - 1   cast_f32/cast_i32 (the same bits)
//        bits_gt(a, b), bits_eq(a, b): uint32_t, bit i set where a > b, a = b in lane i
//        compact(int32_t* p, v, bits): the lanes whose bits are set, one after another; writes kLanes elements at p and
//        returns how many of them count
//   u8   load_u8(const void*, n)  store_u8(void*, u8, n)  max_u8  min_u8  max_s8  min_s8  set1_u8  xor_u8
//        byte_table(const uint8_t[256]) -> ByteTable   lookup(ByteTable, u8 index)
#pragma once

#include <cstdint>
#include <cstring>

#ifdef PYKERNELS_ISA_CUDA
#define PK_INLINE static __device__ __forceinline__
#else
#include "cpu/isa/intrinsics.h"

#define PK_INLINE static inline __attribute__((always_inline))
#endif

namespace pykernels {

// Storage of a bf16 or an fp16; arithmetic happens in fp32.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

}  // namespace pykernels

#if defined(PYKERNELS_ISA_SCALAR)
#include "cpu/isa/scalar.h"
#elif defined(PYKERNELS_ISA_AVX2) || defined(PYKERNELS_ISA_AVXVNNI)
#include "cpu/isa/avx2.h"
#elif defined(PYKERNELS_ISA_AVX512) || defined(PYKERNELS_ISA_AVX512VNNI)
#include "cpu/isa/avx512.h"
#elif defined(PYKERNELS_ISA_CUDA)  // one thread of a CUDA kernel: what the activations need
#include "cuda/vec.h"
#else
#error "vec.h is for sources compiled once per isa"
#endif
