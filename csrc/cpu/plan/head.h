// Which of a plan's first steps run image by image, the head, and whether that pays. Torch-free.
#pragma once

#include <vector>

#include "cpu/plan/prepare.h"

namespace pykernels {

// The first steps of a program, of whose values the others read one alone, and constants.
struct Head {
  int64_t steps = 0;           // 0: there is none
  int value = -1;              // what the others read, or an output
  bool channels_last = false;  // how it lies
};

// Which head a plan gets: the one that moves fewest bytes, if any, or the longest of at most so many steps.
inline constexpr int64_t kGaining = -1;

// The head for these inputs; `whole` is the layout of all steps without one. Its steps yield of every image what they
// yield of the image alone, in the same memory format, so that the answer has the same bits.
Head choose_head(const Program& program, const uint8_t* weights, const std::vector<View>& inputs, int64_t threads,
                 int64_t by_image, const PlanLayout& whole);

}  // namespace pykernels
