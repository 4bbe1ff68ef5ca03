// The exact choice of the k greatest magnitudes, and how the elements of segments are split over threads.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/compress/op.h"
#include "cpu/compress/sparse.h"

namespace pykernels {

// At most kRun elements of one segment: n from the position `first` on, `before` of the segments' elements before them.
struct Run {
  int64_t first, n, before;
};

struct Runs {
  std::vector<Run> list;
  int64_t elements;
};

// f(run, its index) on the threads of the host framework.
template <class F>
void parallel_runs(const Runs& runs, const F& f) {
  torch::stable::parallel_for(0, static_cast<int64_t>(runs.list.size()), kGrain / kRun,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) f(runs.list[i], i);
                              });
}

// sparse_encode: v into residual and velocity; at most k elements, none of a magnitude below `least`, to positions [k]
// and values [k], and out of the residual and the velocity.
void send_greatest(const Gradient&, const Runs&, int64_t k, int32_t least, uint32_t* positions, float* values);

}  // namespace pykernels
