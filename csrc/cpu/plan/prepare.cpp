#include "cpu/plan/prepare.h"

#include <algorithm>

#include "cpu/plan/builder.h"
#include "cpu/plan/memory.h"

namespace pykernels {

namespace {

PlanLayout build(Builder b, const Program& program, const Head& head, const PlanLayout& whole) {
  if (head.steps > 0) b.by_image(head, whole);
  for (size_t s = head.steps; s < program.steps.size(); ++s) b.build(program.steps[s]);
  b.finish();
  return std::move(b.layout);
}

}  // namespace

std::vector<const Driver*> drivers_of(const PlanLayout& layout) {
  std::vector<const Driver*> drivers;
  for (const auto& driver : layout.drivers) drivers.push_back(driver.get());
  return drivers;
}

PlanLayout prepare(const Program& program, const uint8_t* weights, const std::vector<View>& inputs, int64_t threads,
                   int64_t by_image) {
  PlanLayout layout = build({program, weights, inputs, threads}, program, {}, {});
  const Head head = choose_head(program, weights, inputs, threads, by_image, layout);
  const Joined joined(program, layout, head.steps);
  if (head.steps > 0 || joined.any)
    layout = build({program, weights, inputs, threads, joined.any ? &joined : nullptr}, program, head, layout);
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
