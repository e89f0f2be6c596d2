// Element types of a tile, 16-byte packets of them, and the fp32 functions of the inner loops.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/block.h"
#include "dispatch.h"
#include "numerics/scalar.h"

#if !defined(__CUDACC__)
#include <cstring>
#endif

namespace prefkern {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

#if defined(__CUDACC__)

PK_DEVICE float to_float(float x) {
  return x;
}
PK_DEVICE float to_float(Bf16 x) {
  return __uint_as_float(uint32_t(x.bits) << 16);
}
PK_DEVICE float to_float(F16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
// Nearest, ties to even; two at a time, as the hardware converts them.
PK_DEVICE uint32_t pack2(float low, float high, Bf16) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
PK_DEVICE uint32_t pack2(float low, float high, F16) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
// 2^x, 2 ulp; results below 2^-126 are 0.
PK_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
PK_DEVICE float tanh_full(float x) {
  return ::tanhf(x);
}
// Products and sums that must have the same bits wherever they are computed: no contraction.
PK_DEVICE float mul_exact(float a, float b) {
  return __fmul_rn(a, b);
}
PK_DEVICE float add_exact(float a, float b) {
  return __fadd_rn(a, b);
}
PK_DEVICE float bits_to_float(uint32_t x) {
  return __uint_as_float(x);
}
PK_DEVICE uint32_t float_to_bits(float x) {
  return __float_as_uint(x);
}

#else

PK_DEVICE float bits_to_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
PK_DEVICE uint32_t float_to_bits(float x) {
  uint32_t y;
  std::memcpy(&y, &x, 4);
  return y;
}
PK_DEVICE float to_float(float x) {
  return x;
}
PK_DEVICE float to_float(Bf16 x) {
  return bits_to_float(uint32_t(x.bits) << 16);
}
PK_DEVICE float to_float(F16 x) {
  _Float16 h;
  std::memcpy(&h, &x.bits, 2);
  return float(h);
}
PK_DEVICE uint32_t one_bf16(float x) {
  const uint32_t b = float_to_bits(x);
  return x != x ? 0x7fff : (b + 0x7fff + ((b >> 16) & 1)) >> 16;
}
PK_DEVICE uint32_t one_f16(float x) {
  const _Float16 h = _Float16(x);
  uint16_t b;
  std::memcpy(&b, &h, 2);
  return b;
}
PK_DEVICE uint32_t pack2(float low, float high, Bf16) {
  return one_bf16(low) | one_bf16(high) << 16;
}
PK_DEVICE uint32_t pack2(float low, float high, F16) {
  return one_f16(low) | one_f16(high) << 16;
}
PK_DEVICE float exp2_fast(float x) {
  const float y = __builtin_exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}
PK_DEVICE float tanh_full(float x) {
  return __builtin_tanhf(x);
}
PK_DEVICE float mul_exact(float a, float b) {
  return a * b;
}
PK_DEVICE float add_exact(float a, float b) {
  return a + b;
}

#endif

// e^x for x <= 88. The rounding of x log2(e) costs |x| 6e-8 relative, which e^x weighs down:
// at most 2.2e-8 of the largest term in a sum.
PK_DEVICE float exp_fast(float x) {
  return exp2_fast(x * 1.4426950408889634f);
}
PK_DEVICE float larger(float a, float b) {
  return Larger()(a, b);
}

// Rounded to a 16-bit type and back; fp32 stays as it is.
PK_DEVICE float round_to(float x, Dtype type) {
  if (type == Dtype::bf16) return bits_to_float(pack2(x, 0.0f, Bf16()) << 16);
  if (type == Dtype::f16) return to_float(F16{uint16_t(pack2(x, 0.0f, F16()))});
  return x;
}
template <int N>
PK_DEVICE void round_all(float (&x)[N], Dtype type) {
  if (type == Dtype::f32) return;
  if (type == Dtype::bf16) {
    PK_UNROLL
    for (int j = 0; j < N; ++j) x[j] = round_to(x[j], Dtype::bf16);
  } else {
    PK_UNROLL
    for (int j = 0; j < N; ++j) x[j] = round_to(x[j], Dtype::f16);
  }
}
PK_DEVICE int64_t bytes_of(Dtype type) {
  return type == Dtype::f32 ? 4 : 2;
}
template <class E>
PK_DEVICE constexpr Dtype type_of() {
  return sizeof(E) == 4 ? Dtype::f32 : std::is_same_v<E, Bf16> ? Dtype::bf16 : Dtype::f16;
}
// 16 bytes of elements: one load or store.
template <class E>
struct Packet {
  static constexpr int kN = 16 / int(sizeof(E));
  uint32_t word[4];

  PK_DEVICE float at(int i) const {  // i is known when compiled
    if constexpr (sizeof(E) == 4) {
      return bits_to_float(word[i]);
    } else {
      return to_float(E{uint16_t(i % 2 ? word[i / 2] >> 16 : word[i / 2] & 0xffff)});
    }
  }
  PK_DEVICE void set(int i, E x) {
    if constexpr (sizeof(E) == 4) {
      word[i] = float_to_bits(x);
    } else {
      word[i / 2] |= uint32_t(x.bits) << (i % 2 ? 16 : 0);
    }
  }
};

// How the caches see a tile: as read for the last time, or as read once more by the same block.
struct Once {};
struct Again {};

#if defined(__CUDACC__)
// Lines that are read for the last time are the first to leave the caches.
template <class E>
PK_DEVICE Packet<E> load_packet(const E* p, Once) {
  const uint4 v = __ldcs(reinterpret_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}
template <class E>
PK_DEVICE Packet<E> load_packet(const E* p, Again) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
PK_DEVICE void store_packet(void* p, const uint32_t (&w)[4]) {
  *static_cast<uint4*>(p) = make_uint4(w[0], w[1], w[2], w[3]);
}
PK_DEVICE void store_half_packet(void* p, uint32_t a, uint32_t b) {
  *static_cast<uint2*>(p) = make_uint2(a, b);
}
#else
inline void check_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    std::fprintf(stderr, "emulated block: %zu-byte access at %p\n", bytes, p);
    std::abort();
  }
}
template <class E, class Load>
PK_DEVICE Packet<E> load_packet(const E* p, Load) {
  check_aligned(p, 16);
  Packet<E> v;
  std::memcpy(v.word, p, 16);
  return v;
}
PK_DEVICE void store_packet(void* p, const uint32_t (&w)[4]) {
  check_aligned(p, 16);
  std::memcpy(p, w, 16);
}
PK_DEVICE void store_half_packet(void* p, uint32_t a, uint32_t b) {
  check_aligned(p, 8);
  const uint32_t w[2] = {a, b};
  std::memcpy(p, w, 8);
}
#endif

// kN values from column `column` of a row on, in one store or two.
template <int N>
PK_DEVICE void store_whole(void* row, Dtype type, int64_t column, const float (&x)[N]) {
  if (type == Dtype::f32) {
    float* p = static_cast<float*>(row) + column;
    PK_UNROLL
    for (int j = 0; j < N; j += 4) {
      store_packet(p + j, {float_to_bits(x[j]), float_to_bits(x[j + 1]), float_to_bits(x[j + 2]),
                           float_to_bits(x[j + 3])});
    }
    return;
  }
  uint32_t w[N / 2];
  PK_UNROLL
  for (int j = 0; j < N / 2; ++j) {
    w[j] = type == Dtype::bf16 ? pack2(x[2 * j], x[2 * j + 1], Bf16())
                               : pack2(x[2 * j], x[2 * j + 1], F16());
  }
  uint16_t* p = static_cast<uint16_t*>(row) + column;
  if constexpr (N == 8) {
    store_packet(p, w);
  } else {
    store_half_packet(p, w[0], w[1]);
  }
}
// Those of them with valid(j), one by one.
template <int N, class Valid>
PK_DEVICE void store_some(void* row, Dtype type, int64_t column, const float (&x)[N],
                          const Valid& valid) {
  PK_UNROLL
  for (int j = 0; j < N; ++j) {
    if (!valid(j)) continue;
    if (type == Dtype::f32) {
      static_cast<float*>(row)[column + j] = x[j];
    } else {
      static_cast<uint16_t*>(row)[column + j] =
          uint16_t(type == Dtype::bf16 ? pack2(x[j], 0.0f, Bf16()) : pack2(x[j], 0.0f, F16()));
    }
  }
}

}  // namespace prefkern
