// Pools, once per isa. The formulas and the layouts stand in kernels.h.
//
// channels_last: a vector holds channels; each window is reduced in registers, a group of vectors at a time.
// contiguous: a vector holds columns. The rows of a window are first reduced into a padded line of scratch (a vector of
// columns a step), the line then into itself at every column (so that no border is special), and the columns that are
// outputs picked.
#include "cpu/pool/kernels.h"

#include "cpu/isa/loops.h"
#include "cpu/isa/requantize.h"

namespace pykernels::PYKERNELS_ISA_NS {
namespace {

// The reductions. In: element of x; Acc: element of scratch; Vec: kWidth of them.
//   start(p, taps)   what the reduction of a window of `taps` elements begins with; neutral() what the padding holds
//   merge(a, v)      the reduction of a and the later v; join() the same of partial results; one() of single ones
//   finish(p, a, divisor, at, n)   stores n outputs at element `at` of y

template <class T>
struct MaxFloat {
  using In = T;
  using Acc = float;
  using Vec = f32;
  static constexpr int kWidth = kLanes;
  PK_INLINE Acc neutral() { return -__builtin_inff(); }
  PK_INLINE Vec start(const Pool&, int64_t) { return set1(neutral()); }
  PK_INLINE Vec read(const In* x, int n) { return load(x, n); }
  PK_INLINE Vec get(const Acc* a) { return load(a); }
  PK_INLINE void put(Acc* a, Vec v, int n) { store(a, v, n); }
  PK_INLINE Vec merge(Vec a, Vec v) { return max_nan(v, a); }
  PK_INLINE Acc one(Acc a, Acc v) { return v > a || v != v ? v : a; }
  PK_INLINE void finish(const Pool& p, Vec a, f32, int64_t at, int n) { store(static_cast<T*>(p.y) + at, a, n); }
};

template <bool is_signed>
struct MaxByte {
  using In = uint8_t;
  using Acc = uint8_t;
  using Vec = u8;
  static constexpr int kWidth = kBytes;
  PK_INLINE Acc neutral() { return is_signed ? 0x80 : 0; }
  PK_INLINE Vec start(const Pool&, int64_t) { return set1_u8(neutral()); }
  PK_INLINE Vec read(const In* x, int n) { return load_u8(x, n); }
  PK_INLINE Vec get(const Acc* a) { return load_u8(a); }
  PK_INLINE void put(Acc* a, Vec v, int n) { store_u8(a, v, n); }
  PK_INLINE Vec merge(Vec a, Vec v) {
    if constexpr (is_signed)
      return max_s8(a, v);
    else
      return max_u8(a, v);
  }
  PK_INLINE Acc one(Acc a, Acc v) {
    if constexpr (is_signed)
      return static_cast<int8_t>(v) > static_cast<int8_t>(a) ? v : a;
    else
      return v > a ? v : a;
  }
  PK_INLINE void finish(const Pool& p, Vec a, f32, int64_t at, int n) { store_u8(static_cast<In*>(p.y) + at, a, n); }
};

template <class T>
struct SumFloat {
  using In = T;
  using Acc = float;
  using Vec = f32;
  static constexpr int kWidth = kLanes;
  PK_INLINE Acc neutral() { return 0.0f; }
  PK_INLINE Vec start(const Pool&, int64_t) { return set1(0.0f); }
  PK_INLINE Vec read(const In* x, int n) { return load(x, n); }
  PK_INLINE Vec get(const Acc* a) { return load(a); }
  PK_INLINE void put(Acc* a, Vec v, int n) { store(a, v, n); }
  PK_INLINE Vec merge(Vec a, Vec v) { return add(a, v); }
  PK_INLINE Acc one(Acc a, Acc v) { return a + v; }
  PK_INLINE void finish(const Pool& p, Vec a, f32 divisor, int64_t at, int n) {
    store(static_cast<T*>(p.y) + at, div(a, divisor), n);
  }
};

// Beginning with -taps * zero_point leaves padding as the neutral real 0.
template <class T>
struct SumByte {
  using In = T;
  using Acc = int32_t;
  using Vec = i32;
  static constexpr int kWidth = kLanes;
  PK_INLINE Acc neutral() { return 0; }
  PK_INLINE Vec start(const Pool& p, int64_t taps) { return set1_i32(static_cast<int32_t>(-taps * p.x_zero_point)); }
  PK_INLINE Vec read(const In* x, int n) { return load_i32(x, n); }
  PK_INLINE Vec get(const Acc* a) { return load_i32(a); }
  PK_INLINE void put(Acc* a, Vec v, int n) { store_i32(a, v, n); }
  PK_INLINE Vec merge(Vec a, Vec v) { return add(a, v); }
  PK_INLINE Acc one(Acc a, Acc v) { return a + v; }
  PK_INLINE void finish(const Pool& p, Vec a, f32 divisor, int64_t at, int n) {
    const f32 f = mul(to_f32(a), div(set1(p.x_scale), divisor));
    switch (p.y_type) {
      case kPoolF32: return store(static_cast<float*>(p.y) + at, f, n);
      case kPoolBf16: return store(static_cast<bfloat16*>(p.y) + at, f, n);
      case kPoolF16: return store(static_cast<float16*>(p.y) + at, f, n);
      case kPoolU8: {
        uint8_t* y = static_cast<uint8_t*>(p.y) + at;
        return store_i32(y, requantize(requantizer(p.y_inverse, p.y_zero_point, y), f), n);
      }
      default: {
        int8_t* y = static_cast<int8_t*>(p.y) + at;
        return store_i32(y, requantize(requantizer(p.y_inverse, p.y_zero_point, y), f), n);
      }
    }
  }
};

// n elements in steps of `width`: where the step from i begins, so that the last is whole if n allows (outputs of the
// overlap are computed twice, alike), and how many elements a step has.
PK_INLINE int64_t step_begin(int64_t i, int64_t n, int width) { return i + width <= n || n < width ? i : n - width; }
PK_INLINE int step_size(int64_t n, int width) { return n < width ? static_cast<int>(n) : width; }

// One output pixel, V vectors of channels. x: the window's first tap, at: the output, both at the first of the
// channels.
template <class R, int V>
PK_INLINE void pixel(const Pool& p, const typename R::In* x, const Window& row, const Window& col, int64_t at, int n) {
  typename R::Vec acc[V];
  for (int v = 0; v < V; ++v) acc[v] = R::start(p, row.count * col.count);
  const int64_t down = p.row_step * p.x_row, right = p.col_step * p.x_col;
  for (int64_t i = 0; i < row.count; ++i, x += down) {
    const typename R::In* tap = x;
    for (int64_t j = 0; j < col.count; ++j, tap += right)
      for (int v = 0; v < V; ++v) acc[v] = R::merge(acc[v], R::read(tap + v * R::kWidth, n));
  }
  const f32 divisor = set1(row.extent * col.extent);
  for (int v = 0; v < V; ++v) R::finish(p, acc[v], divisor, at + v * R::kWidth, n);
}

template <class R>
void channels_last(const Pool& p, int64_t begin, int64_t end) {
  constexpr int W = R::kWidth;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit % p.blocks, line = unit / p.blocks;
    const int64_t first = block * p.block_channels, left = p.channels - first;
    const int64_t channels = left < p.block_channels ? left : p.block_channels;
    const Window& row = p.rows[line % p.out_h];
    const typename R::In* x_row =
        static_cast<const typename R::In*>(p.x) + line / p.out_h * p.x_batch + row.begin * p.x_row + first;
    for (int64_t ow = 0; ow < p.out_w; ++ow) {
      const Window& col = p.cols[ow];
      const typename R::In* x = x_row + col.begin * p.x_col;
      const int64_t at = (line * p.out_w + ow) * p.channels + first;
      int64_t c = 0;
      for (; c + 8 * W <= channels; c += 8 * W) pixel<R, 8>(p, x + c, row, col, at + c, W);
      if (c + 4 * W <= channels) pixel<R, 4>(p, x + c, row, col, at + c, W), c += 4 * W;
      if (c + 2 * W <= channels) pixel<R, 2>(p, x + c, row, col, at + c, W), c += 2 * W;
      for (; c < channels; c += W) {
        const int64_t i = step_begin(c, channels, W);
        if (channels >= W)
          pixel<R, 1>(p, x + i, row, col, at + i, W);
        else
          pixel<R, 1>(p, x + i, row, col, at + i, step_size(channels, W));
      }
    }
  }
}

// The rows of one window, reduced into line[0, width).
template <class R>
PK_INLINE void reduce_rows(const Pool& p, const typename R::In* x, const Window& row, typename R::Acc* line) {
  constexpr int W = R::kWidth;
  const int64_t down = p.row_step * p.x_row;
  for (int64_t c = 0; c < p.width; c += W) {
    const int64_t i = step_begin(c, p.width, W);
    const int n = step_size(p.width, W);
    typename R::Vec acc = R::start(p, row.count);
    const typename R::In* tap = x + i;
    if (n == W)
      for (int64_t r = 0; r < row.count; ++r, tap += down) acc = R::merge(acc, R::read(tap, W));
    else
      for (int64_t r = 0; r < row.count; ++r, tap += down) acc = R::merge(acc, R::read(tap, n));
    R::put(line + i, acc, n);
  }
}

// The columns of every window: line (with its padding) into result[0, out_w).
template <class R>
PK_INLINE void reduce_cols(const Pool& p, const typename R::Acc* line, typename R::Acc* result) {
  constexpr int W = R::kWidth;
  if (p.col_stride == 0) {
    for (int64_t ow = 0; ow < p.out_w; ++ow) {
      const typename R::Acc* tap = line + p.cols[ow].begin;
      typename R::Acc a = *tap;
      for (int64_t j = 1; j < p.cols[ow].count; ++j) a = R::one(a, *(tap += p.col_step));
      result[ow] = a;
    }
    return;
  }
  const int64_t positions = (p.out_w - 1) * p.col_stride + 1;
  for (int64_t i = 0; i < positions; i += W) {
    typename R::Vec acc = R::get(line + i);
    for (int64_t j = 1; j < p.col_taps; ++j) acc = R::merge(acc, R::get(line + i + j * p.col_step));
    R::put(result + i, acc, W);
  }
  if (p.col_stride > 1)
    for (int64_t ow = 1; ow < p.out_w; ++ow) result[ow] = result[ow * p.col_stride];
}

template <class R>
void contiguous(const Pool& p, int64_t begin, int64_t end, void* scratch) {
  constexpr int W = R::kWidth;
  typename R::Acc* const line = static_cast<typename R::Acc*>(scratch);
  typename R::Acc* const result = line + p.line_length + 64;
  for (int64_t i = 0; i < p.line_length + 64; ++i) line[i] = R::neutral();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t plane = unit / p.out_h;
    const Window& row = p.rows[unit % p.out_h];
    const typename R::In* x = static_cast<const typename R::In*>(p.x) + plane / p.channels * p.x_batch +
                              plane % p.channels * p.x_channel + row.begin * p.x_row;
    reduce_rows<R>(p, x, row, line + p.col_pad);
    reduce_cols<R>(p, line, result);
    for (int64_t c = 0; c < p.out_w; c += W) {
      const int64_t i = step_begin(c, p.out_w, W);
      const f32 divisor = mul(set1(row.extent), load(p.col_extents + i, step_size(p.out_w - i, kLanes)));
      R::finish(p, R::get(result + i), divisor, unit * p.out_w + i, step_size(p.out_w, W));
    }
  }
}

