// How drivers cut a run of units into tasks. Torch-free.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "cpu/driver.h"

namespace pykernels {

// Elements worth a thread of their own.
inline constexpr int64_t kGrain = int64_t{1} << 15;

// [0, n) in `count` neighbouring pieces of nearly one size, cut at multiples of `multiple` units.
struct Pieces {
  int64_t n = 0, count = 0, multiple = 1;

  int64_t begin(int64_t i) const {
    const int64_t blocks = (n + multiple - 1) / multiple;
    return std::min(n, (blocks / count * i + std::min(i, blocks % count)) * multiple);
  }
};

// Pieces of at least kGrain of the `work` elements that all units take, so far as there are units, and `each` at most a
// thread: several, where threads that are early may take more than their share.
inline Pieces cut(int64_t n, double work, int64_t threads, int64_t multiple = 1, int64_t each = 4) {
  if (n <= 0) return {};
  const int64_t most = std::min(each * threads, (n + multiple - 1) / multiple);
  const double worth = std::min(work / kGrain, static_cast<double>(most));
  return {n, std::max<int64_t>(1, static_cast<int64_t>(worth)), multiple};
}

// So many units of `elements` dense elements fill whole cache lines: cut there, no two tasks write to one line.
inline int64_t units_of_lines(int64_t elements) { return 64 / std::gcd(int64_t{64}, elements); }

// A driver whose task is a piece of its units.
class PiecesDriver : public Driver {
 public:
  void run(int64_t task, uint8_t* memory) const final { piece(pieces_.begin(task), pieces_.begin(task + 1), memory); }

 protected:
  void set(const Pieces& pieces) {
    pieces_ = pieces;
    tasks = pieces.count;
  }
  virtual void piece(int64_t begin, int64_t end, uint8_t* memory) const = 0;

 private:
  Pieces pieces_;
};

// One from n dense elements to as many.
class UnaryDriver : public PiecesDriver {
 public:
  void bind(const uint8_t* const* in, uint8_t* out) override {
    x_ = in[0];
    out_ = out;
  }

 protected:
  UnaryDriver(int64_t n, int64_t threads) { set(cut(n, static_cast<double>(n), threads, 64)); }

  const uint8_t* x_ = nullptr;
  uint8_t* out_ = nullptr;
};

}  // namespace pykernels
