// The gradient codecs on NumPy arrays, for processes without torch: one thread, the same bytes as the ops.
#include "host/compress.h"

#include <optional>

#include "cpu/compress/driver.h"

namespace py = pybind11;

namespace pykernels {
namespace {

using Optional = std::optional<py::buffer>;

// A C-contiguous array, aligned to its elements; `formats` are those of the buffer protocol.
py::buffer_info request(const char* op, const char* name, const py::buffer& array, bool written, const char* formats,
                        const char* dtypes) {
  const py::buffer_info info = array.request();
  std::string format = info.format;
  if (format.size() == 2 && (format[0] == '=' || format[0] == '<')) format.erase(0, 1);  // this byte order
  require(format.size() == 1 && std::string(formats).find(format) != std::string::npos, op, name, " must be of dtype ",
          dtypes, ", not of buffer format '", info.format, "'");
  require(!written || !info.readonly, op, name, " must be writable");
  py::ssize_t step = info.itemsize;
  for (py::ssize_t d = info.ndim - 1; d >= 0; --d) {
    require(info.shape[d] <= 1 || info.strides[d] == step || info.size == 0, op, name, " must be C-contiguous");
    step *= info.shape[d];
  }
  require(reinterpret_cast<uintptr_t>(info.ptr) % static_cast<uintptr_t>(info.itemsize) == 0, op, name,
          " must be aligned to its elements");
  return py::buffer_info(info.ptr, info.itemsize, format, info.ndim, info.shape, info.strides, info.readonly);
}

Elements elements_of(const char* op, const char* name, const py::buffer& array, bool written) {
  const py::buffer_info info =
      request(op, name, array, written, "feH", "float32, float16 or uint16 (the bits of bfloat16)");
  const Real type = info.format == "f" ? Real::fp32 : info.format == "e" ? Real::fp16 : Real::bf16;
  return {name, info.ptr, type, info.size};
}

Residual residual_of(const char* op, const Optional& array) {
  if (!array) return {nullptr, 0};
  const py::buffer_info info = request(op, "residual", *array, true, "f", "float32");
  return {static_cast<float*>(info.ptr), info.size};
}

std::optional<Weights> weights_of(const char* op, const Optional& array) {
  if (!array) return {};
  const py::buffer_info info = request(op, "weights", *array, false, "f", "float32");
  require(info.ndim == 1, op, "weights must be flat, not of ", info.ndim, " dimensions");
  return Weights{static_cast<const float*>(info.ptr), info.size};
}

Bytes bytes_of(const char* op, const char* name, const py::buffer& array, bool written, py::ssize_t dim) {
  const py::buffer_info info = request(op, name, array, written, "B", "uint8");
  require(info.ndim == dim, op, name, " must have ", dim, " dimensions, not ", info.ndim);
  Bytes bytes{name, static_cast<uint8_t*>(info.ptr), info.shape[dim - 1]};
  if (dim == 2) bytes.rows = info.shape[0], bytes.stride = info.shape[1];
  return bytes;
}

Segments segments_of(const char* op, const py::buffer& array) {
  const py::buffer_info info = request(op, "segments", array, false, "lq", "int64");
  require(info.itemsize == 8, op, "segments must be of dtype int64");
  require(info.ndim == 2 && info.shape[1] == 3, op, "segments must have shape [segments, 3]");
  return {static_cast<const int64_t*>(info.ptr), info.shape[0]};
}

constexpr auto here = [](int64_t n, int64_t, const auto& body) {
  const py::gil_scoped_release others_run;
  body(0, n);
};

void compress_encode(const py::buffer& x, const Optional& residual, const py::buffer& payload,
                     const py::buffer& segments, const std::string& codec, int64_t block, bool stochastic,
                     int64_t seed) {
  const char* op = "compress_encode";
  encode(coding_of(op, codec, block, stochastic, seed), elements_of(op, "x", x, false), residual_of(op, residual),
         bytes_of(op, "payload", payload, true, 1), segments_of(op, segments), here);
}

void compress_decode(const py::buffer& payloads, const py::buffer& out, const py::buffer& segments,
                     const std::string& codec, int64_t block, double factor, const Optional& weights) {
  const char* op = "compress_decode";
  decode(coding_of(op, codec, block), bytes_of(op, "payloads", payloads, false, 2), elements_of(op, "out", out, true),
         segments_of(op, segments), factor, weights_of(op, weights), here);
}

void compress_reduce(const py::buffer& payloads, const Optional& residual, const py::buffer& payload,
                     const py::buffer& segments, const std::string& codec, int64_t block, double factor,
                     bool stochastic, int64_t seed) {
  const char* op = "compress_reduce";
  reduce(coding_of(op, codec, block, stochastic, seed), bytes_of(op, "payloads", payloads, false, 2),
         residual_of(op, residual), bytes_of(op, "payload", payload, true, 1), segments_of(op, segments), factor, here);
}

}  // namespace

void define_compress(py::module_& m) {
  m.def("compress_encode", &compress_encode, py::arg("x"), py::arg("residual"), py::arg("payload"), py::arg("segments"),
        py::arg("codec"), py::arg("block"), py::arg("stochastic") = false, py::arg("seed") = 0,
        "pykernels.ops.compress.compress_encode on arrays.");
  m.def("compress_decode", &compress_decode, py::arg("payloads"), py::arg("out"), py::arg("segments"), py::arg("codec"),
        py::arg("block"), py::arg("factor") = 1.0, py::arg("weights") = py::none(),
        "pykernels.ops.compress.compress_decode on arrays.");
  m.def("compress_reduce", &compress_reduce, py::arg("payloads"), py::arg("residual"), py::arg("payload"),
        py::arg("segments"), py::arg("codec"), py::arg("block"), py::arg("factor"), py::arg("stochastic") = false,
        py::arg("seed") = 0, "pykernels.ops.compress.compress_reduce on arrays.");
}

}  // namespace pykernels
