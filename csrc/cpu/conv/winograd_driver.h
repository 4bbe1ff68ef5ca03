// A 3x3 convolution of fp32 by Winograd's tiles (winograd.h), where that is faster. Torch-free.
#pragma once

#include <memory>
#include <vector>

#include "cpu/conv/driver.h"
#include "cpu/conv/winograd.h"

namespace pykernels {

// Whether convolutions may run so: not with PYKERNELS_WINOGRAD=0. set_winograd() says what held before (for tests).
bool winograd_allowed();
bool set_winograd(bool allowed);

// U of some packed weights: [n * n][panels][channels][16 columns].
struct WinogradWeights {
  struct alignas(kBlockBytes) Block {
    float column[kColumns];
  };
  int64_t m;
  std::vector<Block> blocks;
};

// The side m of the tiles by which this convolution should run: 2 or 4, or 0 for none. It depends on the geometry of
// one image alone, so that neither batch, threads, isa nor tuning change an answer's bits.
int64_t winograd_tile(const ConvShape& shape, const PackedView& weights);

// One U for all who hold it and, `keep`, for whoever asks for the same weights later: the last 1 GiB are kept. Weights
// are the same where their bytes are.
std::shared_ptr<const WinogradWeights> winograd_weights(const PackedView& weights, int64_t m, bool keep);
// Keeps none but those that somebody holds.
void forget_winograd_weights();

// Operands: x in channels_last, residual.
class WinogradDriver final : public Driver {
 public:
  WinogradDriver(const ConvShape& shape, const PackedView& weights, const Epilogue& e,
                 std::shared_ptr<const WinogradWeights> transformed, int64_t threads);
  void bind(const uint8_t* const* in, uint8_t* out) override;
  void run(int64_t task, uint8_t* memory) const override;

  int64_t operations() const;  // of the products

 private:
  struct Work;
  void split(int64_t threads);
  int64_t all_tiles() const { return s_.n * down_ * across_; }
  int64_t positions() const { return (m_ + 2) * (m_ + 2); }
  void bring(const Work& w, int64_t tile, int64_t count) const;
  void multiply(const Work& w, int64_t tile, int64_t count) const;

  ConvShape s_;
  PackedView packed_;
  Epilogue e_;
  Folded folded_;
  std::shared_ptr<const WinogradWeights> u_;
  const DotKernel* dot_;
  void (*epilogue_)(const Epilogue&, const EpilogueArgs&);
  WinogradTile kernel_;
  const float* x_ = nullptr;
  int64_t m_, down_, across_;  // tiles of an image
  int64_t tile_splits_ = 1, panel_splits_ = 1;
  int64_t block_ = 1;         // tiles at a time
  int64_t row_, v_step_ = 0;  // floats between the tiles and the positions of V
};

// Whether weights are worth a transform: not those of one call, those of a driver that is kept, those of calls to come.
enum class Weights { once, held, called };

// What multiplies, over ConvPixels: dot tiles or Winograd's. Operands: x, residual.
struct ConvProducts {
  std::unique_ptr<Driver> driver;
  const char* kernel;
  int64_t operations, weight_bytes;
};
ConvProducts conv_products(const ConvShape& shape, const PackedView& weights, const Epilogue& e, uint8_t fill,
                           uint8_t flip, const Tiling& tiling, int64_t threads, Weights are);

}  // namespace pykernels
