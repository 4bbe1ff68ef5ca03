// quantize_* and dequantize_*: real numbers to bytes and back. Outputs keep the dense layout of x.
#include "cpu/op.h"

#include <algorithm>
#include <tuple>

#include "common/layout.h"
#include "cpu/quantize/driver.h"

namespace pykernels {
namespace {

// f(begin, end) over [0, n), `each` elements a step, on the host framework's threads.
template <class F>
void parallel_steps(int64_t n, int64_t each, const F& f) {
  parallel(n, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, each)), f);
}

// The same arguments from the i-th element on.
QuantizedInput from(QuantizedInput q, int64_t i) {
  q.data = static_cast<const uint8_t*>(q.data) + i;
  return q;
}
QuantizedOutput from(QuantizedOutput q, int64_t i) {
  q.data = static_cast<uint8_t*>(q.data) + i;
  return q;
}

// Real values by element index, whatever their dtype.
struct Reals {
  uint8_t* data;
  Real type;
  void* at(int64_t i) const { return data + i * real_bytes(type); }
};
Reals reals(const Tensor& t) { return {static_cast<uint8_t*>(t.data_ptr()), real_of(t.scalar_type())}; }

Tensor quantize_per_tensor(const Tensor& x, double scale, int64_t zero_point, ScalarType dtype) {
  const char* op = "quantize_per_tensor";
  check_real(op, "x", x);
  check_byte_dtype(op, "dtype", dtype);
  check_scale(op, "scale", scale);
  check_zero_point(op, "zero_point", zero_point, dtype);
  const Tensor source = dense(x);
  const Tensor q = dense_like(source, dtype);
  QuantizeDriver driver(x.numel(), real_of(x.scalar_type()), quantization(dtype, scale, zero_point),
                        torch::stable::get_num_threads());
  run(driver, {bytes_of(source)}, q);
  return q;
}

Tensor dequantize_per_tensor(const Tensor& x, double scale, int64_t zero_point, ScalarType dtype) {
  const char* op = "dequantize_per_tensor";
  check_byte(op, "x", x);
  check_real_dtype(op, "dtype", dtype);
  check_scale(op, "scale", scale);
  check_zero_point(op, "zero_point", zero_point, x.scalar_type());
  const Tensor source = dense(x);
  const Tensor y = dense_like(source, dtype);
  DequantizeDriver driver(x.numel(), quantization(x.scalar_type(), scale, zero_point), real_of(dtype),
                          torch::stable::get_num_threads());
  run(driver, {bytes_of(source)}, y);
  return y;
}

// One scale and zero point a channel, read out of their tensors and checked; quantized_dtype bounds the zero points.
struct Channels {
  std::vector<float> scale, inverse_scale;
  std::vector<int32_t> zero_point;
  int64_t inner;  // elements between one channel and the next, in memory

  Channels(const char* op, const Tensor& x, const Tensor& scales, const Tensor& zero_points, int64_t axis,
           ScalarType quantized_dtype) {
    PK_CHECK(axis >= -x.dim() && axis < x.dim(), op, ": axis must lie in [", -x.dim(), ", ", x.dim() - 1,
             "] for x of shape ", shape_of(x), ", not ", axis);
    if (axis < 0) axis += x.dim();
    const int64_t n = x.size(axis);
    check_cpu(op, "scale", scales);
    check_cpu(op, "zero_point", zero_points);
    PK_CHECK(scales.scalar_type() == ScalarType::Float || scales.scalar_type() == ScalarType::Double, op,
             ": scale must be float32 or float64, not ", dtype_name(scales.scalar_type()));
    PK_CHECK(zero_points.scalar_type() == ScalarType::Int || zero_points.scalar_type() == ScalarType::Long, op,
             ": zero_point must be int32 or int64, not ", dtype_name(zero_points.scalar_type()));
    PK_CHECK(scales.dim() == 1 && scales.size(0) == n, op, ": scale must have shape [", n,
             "], the size of x along axis ", axis, ", not ", shape_of(scales));
    PK_CHECK(zero_points.dim() == 1 && zero_points.size(0) == n, op, ": zero_point must have shape [", n,
             "], the size of x along axis ", axis, ", not ", shape_of(zero_points));
    const Tensor s = to_contiguous(scales), z = to_contiguous(zero_points);
    for (int64_t i = 0; i < n; ++i) {
      const double value = s.scalar_type() == ScalarType::Float ? pointer<float>(s)[i] : pointer<double>(s)[i];
      check_scale(op, "scale", value);
      scale.push_back(static_cast<float>(value));
      inverse_scale.push_back(1.0f / scale.back());
      const int64_t zero = z.scalar_type() == ScalarType::Int ? pointer<int32_t>(z)[i] : pointer<int64_t>(z)[i];
      check_zero_point(op, "zero_point", zero, quantized_dtype);
      zero_point.push_back(static_cast<int32_t>(zero));
    }
    inner = n == 1 ? std::max<int64_t>(1, x.numel()) : x.stride(axis);
  }

  int64_t size() const { return static_cast<int64_t>(scale.size()); }

