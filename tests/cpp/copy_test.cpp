// Compares CopyDriver and FillDriver with loops over every element, for random shapes, strides and numbers of threads;
// tasks run in random order.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/copy/driver.h"

using namespace pykernels;

namespace {

std::mt19937_64 random_bits(20240);
int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(n)); }

struct Layout {
  std::vector<int64_t> strides;
  int64_t first = 0, elements = 0;  // where the element of index 0 stands among so many
};

// A random order of the dimensions in memory, often the given or the channels_last one, with gaps and, where `any` is
// allowed, dimensions that are repeated or run backwards.
Layout random_layout(const std::vector<int64_t>& sizes, bool any) {
  const auto dims = static_cast<int64_t>(sizes.size());
  std::vector<int64_t> order(dims);
  for (int64_t d = 0; d < dims; ++d) order[d] = d;
  if (const int64_t kind = below(3); kind == 1 && dims > 2)
    std::rotate(order.begin() + 1, order.begin() + 2, order.end());
  else if (kind == 2)
    std::shuffle(order.begin(), order.end(), random_bits);
  Layout layout{std::vector<int64_t>(dims), 0, 1};
  for (int64_t place = dims - 1; place >= 0; --place) {
    const int64_t d = order[place];
    const bool gaps = layout.elements < 100000;
    if (gaps && below(8) == 0) layout.elements *= 1 + below(3);
    layout.strides[d] = layout.elements;
    layout.elements *= std::max<int64_t>(sizes[d], 1) + (gaps && below(6) == 0 ? below(3) : 0);
  }
  for (int64_t d = 0; any && d < dims; ++d) {
    if (const int64_t kind = below(12); kind == 0) {
      layout.strides[d] = 0;
    } else if (kind == 1) {
      layout.first += (std::max<int64_t>(sizes[d], 1) - 1) * layout.strides[d];
      layout.strides[d] *= -1;
    }
  }
  return layout;
}

// f(element of the source, of the output)
template <class F>
void each(const std::vector<int64_t>& sizes, const Layout& from, const Layout& to, const F& f) {
  int64_t elements = 1;
  for (int64_t size : sizes) elements *= size;
  for (int64_t i = 0; i < elements; ++i) {
    int64_t rest = i, x = from.first, y = to.first;
    for (size_t d = sizes.size(); d-- > 0; rest /= sizes[d]) {
      x += rest % sizes[d] * from.strides[d];
      y += rest % sizes[d] * to.strides[d];
    }
    f(x, y);
  }
}

bool run(Driver& driver, const uint8_t* from, uint8_t* to) {
  if (driver.tasks == 0) return true;
  driver.bind(&from, to);
  std::vector<int64_t> order(driver.tasks);
  for (int64_t i = 0; i < driver.tasks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random_bits);
  for (int64_t task : order) driver.run(task, nullptr);
  return driver.scratch == 0;
}

bool one_case() {
  const int64_t bytes = int64_t{1} << below(4), dims = below(CopyDriver::kDims + 1), threads = 1 + below(5);
  std::vector<int64_t> sizes(dims);
  int64_t elements = 1;
  for (int64_t& size : sizes) {
    const int64_t widest = below(4) == 0 ? 300000 : below(2) == 0 ? 70 : 9;
    size = below(50) == 0 ? 0 : 1 + below(std::clamp<int64_t>(60000 / elements, 1, widest));
    elements *= std::max<int64_t>(size, 1);
  }
  const Layout from = random_layout(sizes, true), to = random_layout(sizes, false);
  std::vector<uint8_t> x(from.elements * bytes), y(to.elements * bytes);
  for (auto* memory : {&x, &y})
    for (uint8_t& byte : *memory) byte = static_cast<uint8_t>(random_bits());
  std::vector<uint8_t> expected = y, filled = y, expected_filled = y;
  const uint64_t value = random_bits();
  each(sizes, from, to, [&](int64_t i, int64_t o) {
    std::memcpy(expected.data() + o * bytes, x.data() + i * bytes, bytes);
    std::memcpy(expected_filled.data() + o * bytes, &value, bytes);
  });
  CopyDriver copy(bytes, dims, sizes.data(), from.strides.data(), to.strides.data(), threads);
  FillDriver fill(bytes, dims, sizes.data(), to.strides.data(), value, threads);
  return run(copy, x.data() + from.first * bytes, y.data()) && y == expected && run(fill, nullptr, filled.data()) &&
         filled == expected_filled;
}

}  // namespace

int main() {
  constexpr int kCases = 1000;
  int differences = 0;
  for (int i = 0; i < kCases; ++i) differences += !one_case();
  std::printf("%d copies, %d differences\n", kCases, differences);
  return differences != 0;
}
