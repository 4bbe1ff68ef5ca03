// What the torch ops and the NumPy functions (csrc/host/compress.cpp) share: names of codecs, checks of the arguments'
// sizes, and which records are whose. Torch-free. What is wrong is thrown as std::runtime_error that names the
// argument.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cpu/compress/kernels.h"

namespace pykernels {

template <class... Parts>
void require(bool condition, const char* op, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "pykernels: " << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// Arguments, their dtypes and contiguity already checked.
struct Elements {
  const char* name;
  void* data;
  Real type;
  int64_t count;
};
struct Residual {
  float* data;  // null: none
  int64_t count;
};
struct Weights {  // of the rows of payloads
  const float* data;
  int64_t count;
};
struct Bytes {
  const char* name;
  uint8_t* data;
  int64_t size;
  int64_t rows = 1, stride = 0;  // of payloads: `size` bytes of a rank, and from one rank's to the next one's
};
struct Segments {
  const int64_t* rows;  // [count, 3]: first element, elements, first byte
  int64_t count;
};

struct Coding {
  const char* op;
  Codec codec;
  int64_t block, bytes;  // elements and bytes of a record
  bool stochastic;
  uint64_t seed;
};

// Checks the codec's name, the block, and that the codec knows stochastic rounding where it is asked for.
Coding coding_of(const char* op, const std::string& codec, int64_t block, bool stochastic = false, int64_t seed = 0);

// A payload has rows, and their memory begins at multiples of 4 bytes.
void check_payload(const char* op, const Bytes& payload);

// The records of all segments together. Every segment lies inside `elements` elements of the argument `name`, and its
// records inside each of the payloads, which check_payload() passes.
int64_t checked_records(const Coding& coding, const Segments& segments, const char* name, int64_t elements,
                        std::initializer_list<Bytes> payloads);

// f(records, byte) for the records [begin, end) of all the segments together, a run of one segment at a time; `byte` is
// where the run begins in the payload, and records.first where it begins among the elements.
template <class F>
void each_run(const Coding& coding, const Segments& segments, int64_t begin, int64_t end, const F& f) {
  int64_t before = 0;
  for (int64_t s = 0; s < segments.count && before < end; ++s) {
    const int64_t first = segments.rows[3 * s], n = segments.rows[3 * s + 1], byte = segments.rows[3 * s + 2];
    const int64_t records = n / coding.block + (n % coding.block != 0);
    const int64_t from = std::max(begin - before, int64_t{0}), to = std::min(end - before, records);
    if (from < to) {
      const int64_t skipped = from * coding.block;
      f(Records{coding.codec, coding.block, coding.bytes, std::min(n - skipped, (to - from) * coding.block),
                first + skipped, coding.stochastic, coding.seed},
        byte + from * coding.bytes);
    }
    before += records;
  }
}

// Each of these checks and then does its work through parallel(n, grain, body), which calls body(begin, end) for ranges
// that cover [0, n), of at least `grain` where there are so many.

// Elements worth a thread of their own.
inline constexpr int64_t kGrain = int64_t{1} << 15;
// An output of more bytes than this is written past the caches, which could not hold it.
inline constexpr int64_t kStreamed = int64_t{24} << 20;

template <class Parallel, class F>
void parallel_runs(const Parallel& parallel, const Coding& coding, const Segments& segments, int64_t records,
                   const F& f) {
  if (records == 0) return;
  parallel(records, std::max<int64_t>(1, kGrain / coding.block),
           [&](int64_t begin, int64_t end) { each_run(coding, segments, begin, end, f); });
}

template <class Parallel>
void encode(const Coding& coding, const Elements& x, const Residual& residual, const Bytes& payload,
            const Segments& segments, const Parallel& parallel) {
  require(residual.data == nullptr || residual.count == x.count, coding.op,
          "residual must have as many elements as x, ", x.count, ", not ", residual.count);
  const int64_t records = checked_records(coding, segments, x.name, x.count, {payload});
  const int64_t size = real_bytes(x.type);
  const auto kernel = compress_kernels().encode;
  parallel_runs(parallel, coding, segments, records, [&](const Records& r, int64_t byte) {
    kernel(r, static_cast<const uint8_t*>(x.data) + size * r.first, x.type,
           residual.data == nullptr ? nullptr : residual.data + r.first, payload.data + byte);
  });
}

template <class Parallel>
void decode(const Coding& coding, const Bytes& payloads, const Elements& out, const Segments& segments, double factor,
            const std::optional<Weights>& weights, const Parallel& parallel) {
  require(!weights || weights->count == payloads.rows, coding.op, "weights must have a number for each row of ",
          payloads.name, ", ", payloads.rows, ", not ", weights ? weights->count : 0);
  const int64_t records = checked_records(coding, segments, out.name, out.count, {payloads});
  const int64_t size = real_bytes(out.type);
  const bool stream = records * coding.block * size > kStreamed;
  const auto kernel = compress_kernels().decode;
  parallel_runs(parallel, coding, segments, records, [&](const Records& r, int64_t byte) {
    kernel(r,
           {payloads.data + byte, payloads.stride, payloads.rows, weights ? weights->data : nullptr,
            static_cast<float>(factor)},
           static_cast<uint8_t*>(out.data) + size * r.first, out.type, stream);
  });
}

template <class Parallel>
void reduce(const Coding& coding, const Bytes& payloads, const Residual& residual, const Bytes& payload,
            const Segments& segments, double factor, const Parallel& parallel) {
  // Without a residual, only the payloads bound the segments.
  const int64_t elements = residual.data == nullptr ? INT64_MAX : residual.count;
  const int64_t records = checked_records(coding, segments, "residual", elements, {payloads, payload});
  const auto kernel = compress_kernels().reduce;
  parallel_runs(parallel, coding, segments, records, [&](const Records& r, int64_t byte) {
    kernel(r, {payloads.data + byte, payloads.stride, payloads.rows, nullptr, static_cast<float>(factor)},
           residual.data == nullptr ? nullptr : residual.data + r.first, payload.data + byte);
  });
}

}  // namespace pykernels
