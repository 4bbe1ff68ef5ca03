// The transforms of winograd.h, a vector of channels at a time: first along the columns of a tile, then along its rows.
#include "cpu/conv/winograd.h"

#include "cpu/tile/element.h"

namespace pykernels::PYKERNELS_ISA_NS {
namespace {

template <int m>
struct Winograd;

template <>
struct Winograd<2> {
  PK_INLINE void input(const f32 (&d)[4], f32 (&v)[4]) {
    v[0] = sub(d[0], d[2]);
    v[1] = add(d[1], d[2]);
    v[2] = sub(d[2], d[1]);
    v[3] = sub(d[1], d[3]);
  }
  PK_INLINE void output(const f32 (&s)[4], f32 (&y)[2]) {
    y[0] = add(s[0], add(s[1], s[2]));
    y[1] = sub(sub(s[1], s[2]), s[3]);
  }
};

template <>
struct Winograd<4> {
  PK_INLINE void input(const f32 (&d)[6], f32 (&v)[6]) {
    const f32 four = set1(4.0f), minus_four = set1(-4.0f), minus_five = set1(-5.0f), two = set1(2.0f);
    v[0] = fma(four, d[0], fma(minus_five, d[2], d[4]));
    const f32 even = fma(minus_four, d[2], d[4]), odd = fma(minus_four, d[1], d[3]);
    v[1] = add(even, odd);
    v[2] = sub(even, odd);
    const f32 wide = sub(d[4], d[2]), twice = mul(two, sub(d[3], d[1]));
    v[3] = add(wide, twice);
    v[4] = sub(wide, twice);
    v[5] = fma(four, d[1], fma(minus_five, d[3], d[5]));
  }
  PK_INLINE void output(const f32 (&s)[6], f32 (&y)[4]) {
    const f32 even = add(s[1], s[2]), odd = sub(s[1], s[2]), even2 = add(s[3], s[4]), odd2 = sub(s[3], s[4]);
    y[0] = add(s[0], add(even, even2));
    y[1] = fma(set1(2.0f), odd2, odd);
    y[2] = fma(set1(4.0f), even2, even);
    y[3] = add(fma(set1(8.0f), odd2, odd), s[5]);
  }
};

template <int m>
void input(const WinogradInput& g) {
  constexpr int n = m + 2;
  for (int64_t c = 0; c < g.channels; c += kLanes) {
    f32 half[n][n];  // [column][row]
    PK_FOR (x, n) {
      f32 d[n];
      PK_FOR (y, n) d[y] = load(g.pixel[y * n + x] + c, kLanes);
      Winograd<m>::input(d, half[x]);
    }
    PK_FOR (y, n) {
      f32 d[n], v[n];
      PK_FOR (x, n) d[x] = half[x][y];
      Winograd<m>::input(d, v);
      PK_FOR (x, n) store(g.to + (y * n + x) * g.step + c, v[x], kLanes);
    }
  }
}

template <int m>
void output(const WinogradOutput& g) {
  constexpr int n = m + 2;
  for (int64_t j = 0; j < g.columns; j += kLanes) {
    f32 half[n][m];  // [column][row]
    PK_FOR (x, n) {
      f32 s[n];
      PK_FOR (y, n) s[y] = load(g.from + (y * n + x) * g.step + j, kLanes);
      Winograd<m>::output(s, half[x]);
    }
    PK_FOR (y, m) {
      f32 s[n], out[m];
      PK_FOR (x, n) s[x] = half[x][y];
      Winograd<m>::output(s, out);
      PK_FOR (x, m) store(g.to + (y * m + x) * g.stride + j, out[x], kLanes);
    }
  }
}

}  // namespace

extern const WinogradKernels winograd_kernels = {{&input<2>, &output<2>}, {&input<4>, &output<4>}};

}  // namespace pykernels::PYKERNELS_ISA_NS
