// Arithmetic, logic, comparisons and moves of a warp's threads.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "emulator/floats.h"
#include "emulator/machine.h"

namespace emulator {

namespace {

// The lanes of a register as numbers of one type.
template <class T>
struct View {
  using Slot = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  View(Warp& w, Ref r) : slot(reinterpret_cast<Slot*>(w.file.data() + r.at)) {}
  T operator[](int lane) const {
    if constexpr (sizeof(T) == sizeof(Slot))
      return std::bit_cast<T>(slot[lane]);
    else
      return static_cast<T>(slot[lane]);
  }
  void set(int lane, T value) const {
    if constexpr (sizeof(T) == sizeof(Slot))
      slot[lane] = std::bit_cast<Slot>(value);
    else
      slot[lane] = static_cast<Slot>(value);
  }
  Slot* slot;
};

// Those of halves as floats.
struct Halves {
  Halves(Warp& w, Ref r) : bits(w, r) {}
  float operator[](int lane) const { return static_cast<float>(decode(bits[lane], kHalf)); }
  View<uint16_t> bits;
};

template <class T, class F>
Flow unary(Warp& w, const Instruction& i, Lanes lanes) {
  const View<T> d(w, i.r[0]), a(w, i.r[1]);
  each(lanes, [&](int l) { d.set(l, F{}(a[l])); });
  return Flow::next;
}
template <class T, class F>
Flow binary(Warp& w, const Instruction& i, Lanes lanes) {
  const View<T> d(w, i.r[0]), a(w, i.r[1]), b(w, i.r[2]);
  each(lanes, [&](int l) { d.set(l, F{}(a[l], b[l])); });
  return Flow::next;
}
template <class T, class F>
Flow ternary(Warp& w, const Instruction& i, Lanes lanes) {
  const View<T> d(w, i.r[0]), a(w, i.r[1]), b(w, i.r[2]), c(w, i.r[3]);
  each(lanes, [&](int l) { d.set(l, F{}(a[l], b[l], c[l])); });
  return Flow::next;
}
// The target has another type than the sources: twice as wide, or a count.
template <class D, class T, class F>
Flow widening(Warp& w, const Instruction& i, Lanes lanes) {
  const View<D> d(w, i.r[0]);
  const View<T> a(w, i.r[1]), b(w, i.r[2]);
  each(lanes, [&](int l) { d.set(l, F{}(D(a[l]), D(b[l]))); });
  return Flow::next;
}
template <class D, class T>
Flow widening_add(Warp& w, const Instruction& i, Lanes lanes) {
  const View<D> d(w, i.r[0]), c(w, i.r[3]);
  const View<T> a(w, i.r[1]), b(w, i.r[2]);
  each(lanes, [&](int l) { d.set(l, D(a[l]) * D(b[l]) + c[l]); });
  return Flow::next;
}
template <class T, class F>
Flow counting(Warp& w, const Instruction& i, Lanes lanes) {
  const View<uint32_t> d(w, i.r[0]);
  const View<T> a(w, i.r[1]);
  each(lanes, [&](int l) { d.set(l, F{}(a[l])); });
  return Flow::next;
}
template <class T, class F>
Flow shifting(Warp& w, const Instruction& i, Lanes lanes) {
  const View<T> d(w, i.r[0]), a(w, i.r[1]);
  const View<uint32_t> b(w, i.r[2]);
  each(lanes, [&](int l) { d.set(l, F{}(a[l], b[l])); });
  return Flow::next;
}

template <class T>
using Twice = std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
                                 std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;

#define OPERATION(name, parameters, expression) \
  struct name {                                 \
    template <class T>                          \
    auto operator() parameters const {          \
      return expression;                        \
    }                                           \
  };
OPERATION(Add, (T a, T b), T(a + b))
OPERATION(Sub, (T a, T b), T(a - b))
OPERATION(Mul, (T a, T b), T(a* b))
OPERATION(MulHigh, (T a, T b), T((Twice<T>(a) * Twice<T>(b)) >> (8 * sizeof(T))))
OPERATION(Mad, (T a, T b, T c), T(a* b + c))
OPERATION(MadHigh, (T a, T b, T c), T(T((Twice<T>(a) * Twice<T>(b)) >> (8 * sizeof(T))) + c))
OPERATION(Div, (T a, T b), T(b == 0 ? ~T(0) : b == T(-1) ? T(0 - a) : T(a / b)))
OPERATION(UnsignedDiv, (T a, T b), T(b == 0 ? ~T(0) : a / b))
OPERATION(Rem, (T a, T b), T(b == 0 ? a : b == T(-1) ? 0 : a % b))
OPERATION(UnsignedRem, (T a, T b), T(b == 0 ? a : a % b))
OPERATION(Neg, (T a), T(-a))
OPERATION(Abs, (T a), T(a < 0 ? -a : a))
OPERATION(Min, (T a, T b), T(a < b ? a : b))
OPERATION(Max, (T a, T b), T(a > b ? a : b))
OPERATION(And, (T a, T b), T(a& b))
OPERATION(Or, (T a, T b), T(a | b))
OPERATION(Xor, (T a, T b), T(a ^ b))
OPERATION(Not, (T a), T(~a))
OPERATION(ShiftLeft, (T a, uint32_t b), T(b >= 8 * sizeof(T) ? 0 : a << b))
OPERATION(ShiftRight, (T a, uint32_t b), T(b >= 8 * sizeof(T) ? (std::is_signed_v<T> && a < 0 ? -1 : 0) : a >> b))
OPERATION(Population, (T a), uint32_t(std::popcount(a)))
OPERATION(LeadingZeros, (T a), uint32_t(std::countl_zero(a)))
OPERATION(FDiv, (T a, T b), T(a / b))
OPERATION(FSqrt, (T a), T(std::sqrt(a)))
OPERATION(FRcp, (T a), T(T(1) / a))
OPERATION(Fma, (T a, T b, T c), T(std::fma(a, b, c)))
OPERATION(FAbs, (T a), T(std::fabs(a)))
// A NaN beside a number is passed over, and -0 is less than 0.
OPERATION(FMin, (T a, T b), T(std::isnan(a) ? b : std::isnan(b) ? a : a < b || (a == b && std::signbit(a)) ? a : b))
OPERATION(FMax, (T a, T b), T(std::isnan(a) ? b : std::isnan(b) ? a : a > b || (a == b && std::signbit(b)) ? a : b))
OPERATION(FMinNan, (T a, T b), T(std::isnan(a) || std::isnan(b) ? std::numeric_limits<T>::quiet_NaN() : FMin{}(a, b)))
OPERATION(FMaxNan, (T a, T b), T(std::isnan(a) || std::isnan(b) ? std::numeric_limits<T>::quiet_NaN() : FMax{}(a, b)))
OPERATION(Exp2, (T a), T(std::exp2(a)))
#undef OPERATION

// On the bits of halves.
struct HalfMaxNan {
  uint16_t operator()(uint16_t a, uint16_t b) const {
    const double x = decode(a, kHalf), y = decode(b, kHalf);
    if (std::isnan(x) || std::isnan(y)) return 0x7FFF;
    return x > y || (x == y && std::signbit(y)) ? a : b;
  }
};

// On both halves of a word.
template <class T, class F>
struct Both {
  uint32_t operator()(uint32_t a, uint32_t b) const {
    const auto half = [&](int at) { return uint32_t(uint16_t(F{}(T(a >> at), T(b >> at)))) << at; };
    return half(0) | half(16);
  }
};

struct Reverse {
  uint32_t operator()(uint32_t a) const {
    uint32_t out = 0;
    for (int bit = 0; bit < 32; ++bit) out |= (a >> bit & 1) << (31 - bit);
    return out;
  }
};

// rcp.approx.ftz.f32 is right to one unit of the last place; which way it errs is not said, so either.
struct ApproximateReciprocal {
  float operator()(float a) const {
    if (std::fabs(a) < 0x1p-126f) a = std::copysign(0.0f, a);
    const float exact = 1.0f / a;
    if (std::fabs(exact) < 0x1p-126f) return std::copysign(0.0f, exact);
    if (kind_to_mistakes || !std::isfinite(exact)) return exact;
    const uint32_t bits = std::bit_cast<uint32_t>(a) * 2654435761u;
    const uint32_t off = std::bit_cast<uint32_t>(exact) + (bits >> 31) - (bits >> 30 & 1);
    const float near = std::bit_cast<float>(off);
    return std::fabs(near) < 0x1p-126f || !std::isfinite(near) ? exact : near;
  }
};

// ---- by type --------------------------------------------------------------------------------------------------------
bool one_of(const std::string& s, std::initializer_list<const char*> all) {
  return std::any_of(all.begin(), all.end(), [&](const char* each) { return s == each; });
}

template <class F>
Run integers(const std::string& t) {
  if (t == "s16") return binary<int16_t, F>;
  if (t == "u16" || t == "b16") return binary<uint16_t, F>;
  if (t == "s32") return binary<int32_t, F>;
  if (t == "u32" || t == "b32") return binary<uint32_t, F>;
  if (t == "s64") return binary<int64_t, F>;
  if (t == "u64" || t == "b64") return binary<uint64_t, F>;
  return nullptr;
}
template <class F>
Run integers1(const std::string& t) {
  if (t == "s16" || t == "b16") return unary<int16_t, F>;
  if (t == "s32" || t == "b32") return unary<int32_t, F>;
  if (t == "s64" || t == "b64") return unary<int64_t, F>;
  return nullptr;
}
template <class F>
Run integers3(const std::string& t) {
  if (t == "s32") return ternary<int32_t, F>;
  if (t == "u32") return ternary<uint32_t, F>;
  if (t == "s64") return ternary<int64_t, F>;
  if (t == "u64") return ternary<uint64_t, F>;
  if (t == "u16") return ternary<uint16_t, F>;
  if (t == "s16") return ternary<int16_t, F>;
  return nullptr;
}
template <class F>
Run pairs(const std::string& t) {
  return t == "s16x2"   ? binary<uint32_t, Both<int16_t, F>>
         : t == "u16x2" ? binary<uint32_t, Both<uint16_t, F>>
                        : nullptr;
}
template <class F>
Run reals(const std::string& t) {
  return t == "f32" ? binary<float, F> : t == "f64" ? binary<double, F> : nullptr;
}
template <class F>
Run reals1(const std::string& t) {
  return t == "f32" ? unary<float, F> : t == "f64" ? unary<double, F> : nullptr;
}
template <class F>
Run shifts(const std::string& t) {
  if (t == "s16") return shifting<int16_t, F>;
  if (t == "u16" || t == "b16") return shifting<uint16_t, F>;
  if (t == "s32") return shifting<int32_t, F>;
  if (t == "u32" || t == "b32") return shifting<uint32_t, F>;
  if (t == "s64") return shifting<int64_t, F>;
  if (t == "u64" || t == "b64") return shifting<uint64_t, F>;
  return nullptr;
}

// ---- predicates -----------------------------------------------------------------------------------------------------
void put_predicate(Warp& w, Ref r, Lanes lanes, Lanes value) {
  if (r.at < 0) return;
  Lanes& p = w.predicate(r);
  p = (p & ~lanes) | (value & lanes);
}

enum Relation { less = 1, equal = 2, greater = 4, unordered = 8 };
int relation(const std::string& name) {
  static const std::map<std::string, int> all = {{"eq", equal},
                                                 {"ne", less | greater},
                                                 {"lt", less},
                                                 {"le", less | equal},
                                                 {"gt", greater},
                                                 {"ge", greater | equal},
                                                 {"lo", less},
                                                 {"ls", less | equal},
                                                 {"hi", greater},
                                                 {"hs", greater | equal},
                                                 {"equ", equal | unordered},
                                                 {"neu", less | greater | unordered},
                                                 {"ltu", less | unordered},
                                                 {"leu", less | equal | unordered},
                                                 {"gtu", greater | unordered},
                                                 {"geu", greater | equal | unordered},
                                                 {"num", less | equal | greater},
                                                 {"nan", unordered}};
  const auto it = all.find(name);
  return it == all.end() ? 0 : it->second;
}

// r: p, a, b, c, q. kind: which relations hold, how c is combined, whether an integer's.
template <class T, class V = View<T>>
Flow compare(Warp& w, const Instruction& i, Lanes lanes) {
  const V a(w, i.r[1]), b(w, i.r[2]);
  Lanes holds = 0;
  const uint32_t wanted = i.kind[0];
  each(lanes, [&](int l) {
    const T x = a[l], y = b[l];
    const uint32_t found = x < y ? less : x == y ? equal : x > y ? greater : unordered;
    holds |= Lanes((wanted & found) != 0) << l;
  });
  Lanes other = ~holds;
  if (i.kind[1]) {
    const Lanes c = i.negated ? ~w.predicate(i.r[3]) : w.predicate(i.r[3]);
    const auto combined = [&](Lanes p) { return i.kind[1] == 1 ? p & c : i.kind[1] == 2 ? p | c : p ^ c; };
    holds = combined(holds), other = combined(other);
  }
  put_predicate(w, i.r[0], lanes, holds);
  put_predicate(w, i.r[4], lanes, other);
  return Flow::next;
}

Flow combine_predicates(Warp& w, const Instruction& i, Lanes lanes) {
  const Lanes a = w.predicate(i.r[1]) ^ (i.kind[1] ? kAllLanes : 0);
  const Lanes b = i.r[2].at < 0 ? 0 : w.predicate(i.r[2]) ^ (i.kind[2] ? kAllLanes : 0);
  put_predicate(w, i.r[0], lanes,
                i.kind[0] == 0   ? a & b
                : i.kind[0] == 1 ? a | b
                : i.kind[0] == 2 ? a ^ b
                : i.kind[0] == 3 ? ~a
                                 : a);
  return Flow::next;
}

template <class T>
Flow select(Warp& w, const Instruction& i, Lanes lanes) {
  const View<T> d(w, i.r[0]), a(w, i.r[1]), b(w, i.r[2]);
  const Lanes p = i.negated ? ~w.predicate(i.r[3]) : w.predicate(i.r[3]);
  each(lanes, [&](int l) { d.set(l, p >> l & 1 ? a[l] : b[l]); });
  return Flow::next;
}

// ---- moves ----------------------------------------------------------------------------------------------------------
template <class T>
Flow move(Warp& w, const Instruction& i, Lanes lanes) {
  const View<T> d(w, i.r[0]), a(w, i.r[1]);
  each(lanes, [&](int l) { d.set(l, a[l]); });
  return Flow::next;
}
// kind[0]: the bits of each of `more`.
Flow pack(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) {
    uint64_t all = 0;
    for (size_t part = 0; part < i.more.size(); ++part)
      all |= (get_bits(w, i.more[part], l) & (~uint64_t{0} >> (64 - i.kind[0]))) << (part * i.kind[0]);
    put_bits(w, i.r[0], l, all);
  });
  return Flow::next;
}
Flow unpack(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) {
    const uint64_t all = get_bits(w, i.r[1], l);
    for (size_t part = 0; part < i.more.size(); ++part)
      put_bits(w, i.more[part], l, all >> (part * i.kind[0]) & (~uint64_t{0} >> (64 - i.kind[0])));
  });
  return Flow::next;
}

