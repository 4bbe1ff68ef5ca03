// Loads, stores and atomics; which memory an address means, and whether it is the kernel's to use.
#include <algorithm>
#include <mutex>

#include "emulator/machine.h"

namespace emulator {

namespace {

constexpr uint32_t kRankShift = 24;

bool permitted(uintptr_t address, int size, bool write) {
  if (allowed.empty()) return true;
  thread_local size_t last = 0;
  const auto inside = [&](const Range& r) {
    return r.begin <= address && address + size <= r.end && (r.writable || !write);
  };
  if (last < allowed.size() && inside(allowed[last])) return true;
  for (size_t i = 0; i < allowed.size(); ++i)
    if (inside(allowed[i])) {
      last = i;
      return true;
    }
  return false;
}

std::string hex(uint64_t value) {
  char text[20];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

Space space_of(const Statement& s) {
  for (const std::string& m : s.modifiers) {
    if (m == "global") return Space::global;
    if (m.starts_with("shared")) return Space::shared;
    if (m.starts_with("param")) return Space::parameter;
    if (m == "const") return Space::constant;
  }
  return Space::generic;
}

uint64_t address_of(const Warp& w, const Instruction& i, int slot, int lane) {
  return get_bits(w, i.r[slot], lane) + static_cast<uint64_t>(i.offset);
}

// kind: space, bytes of an element, whether it has a sign. r[0]: the address; more: the elements.
Flow load(Warp& w, const Instruction& i, Lanes lanes) {
  const int size = i.kind[1], count = static_cast<int>(i.more.size());
  each(lanes, [&](int l) {
    const uint8_t* p = memory(w, i, l, Space(i.kind[0]), address_of(w, i, 0, l), size * count, false);
    for (int k = 0; k < count; ++k) {
      uint64_t bits = 0;
      std::memcpy(&bits, p + k * size, size);
      if (i.kind[2] && size < 8)
        bits = static_cast<uint64_t>(static_cast<int64_t>(bits << (64 - 8 * size)) >> (64 - 8 * size));
      put_bits(w, i.more[k], l, bits);
    }
  });
  return Flow::next;
}
Flow store(Warp& w, const Instruction& i, Lanes lanes) {
  const int size = i.kind[1], count = static_cast<int>(i.more.size());
  each(lanes, [&](int l) {
    uint8_t* p = memory(w, i, l, Space(i.kind[0]), address_of(w, i, 0, l), size * count, true);
    for (int k = 0; k < count; ++k) {
      const uint64_t bits = get_bits(w, i.more[k], l);
      std::memcpy(p + k * size, &bits, size);
    }
  });
  return Flow::next;
}

enum Change : uint8_t { kAdd, kMin, kMax, kAnd, kOr, kXor, kExchange, kCompare };
template <class T>
T changed(Change how, T old, T b, T c) {
  switch (how) {
    case kAdd: return old + b;
    case kMin: return std::min(old, b);
    case kMax: return std::max(old, b);
    case kExchange: return b;
    case kCompare: return old == b ? c : old;
    default: break;
  }
  if constexpr (std::is_integral_v<T>) return how == kAnd ? old & b : how == kOr ? old | b : old ^ b;
  return old;
}
// r: the old value, the address, b, c. kind: space, how.
template <class T>
Flow atomic(Warp& w, const Instruction& i, Lanes lanes) {
  static std::mutex mutex;  // of clusters on other threads
  const std::lock_guard lock(mutex);
  each(lanes, [&](int l) {
    uint8_t* p = memory(w, i, l, Space(i.kind[0]), address_of(w, i, 1, l), sizeof(T), true);
    T old;
    std::memcpy(&old, p, sizeof(T));
    const T now = changed(Change(i.kind[1]), old, get<T>(w, i.r[2], l), i.r[3].at < 0 ? T{} : get<T>(w, i.r[3], l));
    std::memcpy(p, &now, sizeof(T));
    if (i.r[0].at >= 0) put<T>(w, i.r[0], l, old);
  });
  return Flow::next;
}

// kind[0]: 0 from a space to generic, 1 back, 2 the same.
Flow convert_address(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) {
    const uint64_t a = get_bits(w, i.r[1], l);
    if (i.kind[0] == 1 && a >> 56 != 1) fail(w, i, 1u << l, "a generic address that is not in shared memory");
    put_bits(w, i.r[0], l, i.kind[0] == 0 ? kSharedWindow + a : i.kind[0] == 1 ? a - kSharedWindow : a);
  });
  return Flow::next;
}
Flow map_address(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) {
    const uint64_t a = get_bits(w, i.r[1], l), rank = get<uint32_t>(w, i.r[2], l);
    if (rank >= w.block->cluster->blocks.size()) fail(w, i, 1u << l, "no block of that rank");
    put_bits(w, i.r[0], l, (a & ~uint64_t{0xff000000}) | (rank + 1) << kRankShift);
  });
  return Flow::next;
}
Flow nothing(Warp&, const Instruction&, Lanes) { return Flow::next; }
Flow proxy_fence(Warp& w, const Instruction&, Lanes) {
  for (const auto& [block, at] : w.written)
    if (block->unfenced[at] == w.index + 1) block->unfenced[at] = 0;
  w.written.clear();
  return Flow::next;
}

