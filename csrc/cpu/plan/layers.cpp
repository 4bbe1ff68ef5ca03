// Steps with weights, and pools.
#include "cpu/attention/driver.h"
#include "cpu/conv/depthwise_driver.h"
#include "cpu/conv/winograd_driver.h"
#include "cpu/linear/driver.h"
#include "cpu/plan/builder.h"
#include "cpu/pool/driver.h"

namespace pykernels {
namespace {

Element element_for(Dtype t) {
  return t == Dtype::f32    ? Element::f32
         : t == Dtype::bf16 ? Element::bf16
         : t == Dtype::f16  ? Element::f16
                            : Element::s8;
}

PoolType pool_type(Dtype t) {
  switch (t) {
    case Dtype::bf16: return kPoolBf16;
    case Dtype::f16: return kPoolF16;
    case Dtype::u8: return kPoolU8;
    case Dtype::s8: return kPoolS8;
    default: return kPoolF32;
  }
}

bool same_sizes(const View& a, const View& b) {
  bool same = a.dims == b.dims;
  for (int64_t d = 0; same && d < a.dims; ++d) same = a.sizes[d] == b.sizes[d];
  return same;
}

}  // namespace

// The rest of a layer's numbers: activation, whether the residual is added after it, dtype of the output, zero points
// of x, output and residual; and its reals: their scales. 1 and 0 where there are no 8 bits.
Epilogue Builder::epilogue(const PackedView& weights, const View& x, Dtype* out_dtype) {
  Epilogue e = make_epilogue(weights, activation());
  const bool after = number(0, 1) != 0;
  const Dtype out = dtype();
  PK_CHECK(is_byte(x.dtype) ? is_byte(out) || is_real(out) : out == x.dtype, "run_plan: a step ", name(),
           " yields another dtype than it can");
  const int64_t x_zero_point = zero_point(x.dtype), out_zero_point = zero_point(out);
  e.x_zero_point = static_cast<int32_t>(x_zero_point) + (x.dtype == Dtype::s8 ? 128 : 0);
  e.x_scale = static_cast<float>(scale());
  set_out(e, out, scale(), out_zero_point);
  const View* residual = operands() > 1 ? &in(1) : nullptr;
  PK_CHECK(!residual || is_real(residual->dtype) || (is_byte(x.dtype) && is_byte(residual->dtype)),
           "run_plan: the residual of a step ", name(), " has a dtype that cannot be added");
  const int64_t residual_zero_point = residual ? zero_point(residual->dtype) : number(0, 0);
  const double residual_scale = scale();
  if (residual) set_residual(e, residual->dtype, after, residual_scale, residual_zero_point);
  *out_dtype = out;
  return e;
}

// A layer's last numbers: how it is cut, see Tiling.
Tiling Builder::tiling() {
  const int64_t rows = number(0, kMaxRows), block = number(0, 1 << 10), splits = number(0, 1 << 10);
  const bool here = program_.tuned_isa == static_cast<int64_t>(current_isa()) && program_.tuned_threads == threads_;
  return here ? Tiling{rows, block, splits} : Tiling{};
}

// numbers: where the packed weights begin and their bytes, output channels, kernel size, stride, padding (left, right,
// top, bottom), dilation, groups, epilogue, tiling; reals: epilogue. Operands: x, residual.
void Builder::conv2d() {
  const View& x = in(0);
  PK_CHECK(x.dims == 4 && (is_byte(x.dtype) || is_real(x.dtype)), "run_plan: a convolution's input is no image");
  const PackedView weights = packed(element_for(x.dtype));
  const int64_t out_channels = number();
  const Ints kernel = pair(), stride = pair();
  Ints padding = pair();
  for (const int64_t p : pair()) padding.push_back(p);
  const Ints dilation = pair();
  const ConvShape s = conv_shape(name(), x.sizes.data(), out_channels, kernel, stride, padding, dilation, number());
  check_conv_weight(name(), weights, s);
  Dtype out_dtype;
  Epilogue e = epilogue(weights, x, &out_dtype);
  const Tiling cut = tiling();
  const int64_t sizes[] = {s.n, s.o, s.oh, s.ow};
  View out = fresh_pixels(out_dtype, sizes), residual;
  e.out_stride = out.strides[3];
  if (operands() > 1) {
    PK_CHECK(same_sizes(in(1), out), "run_plan: a convolution's residual has not its output's shape");
    residual = to_channels_last(in(1));
    if (residual.dtype == out_dtype && !shares(0, 1)) out = in_place_of(residual, 1, out_dtype);
  }
  yields(out);
  if (out.numel() == 0) return;
  const View* added = operands() > 1 ? &residual : nullptr;
  const auto fill = static_cast<uint8_t>(e.x_zero_point);
  const uint8_t flip = x.dtype == Dtype::s8 ? 0x80 : 0;
  if (weights.h.kind == PackKind::depthwise) {
    const View source = to_channels_last(x);
    add(std::make_unique<DepthwiseDriver>(s, weights, e, fill, flip, threads_), "depthwise convolution",
        {&source, added}, out, operations_of(out.numel(), weights.taps() * weights.h.k), weights.h.bytes);
    return;
  }
  const int64_t bytes = dtype_bytes(x.dtype);
  const ConvPixels pixels(s, bytes);
  View source = s.c > 4 || is_channels_last(x) ? to_channels_last(x) : x;
  if (!is_channels_last(source) || !pixels.as_they_are) {
    const int64_t all = s.n * pixels.image + kBlockBytes;
    const View copy = fresh(Dtype::u8, &all, 1, false);
    add(std::make_unique<ConvInputDriver>(s, bytes, source.strides.data(), threads_), "input to words", {&source},
        copy);
    source = copy;
  }
  ConvProducts products = conv_products(s, weights, e, fill, flip, cut, threads_, Weights::held);
  add(std::move(products.driver), products.kernel, {&source, added}, out, products.operations, products.weight_bytes);
}

// numbers: where the packed weights begin and their bytes, output features, epilogue, tiling; reals: epilogue.
// Operands: x, residual.
void Builder::linear() {
  const View& x = in(0);
  PK_CHECK(x.dims >= 1 && (is_byte(x.dtype) || is_real(x.dtype)), "run_plan: a linear layer's input has no features");
  const PackedView weights = packed(element_for(x.dtype));
  const int64_t k = x.sizes[x.dims - 1], out_features = number();
  check_linear_weight(name(), weights, k, out_features);
  Dtype out_dtype;
  const Epilogue e = epilogue(weights, x, &out_dtype);
  const Tiling cut = tiling();
  Sizes sizes = x.sizes;
  sizes[x.dims - 1] = out_features;
  View out = fresh(out_dtype, sizes.data(), x.dims, false), residual;
  if (operands() > 1) {
    PK_CHECK(same_sizes(in(1), out), "run_plan: a linear layer's residual has not its output's shape");
    residual = to_contiguous(in(1));
    if (residual.dtype == out_dtype && !shares(0, 1)) out = in_place_of(residual, 1, out_dtype);
  }
  yields(out);
  if (out.numel() == 0) return;
  View source = to_contiguous(x);
  const int64_t rows = out.numel() / out_features, row_bytes = k * dtype_bytes(x.dtype);
  if (row_bytes % 4 != 0) {
    const int64_t all = rows * round_up(row_bytes, 4);
    const View copy = fresh(Dtype::u8, &all, 1, false);
    add(std::make_unique<WordRowsDriver>(rows, row_bytes, threads_), "rows to words", {&source}, copy);
    source = copy;
  }
  const uint8_t flip = x.dtype == Dtype::s8 ? 0x80 : 0;
  TileProblem problem = linear_problem(rows, weights, e, flip);
  problem.tiling = cut;
  add(std::make_unique<TileDriver>(problem, threads_), "product", {&source, operands() > 1 ? &residual : nullptr}, out,
      operations_of(out.numel(), k), weights.h.bytes);
}

// numbers of a plain pool: kernel size, stride, padding, dilation, ceil_mode; of an average besides: count_include_pad,
// divisor (0: none); of an adaptive one: output size. Of averages then: dtype of the output, zero points of x and
// output; and reals: their scales.
void Builder::pool() {
  View x = in(0);
  const bool average = step_->kind != StepKind::max_pool2d;
  PK_CHECK(x.dims == 4 && (is_byte(x.dtype) || is_real(x.dtype)), "run_plan: a pool's input is no image");
  PoolProblem p;
  p.kind = average ? PoolKind::average : PoolKind::max;
  p.type = pool_type(x.dtype);
  p.adaptive = step_->kind == StepKind::adaptive_avg_pool2d;
  if (p.adaptive) {
    p.output = pair();
  } else {
    p.kernel = pair(), p.stride = pair(), p.padding = pair(), p.dilation = pair();
    p.ceil_mode = number(0, 1) != 0;
  }
  if (step_->kind == StepKind::avg_pool2d) {
    PK_CHECK(p.dilation == (Ints{1, 1}), "run_plan: an average pool is dilated");
    p.count_include_pad = number(0, 1) != 0;
    if (const int64_t divisor = number(); divisor != 0) p.divisor = divisor;
  }
  Dtype out_dtype = x.dtype;
  if (average) {
    out_dtype = dtype();
    PK_CHECK(is_byte(x.dtype) ? is_byte(out_dtype) || is_real(out_dtype) : out_dtype == x.dtype,
             "run_plan: a pool yields another dtype than it can");
    p.out_type = pool_type(out_dtype);
    p.x_zero_point = zero_point(x.dtype), p.out_zero_point = zero_point(out_dtype);
    p.x_scale = scale(), p.out_scale = scale();
  }
  const auto describe = [&](const View& v) {
    std::copy_n(v.sizes.data(), 4, p.sizes.data());
    std::copy_n(v.strides.data(), 4, p.strides.data());
  };
  describe(x);
  const auto [height, width] = pool_output(name(), p);
  const bool channels_last = p.channels_last();
  const int64_t sizes[] = {x.sizes[0], x.sizes[1], height, width};
  const View out = fresh(out_dtype, sizes, 4, channels_last);
  yields(out);
  if (!p.readable()) {
    x = to_contiguous(x);
    describe(x);
  }
  add(std::make_unique<PoolDriver>(name(), p, threads_), channels_last ? "pool, channels last" : "pool, contiguous",
      {&x}, out);
}

// numbers: whether a query sees only the keys up to its own, whether there is a mask; reals: the scale. Operands: query
// [N, H, T, D], key, value, then the mask, [S], [T, S], [H, T, S] or [N, H, T, S] or 1 for any size but S; the output
// lies as [N, T, H, D].
void Builder::attention() {
  const auto with_rows = [&](const View& v) {
    return v.dims == 0 || v.sizes[v.dims - 1] <= 1 || v.strides[v.dims - 1] == 1 ? v : to_contiguous(v);
  };
  const auto strided = [](const View& v) { return Strided{v.sizes.data(), v.strides.data(), v.dims}; };
  View tensors[4];
  for (size_t i = 0; i < 3; ++i) {
    check_real(in(i).dtype);
    PK_CHECK(in(i).dtype == in(0).dtype, "run_plan: the operands of attention have several dtypes");
    tensors[i] = with_rows(in(i));
  }
  const View &q = tensors[0], &k = tensors[1], &v = tensors[2], &mask = tensors[3];
  AttentionShape s = attention_shape(name(), strided(q), strided(k), strided(v));
  s.type = real_of(q.dtype);
  s.causal = number(0, 1) != 0;
  const bool masked = number(0, 1) != 0;
  if (masked) {
    const Dtype dtype = in(3).dtype;
    PK_CHECK(dtype == Dtype::u8 || dtype == q.dtype, "run_plan: the mask of attention has a dtype that it cannot have");
    tensors[3] = with_rows(in(3));
    set_mask(name(), &s, strided(mask), dtype == Dtype::u8 ? MaskRow::Kind::bytes : MaskRow::Kind::reals);
  }
  s.scale = static_cast<float>(real());
  const int64_t in_memory[] = {s.images, s.queries, s.heads, s.value_depth};
  View out = fresh(q.dtype, in_memory, 4, false);
  s.out = {out.strides[0], out.strides[2], out.strides[1]};
  std::swap(out.sizes[1], out.sizes[2]);
  std::swap(out.strides[1], out.strides[2]);
  yields(out);
  std::vector<const View*> operands{&q, &k, &v};
  if (masked) operands.push_back(&mask);
  int64_t terms;
  if (__builtin_mul_overflow(s.keys, s.depth + s.value_depth, &terms)) terms = INT64_MAX;
  add(std::make_unique<AttentionDriver>(s, threads_), name(), operands, out,
      operations_of(s.images * s.heads * s.queries, terms));
}

}  // namespace pykernels
