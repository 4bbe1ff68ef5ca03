// Checks that name the argument. Torch-free: the host framework makes a RuntimeError of what they throw.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace pykernels {

template <class... Args>
[[noreturn]] __attribute__((cold, noinline)) void refuse(const Args&... parts) {
  std::ostringstream message;
  message << "pykernels: ";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

}  // namespace pykernels

#define PK_CHECK(condition, ...) (__builtin_expect(static_cast<bool>(condition), 1) ? void() : refuse(__VA_ARGS__))

namespace pykernels {

using Ints = std::vector<int64_t>;

inline std::string shape_of(const int64_t* sizes, int64_t dims) {
  std::string s = "[";
  for (int64_t i = 0; i < dims; ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + "]";
}

// The pair of an int[2] argument.
inline void check_pair(const char* op, const char* name, const Ints& v, int64_t least) {
  PK_CHECK(v.size() == 2, op, ": ", name, " must have 2 numbers, not ", v.size());
  for (int64_t x : v)
    PK_CHECK(x >= least && x < (int64_t{1} << 31), op, ": ", name, " must be at least ", least, " and below 2^31, not ",
             x);
}

// A scale: finite and positive, and so is its reciprocal in fp32.
inline void check_scale(const char* op, const char* name, double scale) {
  const float s = static_cast<float>(scale);
  PK_CHECK(s > 0.0f && 1.0f / s > 0.0f && s * 0.0f == 0.0f && (1.0f / s) * 0.0f == 0.0f, op, ": ", name,
           " must be a positive number that fp32 holds, not ", scale);
}

}  // namespace pykernels
