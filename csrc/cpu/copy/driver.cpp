#include "cpu/copy/driver.h"

#include <emmintrin.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <type_traits>

namespace pykernels {
namespace {

// A unit of a transposition: so many elements of the dimension that is dense in the source times so many of the one
// that is dense in the output. Whole cache lines of the source are read at once; the unit's lines stay in the second
// level.
constexpr int64_t kSourceBlock = 64, kOutputBlock = 256;

template <class T>
__m128i low(__m128i a, __m128i b) {
  if constexpr (sizeof(T) == 1) return _mm_unpacklo_epi8(a, b);
  if constexpr (sizeof(T) == 2) return _mm_unpacklo_epi16(a, b);
  if constexpr (sizeof(T) == 4) return _mm_unpacklo_epi32(a, b);
  return _mm_unpacklo_epi64(a, b);
}
template <class T>
__m128i high(__m128i a, __m128i b) {
  if constexpr (sizeof(T) == 1) return _mm_unpackhi_epi8(a, b);
  if constexpr (sizeof(T) == 2) return _mm_unpackhi_epi16(a, b);
  if constexpr (sizeof(T) == 4) return _mm_unpackhi_epi32(a, b);
  return _mm_unpackhi_epi64(a, b);
}

template <class T>
constexpr int kTile = 16 / sizeof(T);

// kTile rows of as many elements, `from` and `to` elements apart. A shuffle of the rows' two halves moves one bit of an
// element's place in its row to its row's number; all of them moved, rows and places have changed sides.
template <class T>
void transpose_tile(const T* x, int64_t from, T* y, int64_t to) {
  constexpr int n = kTile<T>;
  __m128i rows[n], shuffled[n];
  for (int i = 0; i < n; ++i) rows[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i * from));
  for (int step = 1; step < n; step *= 2) {
    for (int i = 0; i < n / 2; ++i) {
      shuffled[2 * i] = low<T>(rows[i], rows[i + n / 2]);
      shuffled[2 * i + 1] = high<T>(rows[i], rows[i + n / 2]);
    }
    for (int i = 0; i < n; ++i) rows[i] = shuffled[i];
  }
  for (int i = 0; i < n; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i * to), rows[i]);
}

// y[i * to + j] = x[i + j * from], element by element. Images of few channels are all rest: these loops are unrolled.
template <class T, class From, class To, class Rows, class Columns>
void transpose_loop(const T* __restrict x, From from, T* __restrict y, To to, Rows rows, Columns columns) {
  if constexpr (std::is_same_v<Rows, int64_t>)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) y[i * to + j] = x[i + j * from];
  else
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t i = 0; i < rows; ++i) y[i * to + j] = x[i + j * from];
}

template <class T>
void transpose_rest(const T* x, int64_t from, T* y, int64_t to, int64_t rows, int64_t columns) {
  const auto unrolled = [&](auto few) {
    if (columns == few) {
      if (to == few)
        transpose_loop(x, from, y, few, rows, few);
      else
        transpose_loop(x, from, y, to, rows, few);
    } else if (from == few) {
      transpose_loop(x, few, y, to, few, columns);
    } else {
      transpose_loop(x, from, y, to, few, columns);
    }
  };
  const int64_t few = std::min(rows, columns);
  if (few == 1) return unrolled(std::integral_constant<int64_t, 1>{});
  if (few == 2) return unrolled(std::integral_constant<int64_t, 2>{});
  if (few == 3) return unrolled(std::integral_constant<int64_t, 3>{});
  if (few == 4) return unrolled(std::integral_constant<int64_t, 4>{});
  transpose_loop(x, from, y, to, rows, columns);
}

// The same for a block, a cache line of the source at a time.
template <class T>
void transpose(const T* x, int64_t from, T* y, int64_t to, int64_t rows, int64_t columns) {
  constexpr int64_t n = kTile<T>, line = 64 / sizeof(T);
  const int64_t whole_rows = rows / n * n, whole_columns = columns / n * n;
  for (int64_t first = 0; first < whole_rows; first += line)
    for (int64_t j = 0; j < whole_columns; j += n)
      for (int64_t i = first; i < std::min(first + line, whole_rows); i += n)
        transpose_tile(x + i + j * from, from, y + i * to + j, to);
  transpose_rest(x + whole_columns * from, from, y + whole_columns, to, rows, columns - whole_columns);
  transpose_rest(x + whole_rows, from, y + whole_rows * to, to, rows - whole_rows, whole_columns);
}

template <class T>
void copy_run(const T* x, int64_t from, T* y, int64_t to, int64_t n) {
  if (to == 1 && from == 1)
    std::memcpy(y, x, n * sizeof(T));
  else if (to == 1 && from == 0)
    std::fill_n(y, n, *x);
  else
    for (int64_t i = 0; i < n; ++i) y[i * to] = x[i * from];
}

}  // namespace

