// The gradient codecs on NumPy arrays, as functions of the module.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace pykernels {

void define_compress(pybind11::module_& m);

}  // namespace pykernels
