// The exact choice of the k greatest magnitudes: a radix select that most often looks at few of them.
//
// A sample says which magnitude rather more than k elements reach. The pass that computes v lists those elements (the
// candidates), and the k-th greatest magnitude is found among them, digit by digit. Where the sample misled (fewer than
// k candidates, or more than there is room for), or k is a large share of all, the digits are counted over the whole
// residual instead. Runs are listed one by one and their shares of the ties follow from counts, so the answer depends
// neither on the sample nor on the number of threads.
#include "cpu/compress/topk.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <mutex>

namespace pykernels {
namespace {

constexpr int32_t kNone = INT32_MAX;  // no magnitude is greater
constexpr int64_t kAll = INT64_MAX;

// What is sent: greater magnitudes, and the first `ties` equal ones.
struct Cut {
  int32_t magnitude;
  int64_t ties;
};

struct Values {
  const float* v;
  const uint32_t* positions;  // null: consecutive ones
  int64_t n;
};

// The k-th greatest of the magnitudes in `count` pieces, values(i, buffer of kRun floats), 1 <= k <= all of them.
template <class F>
Cut cut_at(int64_t count, const F& values, int64_t k) {
  const auto kernel = sparse_kernels().histogram;
  int32_t prefix = 0;
  int64_t left = k;
  for (int digit = 0; digit < kDigits; ++digit) {
    std::vector<int64_t> totals(kDigitValues);
    std::mutex adding;
    torch::stable::parallel_for(0, count, kGrain / kRun, [&](int64_t begin, int64_t end) {
      alignas(64) uint32_t counts[kHistograms][kDigitValues] = {};
      alignas(64) float buffer[kRun];
      for (int64_t i = begin; i < end; ++i) {
        const Values from = values(i, buffer);
        kernel(from.v, from.n, digit, prefix, counts);
      }
      const std::lock_guard lock(adding);
      for (const auto& histogram : counts)
        for (int64_t d = 0; d < kDigitValues; ++d) totals[d] += histogram[d];
    });
    int64_t d = kDigitValues - 1;
    for (; totals[d] < left; --d) left -= totals[d];
    const int bits = digit == 0 ? 11 : kDigitShift[digit - 1] - kDigitShift[digit];
    prefix = (prefix << bits) + static_cast<int32_t>(d);
  }
  return {prefix, left};
}

uint32_t place_in(uint32_t key, int64_t n) { return static_cast<uint32_t>(key * static_cast<uint64_t>(n) >> 32); }

// v of `size` elements, as many of a run as is its share.
std::vector<float> sample_of(const Gradient& g, const Runs& runs, int64_t size) {
  std::vector<float> sample(size);
  const SparseKernels& kernels = sparse_kernels();
  parallel_runs(runs, [&](const Run& run, int64_t) {
    uint32_t positions[kRun];
    const int64_t begin = run.before * size / runs.elements, end = (run.before + run.n) * size / runs.elements;
    kernels.keys(static_cast<uint32_t>(begin), end - begin, 0, positions);
    for (int64_t i = 0; i < end - begin; ++i)
      positions[i] = static_cast<uint32_t>(run.first) + place_in(positions[i], run.n);
    kernels.gather(g, positions, end - begin, sample.data() + begin);
  });
  return sample;
}

// The candidates: all elements of magnitude `least` and more, if they are `room` at most.
struct Plan {
  int32_t least;
  int64_t room;
};

Plan plan_of(const Gradient& g, const Runs& runs, int64_t k, int32_t least) {
  constexpr int64_t kFewest = 1 << 16, kSample = 1 << 15, kShare = 8;
  if (runs.elements < kFewest || k == 0) return {kNone, 0};
  const int64_t size = std::min(kSample, runs.elements / 32);
  const std::vector<float> sample = sample_of(g, runs, size);
  // Four standard deviations more than the share of k, so that hardly ever too few are found.
  const double expected = static_cast<double>(k) * static_cast<double>(size) / static_cast<double>(runs.elements);
  const double rank = std::ceil(expected + 4 * std::sqrt(expected) + 4);
  if (rank < static_cast<double>(size)) {
    const auto pieces = [&](int64_t i, float*) {
      return Values{sample.data() + i * kRun, nullptr, std::min(kRun, size - i * kRun)};
    };
    const Cut cut = cut_at((size + kRun - 1) / kRun, pieces, static_cast<int64_t>(rank));
    least = std::max(least, cut.magnitude);
  }
  int64_t reached = 0;
  for (float v : sample) {
    int32_t bits;
    std::memcpy(&bits, &v, 4);
    reached += (bits & INT32_MAX) >= least;
  }
  if (reached > size / kShare) return {kNone, 0};
  const double spread = static_cast<double>(reached) + 4 * std::sqrt(static_cast<double>(reached)) + 16;
  const double room = 1.5 * spread * static_cast<double>(runs.elements) / static_cast<double>(size);
  return {least, std::min(runs.elements, static_cast<int64_t>(room)) + kSlack};
}

// What the first pass leaves behind.
struct State {
  std::vector<int64_t> begins, counts;  // where the candidates of each run stand in the list, and how many they are
  std::vector<uint8_t> stored;          // whether all v of a run are in the residual
  Tensor unstored;                      // for runs where they are not, a bit an element: kRun / 8 bytes a run
  Tensor list;                          // positions [room], values [room]
  int64_t found;                        // candidates; more than there is room for: not all are listed
};

State update_all(const Gradient& g, const Runs& runs, const Plan& plan) {
  const size_t count = runs.list.size();
  State state{std::vector<int64_t>(count),
              std::vector<int64_t>(count),
              std::vector<uint8_t>(count),
              empty({static_cast<int64_t>(count) * kRun / 8}, ScalarType::Byte),
              empty({2, plan.room}, ScalarType::Int),
              0};
  uint8_t* const unstored = mutable_pointer<uint8_t>(state.unstored);
  uint32_t* const list = mutable_pointer<uint32_t>(state.list);
  std::atomic<int64_t> found{0};
  const auto kernel = sparse_kernels().update;
  parallel_runs(runs, [&](const Run& run, int64_t i) {
    uint32_t positions[kRun + kSlack];
    float values[kRun + kSlack];
    bool stored;
    // Nobody needs the candidates once there are too many.
    const int32_t above = plan.room == 0 || found.load(std::memory_order_relaxed) > plan.room ? kNone : plan.least - 1;
    const int64_t n = kernel(g, run.first, run.n, above, positions, values, unstored + i * kRun / 8, &stored);
    const int64_t begin = n == 0 ? 0 : found.fetch_add(n, std::memory_order_relaxed);
    if (n > 0 && begin + n <= plan.room) {
      std::memcpy(list + begin, positions, 4 * n);
      std::memcpy(list + plan.room + begin, values, 4 * n);
    }
    state.begins[i] = begin;
    state.counts[i] = n;
    state.stored[i] = stored;
  });
  state.found = found;
  return state;
}

// v of a run: what is in the residual and, where it is not finite, computed again.
Values values_of(const Gradient& g, const Run& run, const uint8_t* unstored, bool stored, float* buffer) {
  const float* residual = g.residual + run.first;
  if (stored) return {residual, nullptr, run.n};
  uint32_t positions[kRun];
  float values[kRun];
  int64_t n = 0;
  for (int64_t i = 0; i < run.n; ++i)
    if (unstored[i / 8] >> i % 8 & 1) positions[n++] = static_cast<uint32_t>(run.first + i);
  sparse_kernels().gather(g, positions, n, values);
  std::memcpy(buffer, residual, 4 * run.n);
  for (int64_t i = 0; i < n; ++i) buffer[positions[i] - static_cast<uint32_t>(run.first)] = values[i];
  return {buffer, nullptr, run.n};
}

// Sends of every run what the cut says; values(i, buffer) are those of the i-th run. Returns how many they are.
template <class F>
int64_t send(const Gradient& g, const Runs& runs, const Cut& cut, const F& values_at, uint32_t* positions,
             float* values) {
  const SparseKernels& kernels = sparse_kernels();
  struct Share {
    int64_t greater, ties, begin;
  };
  std::vector<Share> shares(runs.list.size());
  parallel_runs(runs, [&](const Run&, int64_t i) {
    alignas(64) float buffer[kRun];
    const Values from = values_at(i, buffer);
    kernels.count(from.v, from.n, cut.magnitude, &shares[i].greater, &shares[i].ties);
  });
  int64_t sent = 0, left = cut.ties;
  for (Share& share : shares) {
    share.ties = std::min(share.ties, left);
    share.begin = sent;
    left -= share.ties;
    sent += share.greater + share.ties;
  }
  parallel_runs(runs, [&](const Run& run, int64_t i) {
    const Share& share = shares[i];
    if (share.greater + share.ties == 0) return;
    alignas(64) float buffer[kRun];
    uint32_t chosen[kRun + kSlack];
    float their[kRun + kSlack];
    const Values from = values_at(i, buffer);
    const int64_t n = kernels.pick(from.v, from.positions, static_cast<uint32_t>(run.first), from.n, cut.magnitude,
                                   share.ties, chosen, their);
    std::memcpy(positions + share.begin, chosen, 4 * n);
    std::memcpy(values + share.begin, their, 4 * n);
    kernels.clear(g, chosen, their, n);
  });
  return sent;
}

}  // namespace

void send_greatest(const Gradient& g, const Runs& runs, int64_t k, int32_t least, uint32_t* positions, float* values) {
  const Plan plan = plan_of(g, runs, k, least);
  const State state = update_all(g, runs, plan);
  const uint8_t* const unstored = pointer<uint8_t>(state.unstored);
  int64_t sent = 0;
  if (plan.room > 0 && state.found <= plan.room && (state.found >= k || plan.least == least)) {
    const uint32_t* const at = pointer<uint32_t>(state.list);
    const float* const v = pointer<float>(state.list) + plan.room;
    const auto piece = [&](int64_t i, float*) {
      return Values{v + i * kRun, at + i * kRun, std::min(kRun, state.found - i * kRun)};
    };
    const Cut cut = state.found <= k ? Cut{plan.least, kAll} : cut_at((state.found + kRun - 1) / kRun, piece, k);
    const auto listed = [&](int64_t i, float*) {
      return Values{v + state.begins[i], at + state.begins[i], state.counts[i]};
    };
    sent = send(g, runs, cut, listed, positions, values);
  } else if (k > 0) {
    const auto all = [&](int64_t i, float* buffer) {
      return values_of(g, runs.list[i], unstored + i * kRun / 8, state.stored[i], buffer);
    };
    Cut cut{least, kAll};
    if (runs.elements > k) {
      const Cut kth = cut_at(static_cast<int64_t>(runs.list.size()), all, k);
      if (kth.magnitude >= least) cut = kth;
    }
    sent = send(g, runs, cut, all, positions, values);
  }
  std::fill(positions + sent, positions + k, kUnused);
  std::fill(values + sent, values + k, 0.0f);
}

}  // namespace pykernels
