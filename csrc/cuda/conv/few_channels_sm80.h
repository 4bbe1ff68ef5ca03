// The int8 convolution of few channels for sm_80 and later. A block copies the rows of the input under a tile of the
// output to shared memory, each pixel widened to a word, so that a word is one tap. Eight taps of a kernel row, or four
// of each of two, are the depth of an mma.sync.m16n8k32: its A are 16 neighbouring pixels of the output, loaded word by
// word; its B, the weights, stay in registers as long as the block lives. Warps divide a tile's rows and, where there
// are many, its output channels.
//
// A product's columns are dealt to the output channels such that a thread's sums of a pixel are neighbours in memory.
#pragma once

#include <cutlass/cutlass.h>

#include "cuda/conv/few_channels.h"
#include "cuda/epilogue/finish.h"

namespace pykernels::PYKERNELS_ISA_NS {

namespace few {

constexpr int kThreads = 32 * few_channels::kWarps, kPitch = few_channels::kPitch;
constexpr int kBatch = 5;  // groups of four pixels that a thread asks for at a time

struct Params {
  few_channels::Problem p;
  few_channels::Tiling t;
  int row;              // bytes of a kernel row of w
  unsigned words;       // of x
  uint32_t flip, fill;  // what makes bytes of x unsigned; the zero point four times
};

// A tile of the output, and where the input under it begins.
struct Place {
  int image, oy, ox, rows, units;  // what of the tile lies in the output
  int iy, ix;
};

PK_INLINE Place place(const Params& a, int tile) {
  Place f;
  const int line = tile / a.t.across;
  f.image = line / a.t.down;
  f.oy = line % a.t.down * a.t.rows;
  f.ox = tile % a.t.across * a.t.units * 16;
  f.rows = ::min(a.t.rows, a.p.out_height - f.oy);
  f.units = ::min(a.t.units, (a.p.out_width - f.ox + 15) / 16);
  f.iy = f.oy * a.p.stride[0] - a.p.before[0];
  f.ix = f.ox * a.p.stride[1] - a.p.before[1];
  return f;
}

// Four pixels of C bytes, from byte `skew` of the first word on, as four words, of which the bytes from C on mean
// nothing.
template <int C>
PK_INLINE void widen(const uint32_t (&words)[C + 1], uint32_t skew, uint32_t (&pixels)[4]) {
  uint32_t w[C];
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < C; ++i) w[i] = __funnelshift_r(words[i], words[i + 1], 8 * skew);
  CUTLASS_PRAGMA_UNROLL
  for (int k = 0; k < 4; ++k) {
    const int first = k * C / 4, byte = k * C % 4;
    pixels[k] = byte + C > 4 ? __funnelshift_r(w[first], w[::min(first + 1, C - 1)], 8 * byte) : w[first] >> 8 * byte;
  }
}

// The input under a tile, of `depth` rows.
template <int C, int Taps>
PK_INLINE void stage(const Params& a, const Place& f, int depth, uint32_t* shared) {
  const int height = a.p.height, width = a.p.width;
  const int across = ((16 * f.units - 1) * a.p.stride[1] + Taps + 3) / 4, count = depth * across;
  const uint32_t inverse = ((1u << 20) + across - 1) / across;  // i / across is right up to 2^20 / across
  const int64_t image = int64_t{f.image} * height * width * C;
  const int base = static_cast<int>(image >> 2), rest = static_cast<int>(image & 3);
  const uint32_t* x = reinterpret_cast<const uint32_t*>(a.p.x);
  for (int begin = threadIdx.x; begin < count; begin += kThreads * kBatch) {
    uint32_t words[kBatch][C + 1];
    CUTLASS_PRAGMA_UNROLL
    for (int k = 0; k < kBatch; ++k) {
      const int i = begin + k * kThreads, row = i * inverse >> 20, iy = f.iy + row, ix = f.ix + 4 * (i - row * across);
      const unsigned end = (i < count) & (unsigned(iy) < unsigned(height)) ? a.words : 0;
      const unsigned at = base + ((rest + (iy * width + ix) * C) >> 2);
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j <= C; ++j) words[k][j] = (C < 4 || j < 4) && at + j < end ? x[static_cast<int>(at) + j] : 0;
    }
    CUTLASS_PRAGMA_UNROLL
    for (int k = 0; k < kBatch; ++k) {
      const int i = begin + k * kThreads, row = i * inverse >> 20, iy = f.iy + row, ix = f.ix + 4 * (i - row * across);
      if (i >= count) break;
      uint32_t pixels[4];
      widen<C>(words[k], rest + (iy * width + ix) * C & 3, pixels);
      const bool there = unsigned(iy) < unsigned(height);
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < 4; ++j)
        pixels[j] = there & (unsigned(ix + j) < unsigned(width)) ? pixels[j] ^ a.flip : a.fill;
      *reinterpret_cast<uint4*>(shared + row * kPitch + ix - f.ix) =
          make_uint4(pixels[0], pixels[1], pixels[2], pixels[3]);
    }
  }
}