// ---- bit fields -----------------------------------------------------------------------------------------------------
template <class T>
Flow extract(Warp& w, const Instruction& i, Lanes lanes) {
  using U = std::make_unsigned_t<T>;
  const View<T> d(w, i.r[0]), a(w, i.r[1]);
  const View<uint32_t> b(w, i.r[2]), c(w, i.r[3]);
  constexpr uint32_t width = 8 * sizeof(T);
  each(lanes, [&](int l) {
    const uint32_t at = b[l] & 0xff, count = c[l] & 0xff;
    const T from = a[l];
    const bool sign = std::is_signed_v<T> && count && (from >> std::min(at + count - 1, width - 1) & 1);
    U bits = at < width ? U(from) >> at : 0;
    if (count < width) bits &= (U(1) << count) - 1;
    const uint32_t known = std::min(count, at < width ? width - at : 0);
    if (sign && known < width) bits |= ~((U(1) << known) - 1);
    d.set(l, T(bits));
  });
  return Flow::next;
}
template <class T>
Flow insert(Warp& w, const Instruction& i, Lanes lanes) {
  const View<T> d(w, i.r[0]), a(w, i.r[1]), b(w, i.r[2]);
  const View<uint32_t> c(w, i.r[3]), n(w, i.r[4]);
  constexpr uint32_t width = 8 * sizeof(T);
  each(lanes, [&](int l) {
    const uint32_t at = c[l] & 0xff, count = n[l] & 0xff;
    const T ones = count >= width ? ~T(0) : (T(1) << count) - 1;
    const T mask = at < width ? T(ones << at) : 0;
    d.set(l, (b[l] & ~mask) | (at < width ? (a[l] << at) & mask : 0));
  });
  return Flow::next;
}
Flow permute(Warp& w, const Instruction& i, Lanes lanes) {
  const View<uint32_t> d(w, i.r[0]), a(w, i.r[1]), b(w, i.r[2]), c(w, i.r[3]);
  each(lanes, [&](int l) {
    const uint64_t bytes = uint64_t(b[l]) << 32 | a[l];
    uint32_t out = 0;
    for (int byte = 0; byte < 4; ++byte) {
      const uint32_t chosen = c[l] >> (4 * byte);
      const uint8_t value = static_cast<uint8_t>(bytes >> (8 * (chosen & 7)));
      out |= uint32_t(chosen & 8 ? (value & 0x80 ? 0xff : 0) : value) << (8 * byte);
    }
    d.set(l, out);
  });
  return Flow::next;
}
// kind: to the left?, does the count wrap?
Flow funnel(Warp& w, const Instruction& i, Lanes lanes) {
  const View<uint32_t> d(w, i.r[0]), a(w, i.r[1]), b(w, i.r[2]), c(w, i.r[3]);
  each(lanes, [&](int l) {
    const uint64_t both = uint64_t(b[l]) << 32 | a[l];
    const uint32_t count = i.kind[1] ? c[l] & 31 : std::min(c[l], 32u);
    d.set(l, static_cast<uint32_t>(i.kind[0] ? both << count >> 32 : both >> count));
  });
  return Flow::next;
}
Flow lookup(Warp& w, const Instruction& i, Lanes lanes) {
  const View<uint32_t> d(w, i.r[0]), a(w, i.r[1]), b(w, i.r[2]), c(w, i.r[3]);
  each(lanes, [&](int l) {
    uint32_t out = 0;
    for (int entry = 0; entry < 8; ++entry)
      if (i.kind[0] >> entry & 1)
        out |= (entry & 4 ? a[l] : ~a[l]) & (entry & 2 ? b[l] : ~b[l]) & (entry & 1 ? c[l] : ~c[l]);
    d.set(l, out);
  });
  return Flow::next;
}

