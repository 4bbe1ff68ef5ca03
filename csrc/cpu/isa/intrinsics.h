// The x86 intrinsics, or SIMDe's emulation of them in a build made to test every isa on any host.
#pragma once

#ifdef PYKERNELS_EMULATE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>
#else
#include <immintrin.h>
#endif
