// Copies that go on by themselves: cp.async of a thread, cp.async.bulk of many bytes; and the groups they are waited
// for in.
#include "emulator/copy.h"

#include <algorithm>

namespace emulator {

namespace {

void perform(const Copy& c) {
  std::memcpy(c.to, c.from, c.bytes);
  std::memset(c.to + c.bytes, 0, c.size - c.bytes);
}

// addresses: shared, global. kind[0]: bytes of a copy. r[0]: how many of them are read, the rest is zero.
Flow copy(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) {
    const int size = i.kind[0];
    const int bytes = i.r[0].at < 0 ? size : static_cast<int>(get<uint32_t>(w, i.r[0], l));
    if (bytes > size) fail(w, i, 1u << l, "reads " + std::to_string(bytes) + " bytes for " + std::to_string(size));
    Copy c{};
    c.to = memory(w, i, l, Space::shared, address_of(w, i.addresses[0], l), size, true);
    const uint64_t from = address_of(w, i.addresses[1], l);
    if (bytes) {
      memory(w, i, l, Space::global, from / size * size, 1, false);
      if (from % size) fail(w, i, 1u << l, "misaligned source");
      c.from = memory(w, i, l, Space::global, from + bytes - 1, 1, false) - (bytes - 1);
    }
    c.size = size, c.bytes = bytes;
    if (kind_to_mistakes)
      perform(c);
    else
      w.lane[l].open.push_back(c);
  });
  return Flow::next;
}

void finish(Lane& lane, size_t left) {
  for (; lane.committed.size() > left; lane.committed.pop_front())
    for (const Copy& c : lane.committed.front()) perform(c);
}
void finish_all(Lane& lane) {
  finish(lane, 0);
  for (const Copy& c : lane.open) perform(c);
  lane.open.clear();
}

Flow commit(Warp& w, const Instruction&, Lanes lanes) {
  each(lanes, [&](int l) {
    Lane& lane = w.lane[l];
    lane.committed.push_back(std::move(lane.open));
    lane.open.clear();
  });
  return Flow::next;
}
Flow wait(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) { finish(w.lane[l], i.offset); });
  return Flow::next;
}
Flow wait_all(Warp& w, const Instruction&, Lanes lanes) {
  each(lanes, [&](int l) { finish_all(w.lane[l]); });
  return Flow::next;
}
// An arrival at an mbarrier once all copies of the thread are done. kind[0]: the mbarrier counts it already.
Flow arrive(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) {
    uint32_t at = static_cast<uint32_t>(address_of(w, i.addresses[0], l));
    Block& block = shared_block(w, i, l, at);
    Mbarrier& m = mbarrier(w, i, l, block, at);
    if (!i.kind[0]) ++m.pending;
    std::vector<Copy> copies;
    for (const auto& group : w.lane[l].committed) copies.insert(copies.end(), group.begin(), group.end());
    copies.insert(copies.end(), w.lane[l].open.begin(), w.lane[l].open.end());
    later({&block, at, [copies, &block, at] {
             for (const Copy& c : copies) perform(c);
             Mbarrier& m = block.mbarriers.at(at);
             --m.pending;
             settle(block, m);
           }});
  });
  return Flow::next;
}

// ---- bulk -----------------------------------------------------------------------------------------------------------
Flow bulk_commit(Warp& w, const Instruction&, Lanes lanes) {
  each(lanes, [&](int l) {
    Lane& lane = w.lane[l];
    lane.bulk_committed.push_back(std::move(lane.bulk_open));
    lane.bulk_open.clear();
  });
  return Flow::next;
}
Flow bulk_wait(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) {
    auto& groups = w.lane[l].bulk_committed;
    for (; groups.size() > static_cast<size_t>(i.offset); groups.pop_front())
      for (const auto& store : groups.front()) store();
  });
  return Flow::next;
}

