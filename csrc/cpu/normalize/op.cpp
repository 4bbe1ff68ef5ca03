// softmax and layer_norm of real numbers. Outputs are contiguous.
#include "cpu/op.h"

#include <optional>

#include "cpu/normalize/driver.h"

namespace pykernels {
namespace {

Tensor softmax(const Tensor& x, int64_t dim) {
  const char* op = "softmax";
  check_real(op, "x", x);
  const int64_t dims = x.dim();
  PK_CHECK(dim >= -dims && dim < dims, op, ": dim must lie in [", -dims, ", ", dims - 1, "] for x of shape ",
           shape_of(x), ", not ", dim);
  if (dim < 0) dim += dims;
  const Tensor source = to_contiguous(x);
  const Tensor out = empty(Ints(x.sizes().begin(), x.sizes().end()), x.scalar_type());
  const int64_t* sizes = x.sizes().data();
  SoftmaxDriver driver(elements_of(sizes, dim), sizes[dim], elements_of(sizes + dim + 1, dims - dim - 1),
                       real_of(x.scalar_type()), torch::stable::get_num_threads());
  run(driver, {bytes_of(source)}, out);
  return out;
}

Tensor layer_norm(const Tensor& x, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps) {
  const char* op = "layer_norm";
  check_real(op, "x", x);
  PK_CHECK(x.dim() >= 1, op, ": x must have a dimension");
  const int64_t n = x.size(x.dim() - 1);
  const auto checked = [&](const char* name, const std::optional<Tensor>& t) {
    if (!t) return;
    check_cpu(op, name, *t);
    PK_CHECK(t->scalar_type() == ScalarType::Float && t->dim() == 1 && t->size(0) == n, op, ": ", name,
             " must be float32 of shape [", n, "], not ", dtype_name(t->scalar_type()), " ", shape_of(*t));
  };
  checked("weight", weight);
  checked("bias", bias);
  const Tensor source = to_contiguous(x);
  const Tensor out = empty(Ints(x.sizes().begin(), x.sizes().end()), x.scalar_type());
  const Tensor w = weight ? to_contiguous(*weight) : out, b = bias ? to_contiguous(*bias) : out;
  LayerNormDriver driver(n == 0 ? 0 : x.numel() / n, n, real_of(x.scalar_type()), static_cast<float>(eps),
                         torch::stable::get_num_threads());
  run(driver, {bytes_of(source), weight ? bytes_of(w) : nullptr, bias ? bytes_of(b) : nullptr}, out);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CPU, m) {
  m.impl("softmax", TORCH_BOX(&softmax));
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
}

}  // namespace pykernels
