// Normalizations, once per isa: a row is brought to fp32 once, in scratch, and read from there.
#include "cpu/normalize/kernels.h"

#include "cpu/isa/math.h"
#include "cpu/isa/rows.h"

namespace pykernels::PYKERNELS_ISA_NS {
namespace {

template <class T>
PK_INLINE void softmax_row(const T* x, int64_t n, float* row, T* y) {
  const int64_t padded = padded_row(n);
  const float top = max_row(x, n);
  each_real(row, n, [&](int64_t i, int k) PK_LAMBDA { return exp(sub(load(x + i, k), set1(top))); });
  clear_tail(row, n, padded);
  const f32 inverse = div(set1(1.0f), set1(sum_row(row, padded, [](f32 v) PK_LAMBDA { return v; })));
  each_real(y, n, [&](int64_t i, int k) PK_LAMBDA { return mul(load(row + i, k), inverse); });
}

void softmax_rows_kernel(const void* x, Real type, int64_t rows, int64_t n, float* memory, void* y) {
  with_real(y, type, [&](auto* out) {
    const auto* in = static_cast<decltype(out)>(const_cast<void*>(x));
    for (int64_t r = 0; r < rows; ++r) softmax_row(in + r * n, n, memory, out + r * n);
  });
}

void layer_norm_rows_kernel(const void* x, Real type, int64_t rows, int64_t n, const float* weight, const float* bias,
                            float eps, float* memory, void* y) {
  const int64_t padded = padded_row(n);
  const f32 count = set1(static_cast<float>(n));
  with_real(y, type, [&](auto* out) {
    const auto* in = static_cast<decltype(out)>(const_cast<void*>(x));
    for (int64_t r = 0; r < rows; ++r, in += n, out += n) {
      each_real(memory, n, [&](int64_t i, int k) PK_LAMBDA { return load(in + i, k); });
      clear_tail(memory, n, padded);
      const f32 mean = div(set1(sum_row(memory, padded, [](f32 v) PK_LAMBDA { return v; })), count);
      each_real(memory, n, [&](int64_t i, int k) PK_LAMBDA { return sub(load(memory + i, k), mean); });
      const f32 variance = div(set1(sum_row(memory, padded, [](f32 v) PK_LAMBDA { return mul(v, v); })), count);
      const f32 inverse = div(set1(1.0f), sqrt(add(variance, set1(eps))));
      each_real(out, n, [&](int64_t i, int k) PK_LAMBDA {
        f32 v = mul(load(memory + i, k), inverse);
        if (weight) v = mul(v, load(weight + i, k));
        return bias ? add(v, load(bias + i, k)) : v;
      });
    }
  });
}

void softmax_columns_kernel(const void* x, Real type, int64_t n, int64_t stride, int64_t width, void* y) {
  with_real(y, type, [&](auto* out) {
    const auto* in = static_cast<decltype(out)>(const_cast<void*>(x));
    for (int64_t c = 0; c < width; c += kLanes) {
      const int k = lanes_left(width - c);
      f32 most = load(in + c, k), sum = set1(0.0f);
      for (int64_t i = 1; i < n; ++i) most = max_nan(load(in + i * stride + c, k), most);
      for (int64_t i = 0; i < n; ++i) sum = add(sum, exp(sub(load(in + i * stride + c, k), most)));
      const f32 inverse = div(set1(1.0f), sum);
      for (int64_t i = 0; i < n; ++i)
        store(out + i * stride + c, mul(exp(sub(load(in + i * stride + c, k), most)), inverse), k);
    }
  });
}

}  // namespace

const NormalizeKernels normalize_kernels = {softmax_rows_kernel, layer_norm_rows_kernel, softmax_columns_kernel};

}  // namespace pykernels::PYKERNELS_ISA_NS
