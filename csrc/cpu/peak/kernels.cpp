// acc[i] += a * b for i < kChains, `steps` times: enough independent chains to cover the latency of the instruction
// (4 or 5 cycles, two issued a cycle), few enough to stay in the registers. The operands pass through an empty asm in
// each step, so the compiler can neither hoist the product nor fold steps together; read the disassembly after any
// change: the loop must hold nothing but the arithmetic and its counter.
#include "cpu/peak/kernels.h"

#include "cpu/isa/intrinsics.h"
#include "cpu/isa/vec.h"
#if defined(PYKERNELS_ISA_AMX)
#include "cpu/isa/amx.h"
#endif

namespace pykernels::PYKERNELS_ISA_NS {
namespace {

#define KEEP(value) asm volatile("" : "+x"(value))
#ifdef PYKERNELS_EMULATE
#define KEEP_WIDE(value) asm volatile("" : "+m"(value))  // 512 bits have no register there
#else
#define KEEP_WIDE(value) asm volatile("" : "+v"(value))
#endif

#if defined(PYKERNELS_ISA_SCALAR)

// What every x86-64 has: SSE2. The "scalar" kernels are plain C++, and this is the most that a compiler could make of
// them.
constexpr int kChains = 12;

__attribute__((noinline)) double fp32(int64_t steps) {
  __m128 acc[kChains], a = _mm_set1_ps(1.0f), b = _mm_set1_ps(1e-30f);
#pragma GCC unroll 32
  for (auto& c : acc) c = _mm_setzero_ps();
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 32
    for (auto& c : acc) {
      KEEP(a);  // or the compiler would multiply once
      c = _mm_add_ps(c, _mm_mul_ps(a, b));
    }
  }
#pragma GCC unroll 32
  for (auto& c : acc) KEEP(c);
  return double(steps) * kChains * 4 * 2;
}

__attribute__((noinline)) double int8(int64_t steps) {
  __m128i acc[kChains], a = _mm_set1_epi16(3), b = _mm_set1_epi16(5);
#pragma GCC unroll 32
  for (auto& c : acc) c = _mm_setzero_si128();
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 32
    for (auto& c : acc) {
      KEEP(a);
      c = _mm_add_epi32(c, _mm_madd_epi16(a, b));
    }
  }
#pragma GCC unroll 32
  for (auto& c : acc) KEEP(c);
  return double(steps) * kChains * 8 * 2;
}

#else

#if defined(PYKERNELS_ISA_AVX2) || defined(PYKERNELS_ISA_AVXVNNI)
constexpr int kChains = 12;
#else
constexpr int kChains = 24;
#endif

__attribute__((noinline)) double fp32(int64_t steps) {
  f32 acc[kChains], a = set1(1.0f), b = set1(1e-30f);
#pragma GCC unroll 32
  for (auto& c : acc) c = set1(0.0f);
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 32
    for (auto& c : acc) {
      c = fma(a, b, c);
      KEEP_WIDE(c);
    }
  }
  return double(steps) * kChains * kLanes * 2;
}

