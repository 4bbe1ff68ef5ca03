// int8 GEMM on sm_90a: TMA fills a ring of shared-memory stages, and wgmma multiplies u8 by s8 straight from them.
//
// Swapped configurations compute d^T = b a^T: wgmma's M is at least 64, its N can be 16, so the few rows of a small
// problem lie along N.
#pragma once

#include "cuda/epilogue/sm90.h"
#include "cuda/gemm/gemm.h"

namespace pykernels::PYKERNELS_ISA_NS {

// Tile and Cluster are the kernel's own (m, n, k): of a swapped one, m runs along the output channels.
// Band: of clusters, as Sm90Epilogue::run takes it; it makes no kernel of its own.
template <class Out, bool Swap, class Tile, class Cluster, class Schedule, class EpilogueSchedule, int Band>
const char* sm90_gemm(const gemm::Problem& p) {
  using End = Sm90Epilogue<Out, Swap, Tile, Cluster, EpilogueSchedule>;
  using ElementA = std::conditional_t<Swap, int8_t, uint8_t>;
  using ElementB = std::conditional_t<Swap, uint8_t, int8_t>;
  using Mainloop = Sm90Mainloop<ElementA, ElementB, Tile, Cluster, typename End::Stages, Schedule>;
  const typename Mainloop::StrideA stride_a{p.k, {}, {}};
  const typename Mainloop::StrideB stride_b{p.k, {}, {}};
  if constexpr (Swap)
    return End::template run<Mainloop>(p.n, p.m, p.k, {p.b, stride_a, p.a, stride_b}, p.epilogue, p.stream, Band);
  else
    return End::template run<Mainloop>(p.m, p.n, p.k, {p.a, stride_a, p.b, stride_b}, p.epilogue, p.stream, Band);
}

// Bytes: the cluster of outputs of bytes, where it is another one.
template <bool Swap, class Tile, class Cluster, class Schedule, class EpilogueSchedule, int Band = 1,
          class Bytes = Cluster>
constexpr gemm::Config sm90_config(const char* name) {
  return {name,
          90,
          {sm90_gemm<int8_t, Swap, Tile, Bytes, Schedule, EpilogueSchedule, Band>,
           sm90_gemm<uint16_t, Swap, Tile, Cluster, Schedule, EpilogueSchedule, Band>,
           sm90_gemm<float, Swap, Tile, Cluster, Schedule, EpilogueSchedule, Band>}};
}

}  // namespace pykernels::PYKERNELS_ISA_NS
