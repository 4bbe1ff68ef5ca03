// The emulated device: clusters of blocks of warps of 32 threads. A cluster runs one warp at a time.
//
// The threads of a warp are groups, each at one instruction; the group at the lowest one runs, so that threads that
// parted meet again. A group that has to wait lets others run. What the hardware does by itself (copies, wgmma) is done
// as late as its rules allow: when a thread waits for it, or, behind an mbarrier, when nothing else can go on. So a
// wait that is missing, or of the wrong stage, shows as wrong numbers: shared memory and registers begin as poison.
#pragma once

#include <array>
#include <bit>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "emulator/ptx.h"

namespace emulator {

using Lanes = uint32_t;  // a bit a thread of a warp
inline constexpr Lanes kAllLanes = ~Lanes{0};

struct Warp;
struct Block;
struct Cluster;
struct Instruction;

enum class Flow { next, jumped, blocked };  // jumped: the groups of the warp were changed
using Run = Flow (*)(Warp&, const Instruction&, Lanes);

// Where a register's lanes lie in a warp's file: 4 bytes each, 8 of 64-bit ones; a predicate is one word of 32 lanes.
struct Ref {
  int32_t at = -1;  // -1: none, `_`
  int32_t stride = 4;
};

struct Address {
  Ref base;
  int64_t offset = 0;
};

// Numbers that stand in the text are registers, too, which nothing writes.
struct Instruction {
  Run run = nullptr;
  int32_t guard = -1;
  bool guard_negated = false;
  bool negated = false;  // of the last source, a predicate
  uint8_t kind[6] = {};  // what else its handler has to know
  int32_t line = 0;
  int64_t offset = 0;              // added to an address; the target of a jump
  Ref r[5];                        // operands in the order of the text, addresses by their register
  std::vector<Ref> more;           // lists
  std::vector<Address> addresses;  // of copies
  const Statement* statement = nullptr;
};

struct Program {
  const Kernel* kernel = nullptr;
  std::vector<Instruction> code;
  std::vector<uint8_t> image;  // what a warp's file begins as: poison and numbers
  std::vector<std::pair<std::string, Ref>> specials;
};

struct Wait {
  enum Kind { nothing, converge, barrier, phase, cluster, warpgroup } kind = nothing;
  Block* block = nullptr;
  uint32_t at = 0;  // a named barrier, or an mbarrier's address
  uint64_t generation =
      0;                 // passed when it is no longer this; of a warpgroup: how many wgmma groups all have committed
  bool expired = false;  // of an mbarrier: nobody else can go on, the wait gives up
};

struct Group {
  int pc;
  Lanes lanes;
  Wait wait;
};

struct Copy {  // cp.async of one thread
  uint8_t* to;
  const uint8_t* from;
  int size, bytes;  // the rest is zero
};

// What one thread has begun and committed.
struct Lane {
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;
  std::vector<std::function<void()>> bulk_open;
  std::deque<std::vector<std::function<void()>>> bulk_committed;
  uint64_t cluster_generation = 0;  // of its barrier.cluster.arrive
};

struct Warp {
  Block* block = nullptr;
  int index = 0;
  std::vector<uint8_t> file;
  std::vector<Group> groups;
  size_t current = 0;  // the group that runs
  Lanes alive = 0;
  std::array<Lane, 32> lane;
  std::vector<std::function<void()>> wgmma_open;
  std::deque<std::vector<std::function<void()>>> wgmma_committed;
  bool refused = false;                              // its last mbarrier.try_wait, without waiting
  std::vector<std::pair<Block*, uint32_t>> written;  // what of `unfenced` is this warp's
  uint64_t wgmma_groups = 0;                         // committed so far, the complete ones too

  Group& group() { return groups[current]; }
  Lanes& predicate(Ref r) { return *reinterpret_cast<Lanes*>(&file[r.at]); }
  Flow block_on(Wait wait, bool advance) {
    group().pc += advance;
    group().wait = wait;
    return Flow::blocked;
  }
};

struct Mbarrier {
  uint32_t expected, pending;
  int64_t bytes = 0;   // still to come
  uint64_t phase = 0;  // how many are complete
};

struct NamedBarrier {
  uint32_t arrived = 0, expected = 0;
  bool all = false;  // as many as there are threads
  uint64_t generation = 0;
};

// Shared addresses: 0 to 2^24 are the block's own, (rank + 1) << 24 is where that of a block of its cluster begins.
inline constexpr uint32_t kSharedBegin = 1024;                // no variable at 0; 1024-byte aligned, as on the hardware
inline constexpr uint64_t kSharedWindow = uint64_t{1} << 56;  // of generic addresses

struct Block {
  Cluster* cluster = nullptr;
  int rank = 0;
  std::array<uint32_t, 3> id{};  // in the grid
  std::vector<uint8_t> shared;   // without the first kSharedBegin bytes
  std::vector<Warp> warps;
  uint32_t threads = 0;  // not exited
  std::array<NamedBarrier, 16> barriers;
  std::map<uint32_t, Mbarrier> mbarriers;  // by address
  // By 16 bytes of shared memory: 1 + the last warp that wrote there, until its fence.proxy.async.
  std::vector<uint8_t> unfenced;
};

// A copy or an arrival that an mbarrier tells of.
struct Pending {
  Block* block;
  uint32_t at;
  std::function<void()> run;
};

struct Launch {
  const Program* program = nullptr;
  std::array<uint32_t, 3> grid{1, 1, 1}, threads{1, 1, 1}, cluster{1, 1, 1};
  uint32_t dynamic_shared = 0;
  const uint8_t* parameters = nullptr;
};

struct Cluster {
  const Launch* launch = nullptr;
  std::array<uint32_t, 3> id{};
  std::vector<std::unique_ptr<Block>> blocks;
  std::deque<Pending> pending;
  uint32_t arrived = 0;  // at the cluster's barrier
  uint64_t generation = 0;
  uint64_t progress = 0;  // barriers passed, phases and copies completed

