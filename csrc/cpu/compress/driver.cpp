#include "cpu/compress/driver.h"

namespace pykernels {
namespace {

struct CodecFacts {
  const char* name;
  int bits, header;  // of an element's code; bytes before the codes of a record
  bool stochastic;   // whether it knows stochastic rounding
};
#define PK_FACTS(name, bits, header, stochastic, ...) {#name, bits, header, stochastic},
constexpr CodecFacts kFacts[] = {PK_CODECS(PK_FACTS)};  // in the order of the enum
#undef PK_FACTS

int codec_by_name(const char* op, const std::string& name) {
  int i = 0;
  for (const CodecFacts& known : kFacts) {
    if (name == known.name) return i;
    ++i;
  }
  require(false, op, "codec must be one of " PK_CODEC_WORDS ", not '", name, "'");
  return 0;
}

}  // namespace

Coding coding_of(const char* op, const std::string& codec, int64_t block, bool stochastic, int64_t seed) {
  const int number = codec_by_name(op, codec);
  const CodecFacts& facts = kFacts[number];
  require(block >= 32 && block <= kMaxBlock && block % 32 == 0, op, "block must be a multiple of 32 in [32, ",
          kMaxBlock, "], not ", block);
  require(!stochastic || facts.stochastic, op, "stochastic rounding is for " PK_STOCHASTIC_WORDS ", not ", codec);
  return {op,         static_cast<Codec>(number), block, facts.header + block * facts.bits / 8,
          stochastic, static_cast<uint64_t>(seed)};
}

void check_payload(const char* op, const Bytes& payload) {
  require(payload.rows > 0, op, payload.name, " must have a row for each rank, not none");
  require(reinterpret_cast<uintptr_t>(payload.data) % 4 == 0 && (payload.rows == 1 || payload.stride % 4 == 0), op,
          payload.name, " must begin at a multiple of 4 bytes, and so must its rows");
}

int64_t checked_records(const Coding& coding, const Segments& segments, const char* name, int64_t elements,
                        std::initializer_list<Bytes> payloads) {
  for (const Bytes& payload : payloads) check_payload(coding.op, payload);
  int64_t total = 0;
  for (int64_t s = 0; s < segments.count; ++s) {
    const int64_t first = segments.rows[3 * s], n = segments.rows[3 * s + 1], byte = segments.rows[3 * s + 2];
    const auto require_segment = [&](bool condition, const auto&... parts) {
      require(condition, coding.op, "segments[", s, "] = (", first, ", ", n, ", ", byte, ") ", parts...);
    };
    require_segment(first >= 0 && n >= 0 && first <= elements && n <= elements - first, "must lie inside ", name,
                    ", which has ", elements, " elements");
    require_segment(byte >= 0 && byte % 4 == 0, "must begin at a byte that is a multiple of 4");
    const int64_t records = n / coding.block + (n % coding.block != 0);
    for (const Bytes& payload : payloads)
      require_segment(byte <= payload.size && records <= (payload.size - byte) / coding.bytes, "takes ", records,
                      " records of ", coding.bytes, " bytes, more than are left in ", payload.name, ", which has ",
                      payload.size, " bytes");
    total += records;
  }
  return total;
}

}  // namespace pykernels
