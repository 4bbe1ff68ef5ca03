// AMX's eight tile registers, each of up to 16 rows of up to 64 bytes: what dot tiles and the peak need of them. A
// register is a template argument. For sources compiled for the isa amx.
//
//   configure(config)          sizes of all registers, which become zero   release()  gives them back to the system
//   load<t>(p, stride)         row r from p + r * stride                   store<t>(p, stride)
//   zero<t>()
//   dot_u8s8<c, a, b>()        c[m][n] += dot of the 4 bytes a[m][k], u8, and b[k][n], s8, for every k; exact, s32
//   dot_bf16<c, a, b>()        of the 2 bf16, in fp32; denormals are zeros
#pragma once

#include "cpu/isa/vec.h"

namespace pykernels::PYKERNELS_ISA_NS {
namespace tmm {

struct Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(Config) == 64);

#ifdef PYKERNELS_EMULATE

struct Registers {
  Config config;
  alignas(64) uint8_t row[8][16][64];
};
static thread_local Registers registers;

static inline void configure(const Config& c) {
  registers.config = c;
  std::memset(registers.row, 0, sizeof registers.row);
}
static inline void release() { registers.config = {}; }
template <int t>
static inline void zero() {
  std::memset(registers.row[t], 0, sizeof registers.row[t]);
}
template <int t>
static inline void load(const void* p, int64_t stride) {
  zero<t>();
  for (int r = 0; r < registers.config.rows[t]; ++r)
    std::memcpy(registers.row[t][r], static_cast<const char*>(p) + r * stride, registers.config.bytes[t]);
}
template <int t>
static inline void store(void* p, int64_t stride) {
  for (int r = 0; r < registers.config.rows[t]; ++r)
    std::memcpy(static_cast<char*>(p) + r * stride, registers.row[t][r], registers.config.bytes[t]);
}
// Of every element of c: each(sum, row m of a, row k of b from column n on) for every k, then last(sum).
template <int c, int a, int b, class T, class Sum, class Each, class Last>
static inline void each_element(Sum zero, Each each, Last last) {
  const Config& config = registers.config;
  for (int m = 0; m < config.rows[c]; ++m)
    for (int n = 0; n < config.bytes[c] / 4; ++n) {
      Sum sum = zero;
      for (int k = 0; k < config.bytes[a] / 4; ++k) each(sum, registers.row[a][m] + 4 * k, registers.row[b][k] + 4 * n);
      T element;
      std::memcpy(&element, registers.row[c][m] + 4 * n, 4);
      element = last(element, sum);
      std::memcpy(registers.row[c][m] + 4 * n, &element, 4);
    }
}
template <int c, int a, int b>
static inline void dot_u8s8() {
  each_element<c, a, b, int32_t>(
      int32_t{0},
      [](int32_t& sum, const uint8_t* x, const uint8_t* w) {
        for (int i = 0; i < 4; ++i) sum += x[i] * static_cast<int8_t>(w[i]);
      },
      [](int32_t before, int32_t sum) { return before + sum; });
}
template <int c, int a, int b>
static inline void dot_bf16() {
  struct Sums {
    float of[2];
  };
  const auto flushed = [](float f) { return (f < 0 ? -f : f) < 1.17549435e-38f ? 0.0f : f; };
  each_element<c, a, b, float>(
      Sums{},
      [&](Sums& sums, const uint8_t* x, const uint8_t* w) {
        for (int i = 0; i < 2; ++i) {
          uint32_t bits[2] = {};
          std::memcpy(reinterpret_cast<char*>(bits) + 2, x + 2 * i, 2);
          std::memcpy(reinterpret_cast<char*>(bits + 1) + 2, w + 2 * i, 2);
          float f[2];
          std::memcpy(f, bits, 8);
          sums.of[i] = flushed(sums.of[i] + flushed(f[0]) * flushed(f[1]));
        }
      },
      [&](float before, Sums sums) { return flushed(flushed(before) + flushed(sums.of[0] + sums.of[1])); });
}

#else

// GCC's own macros want a register's number spelled out, and do not say that they read and write memory.
PK_INLINE void configure(const Config& c) { asm volatile("ldtilecfg %0" ::"m"(c)); }
PK_INLINE void release() { asm volatile("tilerelease"); }
template <int t>
PK_INLINE void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(t));
}
template <int t>
PK_INLINE void load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(t), "r"(p), "r"(stride) : "memory");
}
template <int t>
PK_INLINE void store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(t), "r"(p), "r"(stride) : "memory");
}
template <int c, int a, int b>
PK_INLINE void dot_u8s8() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}
template <int c, int a, int b>
PK_INLINE void dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

#endif

}  // namespace tmm
}  // namespace pykernels::PYKERNELS_ISA_NS
