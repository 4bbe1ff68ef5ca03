// TMA: copies of boxes of a tensor, or of pixels as a convolution visits them, between global and shared memory.
#include "emulator/tensor_map.h"

#include <algorithm>

#include "emulator/copy.h"

namespace emulator {

namespace {

struct Transfer {
  TensorMap map;
  int64_t at[5];      // coordinates
  int64_t offset[3];  // im2col: of the filter's tap, w first
};

// Calls f(global address or 0 where there is none, shared offset of the row, bytes) for every row of the innermost
// dimension.
template <class F>
void each_row(const Transfer& t, F f) {
  const TensorMap& m = t.map;
  const uint32_t row_bytes = m.box[0] * m.element;
  // The part of a row that is in bounds: [begin, end) elements of it.
  const int64_t begin = std::clamp<int64_t>(-t.at[0], 0, m.box[0]),
                end = std::clamp<int64_t>(int64_t{m.size[0]} - t.at[0], begin, m.box[0]);
  uint32_t row = 0;
  const auto visit = [&](const int64_t* coordinates) {  // of dimensions 1 on
    uint64_t address = m.address + static_cast<uint64_t>(t.at[0] * m.element);
    bool inside = end > begin;
    for (int d = 1; d < m.rank; ++d) {
      inside &= coordinates[d] >= 0 && coordinates[d] < int64_t{m.size[d]};
      address += static_cast<uint64_t>(coordinates[d]) * m.stride[d];
    }
    f(address, row * row_bytes, inside ? static_cast<uint32_t>(begin * m.element) : 0,
      inside ? static_cast<uint32_t>(end * m.element) : 0);
    ++row;
  };
  int64_t c[5];
  std::copy(t.at, t.at + 5, c);
  if (!m.im2col) {
    uint32_t rows = 1;
    for (int d = 1; d < m.rank; ++d) rows *= (m.box[d] + m.step[d] - 1) / m.step[d];
    for (uint32_t r = 0; r < rows; ++r) {
      uint32_t rest = r;
      for (int d = 1; d < m.rank; ++d) {
        const uint32_t count = (m.box[d] + m.step[d] - 1) / m.step[d];
        c[d] = t.at[d] + int64_t{rest % count} * m.step[d];
        rest /= count;
      }
      visit(c);
    }
    return;
  }
  // Pixels: the innermost spatial dimension first, each within the bounding box; then the next image.
  const int spatial = m.rank - 2;
  for (uint32_t pixel = 0; pixel < m.box[1]; ++pixel) {
    int64_t tap[5];
    std::copy(c, c + 5, tap);
    for (int d = 0; d < spatial; ++d) tap[1 + d] += t.offset[d];
    visit(tap);
    int d = 0;
    for (; d < spatial; ++d) {
      c[1 + d] += m.step[1 + d];
      if (c[1 + d] < int64_t{m.size[1 + d]} + m.upper[d]) break;
      c[1 + d] = m.lower[d];
    }
    if (d == spatial) ++c[m.rank - 1];
  }
}

uint32_t swizzled(uint32_t address, uint32_t width) {
  return width ? address ^ ((address >> 7 & 7 & (width / 16 - 1)) << 4) : address;
}

uint32_t box_bytes(const TensorMap& m) {
  uint32_t bytes = m.element * m.box[0];
  if (m.im2col) return bytes * m.box[1];
  for (int d = 1; d < m.rank; ++d) bytes *= (m.box[d] + m.step[d] - 1) / m.step[d];
  return bytes;
}

Transfer transfer(const Warp& w, const Instruction& i, int lane) {
  const uint64_t address = address_of(w, i.addresses[1], lane);
  if (address % 64) fail(w, i, 1u << lane, "misaligned tensor map");
  Transfer t{};
  std::memcpy(&t.map, reinterpret_cast<const void*>(address), sizeof t.map);
  if (t.map.magic != TensorMap::kMagic) fail(w, i, 1u << lane, "no tensor map is there");
  if (t.map.rank != i.kind[0] || t.map.im2col != i.kind[1]) fail(w, i, 1u << lane, "a tensor map of another kind");
  for (int d = 0; d < t.map.rank; ++d) t.at[d] = get<int32_t>(w, i.more[d], lane);
  if (t.map.im2col)
    for (int d = 0; d < t.map.rank - 2; ++d) t.offset[d] = get<uint16_t>(w, i.more[t.map.rank + d], lane);
  return t;
}

// The shared memory of a box, from its first byte, in the block that has it.
uint8_t* box(const Warp& w, const Instruction& i, int lane, Block& block, uint32_t at, const TensorMap& m) {
  const uint32_t alignment = 128;
  if (at % alignment) fail(w, i, 1u << lane, "a box in shared memory begins at no multiple of 128 bytes");
  if (at < kSharedBegin || at - kSharedBegin + box_bytes(m) > block.shared.size())
    fail(w, i, 1u << lane, "a box leads out of shared memory");
  return block.shared.data() - kSharedBegin;
}

// addresses: the box, the map, the mbarrier. more: coordinates, offsets. r[0]: the blocks of a multicast.
Flow load(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) {
    const Transfer t = transfer(w, i, l);
    uint32_t at = static_cast<uint32_t>(address_of(w, i.addresses[0], l));
    uint32_t barrier = static_cast<uint32_t>(address_of(w, i.addresses[2], l));
    Block& block = shared_block(w, i, l, at);
    Block& told = shared_block(w, i, l, barrier);
    if (&block != &told) fail(w, i, 1u << l, "the mbarrier is another block's");
    auto& blocks = w.block->cluster->blocks;
    uint32_t receivers = i.r[0].at >= 0 ? get<uint32_t>(w, i.r[0], l) & 0xffff : 1u << block.rank;
    if (receivers >> blocks.size()) fail(w, i, 1u << l, "a multicast to blocks that are not there");
    for (; receivers; receivers &= receivers - 1) {
      Block& to = *blocks[std::countr_zero(receivers)];
      if (!to.threads) fail(w, i, 1u << l, "a copy to a block that has ended");
      mbarrier(w, i, l, to, barrier);
      uint8_t* shared = box(w, i, l, to, at, t.map);
      each_row(t, [&](uint64_t address, uint32_t, uint32_t begin, uint32_t end) {
        if (begin < end)
          memory(w, i, l, Space::global, address + begin, 1, false),
              memory(w, i, l, Space::global, address + end - 1, 1, false);
      });
      later({&to, barrier, [t, at, shared, &to, barrier] {
               each_row(t, [&](uint64_t address, uint32_t offset, uint32_t begin, uint32_t end) {
                 for (uint32_t byte = 0; byte < uint32_t{t.map.box[0]} * t.map.element; ++byte)
                   shared[swizzled(at + offset + byte, t.map.swizzle)] =
                       byte >= begin && byte < end ? reinterpret_cast<const uint8_t*>(address)[byte] : 0;
               });
               std::fill_n(&to.unfenced[(at - kSharedBegin) / 16], box_bytes(t.map) / 16, 0);
               complete(to, barrier, box_bytes(t.map));
             }});
    }
  });
  return Flow::next;
}

