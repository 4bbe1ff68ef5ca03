// Dot tiles in AMX's registers: up to 16 rows by 4 panels, a step of 16 words at a time. A panel's blocks are what the
// instructions want of their second operand; rows of the first are loaded where they stand if they do so evenly, else
// copied to be. For dot.cpp on the isa amx.
#pragma once

#include "cpu/isa/amx.h"
#include "cpu/isa/loops.h"
#include "cpu/tile/kernels.h"

namespace pykernels::PYKERNELS_ISA_NS {
namespace {

// Registers 0 to 3 hold the sums of the panels; 4 and 5 are the operands of whole steps, 6 and 7 of the words left
// over.
constexpr int kStep = 16, kTileRows = 16, kTilePanels = 4;
constexpr int64_t kUneven = INT64_MIN;  // a stride that is none

struct AmxS8 {
  static constexpr bool kStarts = true;  // sums of bytes
  template <int c, int a, int b>
  PK_INLINE void mac() {
    tmm::dot_u8s8<c, a, b>();
  }
};
struct AmxBF16 {
  static constexpr bool kStarts = false;  // with the zeros that a configuration brings
  template <int c, int a, int b>
  PK_INLINE void mac() {
    tmm::dot_bf16<c, a, b>();
  }
};

// The panels' products with the rows in register a.
template <class Dot, int kPanels, int a>
PK_INLINE void mac_panels(const uint8_t* b, int64_t panel_bytes) {
  if constexpr (kPanels > 0) {
    mac_panels<Dot, kPanels - 1, a>(b, panel_bytes);
    tmm::load<a + 1>(b + (kPanels - 1) * panel_bytes, kBlockBytes);
    Dot::template mac<kPanels - 1, a, a + 1>();
  }
}

// Every row of sums begins alike.
template <int kPanels>
PK_INLINE void start_panels(const int32_t* start) {
  if constexpr (kPanels > 0) {
    start_panels<kPanels - 1>(start);
    tmm::load<kPanels - 1>(start + (kPanels - 1) * 16, 0);
  }
}

template <int kPanels>
PK_INLINE void store_panels(uint8_t* c, int64_t stride) {
  if constexpr (kPanels > 0) {
    store_panels<kPanels - 1>(c, stride);
    tmm::store<kPanels - 1>(c + (kPanels - 1) * kBlockBytes, stride);
  }
}

// `words` words of every row at offset, times those of the blocks at b; a: the register of the rows.
template <class Dot, int kPanels, int a>
PK_INLINE void step(const DotArgs& g, const uint8_t* const* row, int rows, int64_t stride, int64_t offset, int words,
                    const uint8_t* b) {
  alignas(64) uint8_t copy[kTileRows * kBlockBytes];
  if (stride == kUneven) {
    for (int r = 0; r < rows; ++r) std::memcpy(copy + r * kBlockBytes, row[r] + offset, 4 * words);
    tmm::load<a>(copy, kBlockBytes);
  } else {
    tmm::load<a>(row[0] + offset, stride);
  }
  mac_panels<Dot, kPanels, a>(b, g.panel_bytes);
}

template <class Dot, int kPanels>
__attribute__((noinline)) void in_tiles(const DotArgs& g, int rows) {
  const int left = static_cast<int>(g.words % kStep);
  tmm::Config config;
  const auto size = [&](int t, int rows_of, int words) PK_LAMBDA {
    config.rows[t] = static_cast<uint8_t>(rows_of), config.bytes[t] = static_cast<uint16_t>(4 * words);
  };
  for (int t = 0; t < kTilePanels; ++t) size(t, rows, kStep);
  size(4, rows, kStep), size(5, kStep, kStep);
  const int last = left > 0 ? left : kStep;
  size(6, rows, last), size(7, last, kStep);
  tmm::configure(config);
  if constexpr (Dot::kStarts) start_panels<kPanels>(g.start);
  for (int64_t t = 0; t < g.taps; ++t) {
    const uint8_t* const* row = g.a + t * g.a_step;
    int64_t offset = g.a_offset + g.tap[t].a, stride = rows > 1 ? row[1] - row[0] : kBlockBytes;
#pragma GCC unroll 1
    for (int r = 2; r < rows; ++r)
      if (row[r] - row[r - 1] != stride) stride = kUneven;
    const uint8_t* b = g.panels + g.tap[t].b;
    for (int64_t w = g.words; w >= kStep; w -= kStep, offset += kBlockBytes, b += kStep * kBlockBytes)
      step<Dot, kPanels, 4>(g, row, rows, stride, offset, kStep, b);
    if (left > 0) step<Dot, kPanels, 6>(g, row, rows, stride, offset, left, b);
  }
  store_panels<kPanels>(static_cast<uint8_t*>(g.c), kPanels * kBlockBytes);
  tmm::release();
}

template <class Dot, int kRows, int kPanels>
void rows_in_tiles(const DotArgs& g) {
  in_tiles<Dot, kPanels>(g, kRows);
}

template <class Dot, int kRows, int kPanels>
constexpr void fill_tiles(DotKernel& kernel) {
  if constexpr (kPanels <= kTilePanels) {
    kernel.tile[kRows][kPanels] = &rows_in_tiles<Dot, kRows, kPanels>;
    fill_tiles<Dot, kRows, kPanels + 1>(kernel);
  } else if constexpr (kRows < kTileRows) {
    fill_tiles<Dot, kRows + 1, 1>(kernel);
  }
}

template <class Dot>
constexpr DotKernel tile_kernel(void (*stage)(const uint8_t*, int64_t, uint8_t, uint8_t*)) {
  DotKernel k{};
  k.max_rows = kTileRows;
  k.word_bytes = 4;
  k.stage = stage;
  for (int r = 1; r <= kTileRows; ++r) k.max_panels[r] = kTilePanels;
  fill_tiles<Dot, 1, 1>(k);
  return k;
}

}  // namespace
}  // namespace pykernels::PYKERNELS_ISA_NS