void mark(Warp& w, Block& block, uint32_t at, int size) {
  for (uint32_t k = at / 16; k <= (at + size - 1) / 16; ++k)
    if (block.unfenced[k] != w.index + 1) {
      block.unfenced[k] = static_cast<uint8_t>(w.index + 1);
      w.written.emplace_back(&block, k);
    }
}

bool access_qualifier(const std::string& m) {
  for (const char* known : {"volatile",     "relaxed",
                            "acquire",      "release",
                            "acq_rel",      "weak",
                            "gpu",          "cta",
                            "cluster",      "sys",
                            "nc",           "ca",
                            "cg",           "cs",
                            "cv",           "lu",
                            "wb",           "wt",
                            "global",       "shared",
                            "param",        "const",
                            "shared::cta",  "v2",
                            "v4",           "shared::cluster",
                            "param::entry", "noftz"})
    if (m == known) return true;
  return m.starts_with("L1::") || m.starts_with("L2::");
}

}  // namespace

uint64_t address_of(const Warp& w, const Address& a, int lane) {
  return get_bits(w, a.base, lane) + static_cast<uint64_t>(a.offset);
}

Block& shared_block(const Warp& w, const Instruction& i, int lane, uint32_t& address) {
  const uint32_t rank = address >> kRankShift;
  address &= (1u << kRankShift) - 1;
  if (!rank) return *w.block;
  const auto& blocks = w.block->cluster->blocks;
  if (rank > blocks.size()) fail(w, i, 1u << lane, "no block of that rank");
  Block& block = *blocks[rank - 1];
  if (!block.threads) fail(w, i, 1u << lane, "shared memory of a block that has ended");
  return block;
}

uint8_t* memory(const Warp& w, const Instruction& i, int lane, Space space, uint64_t address, int size, bool write) {
  if (address % size) fail(w, i, 1u << lane, "misaligned address " + hex(address));
  if (space == Space::generic) {
    if (address >> 56 == 1) {
      space = Space::shared;
      address -= kSharedWindow;
    } else {
      space = Space::global;
    }
  }
  if (space == Space::shared) {
    uint32_t at = static_cast<uint32_t>(address);
    Block& block = shared_block(w, i, lane, at);
    if (at < kSharedBegin || at - kSharedBegin + size > block.shared.size() || address >> 32)
      fail(w, i, 1u << lane, "shared memory has no " + std::to_string(size) + " bytes at " + hex(address));
    if (write) mark(w.block->warps[w.index], block, at - kSharedBegin, size);
    return &block.shared[at - kSharedBegin];
  }
  if (space == Space::global && !permitted(address, size, write))
    fail(w, i, 1u << lane,
         std::string(write ? "writes" : "reads") + " global memory that is not the kernel's: " + hex(address));
  return reinterpret_cast<uint8_t*>(address);
}

void need_fence(const Warp& w, const Instruction& i, int lane, const Block& block, uint32_t address, uint32_t bytes) {
  const uint32_t begin = address - kSharedBegin;
  for (uint32_t k = begin / 16; k <= (begin + bytes - 1) / 16; ++k)
    if (block.unfenced[k])
      fail(w, i, 1u << lane,
           "reads shared memory at " + std::to_string(16 * k + kSharedBegin) + ", which warp " +
               std::to_string(block.unfenced[k] - 1) + " wrote without fence.proxy.async");
}

