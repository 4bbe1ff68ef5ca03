#include "cpu/plan/run.h"

#include <sched.h>

#include <algorithm>
#include <chrono>

namespace pykernels {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// The others' last tasks of a driver end within microseconds, unless the cores are wanted by somebody else.
constexpr int kSpins = 500;

}  // namespace

int64_t steady_nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

Runner::Runner(std::vector<const Driver*> drivers, int64_t threads)
    : threads_(threads),
      drivers_(std::move(drivers)),
      taken_(threads > 1 ? drivers_.size() * threads : 0),
      done_(threads > 1 ? drivers_.size() : 0) {
  for (const Driver* driver : drivers_) scratch_bytes_ = std::max(scratch_bytes_, (driver->scratch + 127) / 128 * 128);
}

void Runner::begin() {
  for (Counter& counter : taken_) counter.value.store(0, std::memory_order_relaxed);
  for (Counter& counter : done_) counter.value.store(0, std::memory_order_relaxed);
}

void Runner::take_part(int64_t me, uint8_t* memory, int64_t* ends) {
  const size_t count = drivers_.size();
  for (size_t d = 0; d < count; ++d) {
    const Driver& driver = *drivers_[d];
    if (threads_ == 1) {
      for (int64_t task = 0; task < driver.tasks; ++task) driver.run(task, memory);
      if (ends) ends[d] = steady_nanoseconds();
    } else {
      Counter* taken = taken_.data() + d * threads_;
      int64_t mine = 0;
      for (int64_t i = 0; i < threads_; ++i) {
        const int64_t share = (me + i) % threads_;
        const int64_t first = driver.tasks * share / threads_, size = driver.tasks * (share + 1) / threads_ - first;
        std::atomic<int64_t>& next = taken[share].value;
        while (next.load(std::memory_order_relaxed) < size) {
          const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
          if (task >= size) break;
          driver.run(first + task, memory);
          ++mine;
        }
      }
      std::atomic<int64_t>& done = done_[d].value;
      const int64_t now = ends ? steady_nanoseconds() : 0;  // before others may go on
      if (mine > 0 && done.fetch_add(mine, std::memory_order_acq_rel) + mine == driver.tasks && ends) ends[d] = now;
      for (int spins = 0; done.load(std::memory_order_acquire) < driver.tasks; ++spins)
        if (spins < kSpins)
          pause();
        else
          sched_yield();
    }
  }
}

}  // namespace pykernels
