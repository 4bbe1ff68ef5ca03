// What threads do together: barriers, mbarriers, shuffles, votes; and their end.
#include <algorithm>
#include <utility>

#include "emulator/machine.h"

namespace emulator {

namespace {

// Whether the lanes of a member mask are all here; those that ended are not waited for.
bool converged(const Warp& w, Lanes lanes, Lanes members) { return !(members & w.alive & ~lanes); }

Flow wait_for_lanes(Warp& w) { return w.block_on({Wait::converge}, false); }

Flow exit(Warp& w, const Instruction&, Lanes lanes) {
  Block& block = *w.block;
  w.alive &= ~lanes;
  block.threads -= std::popcount(lanes);
  each(lanes, [&](int l) {
    Lane& lane = w.lane[l];
    if (!lane.bulk_open.empty() || !lane.bulk_committed.empty())
      throw Error("a thread ends before its bulk stores have read shared memory");
  });
  if (!w.wgmma_open.empty() || !w.wgmma_committed.empty()) throw Error("a warp ends before its wgmma");
  Group& g = w.group();
  g.lanes &= ~lanes;
  ++g.pc;
  if (!g.lanes) w.groups.erase(w.groups.begin() + w.current);
  for (Group& other : w.groups)
    if (other.wait.kind == Wait::converge) other.wait = {};
  for (NamedBarrier& b : block.barriers)
    if (b.all && b.arrived && b.arrived == block.threads) b.arrived = 0, ++b.generation;
  Cluster& cluster = *block.cluster;
  ++cluster.progress;
  if (cluster.arrived && cluster.arrived == cluster.threads()) cluster.arrived = 0, ++cluster.generation;
  return Flow::blocked;
}

// kind[0]: whether it waits. r: which, how many threads.
Flow barrier(Warp& w, const Instruction& i, Lanes lanes) {
  const int first = std::countr_zero(lanes);
  const uint32_t id = get<uint32_t>(w, i.r[0], first);
  if (id >= 16) fail(w, i, lanes, "there are 16 barriers");
  NamedBarrier& b = w.block->barriers[id];
  const bool all = i.r[1].at < 0;
  const uint32_t expected = all ? w.block->threads : get<uint32_t>(w, i.r[1], first);
  if (expected % 32 && !all) fail(w, i, lanes, "a barrier of " + std::to_string(expected) + " threads");
  if (b.arrived && (b.all != all || (!all && b.expected != expected)))
    fail(w, i, lanes, "threads disagree on how many come to barrier " + std::to_string(id));
  b.all = all, b.expected = expected;
  b.arrived += std::popcount(lanes);
  if (b.arrived > expected) fail(w, i, lanes, "more threads than expected at barrier " + std::to_string(id));
  const uint64_t generation = b.generation;
  if (b.arrived == expected) {
    b.arrived = 0;
    ++b.generation;
    ++w.block->cluster->progress;
    return Flow::next;
  }
  if (!i.kind[0]) return Flow::next;
  // The lanes that are not here have still to come.
  Group& g = w.group();
  if (const Lanes rest = g.lanes & ~lanes) {
    g.lanes = lanes;
    w.groups.push_back({g.pc + 1, rest, {}});
  }
  Wait wait{Wait::barrier};
  wait.at = id, wait.generation = generation;
  return w.block_on(wait, true);
}

Flow warp_barrier(Warp& w, const Instruction& i, Lanes lanes) {
  return converged(w, lanes, get<uint32_t>(w, i.r[0], std::countr_zero(lanes))) ? Flow::next : wait_for_lanes(w);
}

Flow cluster_arrive(Warp& w, const Instruction&, Lanes lanes) {
  Cluster& c = *w.block->cluster;
  each(lanes, [&](int l) { w.lane[l].cluster_generation = c.generation; });
  c.arrived += std::popcount(lanes);
  if (c.arrived == c.threads()) c.arrived = 0, ++c.generation, ++c.progress;
  return Flow::next;
}
Flow cluster_wait(Warp& w, const Instruction&, Lanes lanes) {
  Cluster& c = *w.block->cluster;
  const uint64_t arrived = w.lane[std::countr_zero(lanes)].cluster_generation;
  if (c.generation != arrived) return Flow::next;
  Wait wait{Wait::cluster};
  wait.generation = arrived;
  return w.block_on(wait, false);
}

// ---- mbarriers ------------------------------------------------------------------------------------------------------
struct Place {
  Block& block;
  uint32_t at;
};
Place place(const Warp& w, const Instruction& i, int lane, int slot) {
  uint64_t address = get_bits(w, i.r[slot], lane) + static_cast<uint64_t>(i.offset);
  if (address >> 56 == 1) address -= kSharedWindow;
  uint32_t at = static_cast<uint32_t>(address);
  Block& block = shared_block(w, i, lane, at);
  return {block, at};
}

Flow mbarrier_init(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) {
    memory(w, i, l, Space::shared, get_bits(w, i.r[0], l) + i.offset, 8, true);
    const Place p = place(w, i, l, 0);
    const uint32_t count = get<uint32_t>(w, i.r[1], l);
    if (!count || count >= 1 << 20) fail(w, i, 1u << l, "an mbarrier of " + std::to_string(count) + " arrivals");
    p.block.mbarriers[p.at] = {count, count, 0, 0};
  });
  return Flow::next;
}
Flow mbarrier_inval(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) {
    const Place p = place(w, i, l, 0);
    mbarrier(w, i, l, p.block, p.at);
    p.block.mbarriers.erase(p.at);
  });
  return Flow::next;
}
// kind: whether it expects bytes, whether it arrives. r: the state before it, the address, bytes or a count.
Flow mbarrier_arrive(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) {
    const Place p = place(w, i, l, 1);
    Mbarrier& m = mbarrier(w, i, l, p.block, p.at);
    const uint32_t number = i.r[2].at < 0 ? 1 : get<uint32_t>(w, i.r[2], l);
    put_bits(w, i.r[0], l, m.phase);
    if (i.kind[0]) m.bytes += number;
    if (!i.kind[1]) return;
    const uint32_t count = i.kind[0] ? 1 : number;
    if (count > m.pending) fail(w, i, 1u << l, "more arrivals than the mbarrier expects");
    m.pending -= count;
    ++w.block->cluster->progress;
    settle(p.block, m);
  });
  return Flow::next;
}
// kind: whether it may wait, whether it is given a parity rather than a state. r: the answer, the address, the phase.
Flow mbarrier_wait(Warp& w, const Instruction& i, Lanes lanes) {
  Group& g = w.group();
  Lanes complete = 0;
  each(lanes, [&](int l) {
    const Place p = place(w, i, l, 1);
    const Mbarrier& m = mbarrier(w, i, l, p.block, p.at);
    const uint64_t phase = get_bits(w, i.r[2], l);
    complete |= Lanes(i.kind[1] ? (m.phase & 1) != phase : m.phase != phase) << l;
  });
  // How long try_wait waits is not said: the first time it does not, the second time until nothing else can go on.
  const bool gives_up = std::exchange(g.wait.expired, false) || (!kind_to_mistakes && !w.refused);
  if (complete == lanes) {
    w.refused = false;
  } else if (i.kind[0] && gives_up) {
    w.refused = true;
  } else if (i.kind[0]) {
    const int l = std::countr_zero(lanes & ~complete);
    const Place p = place(w, i, l, 1);
    Wait wait{Wait::phase};
    wait.block = &p.block, wait.at = p.at, wait.generation = p.block.mbarriers.at(p.at).phase;
    return w.block_on(wait, false);
  }
  Lanes& answer = w.predicate(i.r[0]);
  answer = (answer & ~lanes) | (complete & lanes);
  return Flow::next;
}