PK_INLINE void multiply(int (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The low bytes of four words.
PK_INLINE uint32_t packed(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// The byte of a sum, in the lowest 8 bits: finish_scaled of one number, rounded by adding 1.5 * 2^23.
PK_INLINE uint32_t byte_of(const Finish& p, int sum, const Line& line) {
  const float t = fma(to_f32(sum), line.multiplier, line.addend);  // never NaN
  return __float_as_uint(add(fminf(p.most, fmaxf(p.least, t)), 12582912.0f));
}

// Tiles: of 8 output channels, a warp's. linear: outputs are bytes, and what makes them of sums is linear.
template <class Out, int Size, int Tiles, bool linear>
struct Kernel {
  static constexpr int kHalves = (Size + 3) / 4;  // of a product's depth, to a kernel row
  static constexpr int kSteps = (Size * kHalves + 1) / 2;
  static constexpr int kColumns = 8 * Tiles, kEach = 2 * Tiles;  // channels of a warp, of a thread

  struct Shared {
    alignas(16) uint32_t rows[few_channels::kMaxRows * kPitch];
    alignas(16) int sums[few_channels::kWarps][linear ? 4 : 16 * kColumns];
  };

  // Both 32-bit words of B of a thread, whose column is lane / 4 and whose rows are the taps lane % 4 of two halves.
  PK_INLINE void weights(const Params& a, int first, int lane, uint32_t (&b)[kSteps][Tiles][2]) {
    const int c = a.p.channels;
    int word[kHalves], next[kHalves], shift[kHalves], mask[kHalves];
    CUTLASS_PRAGMA_UNROLL
    for (int k = 0; k < kHalves; ++k) {
      const int kx = ::min(4 * k + lane % 4, a.p.kernel[1] - 1);
      word[k] = kx * c / 4, next[k] = ::min(word[k] + 1, a.row / 4 - 1), shift[k] = kx * c % 4 * 8;
      mask[k] = 4 * k + lane % 4 > kx ? 0 : c == 4 ? -1 : (1 << 8 * c) - 1;
    }
    CUTLASS_PRAGMA_UNROLL
    for (int j = 0; j < Tiles; ++j) {
      const int channel = ::min(first + kEach * (lane / 8) + 2 * j + (lane / 4) % 2, a.p.out_channels - 1);
      const int8_t* rows = a.p.w + int64_t{channel} * a.p.kernel[0] * a.row;
      CUTLASS_PRAGMA_UNROLL
      for (int ky = 0; ky * kHalves < 2 * kSteps; ++ky) {
        const bool there = ky < a.p.kernel[0];
        const uint32_t* w = reinterpret_cast<const uint32_t*>(rows + (there ? ky * a.row : 0));
        CUTLASS_PRAGMA_UNROLL
        for (int k = 0; k < kHalves; ++k) {
          const int half = ky * kHalves + k;
          b[half / 2][j][half % 2] = there ? __funnelshift_r(w[word[k]], w[next[k]], shift[k]) & mask[k] : 0;
        }
      }
    }
  }

  // Sums of 16 pixels; row, row8: the thread's words of the first row of the input, for pixels lane / 4 and 8 more.
  PK_INLINE void sum(const uint32_t* row, const uint32_t* row8, const uint32_t (&b)[kSteps][Tiles][2],
                     int (&acc)[Tiles][4]) {
    CUTLASS_PRAGMA_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      uint32_t words[4];
      CUTLASS_PRAGMA_UNROLL
      for (int k = 0; k < 2; ++k) {
        const int half = 2 * step + k, at = half / kHalves * kPitch + half % kHalves * 4;
        words[2 * k] = half < Size * kHalves ? row[at] : 0;
        words[2 * k + 1] = half < Size * kHalves ? row8[at] : 0;
      }
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < Tiles; ++j) multiply(acc[j], words, b[step][j]);
    }
  }

  // Bytes of what is linear, of 16 pixels of which there are `left`; d: where the first one's are of this thread.
  PK_INLINE void store_bytes(const Params& a, uint8_t* d, int left, int channel, int lane, const int (&acc)[Tiles][4],
                             const Line (&lines)[Tiles][2]) {
    const Finish& f = a.p.epilogue.finish;
    const uint32_t sign = f.low & 0x80808080;
    CUTLASS_PRAGMA_UNROLL
    for (int half = 0; half < 2; ++half) {
      uint32_t words[Tiles / 2];
      CUTLASS_PRAGMA_UNROLL
      for (int k = 0; k < Tiles / 2; ++k) {
        uint32_t bytes[4];
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int j = 2 * k + i / 2;
          bytes[i] = byte_of(f, acc[j][2 * half + i % 2], lines[j][i % 2]);
        }
        words[k] = packed(bytes[0], bytes[1], bytes[2], bytes[3]) ^ sign;
      }
      if (lane / 4 + 8 * half >= left || channel >= a.p.out_channels) continue;
      if constexpr (Tiles == 4)
        *reinterpret_cast<uint2*>(d + 8 * half * a.p.out_channels) = make_uint2(words[0], words[1]);
      else
        *reinterpret_cast<uint32_t*>(d + 8 * half * a.p.out_channels) = words[0];
    }
  }

  // Everything else, by `finish`, four channels at a time: the code is long, and stands here once.
  PK_INLINE void store(const Params& a, int64_t m, int left, int first, int lane, const int (&acc)[Tiles][4],
                       int* sums) {
    const epilogue::Arguments& e = a.p.epilogue;
    CUTLASS_PRAGMA_UNROLL
    for (int k = 0; k < Tiles; ++k) {
      const int half = k % 2, j = k / 2 * 2;
      *reinterpret_cast<int4*>(sums + (lane / 4 + 8 * half) * kColumns + kEach * (lane % 4) + 2 * j) =
          make_int4(acc[j][2 * half], acc[j][2 * half + 1], acc[j + 1][2 * half], acc[j + 1][2 * half + 1]);
    }
    __syncwarp();
    CUTLASS_PRAGMA_NO_UNROLL
    for (int i = lane; i < 16 * kColumns / 4; i += 32) {
      const int pixel = i / (kColumns / 4), channel = first + i % (kColumns / 4) * 4;
      if (pixel >= left || channel >= a.p.out_channels) continue;
      using Four = cutlass::AlignedArray<Out, 4>;
      const int64_t at = (m + pixel) * a.p.out_channels + channel;
      cutlass::Array<float, 4> row_scale;
      cutlass::Array<int, 4> zero;
      Four residual;
      row_scale.fill(e.row_scale_value), zero.fill(0), residual.fill(Out(0));
      if (e.residual) residual = *reinterpret_cast<const Four*>(static_cast<const Out*>(e.residual) + at);
      const auto scale = *reinterpret_cast<const cutlass::AlignedArray<float, 4>*>(e.column_scale + channel);
      const auto bias = *reinterpret_cast<const cutlass::AlignedArray<float, 4>*>(e.bias + channel);
      const auto sum = *reinterpret_cast<const cutlass::AlignedArray<int, 4>*>(sums + 4 * i);
      Four d;
      static_cast<cutlass::Array<Out, 4>&>(d) = finish<Out, 4>(e.finish, sum, row_scale, zero, scale, zero, bias,
                                                               static_cast<const cutlass::Array<Out, 4>&>(residual));
      *reinterpret_cast<Four*>(static_cast<Out*>(e.d) + at) = d;
    }
    __syncwarp();
  }

  PK_INLINE void run(const Params& a, Shared& shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, slots = few_channels::kWarps / a.t.groups;
    const int first = (blockIdx.y * a.t.groups + warp % a.t.groups) * kColumns;
    const int channel = first + kEach * (lane % 4);  // the first whose sums are this thread's
    const epilogue::Arguments& e = a.p.epilogue;

    uint32_t b[kSteps][Tiles][2];
    weights(a, first, lane, b);
    int begin[Tiles][4];  // where sums begin, that the zero point counts nothing
    Line lines[Tiles][2];
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < kEach; ++i) {
      const int n = ::min(channel + i, a.p.out_channels - 1), j = i / 2, k = i % 2;
      begin[j][k] = begin[j][k + 2] = sub(0, mul(e.row_zero_value, e.column_sum[n]));
      asm volatile("" : "+r"(begin[j][k + 2]));  // mma takes four registers: they are not to be copied each time
      if (linear) lines[j][k] = folded(e.finish, mul(e.row_scale_value, e.column_scale[n]), e.bias[n]);
    }

    const int tiles = a.p.images * a.t.down * a.t.across;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const Place f = place(a, tile);
      const int depth = (f.rows - 1) * a.p.stride[0] + Size;
      __syncthreads();
      switch (a.p.channels) {
        case 1: stage<1, 4 * kHalves>(a, f, depth, shared.rows); break;
        case 2: stage<2, 4 * kHalves>(a, f, depth, shared.rows); break;
        case 3: stage<3, 4 * kHalves>(a, f, depth, shared.rows); break;
        case 4: stage<4, 4 * kHalves>(a, f, depth, shared.rows); break;
      }
      __syncthreads();
      for (int row = warp / a.t.groups; row < f.rows; row += slots) {
        const uint32_t* at = shared.rows + row * a.p.stride[0] * kPitch + lane / 4 * a.p.stride[1] + lane % 4;
        const int64_t m = (int64_t{f.image} * a.p.out_height + f.oy + row) * a.p.out_width + f.ox;
        uint8_t* d = static_cast<uint8_t*>(e.d) + (m + lane / 4) * a.p.out_channels + channel;
        int left = a.p.out_width - f.ox;
        CUTLASS_PRAGMA_NO_UNROLL
        for (int unit = 0; unit < f.units; ++unit) {
          int acc[Tiles][4];
          CUTLASS_PRAGMA_UNROLL
          for (int j = 0; j < Tiles; ++j) CUTLASS_PRAGMA_UNROLL
          for (int i = 0; i < 4; ++i) acc[j][i] = begin[j][i];
          sum(at, at + 8 * a.p.stride[1], b, acc);
          if constexpr (linear)
            store_bytes(a, d, left, channel, lane, acc, lines);
          else
            store(a, m + 16 * unit, left, first, lane, acc, shared.sums[warp]);
          at += 16 * a.p.stride[1], d += 16 * a.p.out_channels, left -= 16;
        }
      }
    }
  }
};

