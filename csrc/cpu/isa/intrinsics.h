// The x86 intrinsics, or their emulation in a build made to test every isa on any host.
#pragma once

#ifdef PYKERNELS_EMULATE
#include "cpu/isa/emulate.h"
#else
#include <immintrin.h>
#endif
