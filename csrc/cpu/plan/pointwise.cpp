// Steps between dense tensors, element by element or along one dimension, and concatenations of bytes.
#include <bit>

#include "cpu/arithmetic/driver.h"
#include "cpu/copy/driver.h"
#include "cpu/normalize/driver.h"
#include "cpu/plan/builder.h"
#include "cpu/quantize/driver.h"

namespace pykernels {
namespace {

Quantization quantization(Dtype t, double scale, int64_t zero_point) {
  return {t == Dtype::s8, static_cast<float>(scale), static_cast<int32_t>(zero_point)};
}

// v with ones before its sizes.
View with_dims(View v, int64_t dims) {
  const int64_t more = dims - v.dims;
  for (int64_t d = dims - 1; d >= 0; --d) {
    v.sizes[d] = d < more ? 1 : v.sizes[d - more];
    v.strides[d] = d < more ? 0 : v.strides[d - more];
  }
  v.dims = dims;
  return v;
}

}  // namespace

void Builder::check_real(Dtype t) const {
  PK_CHECK(is_real(t), "run_plan: a step ", name(), " is of real numbers, not of integers");
}

void Builder::check_byte(Dtype t) const {
  PK_CHECK(is_byte(t), "run_plan: a step ", name(), " is of bytes, not of real numbers");
}

// numbers: dtype and zero point of the output; reals: its scale
void Builder::quantize() {
  const View x = dense(in(0));
  const Dtype to = dtype();
  check_real(x.dtype), check_byte(to);
  const int64_t zero = zero_point(to);
  const View out = fresh_like(x, to);
  add(std::make_unique<QuantizeDriver>(x.numel(), real_of(x.dtype), quantization(to, scale(), zero), threads_),
      "quantize", {&x}, out);
  yields(out);
}

// numbers: dtype of the output, zero point of x; reals: its scale
void Builder::dequantize() {
  const View x = dense(in(0));
  const Dtype to = dtype();
  check_byte(x.dtype), check_real(to);
  const int64_t zero = zero_point(x.dtype);
  const View out = fresh_like(x, to);
  add(std::make_unique<DequantizeDriver>(x.numel(), quantization(x.dtype, scale(), zero), real_of(to), threads_),
      "dequantize", {&x}, out);
  yields(out);
}

// numbers: dtype of the output
void Builder::cast() {
  const Dtype to = dtype();
  check_real(in(0).dtype), check_real(to);
  if (in(0).dtype == to) return yields(in(0));
  const View x = dense(in(0));
  const View out = in_place_of(x, 0, to);
  add(std::make_unique<CastDriver>(x.numel(), real_of(x.dtype), real_of(to), threads_), "cast", {&x}, out);
  yields(out);
}

// numbers: where the 256 entries begin in the weights, their dtype
void Builder::lookup() {
  const View x = dense(in(0));
  const int64_t offset = number();
  const Dtype to = dtype();
  check_byte(x.dtype), check_byte(to);
  PK_CHECK(offset >= 0 && offset <= program_.weight_bytes - 256, "run_plan: a table lies outside of the weights");
  View table;
  table.dtype = to;
  table.dims = 1;
  table.sizes[0] = 256;
  set_strides(table, false);
  table.buffer = weights_buffer_;
  table.offset = offset;
  const View out = in_place_of(x, 0, to);
  add(std::make_unique<LookupDriver>(x.numel(), threads_), "lookup", {&x, &table}, out);
  yields(out);
}

// The operands of a sum or product, dense: b has a's shape, one element, or one for each channel: [N, C, 1, 1] or
// [C, 1, 1] of an image, [C] where the channels are a's last dimension.
Builder::Pairing Builder::pairing(const View& a, const View& other) {
  PK_CHECK(other.dims <= a.dims, "run_plan: the second operand of a step ", name(),
           " has more dimensions than the first");
  const View b = with_dims(other, a.dims), repeated = expanded(b, a), first = dense(a, &repeated);
  const bool image = a.dims == 4, channels_last = image && is_channels_last(first);
  const int64_t channel = image && b.sizes[1] > 1 ? 1 : a.dims - 1;
  bool same = true, one_a_channel = true, fits = true;
  for (int64_t d = 0; d < a.dims; ++d) {
    fits = fits && (b.sizes[d] == a.sizes[d] || b.sizes[d] == 1);
    same = same && b.sizes[d] == a.sizes[d];
    one_a_channel = one_a_channel && (d == channel ? b.sizes[d] == a.sizes[d] : b.sizes[d] == 1);
  }
  PK_CHECK(fits, "run_plan: tensors of shapes ", shape_of(a.sizes.data(), a.dims), " and ",
           shape_of(b.sizes.data(), b.dims), " cannot be combined");
  const int64_t elements = a.numel();
  if (!same && b.numel() == 1) return {first, b, {Operand::rows, 1, 1, elements}, first.buffer == b.buffer};
  const bool last = (channel == 1 && channels_last) || (channel == a.dims - 1 && is_contiguous(first));
  if (!same && one_a_channel && last && elements > 0) {
    const View second = to_contiguous(b);
    const int64_t channels = a.sizes[channel];
    return {first, second, {Operand::columns, 1, elements / channels, channels}, first.buffer == second.buffer};
  }
  const bool per_image = image && b.sizes[1] == a.sizes[1] && b.sizes[2] == 1 && b.sizes[3] == 1;
  if (!same && per_image && (channels_last || is_contiguous(first))) {
    View each = b;
    if (b.sizes[0] != a.sizes[0]) each.sizes[0] = a.sizes[0], each.strides[0] = 0;
    const View second = to_contiguous(each);
    return {first, second, per_channel(a.sizes[0], a.sizes[1], a.sizes[2] * a.sizes[3], channels_last),
            first.buffer == second.buffer};
  }
  return {first, in_layout_of(first, repeated), same_shape(elements), false};
}

// numbers: zero points of both operands, dtype and zero point of the output, of a sum the activation; reals: the scales
// of both operands and the output
void Builder::quantized_binary() {
  check_byte(in(0).dtype), check_byte(in(1).dtype);
  const bool sum = step_->kind == StepKind::qadd;
  const int64_t a_zero = zero_point(in(0).dtype), b_zero = zero_point(in(1).dtype);
  const Dtype to = dtype();
  check_byte(to);
  const int64_t zero = zero_point(to);
  const Activation applied = sum ? activation() : Activation::none;
  const double a_scale = scale(), b_scale = scale(), out_scale = scale();
  const Pairing p = pairing(in(0), in(1));
  const View out = p.overlap ? fresh_like(p.a, to) : in_place_of(p.a, 0, to);
  add(std::make_unique<ByteArithmeticDriver>(
          sum ? Arithmetic::add : Arithmetic::mul, applied, p.broadcast, quantization(p.a.dtype, a_scale, a_zero),
          quantization(p.b.dtype, b_scale, b_zero), quantization(to, out_scale, zero), threads_),
      name(), {&p.a, &p.b}, out);
  yields(out);
}

// numbers: the activation after a sum, where there is one; reals: the second operand, where there is only one
void Builder::binary() {
  check_real(in(0).dtype);
  const bool sum = step_->kind == StepKind::add;
  const Activation applied = sum && !step_->numbers.empty() ? activation() : Activation::none;
  View second;
  if (operands() > 1) {
    second = in(1);
    PK_CHECK(in(0).dtype == second.dtype, "run_plan: the operands of a step ", name(), " differ in dtype");
  } else {
    PK_CHECK(in(0).dtype == Dtype::f32, "run_plan: a number can be combined with float32 only");
    const int64_t one = 1;
    second = fresh(Dtype::f32, &one, 1, false);
    if (in(0).dims == 0) second.dims = 0;
    const auto bits = std::bit_cast<uint32_t>(static_cast<float>(real()));
    add(std::make_unique<FillDriver>(4, 1, bits, threads_), "number", {}, second);
  }
  const Pairing p = pairing(in(0), second);
  const View out = p.overlap ? fresh_like(p.a, p.a.dtype) : in_place_of(p.a, 0, p.a.dtype);
  add(std::make_unique<RealArithmeticDriver>(sum ? Arithmetic::add : Arithmetic::mul, applied, p.broadcast,
                                             real_of(p.a.dtype), threads_),
      name(), {&p.a, &p.b}, out);
  yields(out);
}

// numbers: the activation
void Builder::activated() {
  check_real(in(0).dtype);
  const View x = dense(in(0)), out = in_place_of(x, 0, x.dtype);
  add(std::make_unique<ActivationDriver>(x.numel(), real_of(x.dtype), activation(), threads_), name(), {&x}, out);
  yields(out);
}

// reals: the slope of what is negative
void Builder::leaky_relu() {
  check_real(in(0).dtype);
  const View x = dense(in(0)), out = in_place_of(x, 0, x.dtype);
  add(std::make_unique<LeakyReluDriver>(x.numel(), real_of(x.dtype), static_cast<float>(real()), threads_), name(),
      {&x}, out);
  yields(out);
}

// numbers: dimension
void Builder::softmax() {
  check_real(in(0).dtype);
  const View x = to_contiguous(in(0)), out = in_place_of(x, 0, x.dtype);
  const int64_t d = number(0, x.dims - 1);
  add(std::make_unique<SoftmaxDriver>(elements_of(x.sizes.data(), d), x.sizes[d],
                                      elements_of(x.sizes.data() + d + 1, x.dims - d - 1), real_of(x.dtype), threads_),
      name(), {&x}, out);
  yields(out);
}

// numbers: whether there is a weight, a bias, then dtype and zero point of the output, where that is bytes; reals:
// epsilon, then the scale of these. Operands: x, then weight and bias, [n] in fp32.
void Builder::layer_norm() {
  check_real(in(0).dtype);
  PK_CHECK(in(0).dims >= 1, "run_plan: a layer norm's input has no dimension");
  const View x = to_contiguous(in(0));
  const int64_t n = x.sizes[x.dims - 1];
  size_t given = 1;
  View held[2];
  const View* operands[] = {&x, nullptr, nullptr};
  for (int i = 0; i < 2; ++i) {
    if (!number(0, 1)) continue;
    held[i] = to_contiguous(in(given++));
    PK_CHECK(held[i].dtype == Dtype::f32 && held[i].dims == 1 && held[i].sizes[0] == n,
             "run_plan: the weight or bias of a layer norm has not its features");
    operands[1 + i] = &held[i];
  }
  const auto eps = static_cast<float>(real());
  Dtype to = x.dtype;
  std::optional<Quantization> bytes;
  if (step_->numbers.size() > numbers_read_) {
    to = dtype();
    check_byte(to);
    const int64_t zero = zero_point(to);
    bytes = quantization(to, scale(), zero);
  }
  const View out = in_place_of(x, 0, to);
  yields(out);
  if (x.numel() == 0) return;
  add(std::make_unique<LayerNormDriver>(x.numel() / n, n, real_of(x.dtype), eps, threads_, bytes), name(),
      {operands[0], operands[1], operands[2]}, out);
}

// numbers: dimension, dtype and zero point of the output, zero point of each operand; reals: the scale of the output
// and of each operand
void Builder::quantized_cat() {
  const View& first = in(0);
  const int64_t d = number(0, first.dims - 1);
  const Dtype to = dtype();
  check_byte(to);
  const int64_t zero = zero_point(to);
  const double out_scale = scale();
  // The layout of the first: memory order of the dimensions, from it the bytes of a row that an operand contributes.
  const bool channels_last = joins() || (is_channels_last(first) && !is_contiguous(first));
  Sizes sizes = first.sizes;
  sizes[d] = 0;
  int64_t outer = 1, inner = 1;
  bool before = true;
  for (int64_t place = 0; place < first.dims; ++place) {
    const int64_t at = channels_last ? kNhwc[place] : place;
    if (at == d)
      before = false;
    else
      (before ? outer : inner) *= first.sizes[at];
  }
  std::vector<View> operands_in;
  std::vector<ConcatPart> parts;
  int64_t offset = 0;
  for (size_t i = 0; i < operands(); ++i) {
    const View& x = in(i);
    check_byte(x.dtype);
    bool fits = x.dims == first.dims;
    for (int64_t k = 0; fits && k < x.dims; ++k) fits = k == d || x.sizes[k] == first.sizes[k];
    PK_CHECK(fits, "run_plan: tensors of shapes ", shape_of(first.sizes.data(), first.dims), " and ",
             shape_of(x.sizes.data(), x.dims), " cannot be joined");
    sizes[d] += x.sizes[d];
    const int64_t x_zero = zero_point(x.dtype);
    const Quantization q = quantization(x.dtype, scale(), x_zero);
    const int64_t length = inner * x.sizes[d];
    if (x.numel() == 0 || in_place(i)) {
      offset += length;
      continue;
    }
    operands_in.push_back(channels_last ? to_channels_last(x) : to_contiguous(x));
    parts.push_back({q, offset, length});
    offset += length;
  }
  const View out =
      joins() ? whole(value(), joined_->wholes[value()]) : fresh(to, sizes.data(), first.dims, channels_last);
  yields(out);
  if (out.numel() == 0 || parts.empty()) return;
  std::vector<const View*> pointers;
  for (const View& v : operands_in) pointers.push_back(&v);
  add(std::make_unique<ConcatDriver>(std::move(parts), outer, offset, quantization(to, out_scale, zero), threads_),
      "concatenation", pointers, out);
}

}  // namespace pykernels
