// From statements to instructions: registers, numbers and special registers get their places in a warp's file.
#include "emulator/machine.h"

namespace emulator {

namespace {
constexpr uint8_t kPoison = 0xA5;
}

Assembler::Assembler(const Module& module, const Kernel& kernel) : module(module), kernel(kernel) {
  program_.kernel = &kernel;
  int32_t at = 0;
  for (const int bits : kernel.registers) {
    const int stride = bits == 64 ? 8 : 4;
    registers_.push_back({at, stride});
    at += bits == 1 ? 4 : 32 * stride;
  }
  program_.image.assign(at, kPoison);
}

int Assembler::bits(const Operand& o) const { return o.kind == Operand::reg ? kernel.registers[o.index] : 0; }

void Assembler::unknown(const Statement& s) const {
  throw Error("PTX line " + std::to_string(s.line) + ": unknown instruction " + s.text());
}

Ref Assembler::number(uint64_t bits, int width) {
  const auto [it, fresh] = numbers_.try_emplace({bits, width});
  if (fresh) {
    std::vector<uint8_t>& image = program_.image;
    it->second = {static_cast<int32_t>(image.size()), width == 64 ? 8 : 4};
    for (int lane = 0; lane < 32; ++lane)
      for (int byte = 0; byte < it->second.stride; ++byte) image.push_back(static_cast<uint8_t>(bits >> (8 * byte)));
  }
  return it->second;
}

Ref Assembler::special(const std::string& name) {
  const auto [it, fresh] = specials_.try_emplace(name);
  if (fresh) {
    it->second = number(0x5EC1A15EC1A1 + specials_.size(), name == "%parameters" || name == "%clock64" ? 64 : 32);
    program_.specials.emplace_back(name, it->second);
  }
  return it->second;
}

Ref Assembler::source(const Operand& o, int bits) {
  switch (o.kind) {
    case Operand::reg: return registers_[o.index];
    case Operand::special: return special(o.name);
    case Operand::number: return number(bits == 64 ? o.bits : o.bits & 0xffffffff, bits);
    case Operand::symbol:
      if (const auto it = kernel.shared.find(o.name); it != kernel.shared.end())
        return number(kSharedBegin + it->second + o.bits, bits);
      if (module.dynamic_shared.contains(o.name))
        return number(kSharedBegin + (kernel.shared_bytes + 15) / 16 * 16 + o.bits, bits);
      if (const auto it = module.variables.find(o.name); it != module.variables.end())
        return number(reinterpret_cast<uint64_t>(it->second.data()) + o.bits, 64);
      throw Error("unknown name " + o.name);
    default: return {};
  }
}

Ref Assembler::target(const Operand& o) const {
  if (o.kind == Operand::sink) return {};
  if (o.kind != Operand::reg) throw Error("a register expected as the target");
  return registers_[o.index];
}

Address Assembler::address(const Operand& o) {
  const Operand& base = o.kind == Operand::address ? o.parts.at(0) : o;
  if (const auto it = kernel.parameters.find(base.name); base.kind == Operand::symbol && it != kernel.parameters.end())
    return {special("%parameters"), it->second.offset + static_cast<int64_t>(base.bits)};
  if (base.kind == Operand::reg) return {registers_[base.index], static_cast<int64_t>(base.bits)};
  return {source(base, 64), 0};
}

void Assembler::address(Instruction& i, int slot, const Operand& o) {
  const Address a = address(o);
  i.r[slot] = a.base, i.offset = a.offset;
}

Program Assembler::assemble() {
  for (const Statement& s : kernel.statements) {
    Instruction i;
    i.line = s.line;
    i.statement = &s;
    if (s.guard >= 0) i.guard = registers_[s.guard].at, i.guard_negated = s.guard_negated;
    const auto parameter = s.name == "mov" && s.operands.size() == 2 && s.operands[1].kind == Operand::symbol
                               ? kernel.parameters.find(s.operands[1].name)
                               : kernel.parameters.end();
    Statement sum;  // the address of a parameter is a sum
    if (parameter != kernel.parameters.end()) {
      sum.name = "add", sum.modifiers = {"s64"}, sum.operands = {s.operands[0], {}, {}};
      sum.operands[1].kind = Operand::special, sum.operands[1].name = "%parameters";
      sum.operands[2].kind = Operand::number, sum.operands[2].bits = parameter->second.offset + s.operands[1].bits;
    }
    const Statement& meant = sum.name.empty() ? s : sum;
    if (!assemble_scalar(*this, meant, i) && !assemble_convert(*this, meant, i) && !assemble_copy(*this, meant, i) &&
        !assemble_memory(*this, meant, i) && !assemble_synchronize(*this, meant, i) &&
        !assemble_tensor_core(*this, meant, i) && !assemble_tensor_map(*this, meant, i))
      unknown(s);
    program_.code.push_back(std::move(i));
  }
  return std::move(program_);
}

}  // namespace emulator
