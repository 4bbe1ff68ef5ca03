#include "cpu/compress/driver.h"

#include <sstream>
#include <stdexcept>

namespace pykernels {
namespace {

constexpr const char* kCodecNames[kCodecs] = {"int8", "int4", "int2", "onebit", "fp8", "bf16", "fp16", "fp32"};

template <class... Parts>
void check(bool condition, const char* op, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "pykernels: " << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

Codec codec_by_name(const char* op, const std::string& name) {
  std::string known;
  for (int i = 0; i < kCodecs; ++i) {
    if (name == kCodecNames[i]) return static_cast<Codec>(i);
    known += (i ? ", " : "") + std::string(kCodecNames[i]);
  }
  check(false, op, "codec must be one of ", known, ", not '", name, "'");
  return Codec::int8;
}

}  // namespace

Coding coding_of(const char* op, const std::string& codec, int64_t block, bool stochastic, int64_t seed) {
  const Codec c = codec_by_name(op, codec);
  check(block >= 32 && block <= kMaxBlock && block % 32 == 0, op, "block must be a multiple of 32 in [32, ", kMaxBlock,
        "], not ", block);
  check(!stochastic || c <= Codec::int2, op, "stochastic rounding is for int8, int4 and int2, not ", codec);
  const int64_t header = c < Codec::bf16 ? 4 : 0;
  return {c, block, header + block * kCodeBits[static_cast<int>(c)] / 8, stochastic, static_cast<uint64_t>(seed)};
}

Segments checked_segments(const char* op, const int64_t* rows, int64_t count, const Coding& coding, Extent elements,
                          std::initializer_list<Extent> payloads) {
  Segments segments{rows, count, 0};
  for (int64_t s = 0; s < count; ++s) {
    const int64_t first = rows[3 * s], n = rows[3 * s + 1], byte = rows[3 * s + 2];
    check(first >= 0 && n >= 0 && first <= elements.size && n <= elements.size - first, op, "segments[", s, "] = (",
          first, ", ", n, ", ", byte, ") must lie inside ", elements.name, ", which has ", elements.size, " elements");
    check(byte >= 0 && byte % 4 == 0, op, "segments[", s, "] = (", first, ", ", n, ", ", byte,
          ") must begin at a byte that is a multiple of 4");
    const int64_t records = n / coding.block + (n % coding.block != 0);
    for (const Extent& payload : payloads)
      check(byte <= payload.size && records <= (payload.size - byte) / coding.bytes, op, "segments[", s, "] = (", first,
            ", ", n, ", ", byte, ") takes ", records, " records of ", coding.bytes, " bytes, more than are left in ",
            payload.name, ", which has ", payload.size, " bytes");
    segments.records += records;
  }
  return segments;
}

void check_alignment(const char* op, const char* name, const void* data, int64_t stride) {
  check(reinterpret_cast<uintptr_t>(data) % 4 == 0 && stride % 4 == 0, op, name,
        " must begin at a multiple of 4 bytes, and so must its rows");
}

}  // namespace pykernels
