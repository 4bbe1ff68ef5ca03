// What linear/op.cpp and conv/op.cpp share: packing into a tensor, reading one back, filling an Epilogue from
// arguments.
#pragma once

#include <optional>
#include <string>

#include "cpu/op.h"
#include "cpu/tile/driver.h"

namespace pykernels {

// Products of u8 and s8 summed in s32 cannot overflow below this many.
inline constexpr int64_t kMaxReduction = (int64_t{1} << 31) / (255 * 128) - 1;

bool residual_after_activation(const char* op, const std::string& order);
Dtype dtype_of(ScalarType t);
Element element_of(ScalarType t);

// Throws where the s32 sum of so many products of bytes could overflow.
void check_reduction(const char* op, const char* name, int64_t products);

// weight is contiguous with groups * n output channels first; scale and bias are fp32 vectors of as many, or absent.
Tensor pack_weights(const char* op, const PackedHeader& header, const Tensor& weight,
                    const std::optional<Tensor>& scale, const std::optional<Tensor>& bias);

// Checks of weight_scale and bias against the number of output channels; bias comes back as contiguous fp32.
std::optional<Tensor> checked_bias(const char* op, const std::optional<Tensor>& bias, int64_t channels);
Tensor checked_weight_scale(const char* op, const Tensor& weight_scale, int64_t channels);

// The view of argument `packed`, refused with a clear error unless it is what the op expects.
PackedView checked_packed(const char* op, const Tensor& packed, Element element);

// Everything of an epilogue but x, residual and out: weights' arrays and activation.
Epilogue make_epilogue(const char* op, const PackedView& weights, const std::string& activation);
// out_dtype with its scale (required exactly for 8 bit) and zero point.
void set_out(const char* op, Epilogue& e, ScalarType out_dtype, std::optional<double> out_scale,
             int64_t out_zero_point);
void set_residual(const char* op, Epilogue& e, const Tensor& residual, const std::string& order, double scale,
                  int64_t zero_point);

}  // namespace pykernels
