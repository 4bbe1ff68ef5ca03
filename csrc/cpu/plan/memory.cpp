#include "cpu/plan/memory.h"

#include <algorithm>
#include <numeric>

namespace pykernels {
namespace {

int64_t rounded(int64_t bytes) { return (bytes + kArenaAlignment - 1) / kArenaAlignment * kArenaAlignment; }

}  // namespace

std::vector<int64_t> place(const std::vector<Lifetime>& pieces, int64_t* total) {
  std::vector<size_t> order(pieces.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return pieces[a].bytes > pieces[b].bytes; });
  std::vector<int64_t> places(pieces.size());
  std::vector<size_t> placed;  // by place
  *total = 0;
  for (const size_t i : order) {
    const Lifetime& piece = pieces[i];
    int64_t end = 0, best = -1, smallest = INT64_MAX;
    for (const size_t k : placed) {
      if (pieces[k].last < piece.first || piece.last < pieces[k].first) continue;
      const int64_t gap = places[k] - end;
      if (gap >= rounded(piece.bytes) && gap < smallest) best = end, smallest = gap;
      end = std::max(end, places[k] + rounded(pieces[k].bytes));
    }
    places[i] = best >= 0 ? best : end;
    *total = std::max(*total, places[i] + rounded(piece.bytes));
    placed.insert(
        std::upper_bound(placed.begin(), placed.end(), i, [&](size_t a, size_t b) { return places[a] < places[b]; }),
        i);
  }
  return places;
}

int64_t least_bytes(const std::vector<Lifetime>& pieces) {
  int64_t most = 0;
  for (const Lifetime& at : pieces) {  // the most live where one begins
    int64_t alive = 0;
    for (const Lifetime& piece : pieces)
      if (piece.first <= at.first && at.first <= piece.last) alive += rounded(piece.bytes);
    most = std::max(most, alive);
  }
  return most;
}

}  // namespace pykernels