// Averages of whole planes: a plane is a run of memory. Element i belongs to sum i % 16 whatever the width of a vector.
// Planes are summed side by side, since each adds to its sums one step after another.
constexpr int kPlanes = 4;

template <class R>
PK_INLINE void sum_runs(const typename R::In* const* x, int64_t count, typename R::Vec zero, typename R::Acc* sums) {
  constexpr int kSums = 16, W = R::kWidth, kVectors = kSums / W;
  typename R::Vec acc[kPlanes][kVectors];
  for (int k = 0; k < kPlanes; ++k)
    for (int v = 0; v < kVectors; ++v) acc[k][v] = zero;
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int k = 0; k < kPlanes; ++k)
      for (int v = 0; v < kVectors; ++v) acc[k][v] = R::merge(acc[k][v], R::read(x[k] + i + v * W, W));
  for (int v = 0; v < kVectors && i + v * W < count; ++v) {
    const int n = step_size(count - i - v * W, W);
    for (int k = 0; k < kPlanes; ++k) acc[k][v] = R::merge(acc[k][v], R::read(x[k] + i + v * W, n));
  }
  for (int k = 0; k < kPlanes; ++k) {
    for (int half = kVectors / 2; half > 0; half /= 2)
      for (int v = 0; v < half; ++v) acc[k][v] = R::merge(acc[k][v], acc[k][v + half]);
    sums[k] = sum_lanes(acc[k][0]);
  }
}