  uint32_t threads() const;
  void run();

 private:
  bool can_run(Warp& warp);
  void run(Warp& warp);
  bool unblock();
};

// Runs every cluster of a launch, on all of the host's threads; throws Error.
void run(const Launch& launch);

// Whether copies and wgmma are done at once, and approximations are exact: each alike hides mistakes.
extern bool kind_to_mistakes;

// The global memory that kernels may use: everything, until some is named.
struct Range {
  uintptr_t begin, end;
  bool writable;
};
extern thread_local std::vector<Range> allowed;

// ---- for the handlers -----------------------------------------------------------------------------------------------
template <class F>
inline void each(Lanes lanes, F f) {
  if (lanes == kAllLanes) {
    for (int lane = 0; lane < 32; ++lane) f(lane);
  } else {
    for (; lanes; lanes &= lanes - 1) f(std::countr_zero(lanes));
  }
}

template <class T>
inline T get(const Warp& w, Ref r, int lane) {
  T value;
  std::memcpy(&value, &w.file[r.at] + lane * (sizeof(T) == 8 ? 8 : 4), sizeof(T));
  return value;
}
// Narrow values fill a word: with their sign, if they have one.
template <class T>
inline void put(Warp& w, Ref r, int lane, T value) {
  if constexpr (sizeof(T) >= 4) {
    std::memcpy(&w.file[r.at] + lane * sizeof(T), &value, sizeof(T));
  } else {
    const int32_t wide = static_cast<int32_t>(value);
    std::memcpy(&w.file[r.at] + lane * 4, &wide, 4);
  }
}
// Of a register of any width.
inline uint64_t get_bits(const Warp& w, Ref r, int lane) {
  return r.stride == 8 ? get<uint64_t>(w, r, lane) : get<uint32_t>(w, r, lane);
}
inline void put_bits(Warp& w, Ref r, int lane, uint64_t bits) {
  if (r.at < 0) return;
  if (r.stride == 8)
    put<uint64_t>(w, r, lane, bits);
  else
    put<uint32_t>(w, r, lane, static_cast<uint32_t>(bits));
}

// Whether every warp of w's warpgroup has committed so many wgmma groups.
bool committed(const Warp& w, uint64_t groups);

[[noreturn]] void fail(const Warp& w, const Instruction& i, Lanes lanes, const std::string& what);

enum class Space : uint8_t { generic, global, shared, parameter, constant };
// The host's memory behind an address, after a look at alignment and bounds.
uint8_t* memory(const Warp& w, const Instruction& i, int lane, Space space, uint64_t address, int size, bool write);
uint64_t address_of(const Warp& w, const Address& a, int lane);
// TMA and wgmma see what threads wrote only behind a fence of theirs: fails if they read these bytes without.
void need_fence(const Warp& w, const Instruction& i, int lane, const Block& block, uint32_t address, uint32_t bytes);
// The block and its own address behind a shared address.
Block& shared_block(const Warp& w, const Instruction& i, int lane, uint32_t& address);

Mbarrier& mbarrier(const Warp& w, const Instruction& i, int lane, Block& block, uint32_t address);
void settle(Block& block, Mbarrier& barrier);  // completes the phase, where nothing is left to come

// ---- from statements to instructions --------------------------------------------------------------------------------
class Assembler {
 public:
  Assembler(const Module& module, const Kernel& kernel);
  Program assemble();

  const Module& module;
  const Kernel& kernel;

  Ref source(const Operand& o, int bits = 32);  // a register, or a number or an address of that width
  Ref target(const Operand& o) const;           // a register or `_`
  Address address(const Operand& o);  // [register + number], [symbol + number], or what stands first in the brackets
  void address(Instruction& i, int slot, const Operand& o);
  int bits(const Operand& o) const;  // of a register
  [[noreturn]] void unknown(const Statement& s) const;

 private:
  Ref number(uint64_t bits, int width);
  Program program_;
  std::vector<Ref> registers_;
  std::map<std::pair<uint64_t, int>, Ref> numbers_;
  Ref special(const std::string& name);
  std::map<std::string, Ref> specials_;
};

// Each fills in the handler and its operands, or returns false for an instruction of another file.
bool assemble_scalar(Assembler& a, const Statement& s, Instruction& i);
bool assemble_convert(Assembler& a, const Statement& s, Instruction& i);
bool assemble_copy(Assembler& a, const Statement& s, Instruction& i);
bool assemble_memory(Assembler& a, const Statement& s, Instruction& i);
bool assemble_synchronize(Assembler& a, const Statement& s, Instruction& i);
bool assemble_tensor_core(Assembler& a, const Statement& s, Instruction& i);
bool assemble_tensor_map(Assembler& a, const Statement& s, Instruction& i);

}  // namespace emulator