CopyDriver::CopyDriver(int64_t bytes, int64_t dims, const int64_t* sizes, const int64_t* from, const int64_t* to,
                       int64_t threads)
    : bytes_(bytes) {
  int64_t elements = 1;
  for (int64_t d = 0; d < dims; ++d) {
    elements *= sizes[d];
    if (sizes[d] != 1) dim_[dims_++] = {sizes[d], from[d], to[d]};
  }
  if (elements == 0) return;
  std::sort(dim_, dim_ + dims_, [](const Dim& a, const Dim& b) { return std::abs(a.to) > std::abs(b.to); });
  int64_t kept = 0;
  for (int64_t d = 1; d < dims_; ++d) {
    Dim& outer = dim_[kept];
    const Dim& inner = dim_[d];
    if (outer.from == inner.from * inner.size && outer.to == inner.to * inner.size)
      outer = {outer.size * inner.size, inner.from, inner.to};
    else
      dim_[++kept] = inner;
  }
  dims_ = kept + 1;
  if (elements == 1) dim_[0] = {1, 1, 1};

  Dim* const last = dim_ + dims_ - 1;
  const auto dense = std::find_if(dim_, last, [](const Dim& d) { return d.from == 1; });
  transposed_ = dense != last && last->to == 1 && last->from != 0;
  if (!transposed_) {
    set(cut(elements, static_cast<double>(elements), threads, 64));
    return;
  }
  std::rotate(dense, dense + 1, last);
  blocks_[0] = (last[-1].size + kSourceBlock - 1) / kSourceBlock;
  blocks_[1] = (last->size + kOutputBlock - 1) / kOutputBlock;
  const int64_t units = elements / (last[-1].size * last->size) * blocks_[0] * blocks_[1];
  set(cut(units, static_cast<double>(elements), threads));
}

// The index-th of the `outer` first dimensions' elements.
CopyDriver::Walk CopyDriver::walk(int64_t index, int64_t outer) const {
  Walk w{};
  for (int64_t d = outer - 1; d >= 0; --d) {
    w.index[d] = index % dim_[d].size;
    index /= dim_[d].size;
    w.from += w.index[d] * dim_[d].from;
    w.to += w.index[d] * dim_[d].to;
  }
  return w;
}

void CopyDriver::next(Walk& w, int64_t outer) const {
  for (int64_t d = outer - 1; d >= 0; --d) {
    w.from += dim_[d].from;
    w.to += dim_[d].to;
    if (++w.index[d] < dim_[d].size) return;
    w.from -= dim_[d].size * dim_[d].from;
    w.to -= dim_[d].size * dim_[d].to;
    w.index[d] = 0;
  }
}

template <class T>
void CopyDriver::copy_rows(int64_t begin, int64_t end) const {
  const Dim& last = dim_[dims_ - 1];
  const T* x = reinterpret_cast<const T*>(from_);
  T* y = reinterpret_cast<T*>(to_);
  Walk w = walk(begin / last.size, dims_ - 1);
  int64_t first = begin % last.size;
  while (begin < end) {
    const int64_t n = std::min(last.size - first, end - begin);
    copy_run(x + w.from + first * last.from, last.from, y + w.to + first * last.to, last.to, n);
    begin += n;
    first = 0;
    next(w, dims_ - 1);
  }
}

template <class T>
void CopyDriver::transpose_blocks(int64_t begin, int64_t end) const {
  const Dim &rows = dim_[dims_ - 2], &columns = dim_[dims_ - 1];
  const T* x = reinterpret_cast<const T*>(from_);
  T* y = reinterpret_cast<T*>(to_);
  const int64_t blocks = blocks_[0] * blocks_[1];
  Walk w = walk(begin / blocks, dims_ - 2);
  int64_t block = begin % blocks;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = block / blocks_[1] * kSourceBlock, column = block % blocks_[1] * kOutputBlock;
    transpose(x + w.from + row + column * columns.from, columns.from, y + w.to + row * rows.to + column, rows.to,
              std::min(kSourceBlock, rows.size - row), std::min(kOutputBlock, columns.size - column));
    if (++block == blocks) {
      block = 0;
      next(w, dims_ - 2);
    }
  }
}

void CopyDriver::piece(int64_t begin, int64_t end, uint8_t*) const {
  const auto run = [&](auto element) {
    using T = decltype(element);
    if (transposed_)
      transpose_blocks<T>(begin, end);
    else
      copy_rows<T>(begin, end);
  };
  switch (bytes_) {
    case 1: return run(uint8_t{});
    case 2: return run(uint16_t{});
    case 4: return run(uint32_t{});
    default: return run(uint64_t{});
  }
}

namespace {
constexpr int64_t kNoStrides[CopyDriver::kDims] = {};
constexpr int64_t kDense[1] = {1};
}  // namespace

FillDriver::FillDriver(int64_t bytes, int64_t dims, const int64_t* sizes, const int64_t* to, uint64_t value,
                       int64_t threads)
    : CopyDriver(bytes, dims, sizes, kNoStrides, to, threads), value_(value) {}

FillDriver::FillDriver(int64_t bytes, int64_t n, uint64_t value, int64_t threads)
    : FillDriver(bytes, 1, &n, kDense, value, threads) {}

}  // namespace pykernels
