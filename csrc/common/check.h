// Checks that name the argument. Torch-free: the host framework makes a RuntimeError of what they throw.
#pragma once

#include <sstream>
#include <stdexcept>

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
