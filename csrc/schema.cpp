// Every operator of the library: torch.ops.pykernels.*. Implementations stand in the families' op.cpp, shape functions
// in pykernels/ops. What a shape function needs is in the schema, never only in a packed tensor's bytes.
#include "common/stable.h"

STABLE_TORCH_LIBRARY(pykernels, m) {
  // The isa in force; set_isa returns the one before (for tests: an op in flight may see either).
  m.def("_isa() -> str");
  m.def("_set_isa(str isa) -> str");
  // Whether convolutions may run by Winograd's tiles, PYKERNELS_WINOGRAD until it is called; what held before (for
  // tests).
  m.def("_set_winograd(bool allowed) -> bool");
  // Which of a plan's first steps run image by image: -1 for those that move fewer bytes so (none with
  // PYKERNELS_BY_IMAGE=0, until it is called), else the most that can of so many; what held before (for tests).
  m.def("_set_by_image(int steps) -> int");
  // What the machine could do at most: operations done, bytes moved (pykernels/bench/machine.py holds the watch).
  m.def("_peak(str dtype, int steps) -> float");
  m.def("_bandwidth(Tensor(a!) target, Tensor source, str kind, int rounds) -> float");

  // linear
  m.def("int8_mm(Tensor a, Tensor b) -> Tensor");
  m.def("linear_pack(Tensor weight, Tensor? bias=None) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor packed, SymInt out_features, str activation=\"none\", Tensor? residual=None, "
      "str residual_order=\"before\") -> Tensor");
  m.def("int8_linear_pack(Tensor weight, Tensor weight_scale, Tensor? bias=None) -> Tensor");
  m.def(
      "int8_linear(Tensor x, Tensor packed, SymInt out_features, float? x_scale=None, int x_zero_point=0, "
      "float? out_scale=None, int out_zero_point=0, ScalarType? out_dtype=None, str activation=\"none\") -> Tensor");

  // conv
  m.def("conv2d_pack(Tensor weight, Tensor? bias=None, int groups=1) -> Tensor");
  m.def(
      "conv2d(Tensor x, Tensor packed, SymInt out_channels, int[2] kernel_size, int[2] stride, int[4] padding, "
      "int[2] dilation, int groups, str activation=\"none\", Tensor? residual=None, str residual_order=\"before\") "
      "-> Tensor");
  m.def("qconv2d_pack(Tensor weight, Tensor weight_scale, Tensor? bias=None, int groups=1) -> Tensor");
  m.def(
      "qconv2d(Tensor x, Tensor packed, SymInt out_channels, int[2] kernel_size, int[2] stride, int[4] padding, "
      "int[2] dilation, int groups, float x_scale, int x_zero_point, float? out_scale, int out_zero_point, "
      "ScalarType out_dtype, str activation=\"none\", Tensor? residual=None, float residual_scale=1.0, "
      "int residual_zero_point=0, str residual_order=\"before\") -> Tensor");
  m.def(
      "conv_bn_act(Tensor x, Tensor weight, Tensor? bias, Tensor running_mean, Tensor running_var, Tensor? gamma, "
      "Tensor? beta, float eps, int[2] stride, int[4] padding, int[2] dilation, int groups, str activation=\"relu\", "
      "Tensor? residual=None, str residual_order=\"before\") -> Tensor");

  // pool
  m.def(
      "max_pool2d(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode) "
      "-> Tensor");
  m.def(
      "max_pool2d_with_indices(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
      "bool ceil_mode) -> (Tensor, Tensor)");
  m.def("adaptive_max_pool2d(Tensor x, SymInt[2] output_size) -> Tensor");
  m.def("adaptive_max_pool2d_with_indices(Tensor x, SymInt[2] output_size) -> (Tensor, Tensor)");
  m.def(
      "avg_pool2d(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, bool ceil_mode, "
      "bool count_include_pad, int? divisor_override=None) -> Tensor");
  m.def("adaptive_avg_pool2d(Tensor x, SymInt[2] output_size) -> Tensor");
  m.def(
      "qavg_pool2d(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, bool ceil_mode, "
      "bool count_include_pad, int? divisor_override, float x_scale, int x_zero_point, float? out_scale, "
      "int out_zero_point, ScalarType out_dtype) -> Tensor");
  m.def(
      "qadaptive_avg_pool2d(Tensor x, SymInt[2] output_size, float x_scale, int x_zero_point, float? out_scale, "
      "int out_zero_point, ScalarType out_dtype) -> Tensor");

  // quantize
  m.def("quantize_per_tensor(Tensor x, float scale, int zero_point, ScalarType dtype) -> Tensor");
  m.def("dequantize_per_tensor(Tensor x, float scale, int zero_point, ScalarType dtype) -> Tensor");
  m.def("quantize_per_channel(Tensor x, Tensor scale, Tensor zero_point, int axis, ScalarType dtype) -> Tensor");
  m.def("dequantize_per_channel(Tensor x, Tensor scale, Tensor zero_point, int axis, ScalarType dtype) -> Tensor");
  m.def("quantize_per_token(Tensor x, ScalarType dtype) -> (Tensor, Tensor, Tensor)");
  m.def("dequantize_per_token(Tensor x, Tensor scale, Tensor zero_point, ScalarType dtype) -> Tensor");
  m.def("quantize_per_block(Tensor x, int block_size) -> (Tensor, Tensor)");
  m.def("dequantize_per_block(Tensor x, Tensor scale, int block_size, ScalarType dtype) -> Tensor");
  m.def(
      "qadd(Tensor a, Tensor b, float a_scale, int a_zero_point, float b_scale, int b_zero_point, float out_scale, "
      "int out_zero_point, ScalarType out_dtype, str activation=\"none\") -> Tensor");
  m.def(
      "qmul(Tensor a, Tensor b, float a_scale, int a_zero_point, float b_scale, int b_zero_point, float out_scale, "
      "int out_zero_point, ScalarType out_dtype) -> Tensor");
  m.def(
      "qcat(Tensor[] xs, float[] scales, int[] zero_points, int dim, float out_scale, int out_zero_point, "
      "ScalarType out_dtype) -> Tensor");
  m.def("qlookup(Tensor x, Tensor table) -> Tensor");

  // pointwise functions of real numbers
  m.def("add(Tensor a, Tensor b, str activation=\"none\") -> Tensor");
  m.def("activate(Tensor x, str activation) -> Tensor");
  m.def("leaky_relu(Tensor x, float negative_slope) -> Tensor");

  // upsample: one of output_size and scale_factors is empty, as ATen's are None. Real numbers or bytes.
  m.def("upsample_nearest2d(Tensor x, SymInt[] output_size, float[] scale_factors) -> Tensor");
  m.def("upsample_bilinear2d(Tensor x, SymInt[] output_size, bool align_corners, float[] scale_factors) -> Tensor");
  // Of a transposed convolution's phases its result: [N, groups * stride * stride * C, H, W] -> [N, groups * C, ..].
  m.def("interleave(Tensor x, int[2] stride, int[4] crop, int groups) -> Tensor");

  // normalize
  m.def("softmax(Tensor x, int dim) -> Tensor");
  m.def("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor");

  // attention: query [N, H, T, D], key [N, H / share, S, D], value [N, H / share, S, Dv] -> [N, H, T, Dv]
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? mask=None, bool causal=False, float? scale=None) "
      "-> Tensor");

  // plan: a network as one call. Sizes (those of all outputs, one after another), numbers of dimensions, dtypes (by
  // their number in names.json) and layouts are what its shape function knows of the outputs.
  m.def(
      "run_plan(Tensor plan, Tensor weights, Tensor[] inputs, SymInt[] out_sizes, int[] out_dims, int[] out_dtypes, "
      "int[] out_channels_last) -> Tensor[]");
  m.def("_describe_plan(Tensor plan, Tensor weights, Tensor[] inputs) -> str");
  m.def("_profile_plan(Tensor plan, Tensor weights, Tensor[] inputs, int rounds) -> Tensor");
  m.def("_forget_plans(int address) -> ()");

  // compress: results are written into arguments
  m.def(
      "compress_encode(Tensor x, Tensor(a!)? residual, Tensor(b!) payload, Tensor segments, str codec, int block, "
      "bool stochastic=False, int seed=0) -> ()");
  m.def(
      "compress_decode(Tensor payloads, Tensor(a!) out, Tensor segments, str codec, int block, float factor=1.0, "
      "Tensor? weights=None) "
      "-> ()");
  m.def(
      "compress_reduce(Tensor payloads, Tensor(a!)? residual, Tensor(b!) payload, Tensor segments, str codec, "
      "int block, float factor, bool stochastic=False, int seed=0) -> ()");
  m.def(
      "sparse_encode(Tensor x, Tensor(a!) residual, Tensor(b!)? velocity, Tensor(c!) payload, Tensor segments, int k, "
      "float threshold=0.0, float momentum=0.0) -> ()");
  m.def("sparse_decode(Tensor payloads, Tensor(a!) out, int k, float factor=1.0) -> ()");
  m.def("randomk_encode(Tensor x, Tensor(a!)? residual, Tensor(b!) values, Tensor segments, int k, int seed) -> ()");
  m.def("randomk_decode(Tensor values, Tensor(a!) out, Tensor segments, int k, int seed, float factor=1.0) -> ()");
}