// ---- shuffles and votes ---------------------------------------------------------------------------------------------
enum Shuffle : uint8_t { kUp, kDown, kButterfly, kIndex };
// r: the value, a, b, c, the members; more: the predicate
Flow shuffle(Warp& w, const Instruction& i, Lanes lanes) {
  const int first = std::countr_zero(lanes);
  if (!converged(w, lanes, get<uint32_t>(w, i.r[4], first))) return wait_for_lanes(w);
  uint32_t from[32], out[32];
  each(w.alive, [&](int l) { from[l] = get<uint32_t>(w, i.r[1], l); });
  Lanes good = 0;
  each(lanes, [&](int l) {
    const int b = get<uint32_t>(w, i.r[2], l) & 31, c = get<uint32_t>(w, i.r[3], l);
    const int mask = c >> 8 & 31, clamp = c & 31;
    const int low = l & mask, high = (l & mask) | (clamp & ~mask);
    int other = 0;
    bool inside = false;
    switch (Shuffle(i.kind[0])) {
      case kUp: other = l - b, inside = other >= high; break;
      case kDown: other = l + b, inside = other <= high; break;
      case kButterfly: other = l ^ b, inside = other <= high; break;
      case kIndex: other = low | (b & ~mask), inside = other <= high; break;
    }
    if (!inside) other = l;
    if (!(lanes >> other & 1)) fail(w, i, 1u << l, "shuffles from a thread that is not here");
    out[l] = from[other];
    good |= Lanes(inside) << l;
  });
  each(lanes, [&](int l) { put_bits(w, i.r[0], l, out[l]); });
  if (!i.more.empty() && i.more[0].at >= 0) {
    Lanes& p = w.predicate(i.more[0]);
    p = (p & ~lanes) | good;
  }
  return Flow::next;
}