  // run(channel, begin, end) over runs of memory that lie in one channel.
  template <class F>
  void each_run(int64_t numel, const F& run) const {
    parallel_steps(numel, 1, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t index = begin / inner, next = std::min(end, (index + 1) * inner);
        run(index % size(), begin, next);
        begin = next;
      }
    });
  }
};

Tensor quantize_per_channel(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t axis,
                            ScalarType dtype) {
  const char* op = "quantize_per_channel";
  check_real(op, "x", x);
  check_byte_dtype(op, "dtype", dtype);
  const Tensor source = dense(x);
  const Channels channels(op, source, scale, zero_point, axis, dtype);
  const Tensor q = dense_like(source, dtype);
  if (x.numel() == 0) return q;
  const Reals from_x = reals(source);
  const QuantizedOutput out = output_of(quantization(dtype, 1.0, 0), mutable_bytes_of(q));
  const QuantizeKernels& kernels = quantize_kernels();
  if (channels.inner == 1) {
    const int64_t n = channels.size();
    const ChannelParameters parameters{channels.inverse_scale.data(), channels.zero_point.data()};
    parallel_steps(x.numel() / n, n, [&](int64_t begin, int64_t end) {
      kernels.quantize_channels(from_x.at(begin * n), from_x.type, end - begin, n, parameters, from(out, begin * n));
    });
  } else {
    channels.each_run(x.numel(), [&](int64_t channel, int64_t begin, int64_t end) {
      QuantizedOutput run = from(out, begin);
      run.inverse_scale = channels.inverse_scale[channel];
      run.zero_point = channels.zero_point[channel];
      kernels.quantize(from_x.at(begin), from_x.type, end - begin, run);
    });
  }
  return q;
}

Tensor dequantize_per_channel(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t axis,
                              ScalarType dtype) {
  const char* op = "dequantize_per_channel";
  check_byte(op, "x", x);
  check_real_dtype(op, "dtype", dtype);
  const Tensor source = dense(x);
  const Channels channels(op, source, scale, zero_point, axis, x.scalar_type());
  const Tensor y = dense_like(source, dtype);
  if (x.numel() == 0) return y;
  const QuantizedInput in = input_of(quantization(x.scalar_type(), 1.0, 0), bytes_of(source));
  const Reals to_y = reals(y);
  const QuantizeKernels& kernels = quantize_kernels();
  if (channels.inner == 1) {
    const int64_t n = channels.size();
    const ChannelParameters parameters{channels.scale.data(), channels.zero_point.data()};
    parallel_steps(x.numel() / n, n, [&](int64_t begin, int64_t end) {
      kernels.dequantize_channels(from(in, begin * n), end - begin, n, parameters, to_y.at(begin * n), to_y.type);
    });
  } else {
    channels.each_run(x.numel(), [&](int64_t channel, int64_t begin, int64_t end) {
      QuantizedInput run = from(in, begin);
      run.scale = channels.scale[channel];
      run.zero_point = channels.zero_point[channel];
      kernels.dequantize(run, end - begin, to_y.at(begin), to_y.type);
    });
  }
  return y;
}

// Rows of the logical tensor are rows of memory only when it is contiguous: otherwise the op works on a contiguous copy
// and its output goes back to the layout of x.
Tensor back_in_layout_of(const Tensor& x, const Tensor& contiguous) {
  return x.is_contiguous() ? contiguous : in_layout_of(dense(x), contiguous);
}

Ints row_sizes(const Tensor& x) {
  Ints sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = 1;
  return sizes;
}

std::tuple<Tensor, Tensor, Tensor> quantize_per_token(const Tensor& x, ScalarType dtype) {
  const char* op = "quantize_per_token";
  check_real(op, "x", x);
  check_byte_dtype(op, "dtype", dtype);
  PK_CHECK(x.dim() >= 1, op, ": x must have at least 1 dimension, its tokens run along the last");
  const Tensor source = to_contiguous(x);
  const Tensor q = dense_like(source, dtype);
  const Tensor scale = empty(row_sizes(x), ScalarType::Float), zero_point = empty(row_sizes(x), ScalarType::Int);
  const int64_t n = x.size(x.dim() - 1);
  const Reals from_x = reals(source);
  float* scales = mutable_pointer<float>(scale);
  int32_t* zero_points = mutable_pointer<int32_t>(zero_point);
  void* bytes = q.mutable_data_ptr();
  const QuantizeKernels& kernels = quantize_kernels();
  parallel_steps(scale.numel(), n, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (dtype == ScalarType::Byte) {
        kernels.quantize_row(from_x.at(row * n), from_x.type, n, static_cast<uint8_t*>(bytes) + row * n, scales + row,
                             zero_points + row);
      } else {
        kernels.quantize_row_s8(from_x.at(row * n), from_x.type, n, static_cast<int8_t*>(bytes) + row * n,
                                scales + row);
        zero_points[row] = 0;
      }
    }
  });
  return {back_in_layout_of(x, q), scale, zero_point};
}

