#include "cpu/plan/builder.h"

#include <unistd.h>

#include <algorithm>

#include "cpu/copy/driver.h"
#include "cpu/plan/by_image.h"

namespace pykernels {
namespace {

bool may_be_view(StepKind kind) {
  switch (kind) {
    case StepKind::reshape:
    case StepKind::permute:
    case StepKind::slice:
    case StepKind::expand:
    case StepKind::contiguous:
    case StepKind::cast: return true;
    default: return false;
  }
}

// Whether the step's drivers can write pixels apart from one another.
bool writes_apart(const PlanStep& step) {
  switch (step.kind) {
    case StepKind::conv2d: return step.in.size() == 1;
    case StepKind::upsample_nearest2d:
    case StepKind::upsample_bilinear2d:
    case StepKind::interleave: return true;
    default: return false;
  }
}

bool same_meaning(const PlanStep& cat, size_t i) {
  return cat.kind == StepKind::cat || (cat.numbers[3 + i] == cat.numbers[2] &&
                                       static_cast<float>(cat.reals[1 + i]) == static_cast<float>(cat.reals[0]));
}

}  // namespace

int64_t memory_of_machine() {
  static const int64_t bytes = sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
  return bytes;
}

// Whoever reads what is written apart must not mind.
Joined::Joined(const Program& program, const PlanLayout& layout, int64_t first) {
  const size_t inputs = program.inputs.size();
  pieces.resize(layout.values.size());
  wholes.resize(layout.values.size());
  std::vector<int> readers(layout.values.size());
  for (const PlanStep& step : program.steps)
    for (const int v : step.in) ++readers[v];
  for (const PlanOutput& output : program.outputs) ++readers[output.value];
  for (size_t c = first; c < program.steps.size(); ++c) {
    const PlanStep& cat = program.steps[c];
    const View& whole = layout.values[inputs + c];
    if ((cat.kind != StepKind::cat && cat.kind != StepKind::qcat) || cat.numbers[0] != 1 || whole.numel() == 0 ||
        !is_channels_last(whole) || is_contiguous(whole))
      continue;
    int64_t channel = 0;
    for (size_t i = 0; i < cat.in.size(); ++i) {
      const size_t v = cat.in[i];
      const PlanStep* step = v < inputs + first ? nullptr : &program.steps[v - inputs];
      if (step && writes_apart(*step) && readers[v] == 1 && layout.values[v].dtype == whole.dtype &&
          is_channels_last(layout.values[v]) && same_meaning(cat, i)) {
        pieces[v] = {static_cast<int>(inputs + c), channel};
        wholes[inputs + c] = whole;
        any = true;
      }
      channel += layout.values[v].sizes[1];
    }
  }
}

Builder::Builder(const Program& program, const uint8_t* weights, const std::vector<View>& inputs, int64_t threads,
                 const Joined* joined)
    : program_(program), weights_(weights), threads_(threads), joined_(joined) {
  for (size_t i = 0; i < inputs.size(); ++i) {
    View v = inputs[i];
    PK_CHECK(is_countable(v), "run_plan: inputs[", i, "] has too many elements: its shape is ",
             shape_of(v.sizes.data(), v.dims));
    for (int64_t d = 0; d < v.dims; ++d)  // strides that nobody steps along may be anything
      if (v.sizes[d] == 1 || v.numel() == 0) v.strides[d] = 0;
    v.buffer = static_cast<int>(layout.buffers.size());
    v.offset = 0;
    layout.buffers.push_back({Buffer::Kind::input, 0, static_cast<int64_t>(i)});
    layout.values.push_back(v);
  }
  weights_buffer_ = static_cast<int>(layout.buffers.size());
  layout.buffers.push_back({Buffer::Kind::weights, program.weight_bytes, 0});

  const size_t values = inputs.size() + program.steps.size();
  last_use_.assign(values, 0);
  for (size_t v = 0; v < values; ++v) {
    const PlanStep* step = v < inputs.size() ? nullptr : &program.steps[v - inputs.size()];
    roots_.push_back(step && may_be_view(step->kind) && !step->in.empty() ? roots_[step->in[0]] : static_cast<int>(v));
    if (step)
      for (const int operand : step->in) last_use_[roots_[operand]] = v - inputs.size();
  }
  for (const PlanOutput& output : program.outputs) last_use_[roots_[output.value]] = program.steps.size();
}

// What the others read is made as the last step of the first ones leaves it.
void Builder::by_image(const Head& head, const PlanLayout& whole) {
  const size_t inputs = program_.inputs.size();
  for (int64_t s = 0; s < head.steps; ++s) {
    if (program_.steps[s].kind == StepKind::constant) {
      build(program_.steps[s]);
      continue;
    }
    View v = whole.values[inputs + s];
    v.buffer = -1;
    if (value() == head.value) v = fresh(v.dtype, v.sizes.data(), v.dims, head.channels_last);
    layout.values.push_back(v);
  }
  Program first = program_;
  first.steps.resize(head.steps);
  first.outputs = {{head.value, head.channels_last}};
  const std::vector<View> images(layout.values.begin(), layout.values.begin() + static_cast<int64_t>(inputs));
  const View out = layout.values[head.value];
  auto driver = std::make_unique<ByImageDriver>(first, weights_, images, out, threads_);
  layout.by_image = driver.get();
  std::vector<const View*> operands;
  for (const View& v : images) operands.push_back(&v);
  add(std::move(driver), "", operands, out);
  layout.work.clear();
  for (Work work : layout.by_image->layout().work) {
    work.by_image = true;
    work.tasks = out.sizes[0];
    for (int64_t* sum : {&work.bytes, &work.weight_bytes, &work.operations})
      if (__builtin_mul_overflow(*sum, work.tasks, sum)) *sum = INT64_MAX;
    // The copy that brings the value into place belongs to the step that made it.
    if (work.step == head.steps && head.steps < static_cast<int64_t>(program_.steps.size()))
      work.step = head.value - static_cast<int>(inputs);
    layout.work.push_back(work);
  }
}

void Builder::build(const PlanStep& step) {
  begin(step);
  switch (step.kind) {
    case StepKind::constant: constant(); break;
    case StepKind::conv2d: conv2d(); break;
    case StepKind::linear: linear(); break;
    case StepKind::max_pool2d:
    case StepKind::avg_pool2d:
    case StepKind::adaptive_avg_pool2d: pool(); break;
    case StepKind::quantize: quantize(); break;
    case StepKind::dequantize: dequantize(); break;
    case StepKind::cast: cast(); break;
    case StepKind::qadd:
    case StepKind::qmul: quantized_binary(); break;
    case StepKind::qcat: quantized_cat(); break;
    case StepKind::qlookup: lookup(); break;
    case StepKind::add:
    case StepKind::mul: binary(); break;
    case StepKind::cat: cat(); break;
    case StepKind::reshape: reshape(); break;
    case StepKind::permute: permute(); break;
    case StepKind::slice: slice(); break;
    case StepKind::expand: expand(); break;
    case StepKind::pad: pad(); break;
    case StepKind::contiguous: contiguous(); break;
    case StepKind::activation: activated(); break;
    case StepKind::leaky_relu: leaky_relu(); break;
    case StepKind::upsample_nearest2d:
    case StepKind::upsample_bilinear2d: upsample(); break;
    case StepKind::interleave: interleave(); break;
    case StepKind::softmax: softmax(); break;
    case StepKind::layer_norm: layer_norm(); break;
    case StepKind::attention: attention(); break;
  }
  end();
}

void Builder::begin(const PlanStep& step) {
  step_ = &step;
  numbers_read_ = reals_read_ = 0;
}

void Builder::end() {
  PK_CHECK(numbers_read_ == step_->numbers.size() && reals_read_ == step_->reals.size(), "run_plan: a step ", name(),
           " has ", step_->numbers.size(), " numbers and ", step_->reals.size(), " reals, not ", numbers_read_, " and ",
           reals_read_);
  layout.values.push_back(value_);
}

// Each in a buffer of its own, dense in the layout asked for: that of the step that makes it where this fits.
void Builder::finish() {
  step_ = nullptr;
  for (size_t i = 0; i < program_.outputs.size(); ++i) {
    const View v = layout.values[program_.outputs[i].value];
    View wanted = v;
    set_strides(wanted, program_.outputs[i].channels_last);
    Buffer& buffer = layout.buffers[v.buffer];
    const bool there = buffer.kind == Buffer::Kind::arena && v.offset == 0 && v.bytes() == buffer.bytes &&
                       (program_.outputs[i].channels_last && v.dims == 4 ? is_channels_last(v) : is_contiguous(v));
    if (there) {
      buffer.kind = Buffer::Kind::output;
      buffer.place = static_cast<int64_t>(i);
      wanted.buffer = v.buffer;
    } else {
      wanted.offset = 0;
      wanted.buffer = static_cast<int>(layout.buffers.size());
      layout.buffers.push_back({Buffer::Kind::output, wanted.bytes(), static_cast<int64_t>(i)});
      copy(v, wanted);
    }
    layout.outputs.push_back(wanted);
    layout.channels_last.push_back(program_.outputs[i].channels_last && v.dims == 4);
  }
}

// --- the step in hand ---

const View& Builder::in(size_t i) const {
  PK_CHECK(i < step_->in.size(), "run_plan: a step ", name(), " lacks operand ", i);
  return layout.values[step_->in[i]];
}

int64_t Builder::number() {
  PK_CHECK(numbers_read_ < step_->numbers.size(), "run_plan: a step ", name(), " has too few numbers");
  return step_->numbers[numbers_read_++];
}

int64_t Builder::number(int64_t low, int64_t high) {
  const int64_t value = number();
  PK_CHECK(value >= low && value <= high, "run_plan: a number of a step ", name(), " must lie in [", low, ", ", high,
           "], not ", value);
  return value;
}

double Builder::real() {
  PK_CHECK(reals_read_ < step_->reals.size(), "run_plan: a step ", name(), " has too few reals");
  return step_->reals[reals_read_++];
}

Dtype Builder::dtype() { return static_cast<Dtype>(number(0, PK_DTYPES(PK_COUNTED) - 1)); }

Ints Builder::pair() {
  const int64_t first = number();
  return {first, number()};
}

Activation Builder::activation() { return static_cast<Activation>(number(0, PK_ACTIVATIONS(PK_COUNTED) - 1)); }

int64_t Builder::zero_point(Dtype t) {
  if (t == Dtype::u8) return number(0, 255);
  if (t == Dtype::s8) return number(-128, 127);
  return number(0, 0);
}

double Builder::scale() {
  const double value = real();
  check_scale(name(), "scale", value);
  return value;
}

// --- memory ---

View Builder::shaped(Dtype dtype, const int64_t* sizes, int64_t dims, bool channels_last) const {
  View v;
  v.dtype = dtype;
  v.dims = dims;
  std::copy_n(sizes, dims, v.sizes.data());
  PK_CHECK(is_countable(v) && v.bytes() <= memory_of_machine(), "run_plan: a step ", name(),
           " yields a tensor of shape ", shape_of(sizes, dims), ", more than this machine's memory holds");
  set_strides(v, channels_last);
  return v;
}

View Builder::fresh(Dtype dtype, const int64_t* sizes, int64_t dims, bool channels_last) {
  View v = shaped(dtype, sizes, dims, channels_last);
  v.buffer = static_cast<int>(layout.buffers.size());
  layout.buffers.push_back({Buffer::Kind::arena, v.bytes(), 0});
  return v;
}

View Builder::fresh_like(const View& v, Dtype dtype) {
  View out = fresh(dtype, v.sizes.data(), v.dims, false);
  out.strides = v.strides;
  return out;
}

View Builder::whole(int value, const View& like) {
  View v = like;
  v.offset = 0;
  const auto [found, is_new] = whole_buffers_.try_emplace(value, static_cast<int>(layout.buffers.size()));
  if (is_new) layout.buffers.push_back({Buffer::Kind::arena, v.bytes(), 0});
  v.buffer = found->second;
  return v;
}

View Builder::fresh_pixels(Dtype dtype, const int64_t* sizes) {
  if (!joined_ || joined_->pieces[value()].cat < 0) return fresh(dtype, sizes, 4, true);
  const Joined::Piece& piece = joined_->pieces[value()];
  View v = whole(piece.cat, joined_->wholes[piece.cat]);
  std::copy_n(sizes, 4, v.sizes.data());
  v.offset = piece.channel * dtype_bytes(dtype);
  return v;
}

bool Builder::dies(size_t i) const {
  const size_t here = layout.values.size() - program_.inputs.size();
  return last_use_[roots_[step_->in[i]]] == here;
}

View Builder::in_place_of(const View& v, size_t i, Dtype dtype) {
  const Buffer& buffer = layout.buffers[v.buffer];
  const bool own = v.buffer != in(i).buffer || dies(i);  // a copy of this step's own, or read for the last time
  const bool whole = buffer.kind == Buffer::Kind::arena && v.offset == 0 && v.bytes() == buffer.bytes;
  if (!own || !whole || dtype_bytes(dtype) != dtype_bytes(v.dtype)) return fresh_like(v, dtype);
  View out = v;
  out.dtype = dtype;
  return out;
}

void Builder::add(std::unique_ptr<Driver> driver, const char* kernel, const std::vector<const View*>& operands,
                  const View& out, int64_t operations, int64_t weight_bytes) {
  if (driver->tasks == 0) return;
  const auto index = static_cast<int64_t>(layout.drivers.size());
  PlanLayout::Binding binding;
  const Dtype read = operands.empty() ? out.dtype : operands[0]->dtype;
  Work work{value() - static_cast<int>(program_.inputs.size()),
            kernel,
            read,
            weight_bytes,
            weight_bytes,
            operations,
            driver->tasks,
            false};
  const auto use = [&](const View& v) {
    Buffer& buffer = layout.buffers[v.buffer];
    buffer.first = std::min(buffer.first, index);
    buffer.last = index;
    work.bytes += v.bytes();
    return PlanLayout::Place{v.buffer, v.offset};
  };
  for (const View* v : operands) binding.in.push_back(v ? use(*v) : PlanLayout::Place{});
  binding.out = use(out);
  layout.drivers.push_back(std::move(driver));
  layout.bindings.push_back(std::move(binding));
  layout.work.push_back(work);
}

void Builder::copy(const View& from, const View& to) {
  add(std::make_unique<CopyDriver>(dtype_bytes(from.dtype), from.dims, from.sizes.data(), from.strides.data(),
                                   to.strides.data(), threads_),
      "copy", {&from}, to);
}

View Builder::to_contiguous(const View& v) {
  if (is_contiguous(v)) return v;
  const View out = fresh(v.dtype, v.sizes.data(), v.dims, false);
  copy(v, out);
  return out;
}

View Builder::to_channels_last(const View& v) {
  if (is_channels_last(v)) return v;
  const View out = fresh(v.dtype, v.sizes.data(), v.dims, true);
  copy(v, out);
  return out;
}

View Builder::dense(const View& v, const View* beside) {
  if (is_dense(v)) return v;
  View out = fresh(v.dtype, v.sizes.data(), v.dims, false);
  if (beside)
    set_strides_like(out, {&v, beside});
  else
    set_strides_like(out, {&v});
  copy(v, out);
  return out;
}

View Builder::in_layout_of(const View& a, const View& b) {
  bool same = true;
  for (int64_t d = 0; same && d < a.dims; ++d) same = a.sizes[d] == 1 || a.strides[d] == b.strides[d];
  if (same) return b;
  const View out = fresh_like(a, b.dtype);
  copy(b, out);
  return out;
}

// v repeated where its size is 1 and that of `to` is not.
View Builder::expanded(const View& v, const View& to) {
  View out = v;
  for (int64_t d = 0; d < to.dims; ++d) {
    if (v.sizes[d] != to.sizes[d]) out.strides[d] = 0;
    out.sizes[d] = to.sizes[d];
  }
  return out;
}

PackedView Builder::packed(Element element) {
  const int64_t offset = number(), bytes = number();
  PK_CHECK(offset >= 0 && bytes >= 0 && offset % kBlockBytes == 0 && offset <= program_.weight_bytes &&
               bytes <= program_.weight_bytes - offset,
           "run_plan: the weights of a step ", name(), " lie outside of the plan's");
  PackedView view;
  const char* refused = read_packed(weights_ + offset, bytes, &view);
  PK_CHECK(refused == nullptr, "run_plan: the weights of a step ", name(), " are refused: ", refused);
  PK_CHECK(view.h.element == element, "run_plan: the weights of a step ", name(), " are of another dtype");
  return view;
}

}  // namespace pykernels
