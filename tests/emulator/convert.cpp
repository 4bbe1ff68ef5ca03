// cvt: between integers and the device's floating-point formats, each rounding as the instruction says.
#include <algorithm>
#include <cmath>

#include "emulator/floats.h"
#include "emulator/machine.h"

namespace emulator {

namespace {

enum Class : uint8_t { kUnsigned, kSigned, kReal };
// kind: class and bits of the target, of the source, rounding, and what else is asked.
enum Flags : uint8_t { kSaturate = 1, kIntegral = 2, kPair = 4, kFlush = 8, kBfloats = 16, kBfloatSource = 32 };

Format format(int bits, bool bfloat) { return bits == 32 ? kFloat : bfloat ? kBfloat : kHalf; }

double real(uint64_t bits, int width, bool bfloat) {
  if (width == 64) return std::bit_cast<double>(bits);
  if (width == 32) return std::bit_cast<float>(static_cast<uint32_t>(bits));
  return decode(static_cast<uint32_t>(bits & 0xffff), format(width, bfloat));
}

uint64_t real_bits(double x, int width, bool bfloat, Rounding r) {
  if (width == 64) return std::bit_cast<uint64_t>(x);
  if (width == 32 && r == Rounding::nearest && !std::isnan(x)) return std::bit_cast<uint32_t>(static_cast<float>(x));
  return encode(x, format(width, bfloat), r);
}

// Out of range: the nearest number that is in it; a NaN is 0.
uint64_t integer_bits(double x, Class type, int width) {
  if (std::isnan(x)) return 0;
  if (type == kUnsigned) {
    if (x <= 0) return 0;
    return x >= std::ldexp(1.0, width) ? ~uint64_t{0} >> (64 - width) : static_cast<uint64_t>(x);
  }
  const double limit = std::ldexp(1.0, width - 1);
  const uint64_t top = uint64_t{1} << (width - 1);
  if (x >= limit) return top - 1;
  return x < -limit ? 0 - top : static_cast<uint64_t>(static_cast<int64_t>(x));
}

uint64_t converted(const Instruction& i, uint64_t bits) {
  const Class to = Class(i.kind[0] >> 6), from = Class(i.kind[1] >> 6);
  const int to_bits = 1 << (i.kind[0] & 15), from_bits = 1 << (i.kind[1] & 15);
  const Rounding r = Rounding(i.kind[2]);
  const uint8_t flags = i.kind[3];
  if (from == kReal) {
    double x = real(bits, from_bits, flags & kBfloatSource);
    if (flags & kFlush && std::fabs(x) < 0x1p-126) x = std::copysign(0.0, x);
    if (to != kReal) return integer_bits(integral(x, r), to, to_bits);
    if (flags & kIntegral) x = integral(x, r);
    if (flags & kSaturate) x = std::isnan(x) ? 0 : std::clamp(x, 0.0, 1.0);
    return real_bits(x, to_bits, flags & kBfloats, r);
  }
  const int64_t x = from == kSigned ? static_cast<int64_t>(bits << (64 - from_bits)) >> (64 - from_bits)
                                    : static_cast<int64_t>(bits & (~uint64_t{0} >> (64 - from_bits)));
  const bool huge = from == kUnsigned && x < 0;  // 2^63 and more
  if (to == kReal) {
    if (to_bits == 32 && r == Rounding::nearest && from_bits == 64)
      return std::bit_cast<uint32_t>(huge ? static_cast<float>(static_cast<uint64_t>(x)) : static_cast<float>(x));
    return real_bits(huge ? static_cast<double>(static_cast<uint64_t>(x)) : static_cast<double>(x), to_bits,
                     flags & kBfloats, r);
  }
  if (!(flags & kSaturate)) return static_cast<uint64_t>(x);
  if (to == kUnsigned) {
    const uint64_t top = ~uint64_t{0} >> (64 - to_bits);
    return huge ? top : x < 0 ? 0 : std::min(static_cast<uint64_t>(x), top);
  }
  const int64_t top = static_cast<int64_t>(~uint64_t{0} >> (65 - to_bits));
  return static_cast<uint64_t>(huge ? top : std::clamp(x, -top - 1, top));
}

Flow convert(Warp& w, const Instruction& i, Lanes lanes) {
  const Class to = Class(i.kind[0] >> 6);
  const int to_bits = 1 << (i.kind[0] & 15);
  each(lanes, [&](int l) {
    uint64_t out = converted(i, get_bits(w, i.r[1], l));
    if (i.kind[3] & kPair) {  // the first source is the upper half
      out = (out & 0xffff) << 16 | (converted(i, get_bits(w, i.r[2], l)) & 0xffff);
    } else if (to == kSigned) {
      out = static_cast<uint64_t>(static_cast<int64_t>(out << (64 - to_bits)) >> (64 - to_bits));
    } else {
      out &= ~uint64_t{0} >> (64 - to_bits);
    }
    put_bits(w, i.r[0], l, out);
  });
  return Flow::next;
}

// The ones that stand in every epilogue, without detours.
Flow float_to_int(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) {
    const float x = std::nearbyint(get<float>(w, i.r[1], l));
    put<int32_t>(w, i.r[0], l,
                 std::isnan(x)  ? 0
                 : x >= 0x1p31f ? INT32_MAX
                 : x < -0x1p31f ? INT32_MIN
                                : static_cast<int32_t>(x));
  });
  return Flow::next;
}
Flow int_to_float(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) { put<float>(w, i.r[0], l, static_cast<float>(get<int32_t>(w, i.r[1], l))); });
  return Flow::next;
}
Flow round_float(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) { put<float>(w, i.r[0], l, std::nearbyint(get<float>(w, i.r[1], l))); });
  return Flow::next;
}

}  // namespace

