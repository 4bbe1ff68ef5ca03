// How a family of kernels is built once per isa and chosen at run time. Torch-free.
//
// kernels.h of a family:      struct PoolKernels { void (*max_u8)(...); ... };
//                             PYKERNELS_TABLE(PoolKernels, pool_kernels)
// kernels.cpp (every isa):    namespace pykernels::PYKERNELS_ISA_NS { ... const PoolKernels pool_kernels = {...}; }
// csrc/cpu/dispatch.cpp:      PYKERNELS_DISPATCH(PK_ISA_BASES, PoolKernels, pool_kernels)
// op.cpp:                     pool_kernels().max_u8(...)
#pragma once

#include "cpu/features.h"

namespace pykernels {

// The isa in force: choose_isa()'s at load, or what set_isa() said last (tests run every isa in one process).
Isa current_isa();
void set_isa(Isa isa);

}  // namespace pykernels

#define PYKERNELS_DECLARE(isa, Table, name) \
  namespace isa {                           \
  extern const Table name;                  \
  }
#define PYKERNELS_TABLE(Table, name)      \
  PK_ISAS(PYKERNELS_DECLARE, Table, name) \
  const Table& name();

#define PYKERNELS_ADDRESS(isa, name) &isa::name,
// ISAS: PK_ISAS where a family is built for every isa, PK_ISA_BASES where for those that are a base.
#define PYKERNELS_DISPATCH(ISAS, Table, name)                                      \
  const Table& name() {                                                            \
    static const Table* const tables[kIsaCount] = {ISAS(PYKERNELS_ADDRESS, name)}; \
    return *tables[static_cast<int>(current_isa())];                               \
  }
