// Arithmetic, once per isa. From bytes to bytes: dequantize, combine, requantize in registers; of real numbers: load,
// combine, store.
#include "cpu/arithmetic/kernels.h"

#include "cpu/isa/math.h"
#include "cpu/isa/quantized.h"

namespace pykernels::PYKERNELS_ISA_NS {
namespace {

constexpr int64_t kColumnsHeld = 1024;

// Relu and relu6 are bounds on the real value, and rounding is monotone: they become bounds on the integer.
PK_INLINE Requantize clip(Requantize r, Activation activation, const QuantizedOutput& out) {
  if (activation == Activation::relu || activation == Activation::relu6) r.low = max(r.low, set1(0.0f));
  if (activation == Activation::relu6) r.high = min(r.high, round(set1(6.0f * out.inverse_scale)));
  return r;
}

// out[r, i] = q(f(a[r, i], b[..])) with f on real vectors.
template <class F>
PK_INLINE void combine(const QuantizedInput& a, const QuantizedInput& b, Operand operand, int64_t rows, int64_t n,
                       const QuantizedOutput& out, Activation clipping, const F& f) {
  with_bytes(a.data, a.s8, [&](const auto* qa) {
    with_bytes(b.data, b.s8, [&](const auto* qb) {
      with_bytes(out.data, out.s8, [&](auto* q) {
        const Requantize r = clip(requantizer(out.inverse_scale, out.zero_point, q), clipping, out);
        if (operand == Operand::columns) {  // their real values are made once for all rows
          float values[kColumnsHeld];
          for (int64_t column = 0; column < n; column += kColumnsHeld) {
            const int64_t width = n - column < kColumnsHeld ? n - column : kColumnsHeld;
            const auto real_b = reader(qb + column, b);
            each_real(values, width, [&](int64_t i, int lanes) PK_LAMBDA { return read(real_b, i, lanes); });
            for (int64_t row = 0; row < rows; ++row) {
              const auto real_a = reader(qa + row * n + column, a);
              each_byte(q + row * n + column, width, [&](int64_t i, int lanes) PK_LAMBDA {
                return requantize(r, f(read(real_a, i, lanes), load(values + i, lanes)));
              });
            }
          }
          return;
        }
        for (int64_t row = 0; row < rows; ++row, qa += n, q += n) {
          const auto real_a = reader(qa, a);
          if (operand == Operand::rows) {
            const f32 value = dequantize(set1_i32(qb[row]), set1_i32(b.zero_point), set1(b.scale));
            each_byte(q, n,
                      [&](int64_t i, int lanes) PK_LAMBDA { return requantize(r, f(read(real_a, i, lanes), value)); });
          } else {
            const auto real_b = reader(qb + row * n, b);
            each_byte(q, n, [&](int64_t i, int lanes) PK_LAMBDA {
              return requantize(r, f(read(real_a, i, lanes), read(real_b, i, lanes)));
            });
          }
        }
      });
    });
  });
}

void add_kernel(const QuantizedInput& a, const QuantizedInput& b, Operand operand, int64_t rows, int64_t n,
                Activation activation, const QuantizedOutput& out) {
  if (activation <= Activation::relu6)
    combine(a, b, operand, rows, n, out, activation, [](f32 x, f32 y) PK_LAMBDA { return add(x, y); });
  else
    combine(a, b, operand, rows, n, out, Activation::none,
            [&](f32 x, f32 y) PK_LAMBDA { return activate(activation, add(x, y)); });
}

void mul_kernel(const QuantizedInput& a, const QuantizedInput& b, Operand operand, int64_t rows, int64_t n,
                const QuantizedOutput& out) {
  combine(a, b, operand, rows, n, out, Activation::none, [](f32 x, f32 y) PK_LAMBDA { return mul(x, y); });
}

void requantize_kernel(const QuantizedInput& a, int64_t n, const QuantizedOutput& out) {
  with_bytes(a.data, a.s8, [&](const auto* qa) {
    with_bytes(out.data, out.s8, [&](auto* q) {
      const Requantize r = requantizer(out.inverse_scale, out.zero_point, q);
      const auto real_a = reader(qa, a);
      each_byte(q, n, [&](int64_t i, int lanes) PK_LAMBDA { return requantize(r, read(real_a, i, lanes)); });
    });
  });
}

void lookup_kernel(const uint8_t* x, int64_t n, const uint8_t* table, uint8_t* y) {
  const ByteTable t = byte_table(table);
  int64_t i = 0;
  for (; i + kBytes <= n; i += kBytes) store_u8(y + i, lookup(t, load_u8(x + i)));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    store_u8(y + i, lookup(t, load_u8(x + i, rest)), rest);
  }
}

// y[r, i] = f(a[r, i], b[..])
template <class T, class F>
PK_INLINE void combine_reals(const void* a, const void* b, Operand operand, int64_t rows, int64_t n, T* y, const F& f) {
  const T *pa = static_cast<const T*>(a), *pb = static_cast<const T*>(b);
  for (int64_t row = 0; row < rows; ++row, pa += n, y += n) {
    if (operand == Operand::rows) {
      const f32 value = set1(real(pb[row]));
      each_real(y, n, [&](int64_t i, int lanes) PK_LAMBDA { return f(load(pa + i, lanes), value); });
    } else {
      const T* row_b = operand == Operand::same ? pb + row * n : pb;
      each_real(y, n, [&](int64_t i, int lanes) PK_LAMBDA { return f(load(pa + i, lanes), load(row_b + i, lanes)); });
    }
  }
}

void add_reals_kernel(const void* a, const void* b, Real type, Operand operand, int64_t rows, int64_t n,
                      Activation activation, void* y) {
  with_real(y, type, [&](auto* out) {
    if (activation == Activation::none)
      combine_reals(a, b, operand, rows, n, out, [](f32 x, f32 z) PK_LAMBDA { return add(x, z); });
    else
      combine_reals(a, b, operand, rows, n, out,
                    [&](f32 x, f32 z) PK_LAMBDA { return activate(activation, add(x, z)); });
  });
}

void mul_reals_kernel(const void* a, const void* b, Real type, Operand operand, int64_t rows, int64_t n, void* y) {
  with_real(y, type, [&](auto* out) {
    combine_reals(a, b, operand, rows, n, out, [](f32 x, f32 z) PK_LAMBDA { return mul(x, z); });
  });
}

void cast_kernel(const void* x, Real from, int64_t n, void* y, Real to) {
  with_real(x, from, [&](const auto* in) {
    with_real(y, to, [&](auto* out) {
      each_real(out, n, [&](int64_t i, int lanes) PK_LAMBDA { return load(in + i, lanes); });
    });
  });
}

void activate_kernel(const void* x, Real type, int64_t n, Activation activation, void* y) {
  with_real(y, type, [&](auto* out) {
    const auto* in = static_cast<decltype(out)>(const_cast<void*>(x));
    each_real(out, n, [&](int64_t i, int lanes) PK_LAMBDA { return activate(activation, load(in + i, lanes)); });
  });
}

void leaky_relu_kernel(const void* x, Real type, int64_t n, float slope, void* y) {
  with_real(y, type, [&](auto* out) {
    const auto* in = static_cast<decltype(out)>(const_cast<void*>(x));
    each_real(out, n, [&](int64_t i, int lanes) PK_LAMBDA {
      const f32 v = load(in + i, lanes);
      return select_lt(set1(0.0f), v, v, mul(v, set1(slope)));
    });
  });
}

}  // namespace

const ArithmeticKernels arithmetic_kernels = {
    add_kernel,       mul_kernel,  requantize_kernel, lookup_kernel,     add_reals_kernel,
    mul_reals_kernel, cast_kernel, activate_kernel,   leaky_relu_kernel,
};

}  // namespace pykernels::PYKERNELS_ISA_NS
