#include "cpu/plan/bind.h"

#include <algorithm>
#include <utility>

namespace pykernels {

Binder::Binder(PlanLayout& layout, const uint8_t* weights) : layout_(layout), weights_(weights) {
  const auto outside = [&](const PlanLayout::Place& p) {
    if (p.buffer < 0) return false;
    const Buffer::Kind kind = layout_.buffers[p.buffer].kind;
    return kind == Buffer::Kind::input || kind == Buffer::Kind::output;
  };
  size_t most = 2;
  for (size_t d = 0; d < layout_.bindings.size(); ++d) {
    const PlanLayout::Binding& b = layout_.bindings[d];
    if (outside(b.out) || std::any_of(b.in.begin(), b.in.end(), outside)) outer_.push_back(d);
    most = std::max(most, b.in.size());
  }
  operands_.resize(most);  // here, since a task binds, too, where nothing may throw
}

uint8_t* Binder::at(const PlanLayout::Place& place, const uint8_t* const* inputs, uint8_t* const* outputs) const {
  if (place.buffer < 0) return nullptr;
  const Buffer& buffer = layout_.buffers[place.buffer];
  switch (buffer.kind) {
    case Buffer::Kind::arena: return arena_ + buffer.place + place.offset;
    case Buffer::Kind::input: return const_cast<uint8_t*>(inputs[buffer.place]) + place.offset;
    case Buffer::Kind::output: return outputs[buffer.place] + place.offset;
    default: return const_cast<uint8_t*>(weights_) + place.offset;
  }
}

void Binder::bind(size_t driver, const uint8_t* const* inputs, uint8_t* const* outputs) {
  const PlanLayout::Binding& b = layout_.bindings[driver];
  std::fill(operands_.begin(), operands_.end(), nullptr);
  for (size_t i = 0; i < b.in.size(); ++i) operands_[i] = at(b.in[i], inputs, outputs);
  layout_.drivers[driver]->bind(operands_.data(), at(b.out, inputs, outputs));
}

void Binder::bind(uint8_t* arena, const uint8_t* const* inputs, uint8_t* const* outputs) {
  if (std::exchange(arena_, arena) == arena)
    for (const size_t driver : outer_) bind(driver, inputs, outputs);
  else
    for (size_t driver = 0; driver < layout_.drivers.size(); ++driver) bind(driver, inputs, outputs);
}

}  // namespace pykernels