// addresses: the box, the map.
Flow store(Warp& w, const Instruction& i, Lanes lanes) {
  each(lanes, [&](int l) {
    const Transfer t = transfer(w, i, l);
    uint32_t at = static_cast<uint32_t>(address_of(w, i.addresses[0], l));
    Block& block = shared_block(w, i, l, at);
    const uint8_t* shared = box(w, i, l, block, at, t.map);
    need_fence(w, i, l, block, at, box_bytes(t.map));
    each_row(t, [&](uint64_t address, uint32_t, uint32_t begin, uint32_t end) {
      if (begin < end)
        memory(w, i, l, Space::global, address + begin, 1, true),
            memory(w, i, l, Space::global, address + end - 1, 1, true);
    });
    store_later(w, l, [t, at, shared] {
      each_row(t, [&](uint64_t address, uint32_t offset, uint32_t begin, uint32_t end) {
        for (uint32_t byte = begin; byte < end; ++byte)
          reinterpret_cast<uint8_t*>(address)[byte] = shared[swizzled(at + offset + byte, t.map.swizzle)];
      });
    });
  });
  return Flow::next;
}

}  // namespace

bool assemble_tensor_map(Assembler& a, const Statement& s, Instruction& i) {
  if (s.name != "cp" || !s.has("tensor") || s.has("reduce") || s.has("prefetch")) return false;
  const bool loads = s.has("mbarrier::complete_tx::bytes");
  const Operand& map = s.operands.at(loads ? 1 : 0);
  const auto rank = std::find_if(s.modifiers.begin(), s.modifiers.end(),
                                 [](const std::string& m) { return m.size() == 2 && m[1] == 'd'; });
  if (rank == s.modifiers.end() || map.parts.size() != 2) a.unknown(s);
  i.kind[0] = static_cast<uint8_t>((*rank)[0] - '0');
  i.kind[1] = s.has("im2col");
  for (const Operand& o : map.parts[1].parts) i.more.push_back(a.source(o));
  if (i.more.size() != i.kind[0]) a.unknown(s);
  if (!loads) {
    if (i.kind[1]) a.unknown(s);
    i.addresses = {a.address(s.operands.at(1)), a.address(map)};
    i.run = store;
    return true;
  }
  i.addresses = {a.address(s.operands.at(0)), a.address(map), a.address(s.operands.at(2))};
  size_t next = 3;
  if (i.kind[1])
    for (const Operand& o : s.operands.at(next++).parts) i.more.push_back(a.source(o));
  if (s.has("multicast::cluster")) i.r[0] = a.source(s.operands.at(next++));
  i.run = load;
  return true;
}

}  // namespace emulator
