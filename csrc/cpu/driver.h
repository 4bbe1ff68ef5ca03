// A call of a family's kernels, cut into tasks that may run at once, in any order, on any threads: what an op runs and
// forgets and a plan keeps. Torch-free.
//
// A driver is made for a geometry and a number of threads, which decides nothing but how the call is cut: the answer
// has the same bits. Memory is bound to it afterwards, and may be bound anew between runs.
#pragma once

#include <cstdint>

namespace pykernels {

// What a task reads lies apart (two lines, which processors fetch in pairs) from what other threads write.
class alignas(128) Driver {
 public:
  virtual ~Driver() = default;

  int64_t tasks = 0;    // 0: there is nothing to do
  int64_t scratch = 0;  // bytes that a running task needs

  // The first bytes of the operands (as many as the driver says, null where one is left out) and of the output.
  virtual void bind(const uint8_t* const* in, uint8_t* out) = 0;
  // `memory` is the task's own: scratch bytes at a multiple of 64.
  virtual void run(int64_t task, uint8_t* memory) const = 0;
};

}  // namespace pykernels
