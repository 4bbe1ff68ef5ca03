#include "cpu/plan/head.h"

#include <algorithm>
#include <stdexcept>

#include "cpu/pieces.h"
#include "cpu/plan/builder.h"
#include "cpu/plan/by_image.h"
#include "cpu/tile/driver.h"

namespace pykernels {
namespace {

// What decides: the bytes that steps read and write, and what they cost where they come from. Arithmetic is the same
// image by image and together. A step reads what the step before wrote, so of its operands and output so much is still
// in a cache as this holds of them:
//
//   together   those of all images, once; its weights, once a thread
//   by image   those of one image a thread, for each image; its weights once an image
//
// Weights are found where those of all steps, or of the head, fit. A byte from L3 costs as much as kL3 from L2, one
// from memory as much as kMemory, by the peaks that `pykernels bench` measures (docs/benchmarks.md). Of L3 a thread is
// thought to have so much whatever the system says: others use it, and virtual machines tell its size wrongly.
constexpr double kL3 = 1.5, kMemory = 6, kL3Bytes = 4 << 20;

// Of reading or writing `bytes`, where a thread comes back to a byte after `between` others.
double cost(double bytes, double between) {
  const double in_l2 = std::min(1.0, static_cast<double>(l2_bytes()) / std::max(between, 1.0));
  const double in_l3 = std::min(1.0, kL3Bytes / std::max(between, 1.0));
  return bytes * (kMemory - (kMemory - kL3) * in_l3 - (kL3 - 1) * in_l2);
}

// Threads wait for the last image: the times that they take for so many over those without waiting, at most.
constexpr double kMostWait = 1.05;

// Images along dimension 0 of every input, or 0.
int64_t images_of(const std::vector<View>& inputs) {
  int64_t images = 0;
  for (const View& v : inputs) {
    if (v.dims == 0 || (images != 0 && v.sizes[0] != images)) return 0;
    images = v.sizes[0];
  }
  return images;
}

// Whether, by its numbers, the step can take what lies along dimension 0 of its operands one by one. What it yields
// must be looked at, too: see follows().
bool can_go_apart(const PlanStep& step, const std::vector<View>& values, const std::vector<bool>& apart) {
  const auto dims = [&](size_t i) { return values[step.in[i]].dims; };
  switch (step.kind) {
    case StepKind::attention:
      return apart[step.in[1]] && apart[step.in[2]] && (step.in.size() < 4 || (apart[step.in[3]] && dims(3) == 4));
    case StepKind::linear:
    case StepKind::layer_norm: return dims(0) > 1;  // the last is their features
    case StepKind::add:
    case StepKind::mul:
    case StepKind::qadd:
    case StepKind::qmul: return step.in.size() < 2 || !apart[step.in[1]] || dims(0) == dims(1);
    case StepKind::cat:
    case StepKind::qcat:
    case StepKind::slice:
    case StepKind::softmax: return step.numbers[0] != 0;
    case StepKind::permute: return step.numbers.empty() || step.numbers[0] == 0;
    case StepKind::expand: return static_cast<int64_t>(step.numbers.size()) == dims(0);
    default: return true;
  }
}

// Whether a value of one image is that of each of `images` images or, not `apart`, that of all of them.
bool follows(const View& one, const View& all, int64_t images, bool apart) {
  bool same = one.dims == all.dims && one.dtype == all.dtype && all.numel() > 0 && (!apart || all.dims > 0);
  for (int64_t d = 0; same && d < all.dims; ++d) {
    if (apart && d == 0)
      same = one.sizes[0] == 1 && all.sizes[0] == images;
    else
      same = one.sizes[d] == all.sizes[d] && (all.sizes[d] == 1 || one.strides[d] == all.strides[d]);
  }
  return same;
}

// The values that steps to come read, or that are outputs, as step after step is done. Constants are none of them: they
// are made anew where they are read.
class Crossing {
 public:
  explicit Crossing(const Program& program)
      : program_(program),
        last_use_(program.inputs.size() + program.steps.size(), 0),
        dying_(program.steps.size() + 1) {
    for (size_t s = 0; s < program.steps.size(); ++s)
      for (const int v : program.steps[s].in) last_use_[v] = s;
    for (const PlanOutput& output : program.outputs) last_use_[output.value] = program.steps.size();
  }

