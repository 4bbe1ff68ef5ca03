// A plan as bytes: little-endian 64-bit words, written by pykernels/network/plan/format.py. Torch-free.
//
//   magic "PKPLAN01", version, words of the whole, hash of all that follows
//   bytes of the weights; the isa (its number plus one) and the threads that layers were tuned for, or zeros
//   inputs    count, then (dtype, dimensions) of each
//   steps     count, then (kind, operands, numbers, reals) of each; the lists begin with their length
//   outputs   count, then (value, channels_last) of each
//
// Values are numbered: first the inputs, then each step's one result. A step reads values of smaller numbers. Constants
// stand in the weights, a tensor of their own, which several plans and a graph of ops may share. There are no sizes:
// they follow from the inputs', each time that a plan is made ready for others. What the numbers of a kind mean stands
// where they are read: prepare.cpp.
#pragma once

#include <cstdint>
#include <vector>

#include "common/check.h"
#include "common/lists.h"
#include "cpu/tile/kernels.h"

namespace pykernels {

enum class StepKind : int64_t { PK_PLAN_STEPS(PK_NAME) };
inline constexpr const char* kStepNames[] = {PK_PLAN_STEPS(PK_QUOTED)};

struct PlanStep {
  StepKind kind;
  std::vector<int> in;
  Ints numbers;
  std::vector<double> reals;
};

struct PlanInput {
  Dtype dtype;
  int64_t dims;
};

struct PlanOutput {
  int value;
  bool channels_last;
};

struct Program {
  uint64_t hash;
  int64_t weight_bytes;
  int64_t tuned_isa, tuned_threads;  // -1: for none
  std::vector<PlanInput> inputs;
  std::vector<PlanStep> steps;
  std::vector<PlanOutput> outputs;
};

inline constexpr int64_t kMaxDims = 6;

// The hash that a plan's words say they have; 0 for bytes that begin like no plan. Nothing is checked.
uint64_t plan_hash(const void* data, int64_t bytes);

// Throws where the bytes are no plan, a damaged one or another version's: counts, numbers of values, kinds and dtypes
// are then known to be good, the numbers and reals of the steps are not.
Program read_program(const void* data, int64_t bytes);

}  // namespace pykernels