enum Vote : uint8_t { kAll, kAny, kUniform, kBallot };
Flow vote(Warp& w, const Instruction& i, Lanes lanes) {
  if (!converged(w, lanes, get<uint32_t>(w, i.r[2], std::countr_zero(lanes)))) return wait_for_lanes(w);
  const Lanes yes = (w.predicate(i.r[1]) ^ (i.negated ? kAllLanes : 0)) & lanes;
  if (Vote(i.kind[0]) == kBallot) {
    each(lanes, [&](int l) { put<uint32_t>(w, i.r[0], l, yes); });
    return Flow::next;
  }
  const bool holds = i.kind[0] == kAll ? yes == lanes : i.kind[0] == kAny ? yes != 0 : yes == lanes || !yes;
  Lanes& p = w.predicate(i.r[0]);
  p = holds ? p | lanes : p & ~lanes;
  return Flow::next;
}

Flow elect(Warp& w, const Instruction& i, Lanes lanes) {
  const Lanes members = get<uint32_t>(w, i.r[2], std::countr_zero(lanes));
  if (!converged(w, lanes, members)) return wait_for_lanes(w);
  const int leader = std::countr_zero(members & lanes);
  each(lanes, [&](int l) { put_bits(w, i.r[0], l, leader); });
  Lanes& p = w.predicate(i.r[1]);
  p = (p & ~lanes) | (1u << leader);
  return Flow::next;
}

Flow active_mask(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) { put<uint32_t>(w, i.r[0], l, lanes); });
  return Flow::next;
}

// kind[0]: what it does with the members' numbers.
template <class T>
Flow reduce(Warp& w, const Instruction& i, Lanes lanes) {
  if (!converged(w, lanes, get<uint32_t>(w, i.r[2], std::countr_zero(lanes)))) return wait_for_lanes(w);
  T all = get<T>(w, i.r[1], std::countr_zero(lanes));
  each(lanes & (lanes - 1), [&](int l) {
    const T b = get<T>(w, i.r[1], l);
    all = i.kind[0] == 0   ? all + b
          : i.kind[0] == 1 ? std::min(all, b)
          : i.kind[0] == 2 ? std::max(all, b)
          : i.kind[0] == 3 ? all & b
          : i.kind[0] == 4 ? all | b
                           : all ^ b;
  });
  each(lanes, [&](int l) { put<T>(w, i.r[0], l, all); });
  return Flow::next;
}

}  // namespace

Mbarrier& mbarrier(const Warp& w, const Instruction& i, int lane, Block& block, uint32_t address) {
  const auto found = block.mbarriers.find(address);
  if (found == block.mbarriers.end()) fail(w, i, 1u << lane, "no mbarrier was made at " + std::to_string(address));
  return found->second;
}

