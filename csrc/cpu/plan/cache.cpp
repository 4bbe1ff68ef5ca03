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
    : key(std::move(made_for)),
      layout_(std::move(layout)),
      binder_(layout_, weights),
      runner_(drivers_of(layout_), key.threads) {}

int64_t Prepared::memory_bytes() const { return binder_.bytes() + key.threads * runner_.scratch_bytes(); }

void Prepared::bind(const uint8_t* const* inputs, uint8_t* const* outputs) {
  if (!block_.memory) block_ = take_block(memory_bytes());  // a profile's later calls have it still
  binder_.bind(block_.memory.get(), inputs, outputs);
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
