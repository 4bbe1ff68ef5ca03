// int8 GEMM on sm_90a: TMA fills a ring of shared-memory stages, wgmma multiplies u8 by s8 straight from them, and the
// epilogue of gemm.h is one node of a visitor tree over the accumulators in registers, stored through shared memory by
// TMA.
//
// Swapped configurations compute d^T = b a^T: wgmma's M is at least 64, its N can be 16, so the few rows of a small
// problem lie along N. They take no residual: its copies would be of single bytes.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/kernel_hardware_info.hpp>

#include "cuda/gemm/finish.h"

namespace pykernels::PYKERNELS_ISA_NS {

namespace fusion = cutlass::epilogue::fusion;
using cute::_0;
using cute::_1;
using cute::Shape;
using cute::Stride;

// The residual, loaded by TMA as the epilogue's C, where there is one.
template <class Out>
struct ResidualFetch : fusion::Sm90SrcFetch<Out> {
  using Base = fusion::Sm90SrcFetch<Out>;
  struct Arguments {
    bool present;
  };
  using Params = Arguments;
  using typename Base::SharedStorage;
  template <class Shape>
  static constexpr Params to_underlying_arguments(const Shape&, const Arguments& args, void*) {
    return args;
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  CUTLASS_HOST_DEVICE ResidualFetch() {}
  CUTLASS_HOST_DEVICE ResidualFetch(const Params& params, const SharedStorage&) : present(params.present) {}
  CUTLASS_DEVICE bool is_C_load_needed() const { return present; }
  CUTLASS_DEVICE bool is_producer_load_needed() const { return present; }
  bool present = false;
};

template <class Out>
struct FinishNode : fusion::Sm90VisitorImpl<> {
  using Arguments = Finish;
  using Params = Finish;
  struct SharedStorage {};
  template <class Shape>
  static constexpr Params to_underlying_arguments(const Shape&, const Arguments& args, void*) {
    return args;
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  CUTLASS_HOST_DEVICE FinishNode() {}
  CUTLASS_HOST_DEVICE FinishNode(const Params& params, const SharedStorage&) : params(&params) {}
  const Params* params = nullptr;

  struct ConsumerStoreCallbacks : fusion::detail::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE explicit ConsumerStoreCallbacks(const Params* params) : params(params) {}
    const Params* params;
    template <int N, class... Residual>
    CUTLASS_DEVICE cutlass::Array<Out, N> visit(const cutlass::Array<int, N>& acc, int, int, int,
                                                const cutlass::Array<float, N>& row_scale,
                                                const cutlass::Array<int, N>& row_zero,
                                                const cutlass::Array<float, N>& column_scale,
                                                const cutlass::Array<int, N>& column_sum,
                                                const cutlass::Array<float, N>& bias, const Residual&... residual) {
      return finish<Out>(*params, acc, row_scale, row_zero, column_scale, column_sum, bias, residual...);
    }
  };
  template <bool ReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const fusion::detail::ConsumerStoreArgs<Args...>&) {
    return ConsumerStoreCallbacks(params);
  }
};

// Tile and Cluster are the kernel's own (m, n, k): of a swapped one, m runs along the output channels.
template <class Out, bool Swap, class Tile, class Cluster, class Mainloop, class EpilogueSchedule>
struct Sm90Gemm {
  template <class T>
  using AlongM = fusion::Sm90ColBroadcast<0, Tile, T, T, Stride<_1, _0, _0>, 4>;
  template <class T>
  using AlongN = fusion::Sm90RowBroadcast<0, Tile, T, T, Stride<_0, _1, _0>, 4>;
  template <class T>
  using Row = std::conditional_t<Swap, AlongN<T>, AlongM<T>>;
  template <class T>
  using Column = std::conditional_t<Swap, AlongM<T>, AlongN<T>>;
  template <class... Residual>
  using TreeWith =
      fusion::Sm90EVT<FinishNode<Out>, Row<float>, Row<int>, Column<float>, Column<int>, Column<float>, Residual...>;
  using Tree = std::conditional_t<Swap, TreeWith<>, TreeWith<ResidualFetch<Out>>>;
  using ElementC = std::conditional_t<Swap, void, Out>;

