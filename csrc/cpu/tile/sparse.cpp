#include "cpu/tile/sparse.h"

#include <cstring>
#include <limits>

namespace pykernels {
namespace {

// Of all blocks. A sparse tile has one panel, a dense one several, which share what they read of A.
constexpr double kWorthwhile = 0.3;
constexpr int64_t kSampled = 64;  // blocks, before all are looked at

bool is_zero(const uint8_t* block) {
  uint64_t words[kBlockBytes / 8], any = 0;
  std::memcpy(words, block, kBlockBytes);
  for (const uint64_t word : words) any |= word;
  return any == 0;
}

}  // namespace

NonzeroBlocks NonzeroBlocks::find(const PackedView& w) {
  const int64_t panels = w.h.groups * w.panels_per_group(), words = w.words() * w.taps(), blocks = panels * words;
  NonzeroBlocks found;
  if (w.h.element != Element::s8 || blocks < kSampled || blocks > std::numeric_limits<int32_t>::max()) return found;
  int64_t zeros = 0;
  for (int64_t i = 0; i < kSampled; ++i) zeros += is_zero(w.panels + blocks * i / kSampled * kBlockBytes);
  if (static_cast<double>(zeros) < kWorthwhile / 2 * kSampled) return found;
  found.taps_ = w.taps(), found.tap_words_ = w.words();
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t word = 0; word <= words; ++word) {
      if (word % found.tap_words_ == 0) found.first_.push_back(static_cast<int32_t>(found.word_.size()));
      if (word < words && !is_zero(w.panels + (panel * words + word) * kBlockBytes))
        found.word_.push_back(static_cast<int32_t>(word));
    }
  const auto kept = static_cast<double>(found.word_.size());
  return kept > (1 - kWorthwhile) * static_cast<double>(blocks) ? NonzeroBlocks{} : found;
}

}  // namespace pykernels
