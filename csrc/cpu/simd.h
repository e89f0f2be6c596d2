// One vector type per element type and instruction set, and the few operations the kernels need.
//
// Included by kernels_<isa>.cpp inside a namespace named after the instruction set; nothing here
// may have external linkage outside it. Operators (+, *, <, ?:) are those of the compiler's vector
// types.
#pragma once

// GCC 12 takes the deliberately undefined operand inside its own AVX-512 intrinsics for a mistake.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <cstdint>
#include <cstring>

#define PK_INLINE inline __attribute__((always_inline))
// Hot loops are functions of their own: a test finds them by name and reads their instructions.
#define PK_HOT __attribute__((noinline))

#if defined(__AVX512F__)
#define PK_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define PK_VECTOR_BYTES 32
#else
#define PK_VECTOR_BYTES 16
#endif

namespace prefkern {
namespace PK_ISA {

typedef float vf __attribute__((vector_size(PK_VECTOR_BYTES)));
typedef double vd __attribute__((vector_size(PK_VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(PK_VECTOR_BYTES)));
typedef int64_t vl __attribute__((vector_size(PK_VECTOR_BYTES)));

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  using V = vf;
  using I = vi;
  static constexpr int L = PK_VECTOR_BYTES / 4;
};
template <>
struct Lanes<double> {
  using V = vd;
  using I = vl;
  static constexpr int L = PK_VECTOR_BYTES / 8;
};
template <class T>
using Vec = typename Lanes<T>::V;

template <class T>
PK_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
PK_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}
PK_INLINE vf splat(float x) {
  return x - vf{};
}
PK_INLINE vd splat(double x) {
  return x - vd{};
}

PK_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
PK_INLINE vd fma(vd a, vd b, vd c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// The larger value; the second argument where either is NaN (the x86 rule, kept everywhere).
PK_INLINE vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
PK_INLINE vd max(vd a, vd b) {
  return a > b ? a : b;
}
template <class V>
PK_INLINE V min_second(V a, V b) {
  return a < b ? a : b;
}  // second argument where either is NaN

// Sum and largest of the lanes, by halves: always the same order.
template <class V, class Op>
PK_INLINE auto fold_lanes(V v, const Op& op) {
  constexpr int L = sizeof(V) / sizeof(v[0]);
  decltype(v[0] + v[0]) x[L];
  std::memcpy(x, &v, sizeof v);
#pragma GCC unroll 4
  for (int w = L / 2; w > 0; w /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < w; ++i) x[i] = op(x[i], x[i + w]);
  }
  return x[0];
}
template <class V>
PK_INLINE double sum_lanes(V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(v[0]) == 4) return _mm512_reduce_add_ps(v);
#endif
  return fold_lanes(v, [](auto a, auto b) { return a + b; });
}
template <class T>
PK_INLINE T max_lanes(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_max_ps(v);
#endif
  return fold_lanes(v, [](auto a, auto b) { return a > b ? a : b; });
}

// e^x for -104 <= x <= 88.7, our own fits. With FMA: x log2(e) = n + f, |f| <= 0.5, degree-5
// polynomial of 2^f (9.2e-8 relative). Relative error at most 1.6e-7 + 1.4e-8 |x| (the second term
// is log2(e) rounded to fp32, one instruction instead of two), i.e. 3 ulp at -10 and 12 at -87;
// below -87.3 a rightly scaled denormal, 0 at -104. NaN stays NaN.
#if defined(__FMA__) || defined(__AVX512F__)
PK_INLINE vf exp2_poly(vf f) {
  vf p = fma(splat(0x1.5bb92ap-10f), f, splat(0x1.3ceb6cp-7f));
  p = fma(p, f, splat(0x1.c6b75ap-5f));
  p = fma(p, f, splat(0x1.ebf9bap-3f));
  p = fma(p, f, splat(0x1.62e42ap-1f));
  return fma(p, f, splat(1.0f));
}
#else
// Without FMA: x = n ln 2 + r with ln 2 split so that n times its first part is exact (n has at
// most 8 bits), and a degree-5 polynomial of e^r, |r| <= 0.347.
PK_INLINE vf exp_poly(vf r) {
  vf p = fma(splat(0x1.0fa64ap-7f), r, splat(0x1.573ceap-5f));
  p = fma(p, r, splat(0x1.555a78p-3f));
  p = fma(p, r, splat(0x1.fffdc0p-2f));
  p = fma(p, r, splat(0x1.fffff6p-1f));
  return fma(p, r, splat(1.0f));
}
#endif
PK_INLINE vf exp_bounded(vf x) {
  // Adding 1.5 * 2^23 rounds to an integer n, which then sits in the low bits of t.
  const vf log2e = splat(0x1.715476p+0f), magic = splat(0x1.8p23f);
  const vf t = fma(x, log2e, magic), n = t - magic;
#if defined(__AVX512F__)
  return _mm512_scalef_ps(exp2_poly(_mm512_fmsub_ps(x, log2e, n)), n);
#else
#if defined(__FMA__)
  const vf p = exp2_poly(fma(x, log2e, -n));
#else
  const vf p = exp_poly((x - n * splat(0x1.63p-1f)) - n * splat(-0x1.bd0106p-13f));
#endif
  const vi whole = (vi)t - (vi)magic;
  const vi half = whole >> 1;  // 2^n in two factors: n reaches -150, an exponent only -126
  const vi one = (vi)splat(1.0f);
  return p * (vf)((half << 23) + one) * (vf)(((whole - half) << 23) + one);
#endif
}
PK_INLINE vf exp(vf x) {
  return exp_bounded(max(splat(-104.0f), x));
}  // also for -inf: 0
PK_INLINE vf exp_full(vf x) {
  return exp(min_second(splat(128.0f), x));
}  // +inf from 88.8 on

