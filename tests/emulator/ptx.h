// PTX text, split into kernels, instructions and operands: its grammar, and nothing of what instructions do.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace emulator {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Operand {
  enum Kind { reg, special, number, symbol, label, address, list, pair, sink };
  Kind kind = sink;
  int index = -1;        // of a register
  bool negated = false;  // of a predicate: !%p
  std::string name;      // of a special register or a symbol
  uint64_t bits = 0;     // a number; what a register or a symbol is offset by; the statement a label stands before
  std::vector<Operand> parts;  // in brackets, in braces, or at both sides of a bar
};

struct Statement {
  int line = 0;
  std::string name;                    // before the first dot
  std::vector<std::string> modifiers;  // after it
  std::vector<Operand> operands;
  int guard = -1;  // a predicate register
  bool guard_negated = false;

  bool has(std::string_view modifier) const;
  std::string text() const;  // the instruction's whole name
};

struct Parameter {
  int offset, size;
};

struct Kernel {
  std::string name;
  int line = 0;  // where its text begins
  std::string_view body;
  std::string_view signature;
  bool parsed = false;
  std::map<std::string, Parameter> parameters;
  int parameter_bytes = 0;
  std::vector<int> registers;              // bits of each; 1 of a predicate
  std::map<std::string, uint32_t> shared;  // static shared variables, from 0
  uint32_t shared_bytes = 0;
  std::vector<Statement> statements;
};

struct Module {
  explicit Module(std::string text);
  Module(const Module&) = delete;
  std::string text;
  std::string target;                                     // sm_90a
  std::map<std::string, std::vector<uint8_t>> variables;  // .global and .const
  std::map<std::string, bool> dynamic_shared;             // .extern .shared
  std::map<std::string, Kernel> kernels;

  // The kernel with its statements: parsed at its first use.
  Kernel& kernel(const std::string& name);
};

}  // namespace emulator
