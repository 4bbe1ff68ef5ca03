#include "cpu/features.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

namespace pykernels {
namespace {

struct Features {
  bool avx2 = false, avxvnni = false, avx512 = false, avx512vnni = false, avx512bf16 = false, amx = false;
};

// The tile registers are a process's only when it has asked for them; every thread has them then.
bool permit_tiles() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

uint64_t xgetbv0() {
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (uint64_t{hi} << 32) | lo;
}

// A CPU that has the instructions is not enough: the system must save the registers (XCR0), or they fault.
Features read_features() {
  Features f;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool osxsave = c & (1u << 27), fma = c & (1u << 12), f16c = c & (1u << 29);
  if (!osxsave) return f;
  const uint64_t xcr0 = xgetbv0();
  const bool ymm = (xcr0 & 0x6) == 0x6, zmm = (xcr0 & 0xe6) == 0xe6;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  f.avx2 = ymm && fma && f16c && (b & (1u << 5));
  const uint32_t wanted = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
  f.avx512 = f.avx2 && zmm && (b & wanted) == wanted;
  f.avx512vnni = f.avx512 && (c & (1u << 11));
  uint32_t a1, b1, c1, d1;
  if (a >= 1 && __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1)) {
    f.avxvnni = f.avx2 && (a1 & (1u << 4));
    f.avx512bf16 = f.avx512vnni && (a1 & (1u << 5));
    const uint32_t tiles = (1u << 22) | (1u << 24) | (1u << 25);  // BF16, TILE, INT8
    f.amx = f.avx512bf16 && (d & tiles) == tiles && (xcr0 & 0x60000) == 0x60000 && permit_tiles();
  }
  return f;
}

const Features& features() {
  static const Features f = read_features();
  return f;
}

}  // namespace

bool isa_available(Isa isa) {
  const Features& f = features();
#ifdef PYKERNELS_EMULATE
  return isa == Isa::scalar || f.avx2;
#else
  switch (isa) {
    case Isa::scalar: return true;
    case Isa::avx2: return f.avx2;
    case Isa::avxvnni: return f.avxvnni;
    case Isa::avx512: return f.avx512;
    case Isa::avx512vnni: return f.avx512vnni;
    case Isa::avx512bf16: return f.avx512bf16;
    case Isa::amx: return f.amx;
  }
  return false;
#endif
}

int isa_by_name(const char* name) {
  for (int i = 0; i < kIsaCount; ++i)
    if (std::strcmp(name, kIsaNames[i]) == 0) return i;
  return -1;
}

Isa choose_isa(const char** error) {
  *error = nullptr;
  Isa best = Isa::scalar;
#ifdef PYKERNELS_EMULATE
  const int last = static_cast<int>(Isa::avx2);  // emulated isas are run only when asked for by name
#else
  const int last = kIsaCount - 1;
#endif
  for (int i = 0; i <= last; ++i)
    if (isa_available(static_cast<Isa>(i))) best = static_cast<Isa>(i);
  const char* wanted = std::getenv("PYKERNELS_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  const int found = isa_by_name(wanted);
  if (found < 0) {
    *error = "PYKERNELS_ISA must be one of " PK_ISA_WORDS;
    return best;
  }
  if (!isa_available(static_cast<Isa>(found))) {
    *error = "PYKERNELS_ISA names an isa that this CPU does not have";
    return best;
  }
  return static_cast<Isa>(found);
}

}  // namespace pykernels
