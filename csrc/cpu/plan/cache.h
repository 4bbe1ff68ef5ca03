// Plans made ready, kept by what they were made ready for. Torch-free.
#pragma once

#include <memory>

#include "cpu/plan/prepare.h"

namespace pykernels {

// What a plan was made ready for. Weights at an address are those that were there, as long as the plan says the same.
struct PlanKey {
  uint64_t hash;  // of the plan
  int64_t plan_bytes;
  const void* weights;
  int64_t weight_bytes;
  int64_t threads;
  int isa;
  Ints inputs;  // sizes and strides

  bool operator==(const PlanKey&) const = default;
};

// One plan made ready, with memory of its own: for one call at a time.
class Prepared {
 public:
  Prepared(PlanKey key, PlanLayout layout, const uint8_t* weights);

  const PlanKey key;
  const PlanLayout& layout() const { return layout_; }
  int64_t memory_bytes() const { return static_cast<int64_t>(memory_bytes_); }

  // `memory[i]`: the first byte of input or output i.
  void bind(const uint8_t* const* inputs, uint8_t* const* outputs);
  Runner& runner() { return runner_; }
  uint8_t* scratch(int64_t thread) { return scratch_ + thread * runner_.scratch_bytes(); }

 private:
  struct Free {
    void operator()(uint8_t* memory) const;
  };
  uint8_t* at(const PlanLayout::Place& place, const uint8_t* const* inputs, uint8_t* const* outputs) const;
  void bind(size_t driver, const uint8_t* const* inputs, uint8_t* const* outputs);

  PlanLayout layout_;
  const uint8_t* weights_;
  Runner runner_;
  size_t memory_bytes_;
  std::unique_ptr<uint8_t[], Free> memory_;
  uint8_t* scratch_;
  std::vector<const uint8_t*> operands_;
  std::vector<size_t> bound_;  // drivers that touch an input or output
};

// Takes one that lies ready, or null; it comes back by give(), which keeps those of the kinds used last: so many of one
// plan, and so many of all.
inline constexpr size_t kKept = 16, kKeptOfAll = 256;
std::unique_ptr<Prepared> take(const PlanKey& key);
void give(std::unique_ptr<Prepared> prepared);
// Forgets all that was made ready over these weights.
void forget(const void* weights);

}  // namespace pykernels
