#include "cpu/plan/cache.h"

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <iterator>
#include <mutex>
#include <new>

#include "cpu/plan/memory.h"

namespace pykernels {
namespace {

struct Kind {
  PlanKey key;
  std::vector<std::unique_ptr<Prepared>> ready;
};

struct Kinds {
  std::mutex mutex;
  std::deque<Kind> kinds;     // the ones used last stand in front
  std::vector<Block> blocks;  // that no call has

  Kinds() {  // so that a fork in the middle of a look-up leaves the child a mutex that it can lock
    pthread_atfork([] { all().mutex.lock(); }, [] { all().mutex.unlock(); }, [] { all().mutex.unlock(); });
  }
  static Kinds& all() {
    static Kinds* kinds = new Kinds;  // never destroyed: threads may end after main
    return *kinds;
  }
};

std::vector<const Driver*> all(const PlanLayout& layout) {
  std::vector<const Driver*> drivers;
  for (const auto& driver : layout.drivers) drivers.push_back(driver.get());
  return drivers;
}

// The smallest block that is large enough; where there is none, a new one takes the place of the largest.
Block take_block(int64_t bytes) {
  Block found, small;  // small: freed outside of the lock
  {
    Kinds& all = Kinds::all();
    const std::lock_guard lock(all.mutex);
    auto best = all.blocks.end(), largest = all.blocks.end();
    for (auto block = all.blocks.begin(); block != all.blocks.end(); ++block) {
      if (block->bytes >= bytes && (best == all.blocks.end() || block->bytes < best->bytes)) best = block;
      if (largest == all.blocks.end() || block->bytes > largest->bytes) largest = block;
    }
    const auto chosen = best != all.blocks.end() ? best : largest;
    if (chosen != all.blocks.end()) {
      (best != all.blocks.end() ? found : small) = std::move(*chosen);
      all.blocks.erase(chosen);
    }
  }
  if (found.memory) return found;
  small = Block{};
  found.bytes = bytes;
  found.memory.reset(static_cast<uint8_t*>(std::aligned_alloc(kArenaAlignment, bytes)));
  if (!found.memory) throw std::bad_alloc();
  std::memset(found.memory.get(), 0, bytes);
  return found;
}

}  // namespace

void Block::Free::operator()(uint8_t* memory) const { std::free(memory); }

Prepared::Prepared(PlanKey made_for, PlanLayout layout, const uint8_t* weights)
    : key(std::move(made_for)), layout_(std::move(layout)), weights_(weights), runner_(all(layout_), key.threads) {
  const auto outside = [&](const PlanLayout::Place& p) {
    if (p.buffer < 0) return false;
    const Buffer::Kind kind = layout_.buffers[p.buffer].kind;
    return kind == Buffer::Kind::input || kind == Buffer::Kind::output;
  };
  for (size_t d = 0; d < layout_.bindings.size(); ++d) {
    const PlanLayout::Binding& b = layout_.bindings[d];
    if (outside(b.out) || std::any_of(b.in.begin(), b.in.end(), outside)) outer_.push_back(d);
  }
}

// Behind the arena is room that kernels may read over the end of the last value.
int64_t Prepared::arena_bytes() const { return layout_.arena_bytes + kArenaAlignment; }
int64_t Prepared::memory_bytes() const { return arena_bytes() + key.threads * runner_.scratch_bytes(); }

uint8_t* Prepared::at(const PlanLayout::Place& place, const uint8_t* const* inputs, uint8_t* const* outputs) const {
  if (place.buffer < 0) return nullptr;
  const Buffer& buffer = layout_.buffers[place.buffer];
  switch (buffer.kind) {
    case Buffer::Kind::arena: return block_.memory.get() + buffer.place + place.offset;
    case Buffer::Kind::input: return const_cast<uint8_t*>(inputs[buffer.place]) + place.offset;
    case Buffer::Kind::output: return outputs[buffer.place] + place.offset;
    default: return const_cast<uint8_t*>(weights_) + place.offset;
  }
}

void Prepared::bind(size_t driver, const uint8_t* const* inputs, uint8_t* const* outputs) {
  const PlanLayout::Binding& b = layout_.bindings[driver];
  operands_.assign(std::max<size_t>(b.in.size(), 2), nullptr);
  for (size_t i = 0; i < b.in.size(); ++i) operands_[i] = at(b.in[i], inputs, outputs);
  layout_.drivers[driver]->bind(operands_.data(), at(b.out, inputs, outputs));
}

void Prepared::bind(const uint8_t* const* inputs, uint8_t* const* outputs) {
  if (!block_.memory) block_ = take_block(memory_bytes());  // a profile's later calls have it still
  if (bound_to_ == block_.memory.get()) {
    for (const size_t driver : outer_) bind(driver, inputs, outputs);
    return;
  }
  for (size_t driver = 0; driver < layout_.drivers.size(); ++driver) bind(driver, inputs, outputs);
  bound_to_ = block_.memory.get();
}

std::unique_ptr<Prepared> take(const PlanKey& key) {
  Kinds& all = Kinds::all();
  const std::lock_guard lock(all.mutex);
  const auto found =
      std::find_if(all.kinds.begin(), all.kinds.end(), [&](const Kind& kind) { return kind.key == key; });
  if (found == all.kinds.end() || found->ready.empty()) return nullptr;
  std::unique_ptr<Prepared> prepared = std::move(found->ready.back());
  found->ready.pop_back();
  return prepared;
}

void give(std::unique_ptr<Prepared> prepared) {
  Kinds& all = Kinds::all();
  std::vector<std::unique_ptr<Prepared>> dropped;  // freed outside of the lock
  const std::lock_guard lock(all.mutex);
  if (prepared->block_.memory) all.blocks.push_back(std::move(prepared->block_));
  auto found =
      std::find_if(all.kinds.begin(), all.kinds.end(), [&](const Kind& kind) { return kind.key == prepared->key; });
  if (found == all.kinds.end()) {
    all.kinds.push_front({prepared->key, {}});
    found = all.kinds.begin();
  } else if (found != all.kinds.begin()) {
    std::rotate(all.kinds.begin(), found, found + 1);
    found = all.kinds.begin();
  }
  found->ready.push_back(std::move(prepared));
  // Of this plan, and of all, those used last.
  size_t same = 0, count = 0;
  for (auto kind = all.kinds.begin(); kind != all.kinds.end();) {
    const bool of_this =
        kind->key.hash == all.kinds.front().key.hash && kind->key.weights == all.kinds.front().key.weights;
    if ((of_this && ++same > kKept) || ++count > kKeptOfAll) {
      std::move(kind->ready.begin(), kind->ready.end(), std::back_inserter(dropped));
      kind = all.kinds.erase(kind);
    } else {
      ++kind;
    }
  }
}

void forget(const void* weights) {
  Kinds& all = Kinds::all();
  std::vector<std::unique_ptr<Prepared>> dropped;
  std::vector<Block> blocks;
  const std::lock_guard lock(all.mutex);
  blocks.swap(all.blocks);
  for (auto kind = all.kinds.begin(); kind != all.kinds.end();) {
    if (kind->key.weights != weights) {
      ++kind;
      continue;
    }
    std::move(kind->ready.begin(), kind->ready.end(), std::back_inserter(dropped));
    kind = all.kinds.erase(kind);
  }
}

}  // namespace pykernels