bool assemble_synchronize(Assembler& a, const Statement& s, Instruction& i) {
  const auto is = [&](const char* name) { return s.name == name; };
  if (is("ret") || is("exit")) {
    i.run = exit;
    return true;
  }
  if ((is("bar") || is("barrier")) && s.has("cluster")) {
    i.run = s.has("arrive") ? cluster_arrive : cluster_wait;
    return true;
  }
  if (is("bar") && s.has("warp")) {
    i.r[0] = a.source(s.operands.at(0));
    i.run = warp_barrier;
    return true;
  }
  if (is("bar") || is("barrier")) {
    if (!s.has("sync") && !s.has("arrive")) a.unknown(s);
    i.kind[0] = s.has("sync");
    for (size_t k = 0; k < s.operands.size(); ++k) i.r[k] = a.source(s.operands[k]);
    i.run = barrier;
    return true;
  }
  if (is("mbarrier")) {
    if (s.has("init")) {
      a.address(i, 0, s.operands.at(0));
      i.r[1] = a.source(s.operands.at(1));
      i.run = mbarrier_init;
    } else if (s.has("inval")) {
      a.address(i, 0, s.operands.at(0));
      i.run = mbarrier_inval;
    } else if (s.has("test_wait") || s.has("try_wait")) {
      i.kind[0] = s.has("try_wait"), i.kind[1] = s.has("parity");
      i.r[0] = a.target(s.operands.at(0));
      a.address(i, 1, s.operands.at(1));
      i.r[2] = a.source(s.operands.at(2), i.kind[1] ? 32 : 64);
      i.run = mbarrier_wait;
    } else if (s.has("arrive") || s.has("expect_tx")) {
      if (s.has("noComplete") || s.has("arrive_drop")) a.unknown(s);
      i.kind[0] = s.has("expect_tx"), i.kind[1] = s.has("arrive");
      const size_t first = s.operands.at(0).kind != Operand::address;  // a state, or `_`
      if (first) i.r[0] = a.target(s.operands[0]);
      a.address(i, 1, s.operands.at(first));
      if (s.operands.size() > first + 1) i.r[2] = a.source(s.operands[first + 1]);
      i.run = mbarrier_arrive;
    } else {
      a.unknown(s);
    }
    return true;
  }
  if (is("shfl")) {
    const std::string& how = s.modifiers.at(1);
    i.kind[0] = how == "up" ? kUp : how == "down" ? kDown : how == "bfly" ? kButterfly : kIndex;
    const bool two = s.operands.at(0).kind == Operand::pair;
    i.r[0] = a.target(two ? s.operands[0].parts[0] : s.operands[0]);
    if (two) i.more.push_back(a.target(s.operands[0].parts[1]));
    for (int k = 1; k < 5; ++k) i.r[k] = a.source(s.operands.at(k));
    i.run = shuffle;
    return true;
  }
  if (is("vote")) {
    i.kind[0] = s.has("all") ? kAll : s.has("any") ? kAny : s.has("uni") ? kUniform : kBallot;
    i.r[0] = a.target(s.operands.at(0));
    i.r[1] = a.source(s.operands.at(1)), i.negated = s.operands[1].negated;
    i.r[2] = a.source(s.operands.at(2));
    i.run = vote;
    return true;
  }
  if (is("elect")) {
    const Operand& to = s.operands.at(0);
    i.r[0] = a.target(to.parts.at(0)), i.r[1] = a.target(to.parts.at(1));
    i.r[2] = a.source(s.operands.at(1));
    i.run = elect;
    return true;
  }
  if (is("activemask")) {
    i.r[0] = a.target(s.operands.at(0));
    i.run = active_mask;
    return true;
  }
  if (is("redux")) {
    const std::string& how = s.modifiers.at(1);
    i.kind[0] = how == "add" ? 0 : how == "min" ? 1 : how == "max" ? 2 : how == "and" ? 3 : how == "or" ? 4 : 5;
    i.r[0] = a.target(s.operands.at(0));
    for (int k = 1; k < 3; ++k) i.r[k] = a.source(s.operands.at(k));
    i.run = s.modifiers.back() == "s32" ? reduce<int32_t> : reduce<uint32_t>;
    return true;
  }
  return false;
}

}  // namespace emulator
