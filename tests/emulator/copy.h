// When copies are done, for those who begin them.
#pragma once

#include "emulator/machine.h"

namespace emulator {

// What ends with an mbarrier knowing: when somebody waits for it and nothing else can go on.
void later(Pending p);
// A store of a thread from shared memory: when the thread waits for its bulk group.
void store_later(Warp& w, int lane, std::function<void()> store);
// Bytes of the mbarrier's phase have come.
void complete(Block& block, uint32_t at, int64_t bytes);

}  // namespace emulator
