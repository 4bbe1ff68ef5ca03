// int8 convolution on sm_90a as an implicit GEMM: TMA in its im2col mode gathers the rows of A, pixels under one tap,
// from the input into a ring of shared-memory stages; all else is the persistent GEMM of gemm/sm90.h.
//
// CUTLASS's own convolutions of sm_90 are not persistent. Their collective is put under the persistent kernels of its
// GEMMs here: both ask the same of a main loop, once tensors have a batch mode.
#pragma once

#include "cuda/conv/conv.h"
#include "cuda/epilogue/sm90.h"
// after it: these include less than they use
#include <cutlass/conv/collective/collective_builder.hpp>
#include <cutlass/conv/convnd_problem_shape.hpp>

namespace pykernels::PYKERNELS_ISA_NS {

using Fprop = cutlass::conv::ConvProblemShape<cutlass::conv::Operator::kFprop, 2>;

// The layout of conv.h; K counts channels first, then taps along the width and the height, as w does.
inline Fprop fprop(const conv::Problem& p) {
  return Fprop(cutlass::conv::Mode::kCrossCorrelation, {p.images, p.height, p.width, p.channels},
               {p.out_channels, p.kernel[0], p.kernel[1], p.channels}, {p.before[0], p.before[1]},
               {p.after[0], p.after[1]}, {p.stride[0], p.stride[1]}, {p.dilation[0], p.dilation[1]}, 1);
}

// Base: CUTLASS's collective of a convolution, whose tile's depth is along the channels alone.
template <class Base, class Tile>
struct Im2colMainloop : Base {
  using TileShape = Tile;
  static constexpr int NumProducerThreadEvents = 1;
  using StrideA = Stride<int64_t, _1, int64_t>;  // as a GEMM's: only their rank is looked at
  using StrideB = StrideA;
  using Taps = Shape<int, int, int>;  // channels, kernel width, kernel height
  struct Arguments {
    Fprop shape;
    typename Base::Arguments pointers;
  };
  struct Params : Base::Params {
    Taps taps;
  };

  template <class Gemm>
  static Params to_underlying_arguments(const Gemm&, const Arguments& args, void* workspace) {
    const auto& w = args.shape.shape_B;
    return {Base::to_underlying_arguments(args.shape, args.pointers, workspace), {w[3], w[2], w[1]}};
  }
  template <class Gemm>
  static bool can_implement(const Gemm&, const Arguments& args) {
    return Base::can_implement(args.shape, args.pointers);
  }
  template <class Gemm>
  CUTLASS_DEVICE auto load_init(const Gemm& gemm, const Params& params) {
    const auto [a, b] = Base::load_init(
        cute::make_shape(cute::get<0>(gemm), cute::get<1>(gemm), params.taps, cute::get<3>(gemm)), params);
    return cute::make_tuple(batched(a), batched(b));
  }
  template <class A, class B, class Block, class Tiles>
  CUTLASS_DEVICE void load(const Params& params, typename Base::MainloopPipeline pipeline,
                           typename Base::PipelineState state, const cute::tuple<A, B>& inputs, const Block& block,
                           Tiles tile, int tiles, int thread, uint32_t rank, typename Base::TensorStorage& shared) {
    using cute::_;
    const auto [a, b] = inputs;
    Base::load(params, pipeline, state, cute::make_tuple(a(_, _, _, _, _0{}), b(_, _, _, _, _0{})), block, tile, tiles,
               thread, rank, shared);
  }

 private:
  template <class Tensor>
  CUTLASS_DEVICE static auto batched(const Tensor& t) {
    return cute::make_tensor(t.data(), cute::append<5>(t.layout(), cute::Layout<_1, _0>{}));
  }
};

// The schedule of a GEMM under a name of its own: CUTLASS knows its own for convolutions that are not persistent.
template <class Schedule>
struct Im2col : Schedule {};

// Multiplies as the GEMM's collective of these sizes does, from the same stages.
template <class Gemm, class Tile, class Cluster, class Schedule>
struct Im2colOf {
  static constexpr int kStages = Gemm::DispatchPolicy::Stages;
  template <class Copy, class Atom, class Rows>
  using Traits = cutlass::conv::collective::detail::Sm90ImplicitGemmTileTraits<
      Copy,
      decltype(cute::tile_to_shape(Atom{}, Shape<Rows, Shape<decltype(cute::size<2>(Tile{}))>, cute::Int<kStages>>{},
                                   cute::Step<cute::_2, cute::_1, cute::_3>{}))>;
  using CopyA =
      decltype(cutlass::conv::collective::detail::sm90_cluster_shape_to_im2col_tma_atom(cute::size<1>(Cluster{})));
  using CopyB = decltype(cutlass::gemm::collective::detail::sm90_cluster_shape_to_tma_atom(cute::size<0>(Cluster{})));
  using M = decltype(cute::size<0>(Tile{}));
  using N = decltype(cute::size<1>(Tile{}));
  using K = decltype(cute::size<2>(Tile{}));
  using type = Im2colMainloop<
      cutlass::conv::collective::CollectiveConv<
          cutlass::conv::MainloopSm90TmaGmmaWarpSpecializedImplicitGemm<cutlass::conv::Operator::kFprop, kStages, 2,
                                                                        Cluster, Im2col<Schedule>>,
          Shape<M, N, Shape<K>>, uint8_t, int8_t, typename Gemm::TiledMma,
          Traits<CopyA, typename Gemm::SmemLayoutAtomA, M>, Traits<CopyB, typename Gemm::SmemLayoutAtomB, N>>,
      Tile>;
};

template <class Out, class Tile, class Cluster, class Schedule, class EpilogueSchedule>
const char* sm90_conv(const conv::Problem& p) {
  using End = Sm90Epilogue<Out, false, Tile, Cluster, EpilogueSchedule>;
  using Mainloop = typename Im2colOf<Sm90Mainloop<uint8_t, int8_t, Tile, Cluster, typename End::Stages, Schedule>, Tile,
                                     Cluster, Schedule>::type;
  const int tile = cute::size<2>(Tile{});  // the last one of each tap ends in zeros
  const int depth = p.kernel[0] * p.kernel[1] * ((p.channels + tile - 1) / tile) * tile;
  return End::template run<Mainloop>(p.images * p.out_height * p.out_width, p.out_channels, depth,
                                     {fprop(p), {p.x, p.w}}, p.epilogue, p.stream);
}

template <class Tile, class Cluster, class Schedule, class EpilogueSchedule>
constexpr conv::Config sm90_conv_config(const char* name) {
  return {name,
          90,
          {sm90_conv<int8_t, Tile, Cluster, Schedule, EpilogueSchedule>,
           sm90_conv<uint16_t, Tile, Cluster, Schedule, EpilogueSchedule>,
           sm90_conv<float, Tile, Cluster, Schedule, EpilogueSchedule>}};
}

}  // namespace pykernels::PYKERNELS_ISA_NS
