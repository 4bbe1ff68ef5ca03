// Which warp runs, which of its threads, and what goes on when none can.
#include "emulator/machine.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>

namespace emulator {

bool kind_to_mistakes = false;
thread_local std::vector<Range> allowed;

namespace {

constexpr uint8_t kPoison = 0xA5;
constexpr int kPatience = 100;   // how often waits give up, with nothing gained, before it is a deadlock
constexpr int kSlice = 1 << 20;  // instructions, before another group of the warp gets its turn

std::string place(const Block& b, const Warp& w, Lanes lanes) {
  return "block (" + std::to_string(b.id[0]) + ", " + std::to_string(b.id[1]) + ", " + std::to_string(b.id[2]) +
         ") thread " + std::to_string(32 * w.index + (lanes ? std::countr_zero(lanes) : 0));
}

std::string describe(const Wait& wait) {
  switch (wait.kind) {
    case Wait::nothing: return "runs";
    case Wait::converge: return "waits for threads of its warp";
    case Wait::barrier: return "waits at barrier " + std::to_string(wait.at);
    case Wait::phase: return "waits for the mbarrier at " + std::to_string(wait.at);
    case Wait::warpgroup: return "waits for the wgmma of its warpgroup";
    case Wait::cluster: return "waits at the cluster's barrier";
  }
  return "";
}

bool over(const Warp& w, const Wait& wait) {
  switch (wait.kind) {
    case Wait::nothing: return true;
    case Wait::converge: return false;
    case Wait::barrier: return w.block->barriers[wait.at].generation != wait.generation;
    case Wait::phase: return wait.expired || wait.block->mbarriers.at(wait.at).phase != wait.generation;
    case Wait::warpgroup: return committed(w, wait.generation);
    case Wait::cluster: return w.block->cluster->generation != wait.generation;
  }
  return true;
}

uint32_t special(const std::string& name, const Block& b, const Warp& w, int lane) {
  const Launch& launch = *b.cluster->launch;
  const uint32_t thread = 32 * w.index + lane;
  const auto& t = launch.threads;
  const int axis = name.back() - 'x';
  const std::string stem = name.substr(0, name.find('.'));
  if (stem == "%tid") return axis == 0 ? thread % t[0] : axis == 1 ? thread / t[0] % t[1] : thread / (t[0] * t[1]);
  if (stem == "%ntid") return t[axis];
  if (stem == "%ctaid") return b.id[axis];
  if (stem == "%nctaid") return launch.grid[axis];
  if (stem == "%clusterid") return b.cluster->id[axis];
  if (stem == "%nclusterid") return launch.grid[axis] / launch.cluster[axis];
  if (stem == "%cluster_ctaid") return b.id[axis] % launch.cluster[axis];
  if (stem == "%cluster_nctaid") return launch.cluster[axis];
  if (name == "%cluster_ctarank") return b.rank;
  if (name == "%cluster_nctarank") return launch.cluster[0] * launch.cluster[1] * launch.cluster[2];
  if (name == "%laneid") return lane;
  if (name == "%warpid") return w.index;
  if (name == "%nwarpid") return static_cast<uint32_t>(b.warps.size());
  if (name == "%smid") return 0;
  if (name == "%lanemask_eq") return 1u << lane;
  if (name == "%lanemask_lt") return (1u << lane) - 1;
  if (name == "%lanemask_le") return (2u << lane) - 1;
  if (name == "%lanemask_gt") return ~((2u << lane) - 1);
  if (name == "%lanemask_ge") return ~((1u << lane) - 1);
  throw Error("unknown special register " + name);
}

void begin(Warp& w) {
  const Launch& launch = *w.block->cluster->launch;
  const Program& program = *launch.program;
  w.file = program.image;
  for (const auto& [name, ref] : program.specials)
    for (int lane = 0; lane < 32; ++lane) {
      if (name == "%parameters")
        put<uint64_t>(w, ref, lane, reinterpret_cast<uint64_t>(launch.parameters));
      else
        put<uint32_t>(w, ref, lane, special(name, *w.block, w, lane));
    }
  w.groups.push_back({0, w.alive, {}});
}

}  // namespace

void fail(const Warp& w, const Instruction& i, Lanes lanes, const std::string& what) {
  throw Error(place(*w.block, w, lanes) + ", PTX line " + std::to_string(i.line) + ", " +
              (i.statement ? i.statement->text() : "") + ": " + what);
}

uint32_t Cluster::threads() const {
  uint32_t sum = 0;
  for (const auto& block : blocks) sum += block->threads;
  return sum;
}

void settle(Block& block, Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  ++barrier.phase;
  barrier.pending = barrier.expected;
  ++block.cluster->progress;
}

// Wakes and merges groups, and chooses the lowest that can run.
bool Cluster::can_run(Warp& w) {
  if (w.groups.empty()) return false;
  for (Group& g : w.groups)
    if (g.wait.kind != Wait::nothing && over(w, g.wait)) {
      const bool expired = g.wait.expired;
      g.wait = {};
      g.wait.expired = expired;
    }
  const auto merges = [](const Group& g) { return g.wait.kind == Wait::nothing || g.wait.kind == Wait::converge; };
  for (size_t i = 0; i < w.groups.size(); ++i)
    for (size_t j = w.groups.size() - 1; j > i; --j) {
      Group &a = w.groups[i], &b = w.groups[j];
      if (a.pc != b.pc || !merges(a) || !merges(b)) continue;
      a.lanes |= b.lanes;
      a.wait = {};
      w.groups.erase(w.groups.begin() + j);
    }
  int best = -1;
  for (size_t i = 0; i < w.groups.size(); ++i)
    if (w.groups[i].wait.kind == Wait::nothing && (best < 0 || w.groups[i].pc < w.groups[best].pc))
      best = static_cast<int>(i);
  if (best < 0) return false;
  w.current = best;
  return true;
}

void Cluster::run(Warp& w) {
  const Instruction* code = launch->program->code.data();
  const int end = static_cast<int>(launch->program->code.size());
  int stop = end;  // where it may meet others
  for (size_t i = 0; i < w.groups.size(); ++i)
    if (i != w.current && w.groups[i].pc > w.group().pc) stop = std::min(stop, w.groups[i].pc);
  const bool alone = w.groups.size() == 1;
  for (int left = kSlice; left > 0; --left) {
    Group& g = w.groups[w.current];
    if (g.pc >= stop) {
      if (g.pc >= end) throw Error("a kernel ends without ret");
      return;
    }
    const Instruction& i = code[g.pc];
    Lanes lanes = g.lanes;
    if (i.guard >= 0) {
      const Lanes p = w.predicate({i.guard, 4});
      lanes &= i.guard_negated ? ~p : p;
    }
    if (!lanes) {
      ++g.pc;
      continue;
    }
    const Flow flow = i.run(w, i, lanes);
    if (flow == Flow::next) {
      ++w.groups[w.current].pc;
    } else if (flow == Flow::blocked || !alone || w.groups.size() != 1) {
      return;
    }
  }
  // Another group may have to do what this one waits for.
  std::rotate(w.groups.begin(), w.groups.begin() + w.current, w.groups.begin() + w.current + 1);
}

// Nothing can run: completes what is the latest to be waited for, or lets waits for mbarriers give up.
bool Cluster::unblock() {
  const auto awaited = [&](const Pending& p) {
    for (const auto& block : blocks)
      for (const Warp& w : block->warps)
        for (const Group& g : w.groups)
          if (g.wait.kind == Wait::phase && g.wait.block == p.block && g.wait.at == p.at) return true;
    return false;
  };
  for (size_t i = pending.size(); i-- > 0;) {
    if (!awaited(pending[i])) continue;
    const Pending p = std::move(pending[i]);
    pending.erase(pending.begin() + i);
    p.run();
    return true;
  }
  bool any = false;
  for (const auto& block : blocks)
    for (Warp& w : block->warps)
      for (Group& g : w.groups)
        if (g.wait.kind == Wait::phase) g.wait.expired = any = true;
  return any;
}

void Cluster::run() {
  const Launch& l = *launch;
  const uint32_t count = l.threads[0] * l.threads[1] * l.threads[2];
  for (int rank = 0; rank < static_cast<int>(l.cluster[0] * l.cluster[1] * l.cluster[2]); ++rank) {
    auto block = std::make_unique<Block>();
    block->cluster = this;
    block->rank = rank;
    const uint32_t x = rank % l.cluster[0], y = rank / l.cluster[0] % l.cluster[1],
                   z = rank / (l.cluster[0] * l.cluster[1]);
    block->id = {id[0] * l.cluster[0] + x, id[1] * l.cluster[1] + y, id[2] * l.cluster[2] + z};
    block->shared.assign((l.program->kernel->shared_bytes + 15) / 16 * 16 + l.dynamic_shared, kPoison);
    block->unfenced.assign(block->shared.size() / 16 + 1, 0);
    block->threads = count;
    block->warps.resize((count + 31) / 32);
    blocks.push_back(std::move(block));
  }
  for (const auto& block : blocks)
    for (size_t i = 0; i < block->warps.size(); ++i) {
      Warp& w = block->warps[i];
      w.block = block.get();
      w.index = static_cast<int>(i);
      const uint32_t here = std::min<uint32_t>(32, count - 32 * static_cast<uint32_t>(i));
      w.alive = here == 32 ? kAllLanes : (1u << here) - 1;
      begin(w);
    }
  uint64_t before = 0;
  for (int patience = kPatience; threads();) {
    bool ran = false;
    for (const auto& block : blocks)
      for (Warp& w : block->warps)
        while (can_run(w)) {
          run(w);
          ran = true;
        }
    if (ran) continue;
    if (progress != before) patience = kPatience;
    before = progress;
    if (unblock() && patience-- > 0) continue;
    std::string all = "deadlock:";
    for (const auto& block : blocks)
      for (const Warp& w : block->warps)
        for (const Group& g : w.groups)
          all += "\n  " + place(*block, w, g.lanes) + " at PTX line " + std::to_string(l.program->code[g.pc].line) +
                 " " + describe(g.wait);
    throw Error(all);
  }
  if (!pending.empty()) throw Error("a cluster ends before copies that nobody waited for");
}

void run(const Launch& launch) {
  std::array<uint32_t, 3> clusters;
  for (int axis = 0; axis < 3; ++axis) {
    if (launch.grid[axis] % launch.cluster[axis]) throw Error("the grid is no multiple of the cluster");
    clusters[axis] = launch.grid[axis] / launch.cluster[axis];
  }
  const uint32_t count = clusters[0] * clusters[1] * clusters[2];
  std::atomic<uint32_t> next = 0;
  std::mutex mutex;
  std::exception_ptr error;
  const auto work = [&, memory = allowed] {
    allowed = memory;
    for (uint32_t i; (i = next++) < count;) try {
        Cluster cluster;
        cluster.launch = &launch;
        cluster.id = {i % clusters[0], i / clusters[0] % clusters[1], i / (clusters[0] * clusters[1])};
        cluster.run();
      } catch (...) {
        next = count;
        const std::lock_guard lock(mutex);
        if (!error) error = std::current_exception();
      }
  };
  std::vector<std::thread> others;
  for (uint32_t k = 1; k < std::min(count, std::thread::hardware_concurrency()); ++k) others.emplace_back(work);
  work();
  for (std::thread& each : others) each.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace emulator
