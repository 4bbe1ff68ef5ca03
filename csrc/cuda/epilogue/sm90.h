// The epilogue of epilogue.h on sm_90a, and the launch of a persistent kernel that ends with it: one node of a visitor
// tree over the accumulators in registers, stored through shared memory by TMA. Beside them the main loop of a GEMM.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/kernel_hardware_info.hpp>

#include "cuda/epilogue/finish.h"

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

// K contiguous in both operands.
template <class A, class B, class Tile, class Cluster, class Stages, class Schedule>
using Sm90Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, A, cutlass::layout::RowMajor, 16, B,
    cutlass::layout::ColumnMajor, 16, int, Tile, Cluster, Stages, Schedule>::CollectiveOp;

// Tile and Cluster are the kernel's own (m, n, k): where Swap says that the product is d^T, m runs along the columns of
// d. A swapped epilogue takes no residual: its copies would be of single bytes.
template <class Out, bool Swap, class Tile, class Cluster, class Schedule>
struct Sm90Epilogue {
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
  using Layout = std::conditional_t<Swap, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  static constexpr int kAlign = 16 / sizeof(Out);
  // 32 columns at a time: wider ones keep so many column_* numbers in registers that some are spilled.
  static constexpr bool kCooperative = std::is_same_v<Schedule, cutlass::epilogue::TmaWarpSpecializedCooperative>;
  using EpilogueTile = Shape<cute::Int<kCooperative ? 128 : 64>, cute::Int<std::min(32, int(cute::size<1>(Tile{})))>>;
  using Collective = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, EpilogueTile, int, float, ElementC, Layout,
      kAlign, Out, Layout, kAlign, Schedule, Tree>::CollectiveOp;
  // Shared memory that the main loop's ring of stages leaves to it.
  using Stages =
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Collective::SharedStorage))>;

  // columns: of d.
  static typename Collective::Arguments arguments(const epilogue::Arguments& e, int columns) {
    typename Collective::StrideD stride{};
    if constexpr (Swap)
      cute::get<1>(stride) = columns;
    else
      cute::get<0>(stride) = columns;
    Out* d = static_cast<Out*>(e.d);
    const Out* residual = e.residual ? static_cast<const Out*>(e.residual) : d;  // a descriptor is made in any case
    typename Row<float>::Arguments row_scale{e.row_scale, e.row_scale_value, {}};
    typename Row<int>::Arguments row_zero{e.row_zero, e.row_zero_value, {}};
    typename Column<float>::Arguments column_scale{e.column_scale, 0.0f, {}};
    typename Column<int>::Arguments column_sum{e.column_sum, 0, {}};
    typename Column<float>::Arguments bias{e.bias, -0.0f, {}};  // x + -0 is x, whatever x
    const auto tree = [&] {
      if constexpr (Swap)
        return typename Tree::Arguments{row_scale, row_zero, column_scale, column_sum, bias, e.finish};
      else
        return typename Tree::Arguments{row_scale, row_zero, column_scale, column_sum, bias, {e.residual != nullptr},
                                        e.finish};
    }();
    return {tree, residual, stride, d, stride};
  }

  // One launch on the stream; null, or why it did not run. Tiles are taken in bands of up to `band` clusters, a power
  // of two, so that those at work at a time share rows and columns in the L2 cache; 1: row by row.
  template <class Mainloop>
  static const char* run(int m, int n, int k, const typename Mainloop::Arguments& mainloop,
                         const epilogue::Arguments& e, cudaStream_t stream, int band = 1) {
    using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Collective>;
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
    if (Swap && e.residual) return "a swapped configuration takes no residual";
    cutlass::KernelHardwareInfo hardware;
    if (cudaGetDevice(&hardware.device_id) != cudaSuccess) return "no CUDA device";
    hardware.sm_count = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(hardware.device_id);
    if constexpr (cute::size(Cluster{}) > 2) {  // which do not fill every part of the device
      static const int clusters = cutlass::KernelHardwareInfo::query_device_max_active_clusters<Kernel>();
      hardware.max_active_clusters = clusters;
    }
    typename Gemm::Arguments args{
        cutlass::gemm::GemmUniversalMode::kGemm, {m, n, k, 1}, mainloop, arguments(e, Swap ? m : n), hardware, {band}};
    Gemm gemm;
    if (gemm.can_implement(args) != cutlass::Status::kSuccess) return "CUTLASS cannot run this shape";
    if (Gemm::get_workspace_size(args) != 0) return "CUTLASS asks for a workspace";
    const cutlass::Status status = gemm.run(args, nullptr, stream);
    return status == cutlass::Status::kSuccess ? nullptr : cutlassGetStatusString(status);
  }
};

}  // namespace pykernels::PYKERNELS_ISA_NS