// addresses: to, from, the mbarrier. r[0]: bytes.
Flow bulk_load(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) {
    const uint32_t bytes = get<uint32_t>(w, i.r[0], l);
    if (bytes % 16) fail(w, i, 1u << l, "bytes are no multiple of 16");
    const uint64_t to = address_of(w, i.addresses[0], l), from = address_of(w, i.addresses[1], l);
    if (to % 16 || from % 16) fail(w, i, 1u << l, "misaligned");
    if (!bytes) return;
    uint8_t* d = memory(w, i, l, Space::shared, to, 1, false);
    memory(w, i, l, Space::shared, to + bytes - 1, 1, false);
    const uint8_t* s = memory(w, i, l, Space::global, from, 1, false);
    memory(w, i, l, Space::global, from + bytes - 1, 1, false);
    uint32_t at = static_cast<uint32_t>(address_of(w, i.addresses[2], l));
    Block& block = shared_block(w, i, l, at);
    mbarrier(w, i, l, block, at);
    later({&block, at, [=, &block] {
             std::memcpy(d, s, bytes);
             complete(block, at, bytes);
           }});
  });
  return Flow::next;
}
Flow bulk_store(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) {
    const uint32_t bytes = get<uint32_t>(w, i.r[0], l);
    const uint64_t to = address_of(w, i.addresses[0], l), from = address_of(w, i.addresses[1], l);
    if (to % 16 || from % 16 || bytes % 16) fail(w, i, 1u << l, "misaligned");
    if (!bytes) return;
    uint8_t* d = memory(w, i, l, Space::global, to, 1, true);
    memory(w, i, l, Space::global, to + bytes - 1, 1, true);
    const uint8_t* s = memory(w, i, l, Space::shared, from, 1, false);
    memory(w, i, l, Space::shared, from + bytes - 1, 1, false);
    uint32_t at = static_cast<uint32_t>(from);
    const Block& block = shared_block(w, i, l, at);
    need_fence(w, i, l, block, at, bytes);
    store_later(w, l, [=] { std::memcpy(d, s, bytes); });
  });
  return Flow::next;
}

}  // namespace

void later(Pending p) {
  if (kind_to_mistakes)
    p.run();
  else
    p.block->cluster->pending.push_back(std::move(p));
}

void store_later(Warp& w, int lane, std::function<void()> store) {
  if (kind_to_mistakes)
    store();
  else
    w.lane[lane].bulk_open.push_back(std::move(store));
}

void complete(Block& block, uint32_t at, int64_t bytes) {
  Mbarrier& m = block.mbarriers.at(at);
  m.bytes -= bytes;
  ++block.cluster->progress;
  settle(block, m);
}

bool assemble_copy(Assembler& a, const Statement& s, Instruction& i) {
  if (s.name != "cp" || s.has("tensor")) return false;
  const std::string name = s.text();
  const auto groups = [&] { return static_cast<int64_t>(s.operands.at(0).bits); };
  if (name == "cp.async.commit_group") {
    i.run = commit;
  } else if (name == "cp.async.wait_group") {
    i.run = wait, i.offset = groups();
  } else if (name == "cp.async.wait_all") {
    i.run = wait_all;
  } else if (name == "cp.async.bulk.commit_group") {
    i.run = bulk_commit;
  } else if (name == "cp.async.bulk.wait_group" || name == "cp.async.bulk.wait_group.read") {
    i.run = bulk_wait, i.offset = groups();
  } else if (name.starts_with("cp.async.mbarrier.arrive")) {
    i.kind[0] = s.has("noinc");
    i.addresses = {a.address(s.operands.at(0))};
    i.run = arrive;
  } else if (name.starts_with("cp.async.ca.shared") || name.starts_with("cp.async.cg.shared")) {
    i.addresses = {a.address(s.operands.at(0)), a.address(s.operands.at(1))};
    i.kind[0] = static_cast<uint8_t>(s.operands.at(2).bits);
    if (s.operands.size() > 3) i.r[0] = a.source(s.operands[3]);
    i.run = copy;
  } else if (name == "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes" ||
             name == "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes") {
    i.addresses = {a.address(s.operands.at(0)), a.address(s.operands.at(1)), a.address(s.operands.at(3))};
    i.r[0] = a.source(s.operands.at(2));
    i.run = bulk_load;
  } else if (name == "cp.async.bulk.global.shared::cta.bulk_group") {
    i.addresses = {a.address(s.operands.at(0)), a.address(s.operands.at(1))};
    i.r[0] = a.source(s.operands.at(2));
    i.run = bulk_store;
  } else {
    return false;
  }
  return true;
}

}  // namespace emulator