  void pass(size_t s) {
    const size_t value = program_.inputs.size() + s;
    for (const size_t v : dying_[s]) --count_, sum_ -= v;
    if (program_.steps[s].kind == StepKind::constant || last_use_[value] <= s) return;
    ++count_, sum_ += value;
    dying_[last_use_[value]].push_back(value);
  }
  // The value, where it is the only one; else -1.
  int only() const { return count_ == 1 ? static_cast<int>(sum_) : -1; }

 private:
  const Program& program_;
  std::vector<size_t> last_use_;  // of each value, a step; that after the last one for outputs
  std::vector<std::vector<size_t>> dying_;
  size_t count_ = 0, sum_ = 0;  // how many there are, and their numbers added
};

// What the steps up to one save, in bytes from L2.
class Savings {
 public:
  Savings(int64_t images, int64_t threads, const PlanLayout& whole)
      : images_(static_cast<double>(images)), threads_(static_cast<double>(threads)) {
    for (const Work& work : whole.work) all_weights_ += static_cast<double>(work.weight_bytes);
  }

  // A driver's work for one image.
  void add(const Work& work) {
    const auto weights = static_cast<double>(work.weight_bytes), image = static_cast<double>(work.bytes) - weights;
    saved_ += cost(images_ * image, images_ * image / threads_) - cost(images_ * image, image);
    saved_ += cost(threads_ * weights, all_weights_);
    weights_ += weights;
  }
  double sum() const { return saved_ - cost(images_ * weights_, weights_); }

 private:
  double images_, threads_, all_weights_ = 0;
  double weights_ = 0, saved_ = 0;  // of the head: its weights, and what is saved before they are read for each image
};

}  // namespace

Head choose_head(const Program& program, const uint8_t* weights, const std::vector<View>& inputs, int64_t threads,
                 int64_t by_image, const PlanLayout& whole) {
  const int64_t images = images_of(inputs);
  if (by_image == 0 || images < 2) return {};
  const bool gaining = by_image == kGaining;
  if (gaining && static_cast<double>(ceil_div(images, threads) * threads) > kMostWait * static_cast<double>(images))
    return {};
  std::vector<View> one_image;
  for (const View& v : inputs) one_image.push_back(image_of(v));
  Builder one(program, weights, one_image, 1);
  std::vector<bool> apart(whole.values.size(), false);  // values whose dimension 0 is the images
  std::fill_n(apart.begin(), inputs.size(), true);
  Crossing crossing(program);
  Savings savings(images, threads, whole);
  double most = 0;
  Head best;
  const auto steps = static_cast<int64_t>(program.steps.size());
  for (int64_t s = 0; s < (gaining ? steps : std::min(by_image, steps)); ++s) {
    const PlanStep& step = program.steps[s];
    const size_t value = inputs.size() + s, before = one.layout.work.size();
    for (const int v : step.in) apart[value] = apart[value] || apart[v];
    if (!can_go_apart(step, whole.values, apart)) break;
    try {
      one.build(step);
    } catch (const std::runtime_error&) {  // it fits the whole batch alone
      break;
    }
    if (!follows(one.layout.values[value], whole.values[value], images, apart[value])) break;
    for (size_t i = before; i < one.layout.work.size(); ++i) savings.add(one.layout.work[i]);
    crossing.pass(s);
    const int only = crossing.only();
    if (only < 0 || !apart[only] || (gaining && savings.sum() <= most)) continue;
    const View& v = whole.values[only];
    if (!is_contiguous(v) && !is_channels_last(v)) continue;
    most = savings.sum();
    best = {s + 1, only, !is_contiguous(v)};
  }
  return best;
}

}  // namespace pykernels
