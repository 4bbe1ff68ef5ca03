#include "cpu/plan/format.h"

#include <bit>
#include <cstring>

namespace pykernels {
namespace {

constexpr char kMagic[9] = "PKPLAN01";
constexpr int64_t kVersion = 1;
constexpr int64_t kHeaderWords = 7;
constexpr int64_t kMaxSteps = 1 << 13, kMaxInputs = 1 << 12;  // memory is placed in quadratic time

#define PK_DAMAGED(condition) PK_CHECK(condition, "run_plan: plan is damaged")

uint64_t hash_words(const uint64_t* words, int64_t count) {  // FNV-1a, by words
  uint64_t hash = 1469598103934665603ull;
  for (int64_t i = 0; i < count; ++i) hash = (hash ^ words[i]) * 1099511628211ull;
  return hash;
}

class Words {
 public:
  Words(const int64_t* first, int64_t count) : next_(first), end_(first + count) {}
  int64_t next() {
    PK_DAMAGED(next_ < end_);
    return *next_++;
  }
  int64_t next(int64_t limit) {  // a number in [0, limit)
    const int64_t value = next();
    PK_DAMAGED(value >= 0 && value < limit);
    return value;
  }
  int64_t count() { return next(end_ - next_ + 1); }  // of what takes a word each at least
  bool done() const { return next_ == end_; }

 private:
  const int64_t *next_, *end_;
};

}  // namespace

uint64_t plan_hash(const void* data, int64_t bytes) {
  if (bytes < kHeaderWords * 8 || std::memcmp(data, kMagic, 8) != 0) return 0;
  return static_cast<const uint64_t*>(data)[3];
}

Program read_program(const void* data, int64_t bytes) {
  PK_CHECK(bytes >= kHeaderWords * 8 && std::memcmp(data, kMagic, 8) == 0,
           "run_plan: plan is not the plan of a network");
  const auto* all = static_cast<const int64_t*>(data);
  PK_CHECK(all[1] == kVersion, "run_plan: plan was made by another version of pykernels");
  PK_CHECK(all[2] == bytes / 8 && bytes % 8 == 0, "run_plan: plan is truncated or padded");
  Program p{};
  p.hash = plan_hash(data, bytes);
  PK_DAMAGED(p.hash == hash_words(static_cast<const uint64_t*>(data) + 4, all[2] - 4));
  p.weight_bytes = all[4];
  p.tuned_isa = all[5] - 1;
  p.tuned_threads = all[6];
  PK_DAMAGED(p.weight_bytes >= 0);

  Words words(all + kHeaderWords, all[2] - kHeaderWords);
  constexpr int64_t kDtypes = PK_DTYPES(PK_COUNTED), kKinds = PK_PLAN_STEPS(PK_COUNTED);
  p.inputs.resize(words.next(kMaxInputs));
  for (PlanInput& input : p.inputs) {
    input.dtype = static_cast<Dtype>(words.next(kDtypes));
    input.dims = words.next(kMaxDims + 1);
  }
  int values = static_cast<int>(p.inputs.size());
  for (int64_t left = words.next(kMaxSteps); left > 0; --left, ++values) {
    PlanStep& step = p.steps.emplace_back();
    step.kind = static_cast<StepKind>(words.next(kKinds));
    step.in.resize(words.count());
    for (int& value : step.in) value = static_cast<int>(words.next(values));
    step.numbers.resize(words.count());
    for (int64_t& number : step.numbers) number = words.next();
    step.reals.resize(words.count());
    for (double& real : step.reals) real = std::bit_cast<double>(words.next());
  }
  p.outputs.resize(words.count());
  for (PlanOutput& output : p.outputs) {
    output.value = static_cast<int>(words.next(values));
    output.channels_last = words.next(2) != 0;
  }
  PK_DAMAGED(words.done());
  return p;
}

}  // namespace pykernels
