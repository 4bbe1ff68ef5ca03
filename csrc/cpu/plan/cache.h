// Plans made ready, kept by what they were made ready for. Torch-free.
#pragma once

#include <memory>

#include "cpu/plan/bind.h"

namespace pykernels {

// What a plan was made ready for. Weights at an address are those that were there, as long as the plan says the same.
struct PlanKey {
  uint64_t hash;  // of the plan
  int64_t plan_bytes;
  const void* weights;
  int64_t weight_bytes;
  int64_t threads;
  int isa;
  bool winograd;
  int64_t by_image;
  Ints inputs;  // sizes and strides

  bool operator==(const PlanKey&) const = default;
};

// Memory, at a multiple of kArenaAlignment, every page of which has been touched.
struct Block {
  struct Free {
    void operator()(uint8_t* memory) const;
  };
  int64_t bytes = 0;
  std::unique_ptr<uint8_t[], Free> memory;
};

// One plan made ready: for one call at a time.
class Prepared {
 public:
  Prepared(PlanKey key, PlanLayout layout, const uint8_t* weights);

  const PlanKey key;
  const PlanLayout& layout() const { return layout_; }
  int64_t memory_bytes() const;  // of the block that a call takes

  // Takes a block for this call, which give() hands on. [i]: the first byte of input or output i.
  void bind(const uint8_t* const* inputs, uint8_t* const* outputs);
  Runner& runner() { return runner_; }
  uint8_t* scratch(int64_t thread) { return block_.memory.get() + binder_.bytes() + thread * runner_.scratch_bytes(); }

 private:
  friend void give(std::unique_ptr<Prepared> prepared);

  PlanLayout layout_;
  Binder binder_;
  Runner runner_;
  Block block_;
};

// Takes one that lies ready, or null; it comes back by give(), which keeps those of the kinds used last: so many of one
// plan, and so many of all. Their blocks serve any plan: there are as many as calls that ran at once, each as large as
// the largest of these needed.
inline constexpr size_t kKept = 16, kKeptOfAll = 256;
std::unique_ptr<Prepared> take(const PlanKey& key);
void give(std::unique_ptr<Prepared> prepared);
// Forgets all that was made ready over these weights, and the blocks that lie ready.
void forget(const void* weights);

}  // namespace pykernels