template <class Out, int Size, int Tiles, bool linear, int Blocks>
__global__ void __launch_bounds__(kThreads, Blocks) few_channels_conv(const Params a) {
  __shared__ typename Kernel<Out, Size, Tiles, linear>::Shared shared;
  Kernel<Out, Size, Tiles, linear>::run(a, shared);
}

}  // namespace few

template <class Out, int Size, int Tiles, int Blocks>
const char* few_channels_run(const few_channels::Problem& p) {
  if (p.kernel[0] > Size || p.kernel[1] > Size) return "its kernel is smaller";
  few::Params a{p, {}, few_channels::row_bytes(p.kernel[1], p.channels), 0, 0, 0};
  int device, multiprocessors;
  if (cudaGetDevice(&device) != cudaSuccess) return "no CUDA device";
  if (cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return "no multiprocessors";
  a.t = few_channels::tiling(p, {Size, 8 * Tiles, Blocks}, multiprocessors);
  a.words = static_cast<unsigned>((int64_t{p.images} * p.height * p.width * p.channels + 3) / 4);
  a.flip = p.is_signed ? 0x80808080u : 0u;
  a.fill = 0x01010101u * static_cast<uint8_t>(p.epilogue.row_zero_value);
  const Finish& f = p.epilogue.finish;
  const dim3 grid(a.t.grid[0], a.t.grid[1]);
  if (f.scaled && f.residual == Residual::none)  // bytes
    few::few_channels_conv<int8_t, Size, Tiles, true, Blocks><<<grid, few::kThreads, 0, p.stream>>>(a);
  else
    few::few_channels_conv<Out, Size, Tiles, false, Blocks><<<grid, few::kThreads, 0, p.stream>>>(a);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <int Size, int Tiles, int Blocks>
constexpr few_channels::Config few_channels_config(const char* name) {
  return {name,
          80,
          {few_channels_run<int8_t, Size, Tiles, Blocks>, few_channels_run<uint16_t, Size, Tiles, Blocks>,
           few_channels_run<float, Size, Tiles, Blocks>}};
}

}  // namespace pykernels::PYKERNELS_ISA_NS