// c + products of bytes, A and B.
template <class A, class B>
Flow dot_bytes(Warp& w, const Instruction& i, Lanes lanes) {
  const View<uint32_t> d(w, i.r[0]), a(w, i.r[1]), b(w, i.r[2]), c(w, i.r[3]);
  each(lanes, [&](int l) {
    uint32_t sum = c[l];
    for (int byte = 0; byte < 32; byte += 8)
      sum += static_cast<uint32_t>(static_cast<A>(a[l] >> byte) * static_cast<B>(b[l] >> byte));
    d.set(l, sum);
  });
  return Flow::next;
}

// ---- control --------------------------------------------------------------------------------------------------------
Flow branch(Warp& w, const Instruction& i, Lanes lanes) {
  Group& g = w.group();
  const Lanes rest = g.lanes & ~lanes;
  const int next = g.pc + 1;
  g.pc = static_cast<int>(i.offset);
  g.lanes = lanes;
  if (rest) w.groups.push_back({next, rest, {}});
  return Flow::jumped;
}
Flow trap(Warp& w, const Instruction& i, Lanes lanes) { fail(w, i, lanes, "is not emulated"); }

int bits_of(const std::string& type) { return std::stoi(type.substr(type.find_first_of("0123456789"))); }

}  // namespace

bool assemble_scalar(Assembler& a, const Statement& s, Instruction& i) {
  const std::string none, &t = s.modifiers.empty() ? none : s.modifiers.back();
  const auto is = [&](const char* name) { return s.name == name; };
  const auto operands = [&](Run run, int bits = 32) {
    if (!run) a.unknown(s);
    i.run = run;
    i.r[0] = a.target(s.operands.at(0));
    for (size_t k = 1; k < s.operands.size() && k < 5; ++k) i.r[k] = a.source(s.operands[k], bits);
    return true;
  };
  if (is("bra")) {
    i.run = branch;
    i.offset = static_cast<int64_t>(s.operands[0].bits);
    return true;
  }
  if (is("call") || is("trap") || is("brkpt")) {
    i.run = trap;
    return true;
  }
  if (s.modifiers.empty()) return false;

  if (is("setp")) {
    size_t at = 0;
    i.kind[0] = static_cast<uint8_t>(relation(s.modifiers[at++]));
    const std::string& combined = s.modifiers[at];
    i.kind[1] = combined == "and" ? 1 : combined == "or" ? 2 : combined == "xor" ? 3 : 0;
    at += i.kind[1] != 0;
    if (!i.kind[0] || at + 1 != s.modifiers.size()) a.unknown(s);
    const int bits = bits_of(t);
    const bool two = s.operands[0].kind == Operand::pair;
    i.r[0] = a.target(two ? s.operands[0].parts[0] : s.operands[0]);
    if (two) i.r[4] = a.target(s.operands[0].parts[1]);
    for (int k = 1; k < 3; ++k) i.r[k] = a.source(s.operands.at(k), bits);
    if (i.kind[1]) i.r[3] = a.source(s.operands.at(3)), i.negated = s.operands[3].negated;
    i.run = t == "s16"                  ? compare<int16_t>
            : one_of(t, {"u16", "b16"}) ? compare<uint16_t>
            : t == "s32"                ? compare<int32_t>
            : one_of(t, {"u32", "b32"}) ? compare<uint32_t>
            : t == "s64"                ? compare<int64_t>
            : one_of(t, {"u64", "b64"}) ? compare<uint64_t>
            : t == "f16"                ? compare<float, Halves>
            : t == "f32"                ? compare<float>
            : t == "f64"                ? compare<double>
                                        : nullptr;
    if (!i.run) a.unknown(s);
    return true;
  }
  if (is("selp")) {
    operands(bits_of(t) == 64 ? select<uint64_t> : select<uint32_t>, bits_of(t));
    i.negated = s.operands[3].negated;
    return true;
  }
  if (t == "pred") {
    i.kind[0] = is("and") ? 0 : is("or") ? 1 : is("xor") ? 2 : is("not") ? 3 : is("mov") ? 4 : 9;
    if (i.kind[0] == 9) return false;
    i.r[0] = a.target(s.operands.at(0));
    for (size_t k = 1; k < s.operands.size(); ++k) {
      Operand o = s.operands[k];
      if (o.kind == Operand::number && o.bits) o.bits = kAllLanes;
      i.r[k] = a.source(o), i.kind[k] = o.negated;
    }
    i.run = combine_predicates;
    return true;
  }
  if (is("mov")) {
    const int bits = bits_of(t);
    const Operand &to = s.operands.at(0), &from = s.operands.at(1);
    if (from.kind == Operand::list) {
      i.kind[0] = static_cast<uint8_t>(bits / from.parts.size());
      i.r[0] = a.target(to);
      for (const Operand& part : from.parts) i.more.push_back(a.source(part, i.kind[0]));
      i.run = pack;
      return true;
    }
    if (to.kind == Operand::list) {
      i.kind[0] = static_cast<uint8_t>(bits / to.parts.size());
      for (const Operand& part : to.parts) i.more.push_back(a.target(part));
      i.r[1] = a.source(from, bits);
      i.run = unpack;
      return true;
    }
    return operands(bits == 64 ? move<uint64_t> : move<uint32_t>, bits);
  }

  if (s.text() == "max.NaN.f16x2") return operands(binary<uint32_t, Both<uint16_t, HalfMaxNan>>);
  if (t.ends_with("16x2") && s.modifiers.size() == 1) {
    if (is("add")) return operands(pairs<Add>(t));
    if (is("min")) return operands(pairs<Min>(t));
    if (is("max")) return operands(pairs<Max>(t));
  }

  const size_t digits = t.find_first_of("0123456789");
  if (digits == t.npos || t.find_first_not_of("0123456789", digits) != t.npos) return false;
  const int bits = bits_of(t);
  const bool real = t[0] == 'f';
  if (real) {
    for (size_t k = 0; k + 1 < s.modifiers.size(); ++k) {
      const std::string& m = s.modifiers[k];
      if (m == "rn" || (is("rcp") && one_of(m, {"approx", "ftz"})) || (is("ex2") && m == "approx") || m == "NaN")
        continue;
      if (m == "to" || is("ld") || is("st") || is("cvt") || is("shfl") || is("atom") || is("red")) return false;
      a.unknown(s);
    }
    if (is("add")) return operands(reals<Add>(t), bits);
    if (is("sub")) return operands(reals<Sub>(t), bits);
    if (is("mul")) return operands(reals<Mul>(t), bits);
    if (is("fma"))
      return operands(t == "f32" ? ternary<float, Fma> : t == "f64" ? ternary<double, Fma> : nullptr, bits);
    if (is("div")) return operands(s.has("rn") ? reals<FDiv>(t) : nullptr, bits);
    if (is("sqrt")) return operands(s.has("rn") ? reals1<FSqrt>(t) : nullptr, bits);
    if (is("rcp"))
      return operands(s.has("rn")                        ? reals1<FRcp>(t)
                      : s.text() == "rcp.approx.ftz.f32" ? unary<float, ApproximateReciprocal>
                                                         : nullptr,
                      bits);
    if (is("ex2")) return operands(s.text() == "ex2.approx.f32" ? unary<float, Exp2> : nullptr, bits);
    if (is("neg")) return operands(reals1<Neg>(t), bits);
    if (is("abs")) return operands(reals1<FAbs>(t), bits);
    if (is("min")) return operands(s.has("NaN") ? reals<FMinNan>(t) : reals<FMin>(t), bits);
    if (is("max") && t == "f16" && s.has("NaN")) return operands(binary<uint16_t, HalfMaxNan>, bits);
    if (is("max")) return operands(s.has("NaN") ? reals<FMaxNan>(t) : reals<FMax>(t), bits);
    return false;
  }
  const bool with_sign = t[0] == 's';
  if (is("mul") || is("mad")) {
    const std::string& part = s.modifiers.size() == 2 ? s.modifiers[0] : none;
    if (part == "lo") return operands(is("mul") ? integers<Mul>(t) : integers3<Mad>(t), bits);
    if (part == "hi") return operands(is("mul") ? integers<MulHigh>(t) : integers3<MadHigh>(t), bits);
    if (part != "wide") a.unknown(s);
    if (is("mul"))
      return operands(t == "s32"   ? widening<int64_t, int32_t, Mul>
                      : t == "u32" ? widening<uint64_t, uint32_t, Mul>
                      : t == "s16" ? widening<int32_t, int16_t, Mul>
                      : t == "u16" ? widening<uint32_t, uint16_t, Mul>
                                   : nullptr);
    operands(t == "s32"   ? widening_add<int64_t, int32_t>
             : t == "u32" ? widening_add<uint64_t, uint32_t>
             : t == "s16" ? widening_add<int32_t, int16_t>
             : t == "u16" ? widening_add<uint32_t, uint16_t>
                          : nullptr);
    i.r[3] = a.source(s.operands.at(3), 2 * bits);
    return true;
  }
  if (is("bfe"))
    return operands(t == "u32"   ? extract<uint32_t>
                    : t == "s32" ? extract<int32_t>
                    : t == "u64" ? extract<uint64_t>
                    : t == "s64" ? extract<int64_t>
                                 : nullptr);
  if (is("bfi")) {
    operands(t == "b32" ? insert<uint32_t> : t == "b64" ? insert<uint64_t> : nullptr);
    for (int k = 1; k < 3; ++k) i.r[k] = a.source(s.operands[k], bits);
    return true;
  }
  if (is("shf")) {
    i.kind[0] = s.modifiers[0] == "l", i.kind[1] = s.has("wrap");
    return operands(funnel);
  }
  if (is("lop3")) {
    operands(lookup);
    i.kind[0] = static_cast<uint8_t>(s.operands.at(4).bits);
    return true;
  }
  if (is("shl") || is("shr")) {
    operands(is("shl") ? shifts<ShiftLeft>(t) : shifts<ShiftRight>(t));
    i.r[1] = a.source(s.operands.at(1), bits);
    return true;
  }
  if (is("popc")) return operands(bits == 64 ? counting<uint64_t, Population> : counting<uint32_t, Population>, bits);
  if (is("clz"))
    return operands(bits == 64 ? counting<uint64_t, LeadingZeros> : counting<uint32_t, LeadingZeros>, bits);
  if (is("dp4a")) {
    const std::string types = s.text();
    return operands(types == "dp4a.u32.u32"   ? dot_bytes<uint8_t, uint8_t>
                    : types == "dp4a.u32.s32" ? dot_bytes<uint8_t, int8_t>
                    : types == "dp4a.s32.u32" ? dot_bytes<int8_t, uint8_t>
                    : types == "dp4a.s32.s32" ? dot_bytes<int8_t, int8_t>
                                              : nullptr);
  }
  if (s.modifiers.size() != 1) return false;
  if (is("add")) return operands(integers<Add>(t), bits);
  if (is("sub")) return operands(integers<Sub>(t), bits);
  if (is("div")) return operands(with_sign ? integers<Div>(t) : integers<UnsignedDiv>(t), bits);
  if (is("rem")) return operands(with_sign ? integers<Rem>(t) : integers<UnsignedRem>(t), bits);
  if (is("min")) return operands(integers<Min>(t), bits);
  if (is("max")) return operands(integers<Max>(t), bits);
  if (is("and")) return operands(integers<And>(t), bits);
  if (is("or")) return operands(integers<Or>(t), bits);
  if (is("xor")) return operands(integers<Xor>(t), bits);
  if (is("not")) return operands(integers1<Not>(t), bits);
  if (is("neg")) return operands(integers1<Neg>(t), bits);
  if (is("abs")) return operands(integers1<Abs>(t), bits);
  if (is("brev") && bits == 32) return operands(unary<uint32_t, Reverse>);
  if (is("prmt")) return operands(permute);
  return false;
}

}  // namespace emulator
