#include "common/stable.h"
#include "cpu/isa/isa.h"

namespace pykernels {
namespace {

std::string isa() { return kIsaNames[static_cast<int>(current_isa())]; }

std::string set_isa_op(std::string name) {
  const std::string before = isa();
  const int found = isa_by_name(name.c_str());
  PK_CHECK(found >= 0, "_set_isa: isa must be one of " PK_ISA_WORDS ", not '", name, "'");
  PK_CHECK(isa_available(static_cast<Isa>(found)), "_set_isa: this CPU does not have the isa '", name, "'");
  set_isa(static_cast<Isa>(found));
  return before;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pykernels, CompositeExplicitAutograd, m) {
  m.impl("_isa", TORCH_BOX(&isa));
  m.impl("_set_isa", TORCH_BOX(&set_isa_op));
}

}  // namespace pykernels
