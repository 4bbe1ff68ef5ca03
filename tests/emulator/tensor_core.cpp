// Products of matrices: mma.sync, wgmma, and the loads and stores of their fragments.
#include <algorithm>

#include "emulator/machine.h"

namespace emulator {

namespace {

// ---- ldmatrix, stmatrix: 8x8 matrices of 16-bit elements, rows of 16 bytes at the addresses of 8 lanes each
// ------------
void need_all(const Warp& w, const Instruction& i, Lanes lanes) {
  if (lanes != kAllLanes) fail(w, i, lanes, "runs on a part of a warp");
}

// more: a register a matrix. kind[0]: transposed.
template <bool load>
Flow matrices(Warp& w, const Instruction& i, Lanes lanes) {
  need_all(w, i, lanes);
  for (size_t m = 0; m < i.more.size(); ++m) {
    uint8_t* rows[8];
    for (int row = 0; row < 8; ++row) {
      const int lane = static_cast<int>(8 * m) + row;
      rows[row] = memory(w, i, lane, Space::shared, address_of(w, i.addresses[0], lane), 16, !load);
    }
    for (int l = 0; l < 32; ++l) {
      uint16_t pair[2];
      const auto element = [&](int k) {
        const int row = i.kind[0] ? 2 * (l % 4) + k : l / 4, column = i.kind[0] ? l / 4 : 2 * (l % 4) + k;
        return rows[row] + 2 * column;
      };
      if (load) {
        for (int k = 0; k < 2; ++k) std::memcpy(&pair[k], element(k), 2);
        put<uint32_t>(w, i.more[m], l, pair[0] | uint32_t(pair[1]) << 16);
      } else {
        const uint32_t both = get<uint32_t>(w, i.more[m], l);
        for (int k = 0; k < 2; ++k) {
          pair[k] = static_cast<uint16_t>(both >> (16 * k));
          std::memcpy(element(k), &pair[k], 2);
        }
      }
    }
  }
  return Flow::next;
}

// ---- fragments ------------------------------------------------------------------------------------------------------
// The accumulators of 16 rows: element e of lane l.
int row_of(int lane, int e) { return lane / 4 + 8 * (e / 2 % 2); }
int column_of(int lane, int e) { return 8 * (e / 4) + 2 * (lane % 4) + e % 2; }

// 16 rows of 32 bytes from four registers: rows l/4 and l/4 + 8, bytes 4 (l%4) and 16 on.
void rows_of_registers(const Warp& w, const Ref* a, uint8_t (*rows)[32]) {
  for (int l = 0; l < 32; ++l)
    for (int r = 0; r < 4; ++r) {
      const uint32_t word = get<uint32_t>(w, a[r], l);
      std::memcpy(&rows[l / 4 + 8 * (r % 2)][4 * (l % 4) + 16 * (r / 2)], &word, 4);
    }
}

int32_t dot(const uint8_t* a, const uint8_t* b, bool a_sign, bool b_sign) {
  int32_t sum = 0;
  if (a_sign && b_sign) {
    for (int k = 0; k < 32; ++k) sum += int32_t(int8_t(a[k])) * int8_t(b[k]);
  } else if (a_sign) {
    for (int k = 0; k < 32; ++k) sum += int32_t(int8_t(a[k])) * b[k];
  } else if (b_sign) {
    for (int k = 0; k < 32; ++k) sum += int32_t(a[k]) * int8_t(b[k]);
  } else {
    for (int k = 0; k < 32; ++k) sum += int32_t(a[k]) * b[k];
  }
  return sum;
}

int32_t accumulate(int32_t c, int32_t sum, bool saturate) {
  const int64_t all = int64_t{c} + sum;
  return static_cast<int32_t>(saturate ? std::clamp<int64_t>(all, INT32_MIN, INT32_MAX) : all);
}

// m16n8k32 of bytes. more: d 4, a 4, b 2, c 4. kind: a's sign, b's sign, saturation.
Flow mma_bytes(Warp& w, const Instruction& i, Lanes lanes) {
  need_all(w, i, lanes);
  const Ref *d = &i.more[0], *a = &i.more[4], *b = &i.more[8], *c = &i.more[10];
  uint8_t rows[16][32], columns[8][32];
  rows_of_registers(w, a, rows);
  for (int l = 0; l < 32; ++l)
    for (int r = 0; r < 2; ++r) {
      const uint32_t word = get<uint32_t>(w, b[r], l);
      std::memcpy(&columns[l / 4][4 * (l % 4) + 16 * r], &word, 4);
    }
  int32_t out[4][32];
  for (int e = 0; e < 4; ++e)
    for (int l = 0; l < 32; ++l)
      out[e][l] = accumulate(get<int32_t>(w, c[e], l),
                             dot(rows[row_of(l, e)], columns[column_of(l, e)], i.kind[0], i.kind[1]), i.kind[2]);
  for (int e = 0; e < 4; ++e)
    for (int l = 0; l < 32; ++l) put<int32_t>(w, d[e], l, out[e][l]);
  return Flow::next;
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------
// A matrix of bytes in shared memory, K contiguous, as its descriptor says: rows in groups of 8.
class SharedMatrix {
 public:
  SharedMatrix(const Warp& w, const Instruction& i, uint64_t descriptor) : block_(w.block), warp_(w), instruction_(i) {
    start_ = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
    leading_ = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
    stride_ = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
    const uint32_t base = descriptor >> 49 & 7;
    swizzle_ = static_cast<int>(descriptor >> 62);
    if (base) fail(w, i, kAllLanes, "a matrix descriptor with a base offset");
    if (descriptor & 0xC000C000C000 || descriptor >> 46 & 7 || descriptor >> 52 & 0x3ff)
      fail(w, i, kAllLanes, "an illegal matrix descriptor");
  }
  // 32 bytes of a row, 16 at a time.
  void row(int r, uint8_t* to) const {
    for (uint32_t half = 0; half < 2; ++half) {
      uint32_t at;
      if (swizzle_ == 0) {
        at = start_ + half * leading_ + (r / 8) * stride_ + (r % 8) * 16;
      } else {
        const uint32_t width = 256u >> swizzle_;  // 1: 128 bytes, 2: 64, 3: 32
        at = start_ + (r / 8) * stride_ + (r % 8) * width + half * 16;
        at ^= (at >> 7 & 7 & (width / 16 - 1)) << 4;
      }
      if (at < kSharedBegin || at - kSharedBegin + 16 > block_->shared.size())
        fail(warp_, instruction_, kAllLanes,
             "a matrix descriptor leads out of shared memory, to " + std::to_string(at));
      need_fence(warp_, instruction_, 0, *block_, at, 16);
      std::memcpy(to + 16 * half, &block_->shared[at - kSharedBegin], 16);
    }
  }

 private:
  const Block* block_;
  const Warp& warp_;
  const Instruction& instruction_;
  uint32_t start_, leading_, stride_;
  int swizzle_;
};

struct Descriptors {
  uint64_t a, b;
  bool accumulate;
};

// This warp's 16 of the 64 rows. more: d, then a's registers, if it has them.
void multiply(Warp& w, const Instruction& i, const Descriptors& given) {
  const int n = i.kind[3] * 8, count = n / 2;
  uint8_t rows[16][32], columns[256][32];
  if (static_cast<int>(i.more.size()) > count) {
    rows_of_registers(w, &i.more[count], rows);
  } else {
    const SharedMatrix a(w, i, given.a);
    for (int r = 0; r < 16; ++r) a.row(16 * (w.index % 4) + r, rows[r]);
  }
  const SharedMatrix b(w, i, given.b);
  for (int c = 0; c < n; ++c) b.row(c, columns[c]);
  for (int e = 0; e < count; ++e)
    for (int l = 0; l < 32; ++l) {
      const int32_t sum = dot(rows[row_of(l, e)], columns[column_of(l, e)], i.kind[0], i.kind[1]);
      put<int32_t>(w, i.more[e], l, given.accumulate ? accumulate(get<int32_t>(w, i.more[e], l), sum, i.kind[2]) : sum);
    }
}

// r: a's descriptor, if it has one, b's, the predicate of accumulation.
Flow wgmma(Warp& w, const Instruction& i, Lanes lanes) {
  need_all(w, i, lanes);
  Descriptors d{};
  if (i.r[0].at >= 0) d.a = get<uint64_t>(w, i.r[0], 0);
  d.b = get<uint64_t>(w, i.r[1], 0);
  const Lanes p = w.predicate(i.r[2]);
  if (p && p != kAllLanes) fail(w, i, lanes, "threads disagree on whether it accumulates");
  d.accumulate = p != 0;
  if (kind_to_mistakes)
    multiply(w, i, d);
  else
    w.wgmma_open.push_back([&w, &i, d] { multiply(w, i, d); });
  return Flow::next;
}
Flow wgmma_commit(Warp& w, const Instruction& i, Lanes lanes) {
  need_all(w, i, lanes);
  w.wgmma_committed.push_back(std::move(w.wgmma_open));
  w.wgmma_open.clear();
  ++w.wgmma_groups;
  ++w.block->cluster->progress;
  return Flow::next;
}
// A product is one operation of four warps: it begins when all have issued it, and who sees it complete knows that the
// others' rows are, too. CUTLASS relies on that: one thread of the four warps gives a stage back.
Flow wgmma_wait(Warp& w, const Instruction& i, Lanes lanes) {
  need_all(w, i, lanes);
  const uint64_t left = std::min<uint64_t>(w.wgmma_groups, i.offset), wanted = w.wgmma_groups - left;
  if (!committed(w, wanted)) {
    Wait wait{Wait::warpgroup};
    wait.generation = wanted;
    return w.block_on(wait, false);
  }
  for (int k = 0; k < 4; ++k) {
    Warp& other = w.block->warps[w.index / 4 * 4 + k];
    auto& groups = other.wgmma_committed;
    for (; !groups.empty() && other.wgmma_groups - groups.size() < wanted; groups.pop_front())
      for (const auto& product : groups.front()) product();
  }
  return Flow::next;
}
Flow nothing(Warp&, const Instruction&, Lanes) { return Flow::next; }

}  // namespace

bool committed(const Warp& w, uint64_t groups) {
  const auto& warps = w.block->warps;
  const size_t first = w.index / 4 * 4;
  if (first + 4 > warps.size()) throw Error("a warpgroup of fewer than four warps");
  return std::all_of(&warps[first], &warps[first] + 4, [&](const Warp& each) { return each.wgmma_groups >= groups; });
}

bool assemble_tensor_core(Assembler& a, const Statement& s, Instruction& i) {
  const auto list = [&](const Operand& o, bool target) {
    for (const Operand& part : o.parts) i.more.push_back(target ? a.target(part) : a.source(part));
  };
  const std::string name = s.text();
  if (s.name == "ldmatrix" || s.name == "stmatrix") {
    const bool load = s.name == "ldmatrix";
    if (!s.has("m8n8") || s.modifiers.back() != "b16") a.unknown(s);
    i.kind[0] = s.has("trans");
    i.addresses = {a.address(s.operands.at(load ? 1 : 0))};
    const Operand& o = s.operands.at(load ? 0 : 1);
    if (o.kind == Operand::list)
      list(o, load);
    else
      i.more.push_back(load ? a.target(o) : a.source(o));
    i.run = load ? matrices<true> : matrices<false>;
    return true;
  }
  if (s.name == "mma") {
    // mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 d, a, b, c, with .satfinite behind col or at the end
    std::vector<std::string> types = s.modifiers;
    std::erase(types, "satfinite");
    if (!name.starts_with("mma.sync.aligned.m16n8k32.row.col.") || types.size() != 9 || types[5] != "s32" ||
        types[8] != "s32")
      a.unknown(s);
    const std::string &at = types[6], &bt = types[7];
    if ((at != "s8" && at != "u8") || (bt != "s8" && bt != "u8")) a.unknown(s);
    i.kind[0] = at == "s8", i.kind[1] = bt == "s8", i.kind[2] = s.has("satfinite");
    for (size_t k = 0; k < 4; ++k) list(s.operands.at(k), k == 0);
    if (i.more.size() != 14) a.unknown(s);
    i.run = mma_bytes;
    return true;
  }
  if (s.name != "wgmma") return false;
  if (s.has("fence")) {
    i.run = nothing;
  } else if (s.has("commit_group")) {
    i.run = wgmma_commit;
  } else if (s.has("wait_group")) {
    i.run = wgmma_wait;
    i.offset = static_cast<int64_t>(s.operands.at(0).bits);
  } else if (s.has("mma_async")) {
    // wgmma.mma_async.sync.aligned.m64n128k32.s32[.satfinite].u8.s8 d, a, b, accumulate
    const std::string &shape = s.modifiers.at(3), &bt = s.modifiers.back(), &at = s.modifiers[s.modifiers.size() - 2];
    const size_t k = shape.find('k');
    if (!shape.starts_with("m64n") || shape.substr(k) != "k32" || !s.has("s32")) a.unknown(s);
    if ((at != "s8" && at != "u8") || (bt != "s8" && bt != "u8") || s.operands.size() != 4) a.unknown(s);
    i.kind[0] = at == "s8", i.kind[1] = bt == "s8", i.kind[2] = s.has("satfinite");
    i.kind[3] = static_cast<uint8_t>(std::stoi(shape.substr(4, k - 4)) / 8);
    list(s.operands[0], true);
    if (i.more.size() != i.kind[3] * 4u) a.unknown(s);
    if (s.operands[1].kind == Operand::list)
      list(s.operands[1], false);
    else
      i.r[0] = a.source(s.operands[1], 64);
    i.r[1] = a.source(s.operands[2], 64);
    Operand accumulate = s.operands[3];
    if (accumulate.kind == Operand::number && accumulate.bits)
      accumulate.bits = kAllLanes;
    else if (accumulate.kind != Operand::reg && accumulate.kind != Operand::number)
      a.unknown(s);
    i.r[2] = a.source(accumulate);
    i.run = wgmma;
  } else {
    a.unknown(s);
  }
  return true;
}

}  // namespace emulator
