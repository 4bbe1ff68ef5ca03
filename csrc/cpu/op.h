// What the families' op.cpp share: drivers and loops on the host framework's threads.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "common/stable.h"
#include "cpu/driver.h"

namespace pykernels {

// f(begin, end) over [0, n), at least `grain` a thread.
template <class F>
void parallel(int64_t n, int64_t grain, const F& f) {
  if (n > 0) torch::stable::parallel_for(0, n, grain, f);
}

inline const uint8_t* bytes_of(const Tensor& t) { return static_cast<const uint8_t*>(t.const_data_ptr()); }
inline uint8_t* mutable_bytes_of(const Tensor& t) { return static_cast<uint8_t*>(t.mutable_data_ptr()); }

// Binds the driver to its operands and runs all its tasks, a run of them a thread; their scratch is allocated here,
// since nothing may throw in a task.
inline void run(Driver& driver, const uint8_t* const* in, const Tensor& out) {
  if (driver.tasks == 0) return;
  driver.bind(in, mutable_bytes_of(out));
  const int64_t each = (driver.scratch + 63) / 64 * 64;
  const int64_t runs = std::min<int64_t>(driver.tasks, torch::stable::get_num_threads());
  const Tensor scratch = each ? empty({runs * each}, ScalarType::Byte) : out;  // an allocation takes a microsecond
  uint8_t* memory = each ? mutable_bytes_of(scratch) : nullptr;
  parallel(runs, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      for (int64_t task = driver.tasks * i / runs; task < driver.tasks * (i + 1) / runs; ++task)
        driver.run(task, memory + i * each);
  });
}

inline void run(Driver& driver, std::initializer_list<const uint8_t*> in, const Tensor& out) {
  run(driver, in.begin(), out);
}

}  // namespace pykernels
