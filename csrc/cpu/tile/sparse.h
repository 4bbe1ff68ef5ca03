// Which blocks of 4 inputs x 16 outputs of int8 weights are not zero: what a pruned layer need not multiply. Torch-free.
#pragma once

#include <vector>

#include "cpu/tile/kernels.h"

namespace pykernels {

class NonzeroBlocks {
 public:
  // Nothing, unless so many blocks are zero that leaving them out gains time.
  static NonzeroBlocks find(const PackedView& weights);

  bool any() const { return !first_.empty(); }
  Nonzero of(int64_t panel) const { return {word_.data(), first_.data() + panel * (taps_ + 1), tap_words_}; }

 private:
  std::vector<int32_t> word_, first_;  // of all panels; of each panel taps + 1 places in these
  int64_t taps_ = 0, tap_words_ = 0;
};

}  // namespace pykernels
