// The first steps of a plan, image by image: a task is an image of the batch, which goes through all of them on one
// thread. So what lies between the steps is one image's, in the thread's own cache, and no thread waits between steps.
// Torch-free.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "cpu/plan/prepare.h"

namespace pykernels {

// Operands: the plan's inputs; output: what the steps behind these read. Of all, images lie along dimension 0.
class ByImageDriver final : public Driver {
 public:
  // `program` has the steps and one output; `inputs` and `out` are those of the whole batch. As many tasks as threads
  // may run at once.
  ByImageDriver(const Program& program, const uint8_t* weights, const std::vector<View>& inputs, const View& out,
                int64_t threads);
  ~ByImageDriver() override;
  void bind(const uint8_t* const* in, uint8_t* out) override;
  void run(int64_t task, uint8_t* memory) const override;

  // For one image and one thread.
  const PlanLayout& layout() const;
  int64_t threads() const { return static_cast<int64_t>(slots_.size()); }
  // The nanoseconds that each of its drivers takes, of all images, are added to these from now on; null: no more.
  void watch(std::vector<std::atomic<int64_t>>* spent) { spent_ = spent; }

 private:
  struct Slot;
  Slot& take(const uint8_t* memory) const;

  std::vector<std::unique_ptr<Slot>> slots_;  // a task that runs has one
  std::vector<int64_t> input_bytes_;          // from an image to the next
  int64_t out_bytes_;
  std::vector<const uint8_t*> inputs_;
  uint8_t* out_ = nullptr;
  std::vector<std::atomic<int64_t>>* spent_ = nullptr;
};

// A view's one image: without a buffer.
View image_of(View batch);

}  // namespace pykernels
