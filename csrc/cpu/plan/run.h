// Runs the drivers of a plan, one after another, in one parallel region. Torch-free.
//
// A thread that comes, however late, goes through all drivers: it takes tasks of its own share first (the same part of
// the image in every driver, so that what it reads is what it wrote, in its own cache), then those of others, and waits
// for nothing but tasks that others have taken. So any number of threads that really come will do.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "cpu/driver.h"

namespace pykernels {

int64_t steady_nanoseconds();

class Runner {
 public:
  // For as many threads as the drivers were made for; they must outlive it.
  Runner(std::vector<const Driver*> drivers, int64_t threads);

  int64_t scratch_bytes() const { return scratch_bytes_; }  // of one thread, a multiple of 128

  // Before the threads come.
  void begin();
  // What thread `me` of all does; `memory` is scratch_bytes() of its own. `ends`: when the last task of each driver was
  // done, in nanoseconds of the steady clock.
  void take_part(int64_t me, uint8_t* memory, int64_t* ends = nullptr);

 private:
  struct alignas(128) Counter {
    std::atomic<int64_t> value{0};
  };

  int64_t threads_;
  int64_t scratch_bytes_ = 0;
  std::vector<const Driver*> drivers_;
  std::vector<Counter> taken_;  // [drivers][threads]: tasks of each share
  std::vector<Counter> done_;   // [drivers]
};

}  // namespace pykernels
