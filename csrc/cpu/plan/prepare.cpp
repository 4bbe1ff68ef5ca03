#include "cpu/plan/prepare.h"

#include <algorithm>

#include "cpu/plan/builder.h"
#include "cpu/plan/memory.h"

namespace pykernels {

namespace {

PlanLayout build(Builder b, const Program& program) {
  for (const PlanStep& step : program.steps) {
    b.begin(step);
    switch (step.kind) {
      case StepKind::constant: b.constant(); break;
      case StepKind::conv2d: b.conv2d(); break;
      case StepKind::linear: b.linear(); break;
      case StepKind::max_pool2d:
      case StepKind::avg_pool2d:
      case StepKind::adaptive_avg_pool2d: b.pool(); break;
      case StepKind::quantize: b.quantize(); break;
      case StepKind::dequantize: b.dequantize(); break;
      case StepKind::cast: b.cast(); break;
      case StepKind::qadd:
      case StepKind::qmul: b.quantized_binary(); break;
      case StepKind::qcat: b.quantized_cat(); break;
      case StepKind::qlookup: b.lookup(); break;
      case StepKind::add:
      case StepKind::mul: b.binary(); break;
      case StepKind::cat: b.cat(); break;
      case StepKind::reshape: b.reshape(); break;
      case StepKind::permute: b.permute(); break;
      case StepKind::slice: b.slice(); break;
      case StepKind::expand: b.expand(); break;
      case StepKind::pad: b.pad(); break;
      case StepKind::contiguous: b.contiguous(); break;
      case StepKind::activation: b.activated(); break;
      case StepKind::leaky_relu: b.leaky_relu(); break;
      case StepKind::upsample_nearest2d:
      case StepKind::upsample_bilinear2d: b.upsample(); break;
      case StepKind::interleave: b.interleave(); break;
      case StepKind::softmax: b.softmax(); break;
      case StepKind::layer_norm: b.layer_norm(); break;
    }
    b.end();
  }
  b.finish();
  return std::move(b.layout);
}

}  // namespace

PlanLayout prepare(const Program& program, const uint8_t* weights, const std::vector<View>& inputs, int64_t threads) {
  PlanLayout layout = build({program, weights, inputs, threads}, program);
  if (const Joined joined(program, layout); joined.any)
    layout = build({program, weights, inputs, threads, &joined}, program);
  std::vector<Lifetime> pieces;
  std::vector<Buffer*> placed;
  for (Buffer& buffer : layout.buffers)
    if (buffer.kind == Buffer::Kind::arena && buffer.last >= 0) {
      pieces.push_back({buffer.bytes, buffer.first, buffer.last});
      placed.push_back(&buffer);
    }
  const std::vector<int64_t> places = place(pieces, &layout.arena_bytes);
  for (size_t i = 0; i < placed.size(); ++i) placed[i]->place = places[i];
  layout.least_arena_bytes = least_bytes(pieces);
  int64_t scratch = 0;
  for (const auto& driver : layout.drivers) scratch = std::max(scratch, driver->scratch);
  const int64_t memory = memory_of_machine();
  PK_CHECK(scratch < memory / threads && layout.arena_bytes < memory - scratch * threads,
           "run_plan: ", layout.arena_bytes, " bytes are needed for what lies between the steps and ", scratch,
           " by each of ", threads, " threads, more than this machine has");
  return layout;
}

}  // namespace pykernels
