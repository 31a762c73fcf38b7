// Vectors of the instruction set that this translation unit is compiled for. Included only by
// isa_*.cpp, which define GRADCLIP_ISA and GRADCLIP_VECTOR_BYTES first.

#pragma once

#include "prelude.h"

#define GRADCLIP_INLINED __attribute__((always_inline))  // of a lambda
#define GRADCLIP_INLINE inline GRADCLIP_INLINED
// The compiler keeps an array of vectors in registers only if the loops over it are unrolled.
#if defined(__clang__)
#define GRADCLIP_UNROLL _Pragma("unroll")
#else
#define GRADCLIP_UNROLL _Pragma("GCC unroll 16")
#endif

namespace gradclip::cpu::GRADCLIP_ISA {

// GCC's and clang's vector types: +, <, ?: work by element, casts reinterpret the bits.
constexpr int kVectorBytes = GRADCLIP_VECTOR_BYTES;
typedef float F32 __attribute__((vector_size(kVectorBytes)));
typedef double F64 __attribute__((vector_size(kVectorBytes)));
typedef int16_t I16 __attribute__((vector_size(kVectorBytes)));
typedef int32_t I32 __attribute__((vector_size(kVectorBytes)));
typedef int64_t I64 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t U32 __attribute__((vector_size(kVectorBytes)));
typedef uint64_t U64 __attribute__((vector_size(kVectorBytes)));
typedef float HalfF32 __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t HalfU16 __attribute__((vector_size(kVectorBytes / 2)));

template <typename V>
using LaneOf = std::decay_t<decltype(V{}[0])>;
template <typename V>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(LaneOf<V>));

/// Reads a vector from any address.
template <typename V>
GRADCLIP_INLINE V load(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <typename V>
GRADCLIP_INLINE void store(void* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

GRADCLIP_INLINE F32 magnitude(F32 x) { return (F32)((U32)x & 0x7fffffffu); }
GRADCLIP_INLINE F64 magnitude(F64 x) { return (F64)((U64)x & 0x7fffffffffffffffull); }

/// The elements of a vector of floats, converted to double.
struct PairF64 {
  F64 low, high;
};

GRADCLIP_INLINE PairF64 to_float64(F32 x) {
  HalfF32 halves[2];
  __builtin_memcpy(halves, &x, sizeof x);
#if GRADCLIP_VECTOR_BYTES == 64
  // g++ 12 converts __builtin_convertvector in four steps, and warns about the unmasked intrinsic.
  return {(F64)_mm512_maskz_cvtps_pd(0xff, (__m256)halves[0]),
          (F64)_mm512_maskz_cvtps_pd(0xff, (__m256)halves[1])};
#else
  return {__builtin_convertvector(halves[0], F64), __builtin_convertvector(halves[1], F64)};
#endif
}

/// Tells whether any lane of a comparison's result is set.
template <typename Mask>
GRADCLIP_INLINE bool any(Mask mask) {
#if GRADCLIP_VECTOR_BYTES == 64
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif GRADCLIP_VECTOR_BYTES == 32
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_epi8((__m128i)mask) != 0;
#else
  const U64 words = (U64)mask;
  return (words[0] | words[1]) != 0;
#endif
}

/// Adds the lanes pairwise: half of them to the other half, until one is left.
GRADCLIP_INLINE double sum(F64 x) {
  double lanes[kLanes<F64>];
  store(lanes, x);
  GRADCLIP_UNROLL
  for (int half = kLanes<F64> / 2; half != 0; half /= 2) {
    GRADCLIP_UNROLL
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// ---------------------------------------------------------------- float16

/// Reads as many float16 elements as a vector has floats.
GRADCLIP_INLINE F32 load_halves(const uint16_t* from) {
  const HalfU16 halves = load<HalfU16>(from);
#if GRADCLIP_VECTOR_BYTES == 64
  return (F32)_mm512_maskz_cvtph_ps(0xffff, (__m256i)halves);
#elif GRADCLIP_VECTOR_BYTES == 32
  return (F32)_mm256_cvtph_ps((__m128i)halves);
#elif defined(__aarch64__)
  return (F32)vcvt_f32_f16((float16x4_t)halves);
#else
  const U32 words = __builtin_convertvector(halves, U32);
  const U32 bits = words & 0x7fffu;
  const U32 normal = (bits << 13) + (112u << 23);  // exponent bias 15 to 127
  const U32 subnormal = (U32)(__builtin_convertvector((I32)bits, F32) * 0x1p-24f);
  const U32 nonfinite = bits << 13 | 0x7f800000u;
  const U32 value = bits < 0x0400u ? subnormal : bits < 0x7c00u ? normal : nonfinite;
  return (F32)(value | (words & 0x8000u) << 16);
#endif
}

/// Writes a vector of floats as float16, rounded to nearest, ties to even.
GRADCLIP_INLINE void store_halves(uint16_t* to, F32 x) {
#if GRADCLIP_VECTOR_BYTES == 64
  store(to, (HalfU16)_mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif GRADCLIP_VECTOR_BYTES == 32
  store(to, (HalfU16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  store(to, (HalfU16)vcvt_f16_f32((float32x4_t)x));
#else
  const U32 bits = (U32)x & 0x7fffffffu, sign = (U32)x >> 16 & 0x8000u;
  const U32 rounded = (bits - (112u << 23) + 0xfffu + (bits >> 13 & 1u)) >> 13;
  const U32 normal = rounded < 0x7c00u ? rounded : U32{} + 0x7c00u;
  // Floats near 0.5 are multiples of 2^-24, the smallest float16: adding 0.5 rounds to those.
  const U32 subnormal = (U32)((F32)bits + 0.5f) - 0x3f000000u;
  const U32 finite = bits < 0x38800000u ? subnormal : normal;
  const U32 value = sign | (x == x ? finite : U32{} + 0x7e00u);
  store(to, __builtin_convertvector(value, HalfU16));
#endif
}

}  // namespace gradclip::cpu::GRADCLIP_ISA