template <class R>
PK_INLINE void average_planes(const Pool& p, int64_t begin, int64_t end) {
  constexpr int W = R::kWidth;
  const typename R::Vec zero = R::start(p, 0), offset = R::start(p, p.run);
  const f32 divisor = set1(p.rows[0].extent * p.cols[0].extent);
  for (int64_t plane = begin; plane < end; plane += W) {
    const int n = step_size(end - plane, W);
    typename R::Acc sums[W + kPlanes] = {};
    for (int k = 0; k < n; k += kPlanes) {
      const typename R::In* x[kPlanes];
      for (int j = 0; j < kPlanes; ++j) {
        const int64_t at = plane + k + j < end ? plane + k + j : end - 1;  // beyond the last, the last again
        x[j] = static_cast<const typename R::In*>(p.x) + at / p.channels * p.x_batch + at % p.channels * p.x_channel;
      }
      sum_runs<R>(x, p.run, zero, sums + k);
    }
    R::finish(p, R::merge(R::get(sums), offset), divisor, plane, n);
  }
}

template <class R>
void average_contiguous(const Pool& p, int64_t begin, int64_t end, void* scratch) {
  if (p.run)
    average_planes<R>(p, begin, end);
  else
    contiguous<R>(p, begin, end, scratch);
}

// The maximum with its place, in fp32 (which holds every bf16, fp16 and byte): a lane takes v when it is greater or
// NaN.
PK_INLINE void write_indices(int64_t* to, i32 places, int n) {
  int32_t lanes[kLanes];
  store_i32(lanes, places);
  if (n == kLanes)
    for (int k = 0; k < kLanes; ++k) to[k] = lanes[k];
  else
    for (int k = 0; k < n; ++k) to[k] = lanes[k];
}

