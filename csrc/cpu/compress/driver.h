// What the torch ops and the NumPy functions share: names of codecs, checks of segments, and which records are whose.
// Torch-free. What is wrong is thrown as std::runtime_error, "<op>: <argument> must ...".
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "cpu/compress/kernels.h"

namespace pykernels {

struct Coding {
  Codec codec;
  int64_t block, bytes;  // elements and bytes of a record
  bool stochastic;
  uint64_t seed;
};

// Checks the codec's name, the block, and that the codec knows stochastic rounding where it is asked for.
Coding coding_of(const char* op, const std::string& codec, int64_t block, bool stochastic = false, int64_t seed = 0);

// [count, 3] rows of (first element, elements, first byte of the payload).
struct Segments {
  const int64_t* rows;
  int64_t count;
  int64_t records;  // of all segments together
};

// Memory that segments must lie inside of, with the argument's name.
struct Extent {
  const char* name;
  int64_t size;
};

// Every segment lies inside `elements` elements and its records inside each of the payloads; no segment has fewer than
// zero elements, and its first byte is a multiple of 4.
Segments checked_segments(const char* op, const int64_t* rows, int64_t count, const Coding& coding, Extent elements,
                          std::initializer_list<Extent> payloads);

// Payloads begin at multiples of 4 bytes, and so do the rows of a stack of them.
void check_alignment(const char* op, const char* name, const void* data, int64_t stride = 0);

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
      f(Records{coding.codec, coding.block, coding.bytes, std::min(n, to * coding.block) - skipped, first + skipped,
                coding.stochastic, coding.seed},
        byte + from * coding.bytes);
    }
    before += records;
  }
}

}  // namespace pykernels
