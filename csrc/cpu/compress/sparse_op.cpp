// sparse_encode, sparse_decode, randomk_encode, randomk_decode.
#include <atomic>
#include <cmath>
#include <cstring>

#include "cpu/compress/topk.h"

namespace pykernels {
namespace {

// Elements that positions of 32 bits can name.
Elements few_elements_of(const char* op, const char* name, const Tensor& t) {
  const Elements elements = elements_of(op, name, t);
  PK_CHECK(elements.count < int64_t{kUnused}, op, ": ", name, " must have fewer than 2^32 - 1 elements, not ",
           elements.count);
  return elements;
}

float* state_like(const char* op, const char* name, const Optional& state, const Elements& x) {
  const Residual like = state_of(op, name, state);
  PK_CHECK(like.data == nullptr || like.count == x.count, op, ": ", name, " must have as many elements as x, ", x.count,
           ", not ", like.count);
  return like.data;
}

// Positions ascend only if the segments do.
Runs checked_runs(const char* op, const Segments& segments, const Elements& elements) {
  Runs runs{{}, 0};
  int64_t end = 0;
  for (int64_t s = 0; s < segments.count; ++s) {
    const int64_t first = segments.rows[3 * s], n = segments.rows[3 * s + 1];
    PK_CHECK(first >= 0 && n >= 0 && first <= elements.count && n <= elements.count - first, op, ": segments[", s,
             "] = (", first, ", ", n, ", ...) must lie inside ", elements.name, ", which has ", elements.count,
             " elements");
    PK_CHECK(n == 0 || first >= end, op, ": segments[", s, "] = (", first, ", ", n,
             ", ...) must begin where the segment before it ends or later, at ", end);
    if (n > 0) end = first + n;
    for (int64_t i = 0; i < n; i += kRun) {
      runs.list.push_back({first + i, std::min(kRun, n - i), runs.elements});
      runs.elements += runs.list.back().n;
    }
  }
  return runs;
}

void check_count(const char* op, int64_t k) {
  PK_CHECK(k >= 0 && k < int64_t{kUnused}, op, ": k must lie in [0, 2^32 - 2], not ", k);
}

void sparse_encode(const Tensor& x, const Tensor& residual, const Optional& velocity, const Tensor& payload,
                   const Tensor& segments, int64_t k, double threshold, double momentum) {
  const char* op = "sparse_encode";
  const Elements elements = few_elements_of(op, "x", x);
  const Gradient g{elements.data, elements.type, state_like(op, "residual", residual, elements),
                   state_like(op, "velocity", velocity, elements), static_cast<float>(momentum)};
  check_count(op, k);
  const Bytes to = bytes_of(op, "payload", payload, 1);
  check_payload(op, to);
  PK_CHECK(to.size >= 8 * k, op, ": payload must have 8 bytes for each of k = ", k, " elements, not ", to.size);
  PK_CHECK(threshold >= 0.0, op, ": threshold must be 0 or a positive number, not ", threshold);
  PK_CHECK(std::isfinite(g.momentum), op, ": momentum must be a number that fp32 holds, not ", momentum);
  PK_CHECK(velocity || momentum == 0.0, op, ": momentum is that of velocity, which is not given");
  const Runs runs = checked_runs(op, segments_of(op, segments), elements);
  const float bound = static_cast<float>(threshold) + 0.0f;  // not the bits of -0
  int32_t least;
  std::memcpy(&least, &bound, 4);
  send_greatest(g, runs, k, least, reinterpret_cast<uint32_t*>(to.data), reinterpret_cast<float*>(to.data + 4 * k));
}

// Entries of one payload that are in use, after a check of all positions: they come from another machine.
int64_t checked_entries(const char* op, const uint32_t* positions, int64_t k, int64_t rank, int64_t elements) {
  std::atomic<bool> good{true};
  const auto kernel = sparse_kernels().ascending;
  torch::stable::parallel_for(0, k, kGrain, [&](int64_t begin, int64_t end) {
    if (!kernel(positions + begin, std::min(end + 1, k) - begin)) good = false;
  });
  PK_CHECK(good, op, ": payloads[", rank, "] must hold ascending positions, unused entries last");
  const int64_t entries = std::lower_bound(positions, positions + k, kUnused) - positions;
  PK_CHECK(entries == 0 || positions[entries - 1] < elements, op, ": payloads[", rank, "] holds position ",
           positions[entries - 1], ", but out has ", elements, " elements");
  return entries;
}

void sparse_decode(const Tensor& payloads, const Tensor& out, int64_t k, double factor) {
  const char* op = "sparse_decode";
  check_count(op, k);
  const Bytes from = bytes_of(op, "payloads", payloads, 2);
  check_payload(op, from);
  PK_CHECK(from.size >= 8 * k, op, ": payloads must have rows of 8 bytes for each of k = ", k, " elements, not shape ",
           shape_of(payloads));
  const Elements to = few_elements_of(op, "out", out);
  const auto positions_of = [&](int64_t rank) {
    return reinterpret_cast<const uint32_t*>(from.data + rank * from.stride);
  };
  // Nothing is written before every payload is known to be sound.
  std::vector<int64_t> entries(from.rows);
  for (int64_t rank = 0; rank < from.rows; ++rank)
    entries[rank] = checked_entries(op, positions_of(rank), k, rank, to.count);

  // Each part of `out` is added to by one thread, rank after rank. The fullest payload tells where parts of a few
  // thousand entries begin.
  constexpr int64_t kPart = 4096;
  const int64_t fullest = std::max_element(entries.begin(), entries.end()) - entries.begin();
  const int64_t parts = (entries[fullest] + kPart - 1) / kPart;
  const auto begin_of = [&](int64_t part, int64_t rank) {
    if (part == 0) return int64_t{0};
    if (part == parts) return entries[rank];
    const uint32_t* const positions = positions_of(rank);
    return std::lower_bound(positions, positions + entries[rank], positions_of(fullest)[part * kPart]) - positions;
  };
  const auto kernel = sparse_kernels().add;
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      for (int64_t rank = 0; rank < from.rows; ++rank) {
        const int64_t first = begin_of(part, rank), n = begin_of(part + 1, rank) - first;
        const uint32_t* const positions = positions_of(rank);
        const float* const values = reinterpret_cast<const float*>(positions + k);
        if (n > 0) kernel(positions + first, values + first, n, static_cast<float>(factor), to.data, to.type);
      }
  });
}