#if defined(PYKERNELS_ISA_AMX)
// Six registers of sums, 16x16 each, of the products of the other two.
template <class Dot>
PK_INLINE double in_tiles(int64_t steps, Dot dot) {
  tmm::Config config;
  for (int t = 0; t < 8; ++t) config.rows[t] = 16, config.bytes[t] = 64;
  tmm::configure(config);
  for (int64_t s = 0; s < steps; ++s) dot();
  tmm::release();
  return double(steps) * 6 * 16 * 16 * 2;
}
#define PK_SIX(dot) dot<0, 6, 7>(), dot<1, 6, 7>(), dot<2, 6, 7>(), dot<3, 6, 7>(), dot<4, 6, 7>(), dot<5, 6, 7>()
__attribute__((noinline)) double int8(int64_t steps) {
  return 64 * in_tiles(steps, []() __attribute__((always_inline)) { PK_SIX(tmm::dot_u8s8); });
}
__attribute__((noinline)) double bf16(int64_t steps) {
  return 32 * in_tiles(steps, []() __attribute__((always_inline)) { PK_SIX(tmm::dot_bf16); });
}
#else
// One step of the isa's exact integer dot product, and the multiplies in it. Where the product does not depend on the
// sum, an operand is kept opaque: the compiler would multiply once.
#if defined(PYKERNELS_ISA_AVX512VNNI)
constexpr int kProducts = 64;
PK_INLINE i32 dot(i32 c, i32& a, i32 b) { return _mm512_dpbusd_epi32(c, a, b); }
#elif defined(PYKERNELS_ISA_AVX512)
constexpr int kProducts = 32;
PK_INLINE i32 dot(i32 c, i32& a, i32 b) {
  KEEP_WIDE(a);
  return _mm512_add_epi32(c, _mm512_madd_epi16(a, b));
}
#elif defined(PYKERNELS_ISA_AVXVNNI)
constexpr int kProducts = 32;
PK_INLINE i32 dot(i32 c, i32& a, i32 b) { return _mm256_dpbusd_avx_epi32(c, a, b); }
#else
constexpr int kProducts = 16;
PK_INLINE i32 dot(i32 c, i32& a, i32 b) {
  KEEP_WIDE(a);
  return _mm256_add_epi32(c, _mm256_madd_epi16(a, b));
}
#endif

__attribute__((noinline)) double int8(int64_t steps) {
  i32 acc[kChains], a = set1_i32(0x00030003), b = set1_i32(0x00050005);
#pragma GCC unroll 32
  for (auto& c : acc) c = set1_i32(0);
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 32
    for (auto& c : acc) {
      c = dot(c, a, b);
      KEEP_WIDE(c);
    }
  }
  return double(steps) * kChains * kProducts * 2;
}
#endif

#endif

#if defined(PYKERNELS_ISA_AVX512BF16) && !defined(PYKERNELS_ISA_AMX)
__attribute__((noinline)) double bf16(int64_t steps) {
  f32 acc[kChains];
  const auto a = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
  const auto b = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x0080));
#pragma GCC unroll 32
  for (auto& c : acc) c = set1(0.0f);
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 32
    for (auto& c : acc) {
      c = _mm512_dpbf16_ps(c, a, b);
      KEEP_WIDE(c);
    }
  }
  return double(steps) * kChains * 32 * 2;
}
#elif !defined(PYKERNELS_ISA_AMX)
double bf16(int64_t steps) { return fp32(steps); }
#endif

double read(const uint8_t* source, int64_t bytes, int64_t rounds, uint8_t* sink) {
  constexpr int64_t block = 4 * kBytes;
  const int64_t whole = bytes / block * block;
  u8 acc[4] = {set1_u8(0), set1_u8(0), set1_u8(0), set1_u8(0)};
  for (int64_t round = 0; round < rounds; ++round) {
    for (int64_t i = 0; i < whole; i += block)
      for (int k = 0; k < 4; ++k) acc[k] = xor_u8(acc[k], load_u8(source + i + k * kBytes));
    asm volatile("" ::: "memory");
  }
  uint8_t buffer[kBytes];
  store_u8(buffer, xor_u8(xor_u8(acc[0], acc[1]), xor_u8(acc[2], acc[3])));
  *sink = buffer[0];
  return double(whole) * double(rounds);
}

double copy(uint8_t* target, const uint8_t* source, int64_t bytes, int64_t rounds) {
  for (int64_t round = 0; round < rounds; ++round) {
    std::memcpy(target, source, size_t(bytes));
    asm volatile("" ::: "memory");
  }
  return 2.0 * double(bytes) * double(rounds);
}

}  // namespace

const PeakKernels peak_kernels = {fp32, bf16, int8, read, copy};

}  // namespace pykernels::PYKERNELS_ISA_NS
