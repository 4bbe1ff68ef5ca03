// Rows, panels and weights of attention, once per isa (formulas and layouts in kernels.h).
#include "cpu/attention/kernels.h"

#include <cmath>

#include "cpu/isa/math.h"
#include "cpu/isa/rows.h"

namespace pykernels::PYKERNELS_ISA_NS {
namespace {

void widen(const void* x, Real type, int64_t n, float factor, float* to) {
  const f32 f = set1(factor);
  with_real(x, type,
            [&](auto* in) { each_real(to, n, [&](int64_t i, int k) PK_LAMBDA { return mul(load(in + i, k), f); }); });
}

// Four elements of each of four rows, as columns.
#if defined(PYKERNELS_ISA_SCALAR)
PK_INLINE void transpose(const float* const* rows, int64_t at, float* to) {
  for (int d = 0; d < 4; ++d)
    for (int j = 0; j < 4; ++j) to[16 * d + j] = rows[j][at + d];
}
#else
PK_INLINE void transpose(const float* const* rows, int64_t at, float* to) {
  __m128 r0 = _mm_loadu_ps(rows[0] + at), r1 = _mm_loadu_ps(rows[1] + at);
  __m128 r2 = _mm_loadu_ps(rows[2] + at), r3 = _mm_loadu_ps(rows[3] + at);
  _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
  _mm_storeu_ps(to, r0);
  _mm_storeu_ps(to + 16, r1);
  _mm_storeu_ps(to + 32, r2);
  _mm_storeu_ps(to + 48, r3);
}
#endif

template <class T>
PK_INLINE void pack_rows_of(const T* x, int64_t rows, int64_t stride, int64_t depth, float* to) {
  constexpr int64_t kRun = 64;  // elements of a row that are brought to fp32 at a time
  float held[4][kRun];
  for (int64_t first = 0; first < rows; first += 16, to += 16 * depth)
    for (int64_t j = 0; j < 16; j += 4)
      for (int64_t begin = 0; begin < depth; begin += kRun) {
        const int64_t run = depth - begin < kRun ? depth - begin : kRun;
        const float* four[4];
        for (int k = 0; k < 4; ++k) {
          const int64_t row = first + j + k;
          four[k] = held[k];
          if (row < rows) {
            const T* from = x + row * stride + begin;
            each_real(held[k], run, [&](int64_t i, int n) PK_LAMBDA { return load(from + i, n); });
          } else {
            for (int64_t i = 0; i < run; ++i) held[k][i] = 0.0f;
          }
        }
        float* panel = to + 16 * begin + j;
        int64_t d = 0;
        for (; d + 4 <= run; d += 4) transpose(four, d, panel + 16 * d);
        for (; d < run; ++d)
          for (int k = 0; k < 4; ++k) panel[16 * d + k] = held[k][d];
      }
}

void pack_rows(const void* x, Real type, int64_t rows, int64_t stride, int64_t depth, float* to) {
  with_real(x, type, [&](auto* in) { pack_rows_of(in, rows, stride, depth, to); });
}

void pack_columns(const void* x, Real type, int64_t rows, int64_t stride, int64_t depth, float* to) {
  with_real(x, type, [&](auto* in) {
    for (int64_t column = 0; column < depth; column += 16, to += 16 * rows) {
      const int64_t columns = depth - column < 16 ? depth - column : 16;
      for (int64_t r = 0; r < rows; ++r) {
        const auto* from = in + r * stride + column;
        float* block = to + 16 * r;
        each_real(block, columns, [&](int64_t i, int n) PK_LAMBDA { return load(from + i, n); });
        for (int64_t j = columns; j < 16; ++j) block[j] = 0.0f;
      }
    }
  });
}

PK_INLINE void mask_scores(float* scores, int64_t n, const MaskRow& mask) {
  if (mask.kind == MaskRow::Kind::bytes) {
    const auto* takes_part = static_cast<const uint8_t*>(mask.at);
    for (int64_t i = 0; i < n; ++i)
      if (!takes_part[i]) scores[i] = -HUGE_VALF;
  } else if (mask.kind == MaskRow::Kind::reals) {
    with_real(mask.at, mask.type, [&](auto* added) {
      each_real(scores, n, [&](int64_t i, int k) PK_LAMBDA { return add(load(scores + i, k), load(added + i, k)); });
    });
  }
}

float weigh(float* scores, int64_t n, int64_t padded, const MaskRow& mask) {
  mask_scores(scores, n, mask);
  const float top = n > 0 ? max_row(scores, n) : -HUGE_VALF;
  if (top == -HUGE_VALF) {
    clear_tail(scores, 0, padded);
    return 0.0f;
  }
  const f32 low = set1(-HUGE_VALF);
  each_real(scores, n, [&](int64_t i, int k) PK_LAMBDA {
    const f32 s = load(scores + i, k);
    return select_lt(low, s, exp(sub(s, set1(top))), set1(0.0f));  // exp ends above zero
  });
  clear_tail(scores, n, padded);
  return 1.0f / sum_row(scores, padded, [](f32 v) PK_LAMBDA { return v; });
}

void narrow(const float* sums, int64_t n, float factor, Real type, void* to) {
  const f32 f = set1(factor);
  with_real(to, type, [&](auto* out) {
    each_real(out, n, [&](int64_t i, int k) PK_LAMBDA { return mul(load(sums + i, k), f); });
  });
}

}  // namespace

extern const AttentionKernels attention_kernels = {&widen, &pack_rows, &pack_columns, &weigh, &narrow};

}  // namespace pykernels::PYKERNELS_ISA_NS