bool assemble_convert(Assembler& a, const Statement& s, Instruction& i) {
  if (s.name != "cvt") return false;
  std::vector<std::string> types;
  for (const std::string& m : s.modifiers) {
    const auto rounding = [&](Rounding r, bool integral) {
      i.kind[2] = static_cast<uint8_t>(r);
      if (integral) i.kind[3] |= kIntegral;
    };
    if (m == "rn" || m == "rni")
      rounding(Rounding::nearest, m == "rni");
    else if (m == "rz" || m == "rzi")
      rounding(Rounding::zero, m == "rzi");
    else if (m == "rm" || m == "rmi")
      rounding(Rounding::down, m == "rmi");
    else if (m == "rp" || m == "rpi")
      rounding(Rounding::up, m == "rpi");
    else if (m == "sat")
      i.kind[3] |= kSaturate;
    else if (m == "ftz")
      i.kind[3] |= kFlush;
    else
      types.push_back(m);
  }
  if (types.size() != 2) a.unknown(s);
  for (int k = 0; k < 2; ++k) {
    std::string t = types[k];
    const bool bfloat = t.starts_with("bf16");
    if (t.ends_with("x2") && k == 0) i.kind[3] |= kPair, t.resize(t.size() - 2);
    if (bfloat) i.kind[3] |= k == 0 ? kBfloats : kBfloatSource, t = "f16";
    const Class type = t[0] == 'f' ? kReal : t[0] == 's' ? kSigned : kUnsigned;
    const int bits = t.size() > 1 ? std::atoi(t.c_str() + 1) : 0;
    if ((t[0] != 'f' && t[0] != 's' && t[0] != 'u') || (bits != 8 && bits != 16 && bits != 32 && bits != 64))
      a.unknown(s);
    i.kind[k] = static_cast<uint8_t>(type << 6 | std::countr_zero(static_cast<unsigned>(bits)));
  }
  i.r[0] = a.target(s.operands.at(0));
  for (size_t k = 1; k < s.operands.size(); ++k) i.r[k] = a.source(s.operands[k], std::max(32, 1 << (i.kind[1] & 15)));
  const std::string name = s.text();
  i.run = name == "cvt.rni.s32.f32"   ? float_to_int
          : name == "cvt.rn.f32.s32"  ? int_to_float
          : name == "cvt.rni.f32.f32" ? round_float
                                      : convert;
  return true;
}

}  // namespace emulator