// e^x - 1 for |x| <= 80, without the difference of two close numbers: x = n ln 2 + r with n ln 2 in
// two parts, and the series of e^r - 1 up to r^7, 2e-8 short. Within 2 ulp; 0 gives 0.
PK_INLINE vf expm1(vf x) {
  const vf magic = splat(0x1.8p23f), t = fma(x, splat(0x1.715476p+0f), magic), n = t - magic;
  const vf r = fma(n, splat(0x1.bd0106p-13f), fma(n, splat(-0x1.63p-1f), x));
  vf p = fma(r, splat(1.0f / 5040), splat(1.0f / 720));
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  const vf power = (vf)((((vi)t - (vi)magic) << 23) + (vi)splat(1.0f));
  return fma(power, fma(p * r, r, r), power - splat(1.0f));
}

// log(1 + y) for y > -1: exponent and mantissa of u = 1 + y, then the atanh series of the mantissa,
// with y itself instead of u - 1 where the exponent is 0 (no rounding of small y). Within 2 ulp for
// |y| < 0.4, 1e-7 absolute beyond.
PK_INLINE vf log1p(vf y) {
  const vf u = splat(1.0f) + y;
  const vi bits = (vi)u;
  const vi k = (bits - (vi)splat(0x1.6a09e6p-1f)) >> 23;  // mantissa in [0.707, 1.414)
  const vf m = (vf)(bits - (k << 23));
  const vf f = k == 0 ? y : m - splat(1.0f);
  const vf s = f / (splat(2.0f) + f);
  const vf q = s * s;
  vf p = fma(q, splat(2.0f / 9), splat(2.0f / 7));
  p = fma(p, q, splat(2.0f / 5));
  p = fma(p, q, splat(2.0f / 3));
  const vf small = fma(p * q, s, s + s);
  return fma(__builtin_convertvector(k, vf), splat(0x1.62e430p-1f), small);
}

// tanh: odd polynomial below 0.625 (6e-9 relative), 1 - 2/(e^2x + 1) above.
PK_INLINE vf tanh(vf x) {
  const vf a = x < 0 ? -x : x;
  const vf q = x * x;
  vf p = fma(q, splat(-0.0055286030f), splat(0.020483292f));
  p = fma(p, q, splat(-0.053692962f));
  p = fma(p, q, splat(0.13330900f));
  p = fma(p, q, splat(-0.33333263f));
  const vf near = fma(x * q, p, x);
  const vf e = exp(min_second(splat(40.0f), a + a));
  const vf far = splat(1.0f) - splat(2.0f) / (e + splat(1.0f));
  return a < splat(0.625f) ? near : (x < 0 ? -far : far);
}

#define PK_LANEWISE(name, call)                                   \
  PK_INLINE vd name(vd x) {                                       \
    for (int i = 0; i < Lanes<double>::L; ++i) x[i] = call(x[i]); \
    return x;                                                     \
  }
PK_LANEWISE(exp_bounded,
            __builtin_exp)  // fp64 serves gradient checks; the C library is fast enough
PK_LANEWISE(exp, __builtin_exp)
PK_LANEWISE(exp_full, __builtin_exp)
PK_LANEWISE(expm1, __builtin_expm1)
PK_LANEWISE(log1p, __builtin_log1p)
PK_LANEWISE(tanh, __builtin_tanh)
#undef PK_LANEWISE

}  // namespace PK_ISA
}  // namespace prefkern
