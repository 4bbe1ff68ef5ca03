// What this CPU can run, and which build of the kernels ("isa") is chosen. Torch-free.
#pragma once

#include <cstdint>

#include "common/lists.h"

namespace pykernels {

// In order of preference; each one includes what stands before it except that avxvnni and avx512 are siblings. Kernels
// that gain nothing from an isa are those of its base.
enum class Isa : int { PK_ISAS(PK_NAME) };
inline constexpr int kIsaCount = PK_ISAS(PK_COUNTED);
inline constexpr const char* kIsaNames[kIsaCount] = {PK_ISAS(PK_QUOTED)};

// CPUID and XGETBV agree that this isa may run here (always true of scalar; of every isa in an emulating build).
bool isa_available(Isa isa);

// The best available isa, or the one PYKERNELS_ISA names. On a name unknown or not available here: the best, with the
// complaint in *error (a static string, null when all is well).
Isa choose_isa(const char** error);

// The isa of that name, or -1.
int isa_by_name(const char* name);

}  // namespace pykernels