// As pixel(), with the places in the plane, the first of which is `place`.
template <class T, int V>
PK_INLINE void pixel_indices(const Pool& p, const T* x, const Window& row, const Window& col, int32_t place, int64_t at,
                             int n) {
  const int64_t down = p.row_step * p.x_row, right = p.col_step * p.x_col;
  f32 best[V], index[V];
  for (int v = 0; v < V; ++v) best[v] = set1(-__builtin_inff()), index[v] = cast_f32(set1_i32(place));
  for (int64_t r = 0; r < row.count; ++r, x += down, place += static_cast<int32_t>(p.row_step * p.width)) {
    const T* tap = x;
    int32_t here = place;
    for (int64_t s = 0; s < col.count; ++s, tap += right, here += static_cast<int32_t>(p.col_step)) {
      const f32 now = cast_f32(set1_i32(here));
      for (int v = 0; v < V; ++v) {
        const f32 value = read_real(tap + v * kLanes, n);
        index[v] = select_over(value, best[v], now, index[v]);
        best[v] = select_over(value, best[v], value, best[v]);
      }
    }
  }
  for (int v = 0; v < V; ++v) {
    write_real(static_cast<T*>(p.y) + at + v * kLanes, best[v], n);
    write_indices(p.indices + at + v * kLanes, cast_i32(index[v]), n);
  }
}

