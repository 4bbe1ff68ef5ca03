// Where the values of a plan lie in one block of memory, the arena. Torch-free.
#pragma once

#include <cstdint>
#include <vector>

namespace pykernels {

// A piece of memory that is needed while the drivers [first, last] run.
struct Lifetime {
  int64_t bytes;
  int64_t first, last;
};

// The place of each, multiples of kArenaAlignment, such that no two that live at once overlap; *total is the arena's
// size. Largest first, each in the smallest gap that it fits: Pisarchyk, Lee: Efficient memory management for deep
// neural net inference, 2020.
inline constexpr int64_t kArenaAlignment = 128;
std::vector<int64_t> place(const std::vector<Lifetime>& pieces, int64_t* total);

// What lives at once at most: no placement takes less.
int64_t least_bytes(const std::vector<Lifetime>& pieces);

}  // namespace pykernels
