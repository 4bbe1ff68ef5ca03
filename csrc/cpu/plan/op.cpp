// run_plan: a whole network in one parallel region; what a plan does and how long it takes, for tables.
#include "cpu/op.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "cpu/conv/winograd_driver.h"
#include "cpu/isa/isa.h"
#include "cpu/plan/by_image.h"
#include "cpu/plan/cache.h"
#include "cpu/plan/head.h"
#include "cpu/tile/op.h"

namespace pykernels {
namespace {

Dtype plan_dtype(const char* op, const Tensor& t) {
  const ScalarType type = t.scalar_type();
  PK_CHECK(is_real(type) || is_byte(type) || type == ScalarType::Int, op, ": inputs must not be ", dtype_name(type));
  return dtype_of(type);
}

ScalarType scalar_type(Dtype t) {
  switch (t) {
    case Dtype::bf16: return ScalarType::BFloat16;
    case Dtype::f16: return ScalarType::Half;
    case Dtype::u8: return ScalarType::Byte;
    case Dtype::s8: return ScalarType::Char;
    case Dtype::s32: return ScalarType::Int;
    default: return ScalarType::Float;
  }
}

// Which steps run image by image (head.h): none with PYKERNELS_BY_IMAGE=0.
std::atomic<int64_t>& by_image() {
  static std::atomic<int64_t> steps = [] {
    const char* wanted = std::getenv("PYKERNELS_BY_IMAGE");
    return wanted == nullptr || std::strcmp(wanted, "0") != 0 ? kGaining : 0;
  }();
  return steps;
}
int64_t set_by_image(int64_t steps) {
  PK_CHECK(steps >= kGaining, "_set_by_image: steps must be at least -1, not ", steps);
  return by_image().exchange(steps);
}

void check_bytes(const char* op, const char* name, const Tensor& t) {
  check_cpu(op, name, t);
  PK_CHECK(t.scalar_type() == ScalarType::Byte && t.dim() == 1 && t.is_contiguous(), op, ": ", name,
           " must be a contiguous 1-D uint8 tensor");
  PK_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 8 == 0, op, ": ", name,
           " must begin at a multiple of 8 bytes");
}

// A plan ready for these inputs, and back where others find it when this goes.
class Ready {
 public:
  Ready(const char* op, const Tensor& plan, const Tensor& weights, const std::vector<Tensor>& inputs) {
    check_bytes(op, "plan", plan);
    check_bytes(op, "weights", weights);
    const uint8_t* base = bytes_of(weights);
    PlanKey key{plan_hash(plan.const_data_ptr(), plan.numel()),
                plan.numel(),
                base,
                weights.numel(),
                torch::stable::get_num_threads(),
                static_cast<int>(current_isa()),
                winograd_allowed(),
                by_image().load(std::memory_order_relaxed),
                {}};
    for (const Tensor& t : inputs) {
      check_cpu(op, "inputs", t);
      key.inputs.push_back(static_cast<int64_t>(plan_dtype(op, t)));
      key.inputs.push_back(t.dim());
      for (int64_t d = 0; d < t.dim(); ++d) {
        key.inputs.push_back(t.size(d));
        key.inputs.push_back(t.stride(d));
      }
    }
    prepared_ = take(key);
    if (prepared_) return;
    const Program program = read_program(plan.const_data_ptr(), plan.numel());
    PK_CHECK(program.weight_bytes <= weights.numel(), op, ": weights has ", weights.numel(), " bytes, the plan needs ",
             program.weight_bytes);
    PK_CHECK(program.inputs.size() == inputs.size(), op, ": inputs must be ", program.inputs.size(), " tensors, not ",
             inputs.size());
    std::vector<View> views;
    for (size_t i = 0; i < inputs.size(); ++i) {
      View v;
      v.dtype = plan_dtype(op, inputs[i]);
      v.dims = inputs[i].dim();
      const PlanInput& wanted = program.inputs[i];
      PK_CHECK(v.dtype == wanted.dtype, op, ": inputs[", i, "] must be ", dtype_name(scalar_type(wanted.dtype)),
               ", not ", dtype_name(inputs[i].scalar_type()));
      PK_CHECK(v.dims == wanted.dims, op, ": inputs[", i, "] must have ", wanted.dims, " dimensions, not shape ",
               shape_of(inputs[i]));
      for (int64_t d = 0; d < v.dims; ++d) v.sizes[d] = inputs[i].size(d), v.strides[d] = inputs[i].stride(d);
      views.push_back(v);
    }
    PlanLayout layout = prepare(program, base, views, key.threads, key.by_image);
    prepared_ = std::make_unique<Prepared>(std::move(key), std::move(layout), base);
  }
  ~Ready() { give(std::move(prepared_)); }
  Ready(const Ready&) = delete;

  Prepared& operator*() { return *prepared_; }
  Prepared* operator->() { return prepared_.get(); }

 private:
  std::unique_ptr<Prepared> prepared_;
};

std::vector<Tensor> run_ready(Prepared& prepared, const std::vector<Tensor>& inputs, int64_t* ends = nullptr) {
  std::vector<Tensor> outputs;
  const PlanLayout& layout = prepared.layout();
  for (size_t i = 0; i < layout.outputs.size(); ++i) {
    const View& v = layout.outputs[i];
    outputs.push_back(
        empty(Ints(v.sizes.begin(), v.sizes.begin() + v.dims), scalar_type(v.dtype), layout.channels_last[i]));
  }
  std::vector<const uint8_t*> from;
  std::vector<uint8_t*> to;
  for (const Tensor& t : inputs) from.push_back(bytes_of(t));
  for (const Tensor& t : outputs) to.push_back(mutable_bytes_of(t));
  prepared.bind(from.data(), to.data());
  Runner& runner = prepared.runner();
  runner.begin();
  parallel(prepared.key.threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t me = first; me < last; ++me) runner.take_part(me, prepared.scratch(me), ends);
  });
  return outputs;
}

