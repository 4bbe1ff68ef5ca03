// Each operation of the vector layer yields on every isa the bits it yields on the scalar one: on all pairs of awkward
// values, on random bit patterns, and on arrays of every short length that end where the readable memory ends.
// Prints a line per isa and, for a failure, the operands; exits with 1 on any.
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

#include "vec_ops.h"

namespace pykernels {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

namespace {

enum class Agreement { exact, number, fma };

// `bytes` bytes that end at an unreadable page: a load or store past them faults.
class Fenced {
 public:
  explicit Fenced(size_t bytes) : pages_((bytes + 4095) / 4096 * 4096), bytes_(bytes) {
    void* p = mmap(nullptr, pages_ + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) std::perror("mmap"), std::exit(2);
    base_ = static_cast<uint8_t*>(p);
    if (mprotect(base_ + pages_, 4096, PROT_NONE) != 0) std::perror("mprotect"), std::exit(2);
  }
  ~Fenced() { munmap(base_, pages_ + 4096); }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;
  uint8_t* data() { return base_ + pages_ - bytes_; }

 private:
  uint8_t* base_;
  size_t pages_, bytes_;
};

template <class T>
std::vector<T> awkward();

template <>
std::vector<float> awkward() {
  std::vector<float> v = {0.0f,          0.5f,          1.0f,
                          1.5f,          2.5f,          3.5f,
                          0.49999997f,   0.625f,        3.0f,
                          6.0f,          7.3f,          87.0f,
                          88.0f,         89.0f,         126.5f,
                          127.5f,        128.5f,        254.5f,
                          255.5f,        256.0f,        8388607.5f,
                          8388608.0f,    16777217.0f,   2147483520.0f,
                          2147483648.0f, 4e9f,          1.17549435e-38f,
                          1e-40f,        1e-45f,        3.4028235e38f,
                          1.00390625f,   1.01171875f,   INFINITY,
                          65503.9f,      65504.0f,      65519.996f,
                          65520.0f,      1.0004883f,    1.0014648f,
                          6.1035156e-5f, 6.0976e-5f,    5.9604645e-8f,
                          2.9802322e-8f, 2.9802326e-8f, 8.940697e-8f};
  const size_t half = v.size();
  for (size_t i = 0; i < half; ++i) v.push_back(-v[i]);
  for (const uint32_t bits :
       {0x7fc00000u, 0xffc00000u, 0x7fc12345u, 0x7fffffffu, 0x3f808000u, 0x3f818000u, 0x3f807fffu, 0x7f7fffffu}) {
    float f;
    std::memcpy(&f, &bits, 4);
    v.push_back(f);
  }
  return v;
}
template <>
std::vector<int32_t> awkward() {
  return {0,          1,     -1,       127,      128,       129,      -127,       -128,       -129,
          254,        255,   256,      -255,     -256,      32767,    32768,      -32768,     -32769,
          65535,      65536, 16777215, 16777217, -16777217, 33554435, 2147483647, 2147483583, -2147483647 - 1,
          -2147483647};
}
template <class T>
std::vector<T> all_patterns() {
  std::vector<T> v(size_t{1} << (8 * sizeof(T)));
  for (size_t i = 0; i < v.size(); ++i) std::memcpy(&v[i], &i, sizeof(T));
  return v;
}
template <>
std::vector<bfloat16> awkward() {
  return all_patterns<bfloat16>();
}
template <>
std::vector<float16> awkward() {
  return all_patterns<float16>();
}
template <>
std::vector<uint8_t> awkward() {
  return all_patterns<uint8_t>();
}
template <>
std::vector<int8_t> awkward() {
  return all_patterns<int8_t>();
}
template <>
std::vector<byte> awkward() {
  return all_patterns<byte>();
}

// Pairs of values: all with all where they are few, then random bits.
template <class T>
void operands(std::vector<T>* xs, std::vector<T>* ys) {
  const std::vector<T> values = awkward<T>();
  const size_t partners = values.size() > 256 ? 1 : values.size();
  for (size_t i = 0; i < values.size(); ++i)
    for (size_t k = 0; k < partners; ++k) {
      xs->push_back(values[i]);
      ys->push_back(values[(i + k) % values.size()]);
    }
  std::mt19937 bits(1);
  for (int i = 0; i < 20000; ++i)
    for (auto* side : {xs, ys}) {
      uint32_t word = bits();
      if constexpr (std::is_same_v<T,
                                   float>) {  // half of ordinary size; no signaling NaN, which no op promises to keep
        if (i % 2 == 0)
          word = (word & 0x87ffffff) | 0x3c000000;
        else if ((word & 0x7fffffff) > 0x7f800000)
          word |= 0x00400000;
      }
      T value;
      std::memcpy(&value, &word, sizeof(T));
      side->push_back(value);
    }
}

template <class In, class Out>
bool agree(Agreement how, In x, In y, Out expected, Out got) {
  if (std::memcmp(&expected, &got, sizeof(Out)) == 0) return true;
  if constexpr (std::is_same_v<Out, float>) {
    if (how != Agreement::exact && std::isnan(expected) && std::isnan(got)) return true;
    if constexpr (std::is_same_v<In, float>)
      if (how == Agreement::fma) {
        const float once = std::fma(x, y, y);
        return std::memcmp(&once, &got, 4) == 0 || (std::isnan(once) && std::isnan(got));
      }
  }
  return false;
}

template <class T>
unsigned long long shown(T v) {
  unsigned long long bits = 0;
  std::memcpy(&bits, &v, sizeof v);
  return bits;
}

template <class In, class Out>
int compare(const char* name, const char* isa, int op, const VecOps& table, Agreement how) {
  std::vector<In> xs, ys;
  operands(&xs, &ys);
  std::vector<Out> expected(xs.size()), got(xs.size());
  scalar::vec_ops.run[op](xs.data(), ys.data(), expected.data(), static_cast<int64_t>(xs.size()));
  table.run[op](xs.data(), ys.data(), got.data(), static_cast<int64_t>(xs.size()));
  int failures = 0;
  for (size_t i = 0; i < xs.size(); ++i)
    if (!agree(how, xs[i], ys[i], expected[i], got[i]) && ++failures <= 3)
      std::printf("FAILED %s %s: x 0x%llx, y 0x%llx: 0x%llx, scalar 0x%llx\n", isa, name, shown(xs[i]), shown(ys[i]),
                  shown(got[i]), shown(expected[i]));
  for (size_t n = 1; n <= 130; ++n) {
    Fenced x(n * sizeof(In)), y(n * sizeof(In)), out(n * sizeof(Out));
    std::memcpy(x.data(), &xs[n], n * sizeof(In));
    std::memcpy(y.data(), &ys[n], n * sizeof(In));
    std::memset(out.data(), 0x5a, n * sizeof(Out));
    table.run[op](x.data(), y.data(), out.data(), static_cast<int64_t>(n));
    if (std::memcmp(out.data(), &got[n], n * sizeof(Out)) != 0 && ++failures <= 3)
      std::printf("FAILED %s %s: %zu elements, or the same among many, differ\n", isa, name, n);
  }
  return failures;
}

int compare_all(const char* isa, const VecOps& table) {
  int op = 0, failures = 0;
#define PYKERNELS_COMPARE(name, In, Out, result, agreement) \
  failures += compare<In, Out>(#name, isa, op++, table, Agreement::agreement);
  PYKERNELS_VEC_OPS(PYKERNELS_COMPARE)
  return failures;
}

}  // namespace
}  // namespace pykernels

int main() {
  using namespace pykernels;
  const VecOps* const tables[kIsaCount] = {PK_ISAS(PYKERNELS_ADDRESS, vec_ops)};
  int failures = 0;
  for (int i = 0; i < kIsaCount; ++i) {
    if (!isa_available(static_cast<Isa>(i))) {
      std::printf("%s: not on this CPU\n", kIsaNames[i]);
      continue;
    }
    const int failed = compare_all(kIsaNames[i], *tables[i]);
    std::printf("%s: %d operations, %d differences\n", kIsaNames[i], kVecOps, failed);
    failures += failed;
  }
  return failures == 0 ? 0 : 1;
}
