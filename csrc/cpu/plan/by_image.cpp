#include "cpu/plan/by_image.h"

#include <algorithm>
#include <utility>

#include "cpu/plan/bind.h"

namespace pykernels {

View image_of(View batch) {
  batch.sizes[0] = 1;
  batch.buffer = -1;
  batch.offset = 0;
  return batch;
}

struct alignas(128) ByImageDriver::Slot {
  Slot(PlanLayout made, const uint8_t* weights, size_t count)
      : layout(std::move(made)),
        binder(layout, weights),
        runner(drivers_of(layout), 1),
        inputs(count),
        ends(layout.drivers.size()) {}

  std::atomic<bool> taken{false};
  std::atomic<const uint8_t*> memory{nullptr};  // of its last task
  PlanLayout layout;
  Binder binder;
  Runner runner;
  std::vector<const uint8_t*> inputs;
  std::vector<int64_t> ends;
};

ByImageDriver::ByImageDriver(const Program& program, const uint8_t* weights, const std::vector<View>& inputs,
                             const View& out, int64_t threads)
    : out_bytes_(out.strides[0] * dtype_bytes(out.dtype)), inputs_(inputs.size()) {
  std::vector<View> one;
  for (const View& v : inputs) {
    one.push_back(image_of(v));
    input_bytes_.push_back(v.strides[0] * dtype_bytes(v.dtype));
  }
  tasks = out.sizes[0];
  for (int64_t i = std::min(threads, tasks); i > 0; --i)
    slots_.push_back(std::make_unique<Slot>(prepare(program, weights, one, 1, 0), weights, one.size()));
  scratch = slots_[0]->binder.bytes() + slots_[0]->runner.scratch_bytes();
}

ByImageDriver::~ByImageDriver() = default;

const PlanLayout& ByImageDriver::layout() const { return slots_[0]->layout; }

void ByImageDriver::bind(const uint8_t* const* in, uint8_t* out) {
  std::copy_n(in, inputs_.size(), inputs_.data());
  out_ = out;
}

// The one that knows the memory where it is free, else any: as there are no fewer than tasks that run, one is free.
ByImageDriver::Slot& ByImageDriver::take(const uint8_t* memory) const {
  for (bool any = false;; any = true)
    for (const std::unique_ptr<Slot>& slot : slots_)
      if ((any || slot->memory.load(std::memory_order_relaxed) == memory) &&
          !slot->taken.exchange(true, std::memory_order_acquire))
        return *slot;
}

void ByImageDriver::run(int64_t task, uint8_t* memory) const {
  Slot& slot = take(memory);
  slot.memory.store(memory, std::memory_order_relaxed);
  for (size_t i = 0; i < inputs_.size(); ++i) slot.inputs[i] = inputs_[i] + task * input_bytes_[i];
  uint8_t* const out = out_ + task * out_bytes_;
  slot.binder.bind(memory, slot.inputs.data(), &out);
  uint8_t* const scratch_of_steps = memory + slot.binder.bytes();
  if (spent_) {
    int64_t before = steady_nanoseconds();
    slot.runner.take_part(0, scratch_of_steps, slot.ends.data());
    for (size_t d = 0; d < slot.ends.size(); ++d)
      (*spent_)[d].fetch_add(slot.ends[d] - std::exchange(before, slot.ends[d]), std::memory_order_relaxed);
  } else {
    slot.runner.take_part(0, scratch_of_steps);
  }
  slot.taken.store(false, std::memory_order_release);
}

}  // namespace pykernels
