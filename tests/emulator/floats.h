// Numbers in the device's formats, exactly: every one of them is a double, rounded.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace emulator {

enum class Rounding : uint8_t { nearest, zero, down, up };

struct Format {
  int fraction;  // bits
  int exponent;
};
inline constexpr Format kHalf{10, 5}, kBfloat{7, 8}, kTf32{10, 8}, kFloat{23, 8};

inline double integral(double x, Rounding r) {
  switch (r) {
    case Rounding::nearest: return std::nearbyint(x);
    case Rounding::zero: return std::trunc(x);
    case Rounding::down: return std::floor(x);
    case Rounding::up: return std::ceil(x);
  }
  return x;
}

// The bits of x in a format of at most 32 bits.
inline uint32_t encode(double x, Format f, Rounding r) {
  const int width = 1 + f.exponent + f.fraction, bias = (1 << (f.exponent - 1)) - 1;
  const uint32_t infinity = ((1u << f.exponent) - 1) << f.fraction;
  const uint32_t sign = std::signbit(x) ? 1u << (width - 1) : 0;
  if (std::isnan(x)) return (1u << (width - 1)) - 1;
  if (std::isinf(x)) return sign | infinity;
  if (x == 0) return sign;
  const int e = std::max(std::ilogb(x), 1 - bias);  // denormals share the smallest exponent
  const double steps = std::fabs(integral(std::ldexp(x, f.fraction - e), r));
  // steps counts units of the last place: with the exponent in front, a carry makes the next exponent by itself
  const uint64_t bits = (uint64_t(e + bias - 1) << f.fraction) + uint64_t(steps);
  if (bits >= infinity) {
    const bool away = r == Rounding::nearest || (r == Rounding::down && sign) || (r == Rounding::up && !sign);
    return sign | (away ? infinity : infinity - 1);
  }
  return sign | static_cast<uint32_t>(bits);
}

inline double decode(uint32_t bits, Format f) {
  const int width = 1 + f.exponent + f.fraction, bias = (1 << (f.exponent - 1)) - 1;
  const double sign = bits >> (width - 1) & 1 ? -1 : 1;
  const int e = static_cast<int>(bits >> f.fraction & ((1u << f.exponent) - 1));
  const uint32_t fraction = bits & ((1u << f.fraction) - 1);
  if (e == (1 << f.exponent) - 1)
    return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  return sign * std::ldexp(double(fraction) + (e ? double(1u << f.fraction) : 0), std::max(e, 1) - bias - f.fraction);
}

}  // namespace emulator