void check_drawn(const char* op, const Tensor& values, const Runs& runs, int64_t k) {
  check_cpu(op, "values", values);
  PK_CHECK(values.scalar_type() == ScalarType::Float, op, ": values must be float32, not ",
           dtype_name(values.scalar_type()));
  PK_CHECK(values.is_contiguous(), op, ": values must be contiguous");
  PK_CHECK(k >= 0 && k <= runs.elements, op, ": k must lie in [0, elements of the segments = ", runs.elements,
           "], not ", k);
  PK_CHECK(values.numel() >= k, op, ": values must have at least k = ", k, " elements, not ", values.numel());
}

// f(run, positions, n, first): of the k drawn elements, those of the run are numbers `first` to first + n - 1.
template <class F>
void parallel_drawn(const Runs& runs, int64_t k, int64_t seed, const F& f) {
  const auto kernel = sparse_kernels().keys;
  const uint64_t all = runs.elements, many = k;
  parallel_runs(runs, [&](const Run& run, int64_t) {
    uint32_t positions[kRun + 1];
    int64_t n = 0, first = 0;
    if (k > 0) {
      // The strata that the run's first and last elements lie in, and those between.
      const uint64_t begin = ((run.before + 1) * many - 1) / all, end = ((run.before + run.n) * many - 1) / all + 1;
      uint32_t keys[kRun + 1];
      kernel(static_cast<uint32_t>(begin), static_cast<int64_t>(end - begin), static_cast<uint64_t>(seed), keys);
      uint64_t at = begin * all / many;
      for (uint64_t j = begin; j < end; ++j) {
        const uint64_t next = (j + 1) * all / many, drawn = at + (keys[j - begin] * (next - at) >> 32) - run.before;
        at = next;
        if (drawn >= static_cast<uint64_t>(run.n)) continue;  // in another run: below zero wraps
        if (n == 0) first = static_cast<int64_t>(j);
        positions[n++] = static_cast<uint32_t>(run.first + drawn);
      }
    }
    f(run, positions, n, first);
  });
}

void randomk_encode(const Tensor& x, const Optional& residual, const Tensor& values, const Tensor& segments, int64_t k,
                    int64_t seed) {
  const char* op = "randomk_encode";
  const Elements elements = few_elements_of(op, "x", x);
  const Gradient g{elements.data, elements.type, state_like(op, "residual", residual, elements), nullptr, 0.0f};
  const Runs runs = checked_runs(op, segments_of(op, segments), elements);
  check_drawn(op, values, runs, k);
  float* const to = mutable_pointer<float>(values);
  const SparseKernels& kernels = sparse_kernels();
  parallel_drawn(runs, k, seed, [&](const Run& run, const uint32_t* positions, int64_t n, int64_t first) {
    kernels.gather(g, positions, n, to + first);
    if (g.residual == nullptr) return;
    uint32_t none[kSlack];
    float nothing[kSlack];
    uint8_t unstored[kRun / 8];
    bool stored;
    kernels.update(g, run.first, run.n, INT32_MAX, none, nothing, unstored, &stored);
    kernels.clear(g, positions, to + first, n);
  });
}

void randomk_decode(const Tensor& values, const Tensor& out, const Tensor& segments, int64_t k, int64_t seed,
                    double factor) {
  const char* op = "randomk_decode";
  const Elements elements = few_elements_of(op, "out", out);
  const Runs runs = checked_runs(op, segments_of(op, segments), elements);
  check_drawn(op, values, runs, k);
  const float* const from = pointer<float>(values);
  uint8_t* const to = static_cast<uint8_t*>(elements.data);
  const int64_t size = real_bytes(elements.type);
  const auto kernel = sparse_kernels().scale;
  parallel_drawn(runs, k, seed, [&](const Run& run, const uint32_t* positions, int64_t n, int64_t first) {
    alignas(64) uint8_t scaled[4 * kRun];
    kernel(from + first, n, static_cast<float>(factor), scaled, elements.type);
    std::memset(to + size * run.first, 0, size * run.n);
    for (int64_t i = 0; i < n; ++i) std::memcpy(to + size * positions[i], scaled + size * i, size);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("sparse_encode", TORCH_BOX(&sparse_encode));
  m.impl("sparse_decode", TORCH_BOX(&sparse_decode));
  m.impl("randomk_encode", TORCH_BOX(&randomk_encode));
  m.impl("randomk_decode", TORCH_BOX(&randomk_decode));
}

}  // namespace pykernels
