// Compiled once per isa: each operation over arrays, whole registers first and the tail as a partial load and store.
#include "vec_ops.h"

#include "cpu/isa/math.h"
#include "cpu/isa/requantize.h"

namespace pykernels::PYKERNELS_ISA_NS {
namespace {

PK_INLINE f32 get(const float* p, int n) { return load(p, n); }
PK_INLINE f32 get(const bfloat16* p, int n) { return load(p, n); }
PK_INLINE f32 get(const float16* p, int n) { return load(p, n); }
PK_INLINE i32 get(const int32_t* p, int n) { return load_i32(p, n); }
PK_INLINE i32 get(const uint8_t* p, int n) { return load_i32(p, n); }
PK_INLINE i32 get(const int8_t* p, int n) { return load_i32(p, n); }
PK_INLINE u8 get(const byte* p, int n) { return load_u8(p, n); }
PK_INLINE void put(float* p, f32 v, int n) { store(p, v, n); }
PK_INLINE void put(bfloat16* p, f32 v, int n) { store(p, v, n); }
PK_INLINE void put(float16* p, f32 v, int n) { store(p, v, n); }
PK_INLINE void put(int32_t* p, i32 v, int n) { store_i32(p, v, n); }
PK_INLINE void put(uint8_t* p, i32 v, int n) { store_i32(p, v, n); }
PK_INLINE void put(int8_t* p, i32 v, int n) { store_i32(p, v, n); }
PK_INLINE void put(byte* p, u8 v, int n) { store_u8(p, v, n); }

// The chosen lanes after compact() has moved them together, back in their places; 0 in the others.
PK_INLINE i32 expanded(i32 v, uint32_t bits) {
  int32_t together[kLanes], apart[kLanes];
  const int count = compact(together, v, bits);
  int next = 0;
  for (int lane = 0; lane < kLanes; ++lane) apart[lane] = bits >> lane & 1 ? together[next++] : 0;
  return next == count ? load_i32(apart) : set1_i32(-1);
}

template <class T>
constexpr int kStep = kLanes;
template <>
constexpr int kStep<byte> = kBytes;

#define PYKERNELS_RUN(name, In, Out, result, agreement)                              \
  void run_##name(const void* xs, const void* ys, void* out, int64_t count) {        \
    for (int64_t i = 0; i < count; i += kStep<In>) {                                 \
      const int n = count - i < kStep<In> ? static_cast<int>(count - i) : kStep<In>; \
      [[maybe_unused]] const auto x = get(static_cast<const In*>(xs) + i, n);        \
      [[maybe_unused]] const auto y = get(static_cast<const In*>(ys) + i, n);        \
      put(static_cast<Out*>(out) + i, result, n);                                    \
    }                                                                                \
  }
PYKERNELS_VEC_OPS(PYKERNELS_RUN)

}  // namespace

#define PYKERNELS_ENTRY(name, In, Out, result, agreement) run_##name,
extern const VecOps vec_ops = {{PYKERNELS_VEC_OPS(PYKERNELS_ENTRY)}};

}  // namespace pykernels::PYKERNELS_ISA_NS
