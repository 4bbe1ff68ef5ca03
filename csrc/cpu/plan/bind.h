// Tells the drivers of a plan made ready where their operands lie. Torch-free.
#pragma once

#include <vector>

#include "cpu/plan/memory.h"
#include "cpu/plan/prepare.h"

namespace pykernels {

// Of one layout; both it and the weights must outlive this.
class Binder {
 public:
  Binder(PlanLayout& layout, const uint8_t* weights);

  // The memory that everything between the steps needs: the arena, and behind it room that kernels may read over the
  // end of the last value.
  int64_t bytes() const { return layout_.arena_bytes + kArenaAlignment; }
  // `arena` is bytes() at a multiple of kArenaAlignment; [i]: the first byte of input or output i. Drivers that touch
  // neither are bound only when the arena is another than the last.
  void bind(uint8_t* arena, const uint8_t* const* inputs, uint8_t* const* outputs);

 private:
  uint8_t* at(const PlanLayout::Place& place, const uint8_t* const* inputs, uint8_t* const* outputs) const;
  void bind(size_t driver, const uint8_t* const* inputs, uint8_t* const* outputs);

  PlanLayout& layout_;
  const uint8_t* weights_;
  uint8_t* arena_ = nullptr;  // that all drivers know
  std::vector<const uint8_t*> operands_;
  std::vector<size_t> outer_;  // drivers that touch an input or output
};

}  // namespace pykernels
