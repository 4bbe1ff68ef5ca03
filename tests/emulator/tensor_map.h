// What a TMA descriptor of the emulated driver holds, in the 128 bytes of a CUtensorMap.
#pragma once

#include <cstdint>

namespace emulator {

struct TensorMap {
  static constexpr uint32_t kMagic = 0x7E45A17Eu;
  uint32_t magic;
  uint8_t rank, element;  // bytes of an element
  uint8_t swizzle;        // the width of its rows, 32, 64 or 128 bytes; 0: none
  uint8_t im2col;
  uint64_t address;
  uint32_t size[5];    // innermost first
  uint64_t stride[5];  // bytes; [0] is the element's
  uint16_t box[5];     // im2col: channels and pixels
  uint8_t step[5];     // elementStrides
  int16_t lower[3], upper[3];
};
static_assert(sizeof(TensorMap) <= 128);

}  // namespace emulator
