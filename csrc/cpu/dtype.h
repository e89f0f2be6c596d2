// Conversions between storage types and compute types, element by element and by row.
#pragma once

#include "cpu/simd.h"
#include "dispatch.h"

namespace prefkern {
namespace PK_ISA {

PK_INLINE float from_bf16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
PK_INLINE uint16_t to_bf16(float f) {  // nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return uint16_t(f != f ? 0x7fc0 : rounded);
}
PK_INLINE float from_fp16(uint16_t x) {
  // Exponent re-biased by a multiplication, which is exact and handles denormals; inf and NaN
  // apart.
  const uint32_t sign = uint32_t(x & 0x8000) << 16, rest = uint32_t(x & 0x7fff) << 13;
  const bool special = (x & 0x7c00) == 0x7c00;
  float f;
  std::memcpy(&f, &rest, 4);
  f *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  bits = (special ? (rest | 0x7f800000u) : bits) | sign;
  std::memcpy(&f, &bits, 4);
  return f;
}
PK_INLINE uint16_t to_fp16(float f) {  // nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  float a;
  std::memcpy(&a, &bits, 4);
  if (!(a < 65520.0f)) return uint16_t(sign | (a != a ? 0x7e00 : 0x7c00));
  if (a < 0x1p-14f) {  // denormal: the addition rounds at the right place
    const float shifted = a + 0.5f;
    uint32_t s;
    std::memcpy(&s, &shifted, 4);
    return uint16_t(sign | (s - 0x3f000000u));
  }
  const uint32_t odd = (bits >> 13) & 1;
  return uint16_t(sign | ((bits - 0x38000000u + 0xfff + odd) >> 13));
}

// Each lane rounded to a storage type and back.
PK_INLINE vf round_to(vf x, Dtype type) {
  if (type == Dtype::bf16) {
    const vi bits = (vi)x;
    const vi rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff;
    return x == x ? (vf)rounded : (vf)(bits | 0x400000);
  }
  if (type == Dtype::f16) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < Lanes<float>::L; ++i) x[i] = from_fp16(to_fp16(x[i]));
#endif
  }
  return x;
}
PK_INLINE vd round_to(vd x, Dtype) {
  return x;
}
#if defined(__AVX512BF16__)
// The bits of round_to(x, bf16) for x that is no denormal number (these become 0): the instruction
// that multiplies pairs gives none.
PK_INLINE __m256i bf16_of_product(vf x) {
  return (__m256i)_mm512_cvtneps_pbh((__m512)x);
}
#endif
// round_to of what a product gave; `pairs`: of bf16 pairs.
template <bool pairs, class V>
PK_INLINE V round_product(V x, Dtype type) {
#if defined(__AVX512BF16__)
  if constexpr (pairs) return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16_of_product(x)), 16);
#endif
  return round_to(x, type);
}

template <class T>
PK_INLINE T element(const void* p, Dtype type, int64_t i) {
  switch (type) {
    case Dtype::f32:
      return T(static_cast<const float*>(p)[i]);
    case Dtype::f64:
      return T(static_cast<const double*>(p)[i]);
    case Dtype::bf16:
      return T(from_bf16(static_cast<const uint16_t*>(p)[i]));
    case Dtype::f16:
      return T(from_fp16(static_cast<const uint16_t*>(p)[i]));
  }
  return T(0);
}

// dst[0..n) = src[start .. start+n) converted.
template <class T>
inline void read_row(T* dst, const void* src, Dtype type, int64_t start, int64_t n) {
  switch (type) {
    case Dtype::f32: {
      const float* s = static_cast<const float*>(src) + start;
      for (int64_t i = 0; i < n; ++i) dst[i] = T(s[i]);
      return;
    }
    case Dtype::f64: {
      const double* s = static_cast<const double*>(src) + start;
      for (int64_t i = 0; i < n; ++i) dst[i] = T(s[i]);
      return;
    }
    case Dtype::bf16: {
      const uint16_t* s = static_cast<const uint16_t*>(src) + start;
      for (int64_t i = 0; i < n; ++i) dst[i] = T(from_bf16(s[i]));
      return;
    }
    case Dtype::f16: {
      const uint16_t* s = static_cast<const uint16_t*>(src) + start;
      int64_t i = 0;
#if defined(__AVX512F__)
      if constexpr (sizeof(T) == 4) {
        for (; i + 16 <= n; i += 16) {
          _mm512_storeu_ps(dst + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(s + i))));
        }
      }
#elif defined(__F16C__)
      if constexpr (sizeof(T) == 4) {
        for (; i + 8 <= n; i += 8) {
          _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(s + i))));
        }
      }
#endif
      for (; i < n; ++i) dst[i] = T(from_fp16(s[i]));
      return;
    }
  }
}

template <class T>
inline void write_row(void* dst, Dtype type, int64_t start, const T* src, int64_t n) {
  switch (type) {
    case Dtype::f32: {
      float* d = static_cast<float*>(dst) + start;
      for (int64_t i = 0; i < n; ++i) d[i] = float(src[i]);
      return;
    }
    case Dtype::f64: {
      double* d = static_cast<double*>(dst) + start;
      for (int64_t i = 0; i < n; ++i) d[i] = double(src[i]);
      return;
    }
    case Dtype::bf16: {
      uint16_t* d = static_cast<uint16_t*>(dst) + start;
      for (int64_t i = 0; i < n; ++i) d[i] = to_bf16(float(src[i]));
      return;
    }
    case Dtype::f16: {
      uint16_t* d = static_cast<uint16_t*>(dst) + start;
      for (int64_t i = 0; i < n; ++i) d[i] = to_fp16(float(src[i]));
      return;
    }
  }
}

// dst[0..n) = bits of src[start .. start+n) rounded to bf16.
inline void read_bf16(uint16_t* dst, const void* src, Dtype type, int64_t start, int64_t n) {
  if (type == Dtype::bf16) {
    std::memcpy(dst, static_cast<const uint16_t*>(src) + start, size_t(n) * 2);
    return;
  }
  for (int64_t i = 0; i < n; ++i) dst[i] = to_bf16(element<float>(src, type, start + i));
}

}  // namespace PK_ISA
}  // namespace prefkern