// The sizes, dtypes and layouts of the outputs are for shape functions; they follow from the plan.
std::vector<Tensor> run_plan(const Tensor& plan, const Tensor& weights, std::vector<Tensor> inputs, Ints, Ints, Ints,
                             Ints) {
  Ready ready("run_plan", plan, weights, inputs);
  return run_ready(*ready, inputs);
}

std::string quoted(const char* text) { return std::string("\"").append(text).append("\""); }

std::string describe_plan(const Tensor& plan, const Tensor& weights, std::vector<Tensor> inputs) {
  Ready ready("_describe_plan", plan, weights, inputs);
  const PlanLayout& layout = ready->layout();
  std::string json = "{\"isa\": " + quoted(kIsaNames[ready->key.isa]);
  const auto field = [&](const char* name, int64_t value) {
    json += ", " + quoted(name) + ": " + std::to_string(value);
  };
  field("threads", ready->key.threads);
  int64_t arena = layout.arena_bytes, least = layout.least_arena_bytes;
  if (const ByImageDriver* driver = layout.by_image) {
    arena += driver->threads() * driver->layout().arena_bytes;
    least += driver->threads() * driver->layout().least_arena_bytes;
  }
  field("arena_bytes", arena);
  field("least_arena_bytes", least);
  field("memory_bytes", ready->memory_bytes());
  json += ", \"values\": [";
  for (size_t i = 0; i < layout.values.size(); ++i)
    json += (i ? ", " : "") + shape_of(layout.values[i].sizes.data(), layout.values[i].dims);
  json += "], \"drivers\": [";
  for (size_t row = 0; row < layout.work.size(); ++row) {
    const Work& work = layout.work[row];
    json += std::string(row ? ", " : "") + "{\"kernel\": " + quoted(work.kernel);
    json += ", \"dtype\": " + quoted(dtype_name(scalar_type(work.dtype)));
    field("step", work.step);
    field("tasks", work.tasks);
    field("bytes", work.bytes);
    field("operations", work.operations);
    json += std::string(", \"by_image\": ") + (work.by_image ? "true}" : "false}");
  }
  return json + "]}";
}

// What runs image by image is timed as long as this lives.
class Watch {
 public:
  Watch(ByImageDriver* driver, std::vector<std::atomic<int64_t>>* spent) : driver_(driver) {
    if (driver_) driver_->watch(spent);
  }
  ~Watch() {
    if (driver_) driver_->watch(nullptr);
  }
  Watch(const Watch&) = delete;

 private:
  ByImageDriver* driver_;
};

// What goes image by image on several threads has no end that all wait for: each of its rows has the part of the time
// until the last image was done that threads spent on it.
Tensor profile_plan(const Tensor& plan, const Tensor& weights, std::vector<Tensor> inputs, int64_t rounds) {
  PK_CHECK(rounds >= 1 && rounds <= (1 << 20), "_profile_plan: rounds must lie in [1, 2^20], not ", rounds);
  Ready ready("_profile_plan", plan, weights, inputs);
  const PlanLayout& layout = ready->layout();
  const size_t rows = layout.work.size(), drivers = layout.drivers.size();
  const size_t inside = layout.by_image ? rows - (drivers - 1) : 0;  // rows of the first driver
  const Tensor times = empty({rounds, static_cast<int64_t>(rows)}, ScalarType::Long);
  auto* all = mutable_pointer<int64_t>(times);
  std::memset(all, 0, times.numel() * sizeof(int64_t));
  std::vector<std::atomic<int64_t>> spent(inside);
  std::vector<int64_t> ends(drivers);
  const Watch watch(layout.by_image, &spent);
  for (int64_t round = 0; round < rounds; ++round) {
    for (std::atomic<int64_t>& each : spent) each = 0;
    int64_t before = steady_nanoseconds();
    run_ready(*ready, inputs, ends.data());
    for (int64_t& end : ends) end -= std::exchange(before, end);
    int64_t* row = all + round * static_cast<int64_t>(rows);
    if (layout.by_image) {
      int64_t sum = 0;
      for (const std::atomic<int64_t>& each : spent) sum += each;
      const double part = static_cast<double>(ends[0]) / static_cast<double>(std::max<int64_t>(sum, 1));
      for (const std::atomic<int64_t>& each : spent) *row++ = std::llround(static_cast<double>(each) * part);
    }
    std::copy(ends.begin() + (layout.by_image ? 1 : 0), ends.end(), row);
  }
  return times;
}

void forget_plans(int64_t address) {
  forget(reinterpret_cast<const void*>(address));
  forget_winograd_weights();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("run_plan", TORCH_BOX(&run_plan));
  m.impl("_describe_plan", TORCH_BOX(&describe_plan));
  m.impl("_profile_plan", TORCH_BOX(&profile_plan));
}

STABLE_TORCH_LIBRARY_IMPL(pykernels, CompositeExplicitAutograd, m) {
  m.impl("_forget_plans", TORCH_BOX(&forget_plans));
  m.impl("_set_by_image", TORCH_BOX(&set_by_image));
}

}  // namespace pykernels