bool assemble_memory(Assembler& a, const Statement& s, Instruction& i) {
  const auto is = [&](const char* name) { return s.name == name; };
  if (is("ld") || is("st") || is("ldu")) {
    const std::string& t = s.modifiers.back();
    for (size_t k = 0; k + 1 < s.modifiers.size(); ++k)
      if (!access_qualifier(s.modifiers[k])) a.unknown(s);
    const bool loads = !is("st");
    const Operand& value = s.operands.at(loads ? 0 : 1);
    i.kind[0] = static_cast<uint8_t>(space_of(s));
    i.kind[1] = static_cast<uint8_t>(std::stoi(t.substr(t.find_first_of("0123456789"))) / 8);
    i.kind[2] = t[0] == 's';
    a.address(i, 0, s.operands.at(loads ? 1 : 0));
    const auto element = [&](const Operand& o) {
      i.more.push_back(loads ? a.target(o) : a.source(o, std::max(32, 8 * i.kind[1])));
    };
    if (value.kind == Operand::list)
      for (const Operand& part : value.parts) element(part);
    else
      element(value);
    // What is passed to a kernel, and constants, are the host's own.
    if (Space(i.kind[0]) == Space::parameter || Space(i.kind[0]) == Space::constant)
      i.kind[0] = static_cast<uint8_t>(Space::parameter);
    i.run = loads ? load : store;
    return true;
  }
  if (is("atom") || is("red")) {
    const std::string& t = s.modifiers.back();
    int how = -1;
    for (size_t k = 0; k + 1 < s.modifiers.size(); ++k) {
      static const std::map<std::string, Change> all = {{"add", kAdd},       {"min", kMin},    {"max", kMax},
                                                        {"and", kAnd},       {"or", kOr},      {"xor", kXor},
                                                        {"exch", kExchange}, {"cas", kCompare}};
      if (const auto it = all.find(s.modifiers[k]); it != all.end())
        how = it->second;
      else if (!access_qualifier(s.modifiers[k]))
        a.unknown(s);
    }
    if (how < 0) a.unknown(s);
    const int bits = t.back() == '4' ? 64 : 32;
    const size_t first = is("atom");
    if (first) i.r[0] = a.target(s.operands.at(0));
    a.address(i, 1, s.operands.at(first));
    for (size_t k = first + 1; k < s.operands.size(); ++k) i.r[k - first + 1] = a.source(s.operands[k], bits);
    i.kind[0] = static_cast<uint8_t>(space_of(s)), i.kind[1] = static_cast<uint8_t>(how);
    i.run = t == "u32" || t == "b32"   ? atomic<uint32_t>
            : t == "s32"               ? atomic<int32_t>
            : t == "f32"               ? atomic<float>
            : t == "u64" || t == "b64" ? atomic<uint64_t>
            : t == "s64"               ? atomic<int64_t>
            : t == "f64"               ? atomic<double>
                                       : nullptr;
    if (!i.run) a.unknown(s);
    return true;
  }
  if (is("cvta")) {
    const bool back = s.modifiers[0] == "to";
    i.kind[0] = space_of(s) == Space::shared ? back : 2;
    i.r[0] = a.target(s.operands.at(0));
    i.r[1] = a.source(s.operands.at(1), 64);
    i.run = convert_address;
    return true;
  }
  if (is("mapa")) {
    if (!s.has("shared::cluster")) a.unknown(s);
    i.r[0] = a.target(s.operands.at(0));
    for (int k = 1; k < 3; ++k) i.r[k] = a.source(s.operands.at(k));
    i.run = map_address;
    return true;
  }
  if (is("prefetch") || is("prefetchu") || is("fence") || is("membar") || is("setmaxnreg") || is("griddepcontrol") ||
      is("discard") || is("applypriority") || is("createpolicy")) {
    if (is("createpolicy")) a.unknown(s);
    i.run = s.text().starts_with("fence.proxy.async") ? proxy_fence : nothing;
    return true;
  }
  return false;
}

}  // namespace emulator