Tensor dequantize_per_token(const Tensor& x, const Tensor& scale, const Tensor& zero_point, ScalarType dtype) {
  const char* op = "dequantize_per_token";
  check_byte(op, "x", x);
  check_real_dtype(op, "dtype", dtype);
  PK_CHECK(x.dim() >= 1, op, ": x must have at least 1 dimension, its tokens run along the last");
  const Tensor source = to_contiguous(x);
  const Ints rows = row_sizes(x);
  const auto check_rows = [&](const char* name, const Tensor& t, ScalarType expected) {
    check_cpu(op, name, t);
    PK_CHECK(t.scalar_type() == expected, op, ": ", name, " must be ", dtype_name(expected), ", not ",
             dtype_name(t.scalar_type()));
    bool fits = t.dim() == x.dim();
    for (int64_t d = 0; fits && d < x.dim(); ++d) fits = t.size(d) == rows[d];
    PK_CHECK(fits, op, ": ", name, " must have the shape of x, ", shape_of(x), ", with 1 in the last place, not ",
             shape_of(t));
  };
  check_rows("scale", scale, ScalarType::Float);
  check_rows("zero_point", zero_point, ScalarType::Int);
  const Tensor s = to_contiguous(scale), z = to_contiguous(zero_point), y = dense_like(source, dtype);
  const int64_t n = x.size(x.dim() - 1);
  const float* scales = pointer<float>(s);
  const int32_t* zero_points = pointer<int32_t>(z);
  const QuantizedInput in = input_of(quantization(x.scalar_type(), 1.0, 0), bytes_of(source));
  const Reals to_y = reals(y);
  const auto kernel = quantize_kernels().dequantize;
  parallel_steps(s.numel(), n, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      QuantizedInput run = from(in, row * n);
      run.scale = scales[row];
      run.zero_point = zero_points[row];
      kernel(run, n, to_y.at(row * n), to_y.type);
    }
  });
  return back_in_layout_of(x, y);
}

int64_t blocks(const char* op, const Tensor& x, int64_t block_size) {
  PK_CHECK(block_size >= 1, op, ": block_size must be at least 1, not ", block_size);
  return x.numel() / block_size + (x.numel() % block_size != 0);
}

std::tuple<Tensor, Tensor> quantize_per_block(const Tensor& x, int64_t block_size) {
  const char* op = "quantize_per_block";
  check_real(op, "x", x);
  const int64_t count = blocks(op, x, block_size), n = x.numel();
  const Tensor source = to_contiguous(x);
  const Tensor q = dense_like(source, ScalarType::Char), scale = empty({count}, ScalarType::Float);
  const Reals from_x = reals(source);
  int8_t* bytes = mutable_pointer<int8_t>(q);
  float* scales = mutable_pointer<float>(scale);
  const auto kernel = quantize_kernels().quantize_row_s8;
  parallel_steps(count, block_size, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * block_size;
      kernel(from_x.at(first), from_x.type, std::min(block_size, n - first), bytes + first, scales + block);
    }
  });
  return {back_in_layout_of(x, q), scale};
}

Tensor dequantize_per_block(const Tensor& x, const Tensor& scale, int64_t block_size, ScalarType dtype) {
  const char* op = "dequantize_per_block";
  check_cpu(op, "x", x);
  PK_CHECK(x.scalar_type() == ScalarType::Char, op, ": x must be int8, not ", dtype_name(x.scalar_type()));
  check_cpu(op, "scale", scale);
  PK_CHECK(scale.scalar_type() == ScalarType::Float, op, ": scale must be float32, not ",
           dtype_name(scale.scalar_type()));
  check_real_dtype(op, "dtype", dtype);
  const int64_t count = blocks(op, x, block_size), n = x.numel();
  PK_CHECK(scale.dim() == 1 && scale.size(0) == count, op, ": scale must have shape [", count,
           "], one for each block of ", block_size, ", not ", shape_of(scale));
  const Tensor source = to_contiguous(x), s = to_contiguous(scale), y = dense_like(source, dtype);
  const float* scales = pointer<float>(s);
  const QuantizedInput in = input_of(quantization(x.scalar_type(), 1.0, 0), bytes_of(source));
  const Reals to_y = reals(y);
  const auto kernel = quantize_kernels().dequantize;
  parallel_steps(count, block_size, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * block_size;
      QuantizedInput run = from(in, first);
      run.scale = scales[block];
      kernel(run, std::min(block_size, n - first), to_y.at(first), to_y.type);
    }
  });
  return back_in_layout_of(x, y);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("quantize_per_tensor", TORCH_BOX(&quantize_per_tensor));
  m.impl("dequantize_per_tensor", TORCH_BOX(&dequantize_per_tensor));
  m.impl("quantize_per_channel", TORCH_BOX(&quantize_per_channel));
  m.impl("dequantize_per_channel", TORCH_BOX(&dequantize_per_channel));
  m.impl("quantize_per_token", TORCH_BOX(&quantize_per_token));
  m.impl("dequantize_per_token", TORCH_BOX(&dequantize_per_token));
  m.impl("quantize_per_block", TORCH_BOX(&quantize_per_block));
  m.impl("dequantize_per_block", TORCH_BOX(&dequantize_per_block));
}

}  // namespace pykernels
