// int8 GEMM for sm_80 and later: cp.async fills a ring of shared-memory stages, mma.sync multiplies u8 by s8, and the
// epilogue of epilogue.h is one node of a visitor tree over the accumulators, exchanged through shared memory for whole
// 16-byte stores.
#pragma once

#include <cutlass/cutlass.h>
// in this order: the visitors include less than they use
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>

#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

#include "cuda/epilogue/finish.h"
#include "cuda/gemm/gemm.h"

namespace pykernels::PYKERNELS_ISA_NS {

namespace threadblock = cutlass::epilogue::threadblock;
using cute::_0;
using cute::_1;
using cute::Stride;

// The residual, where there is one: no row of an absent one is in bounds.
template <class Base>
struct ResidualLoad : Base {
  using Base::Base;
  template <class Shape>
  CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, Shape shape) {
    if (Base::params_ptr->ptr_aux == nullptr) cute::get<0>(shape) = 0;
    return Base::get_callbacks(tile, thread, shape);
  }
};

template <class Out>
struct FinishNode2x : threadblock::detail::VisitorImpl2x<> {
  using Arguments = Finish;
  using Params = Finish;
  struct SharedStorage {};
  template <class Shape>
  static constexpr Params to_underlying_arguments(const Shape&, const Arguments& args, void*) {
    return args;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  CUTLASS_HOST_DEVICE FinishNode2x() {}
  CUTLASS_HOST_DEVICE FinishNode2x(const Params& params, const SharedStorage&) : params(&params) {}
  const Params* params = nullptr;

  struct Callbacks : threadblock::detail::EmptyCallbacks {
    CUTLASS_DEVICE explicit Callbacks(const Params* params) : params(params) {}
    const Params* params;
    template <int N>
    CUTLASS_DEVICE cutlass::Array<Out, N> visit(int, int, int, int, const cutlass::Array<int, N>& acc,
                                                const cutlass::Array<float, N>& row_scale,
                                                const cutlass::Array<int, N>& row_zero,
                                                const cutlass::Array<float, N>& column_scale,
                                                const cutlass::Array<int, N>& column_sum,
                                                const cutlass::Array<float, N>& bias,
                                                const cutlass::Array<Out, N>& residual) {
      return finish<Out>(*params, acc, row_scale, row_zero, column_scale, column_sum, bias, residual);
    }
  };
  template <class Shape>
  CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord, int, Shape) {
    return Callbacks(params);
  }
};

// Saturation never happens: the op refuses a k whose sums could leave s32. CUTLASS has no plain u8 by s8.
// Tile and Warp: output tiles of a block and of a warp, as GemmShape<m, n, k>.
template <class Out, class Tile, class Warp, int Stages>
struct Sm80Gemm {
  // elements of a store: 16 bytes, but for narrow tiles of bytes, whose rows would be fewer than a warp's threads need
  static constexpr int kAlignD = sizeof(Out) == 1 && Tile::kN == 64 ? 8 : 16 / sizeof(Out);
  // names only how sums are exchanged, which depends on the width
  using ElementC = std::conditional_t<sizeof(Out) == 2, cutlass::bfloat16_t, Out>;
  using Map = threadblock::OutputTileThreadLayout<Tile, Warp, Out, kAlignD, 1>;
  using Matrix = Stride<int64_t, _1, int64_t>;
  template <class T>
  using Row = threadblock::VisitorColBroadcast<Map, T, Stride<_1, _0, int32_t>>;
  template <class T>
  using Column = threadblock::VisitorRowBroadcast<Map, T, Stride<_0, _1, int32_t>>;
  using Finished = threadblock::Sm80EVT<FinishNode2x<Out>, Row<float>, Row<int>, Column<float>, Column<int>,
                                        Column<float>, ResidualLoad<threadblock::VisitorAuxLoad<Map, Out, Matrix>>>;
  using Tree =
      threadblock::Sm80EVT<threadblock::VisitorAuxStore<Map, Out, cutlass::FloatRoundStyle::round_to_nearest, Matrix>,
                           Finished>;
  using Kernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
      uint8_t, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, 16, int8_t, cutlass::layout::ColumnMajor,
      cutlass::ComplexTransform::kNone, 16, ElementC, cutlass::layout::RowMajor, kAlignD, int, float,
      cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Tile, Warp, cutlass::gemm::GemmShape<16, 8, 32>, Tree,
      cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<4>, Stages, cutlass::arch::OpMultiplyAddSaturate,
      1>::GemmKernel;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static const char* run(const gemm::Problem& p) {
    const epilogue::Arguments& e = p.epilogue;
    const int64_t all = int64_t{p.m} * p.n;
    const Matrix matrix{p.n, _1{}, all};
    typename Finished::Arguments finished{{e.row_scale, e.row_scale_value, {}},
                                          {e.row_zero, e.row_zero_value, {}},
                                          {e.column_scale, 0.0f, {}},
                                          {e.column_sum, 0, {}},
                                          {e.bias, -0.0f, {}},  // x + -0 is x, whatever x
                                          {static_cast<Out*>(const_cast<void*>(e.residual)), Out(0), matrix},
                                          e.finish};
    typename Tree::Arguments tree{finished, {static_cast<Out*>(e.d), matrix}};
    typename Gemm::Arguments args(cutlass::gemm::GemmUniversalMode::kGemm, {p.m, p.n, p.k}, 1, tree, p.a, p.b, nullptr,
                                  nullptr, int64_t{p.m} * p.k, int64_t{p.n} * p.k, 0, 0, p.k, p.k, 0, 0);
    Gemm gemm;
    if (gemm.can_implement(args) != cutlass::Status::kSuccess) return "CUTLASS cannot run this shape";
    if (Gemm::get_workspace_size(args) != 0) return "CUTLASS asks for a workspace";
    const cutlass::Status status = gemm(args, nullptr, p.stream);
    return status == cutlass::Status::kSuccess ? nullptr : cutlassGetStatusString(status);
  }
};

template <class Tile, class Warp, int Stages>
constexpr gemm::Config sm80_config(const char* name) {
  return {name,
          80,
          {Sm80Gemm<int8_t, Tile, Warp, Stages>::run, Sm80Gemm<uint16_t, Tile, Warp, Stages>::run,
           Sm80Gemm<float, Tile, Warp, Stages>::run}};
}

}  // namespace pykernels::PYKERNELS_ISA_NS