  using LayoutD = std::conditional_t<Swap, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  static constexpr int kAlignD = 16 / sizeof(Out);
  // 32 columns at a time: wider ones keep so many column_* numbers in registers that some are spilled.
  static constexpr bool kCooperative =
      std::is_same_v<EpilogueSchedule, cutlass::epilogue::TmaWarpSpecializedCooperative>;
  using EpilogueTile = Shape<cute::Int<kCooperative ? 128 : 64>, cute::Int<std::min(32, int(cute::size<1>(Tile{})))>>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, EpilogueTile, int, float, ElementC, LayoutD,
      kAlignD, Out, LayoutD, kAlignD, EpilogueSchedule, Tree>::CollectiveOp;
  using ElementA = std::conditional_t<Swap, int8_t, uint8_t>;
  using ElementB = std::conditional_t<Swap, uint8_t, int8_t>;
  using Loop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, ElementA, cutlass::layout::RowMajor, 16, ElementB,
      cutlass::layout::ColumnMajor, 16, int, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      Mainloop>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Loop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static const char* run(const Problem& p) {
    if (Swap && p.residual) return "a swapped configuration takes no residual";
    cutlass::KernelHardwareInfo hardware;
    if (cudaGetDevice(&hardware.device_id) != cudaSuccess) return "no CUDA device";
    hardware.sm_count = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(hardware.device_id);
    const int m = Swap ? p.n : p.m, n = Swap ? p.m : p.n;
    const ElementA* a;
    const ElementB* b;
    if constexpr (Swap)
      a = p.b, b = p.a;
    else
      a = p.a, b = p.b;
    typename Kernel::StrideA stride_a{p.k, {}, {}};
    typename Kernel::StrideB stride_b{p.k, {}, {}};
    typename Kernel::StrideD stride_d{};
    if constexpr (Swap)
      cute::get<1>(stride_d) = p.n;
    else
      cute::get<0>(stride_d) = p.n;
    Out* d = static_cast<Out*>(p.d);
    const Out* residual = p.residual ? static_cast<const Out*>(p.residual) : d;  // a descriptor is made in any case
    typename Row<float>::Arguments row_scale{p.row_scale, p.row_scale_value, {}};
    typename Row<int>::Arguments row_zero{p.row_zero, p.row_zero_value, {}};
    typename Column<float>::Arguments column_scale{p.column_scale, 0.0f, {}};
    typename Column<int>::Arguments column_sum{p.column_sum, 0, {}};
    typename Column<float>::Arguments bias{p.bias, -0.0f, {}};  // x + -0 is x, whatever x
    const auto tree = [&] {
      if constexpr (Swap)
        return typename Tree::Arguments{row_scale, row_zero, column_scale, column_sum, bias, p.finish};
      else
        return typename Tree::Arguments{row_scale, row_zero, column_scale, column_sum, bias, {p.residual != nullptr},
                                        p.finish};
    }();
    typename Gemm::Arguments args{cutlass::gemm::GemmUniversalMode::kGemm,
                                  {m, n, p.k, 1},
                                  {a, stride_a, b, stride_b},
                                  {tree, residual, stride_d, d, stride_d},
                                  hardware};
    Gemm gemm;
    if (gemm.can_implement(args) != cutlass::Status::kSuccess) return "CUTLASS cannot run this shape";
    if (Gemm::get_workspace_size(args) != 0) return "CUTLASS asks for a workspace";
    const cutlass::Status status = gemm.run(args, nullptr, p.stream);
    return status == cutlass::Status::kSuccess ? nullptr : cutlassGetStatusString(status);
  }
};

template <bool Swap, class Tile, class Cluster, class Mainloop, class EpilogueSchedule>
constexpr gemm::Config sm90_config(const char* name) {
  return {name,
          90,
          {Sm90Gemm<int8_t, Swap, Tile, Cluster, Mainloop, EpilogueSchedule>::run,
           Sm90Gemm<uint16_t, Swap, Tile, Cluster, Mainloop, EpilogueSchedule>::run,
           Sm90Gemm<float, Swap, Tile, Cluster, Mainloop, EpilogueSchedule>::run}};
}

}  // namespace pykernels::PYKERNELS_ISA_NS
