// What is not a tensor op: CPU features and the isa choice, build facts, the gradient codecs on NumPy arrays.
// Torch-free.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/features.h"
#include "host/compress.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.doc() = "CPU features, build facts and gradient codecs of pykernels; needs no torch.";
  m.def(
      "isas",
      [] {
        std::map<std::string, bool> found;
        for (int i = 0; i < pykernels::kIsaCount; ++i)
          found[pykernels::kIsaNames[i]] = pykernels::isa_available(static_cast<pykernels::Isa>(i));
        return found;
      },
      "Each isa the kernels are built for, and whether this CPU (and system) can run it.");
  m.def(
      "choose_isa",
      [] {
        const char* error = nullptr;
        const int isa = static_cast<int>(pykernels::choose_isa(&error));
        return std::pair<std::string, std::optional<std::string>>(
            pykernels::kIsaNames[isa], error ? std::optional<std::string>(error) : std::nullopt);
      },
      "The isa chosen now (PYKERNELS_ISA or the best), and what was wrong with PYKERNELS_ISA, if anything.");
  m.def(
      "build",
      [] {
        std::map<std::string, std::string> facts;
        facts["compiler"] = PYKERNELS_COMPILER;
        facts["sanitizers"] = PYKERNELS_SANITIZED;
#ifdef PYKERNELS_EMULATE
        facts["emulated"] = PYKERNELS_EMULATE;
#else
        facts["emulated"] = "";
#endif
        return facts;
      },
      "How this library was built.");
  pykernels::define_compress(m);
}