template <class T>
void max_indices_channels_last(const Pool& p, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t block = unit % p.blocks, line = unit / p.blocks;
    const int64_t first = block * p.block_channels, left = p.channels - first;
    const int64_t channels = left < p.block_channels ? left : p.block_channels;
    const Window& row = p.rows[line % p.out_h];
    const T* x_row = static_cast<const T*>(p.x) + line / p.out_h * p.x_batch + row.begin * p.x_row + first;
    for (int64_t ow = 0; ow < p.out_w; ++ow) {
      const Window& col = p.cols[ow];
      const int32_t place = static_cast<int32_t>(row.begin * p.width + col.begin);
      const int64_t at = (line * p.out_w + ow) * p.channels + first;
      const T* x = x_row + col.begin * p.x_col;
      int64_t c = 0;
      for (; c + 4 * kLanes <= channels; c += 4 * kLanes)
        pixel_indices<T, 4>(p, x + c, row, col, place, at + c, kLanes);
      for (; c < channels; c += kLanes) {
        const int64_t i = step_begin(c, channels, kLanes);
        if (channels >= kLanes)
          pixel_indices<T, 1>(p, x + i, row, col, place, at + i, kLanes);
        else
          pixel_indices<T, 1>(p, x + i, row, col, place, at + i, step_size(channels, kLanes));
      }
    }
  }
}

template <class T>
void max_indices_contiguous(const Pool& p, int64_t begin, int64_t end, void*) {
  T* const y = static_cast<T*>(p.y);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t plane = unit / p.out_h;
    const Window& row = p.rows[unit % p.out_h];
    const T* x = static_cast<const T*>(p.x) + plane / p.channels * p.x_batch + plane % p.channels * p.x_channel;
    for (int64_t ow = 0; ow < p.out_w; ++ow) {
      const Window& col = p.cols[ow];
      int64_t best_row = row.begin, best_col = col.begin;
      float best = -__builtin_inff();
      for (int64_t i = 0, r = row.begin; i < row.count; ++i, r += p.row_step)
        for (int64_t j = 0, s = col.begin; j < col.count; ++j, s += p.col_step) {
          const float v = real(x[r * p.x_row + s]);
          if (v > best || v != v) best = v, best_row = r, best_col = s;
        }
      const int64_t at = unit * p.out_w + ow;
      y[at] = x[best_row * p.x_row + best_col];
      p.indices[at] = best_row * p.width + best_col;
    }
  }
}

}  // namespace

const PoolKernels pool_kernels = {
    {channels_last<MaxFloat<float>>, channels_last<MaxFloat<bfloat16>>, channels_last<MaxFloat<float16>>,
     channels_last<MaxByte<false>>, channels_last<MaxByte<true>>},
    {max_indices_channels_last<float>, max_indices_channels_last<bfloat16>, max_indices_channels_last<float16>,
     max_indices_channels_last<uint8_t>, max_indices_channels_last<int8_t>},
    {contiguous<MaxFloat<float>>, contiguous<MaxFloat<bfloat16>>, contiguous<MaxFloat<float16>>,
     contiguous<MaxByte<false>>, contiguous<MaxByte<true>>},
    {max_indices_contiguous<float>, max_indices_contiguous<bfloat16>, max_indices_contiguous<float16>,
     max_indices_contiguous<uint8_t>, max_indices_contiguous<int8_t>},
    {channels_last<SumFloat<float>>, channels_last<SumFloat<bfloat16>>, channels_last<SumFloat<float16>>,
     channels_last<SumByte<uint8_t>>, channels_last<SumByte<int8_t>>},
    {average_contiguous<SumFloat<float>>, average_contiguous<SumFloat<bfloat16>>, average_contiguous<SumFloat<float16>>,
     average_contiguous<SumByte<uint8_t>>, average_contiguous<SumByte<int8_t>>},
};

}  // namespace pykernels::PYKERNELS_ISA_NS
