// e^x and log(1 + y) of fp64 vectors, for kernels whose time they decide. Power series, so that
// every constant is 1/k! or 2/k; errors stated in ulp (2^-52 relative) were measured against libm.
#pragma once

#include "cpu/simd.h"

namespace prefkern {
namespace PK_ISA {

typedef uint64_t vu __attribute__((vector_size(PK_VECTOR_BYTES)));

constexpr double kLn2 = 0x1.62e42fefa39efp-1;
// Adding it rounds to an integer n, |n| < 2^51, which then sits in the low bits.
constexpr double kRound = 0x1.8p52;

PK_INLINE vd magnitude(vd x) {
  return (vd)((vu)x & 0x7fffffffffffffffull);
}
PK_INLINE vd above(vd x, double least) {
  return x < least ? splat(least) : x;
}  // NaN stays NaN
PK_INLINE vd below(vd x, double most) {
  return x > most ? splat(most) : x;
}

// A number 2^n (1 + part) with |part| <= 0.42.
struct Power {
  vd n, part;
};

// e^r - 1 for |r| <= 0.347: the series up to r^13/13!, 4e-18 short; even and odd terms side by
// side.
PK_INLINE vd exp_series(vd r) {
  const vd q = r * r;
  vd even = fma(q, splat(1.0 / 479001600), splat(1.0 / 3628800));
  vd odd = fma(q, splat(1.0 / 6227020800), splat(1.0 / 39916800));
  even = fma(q, even, splat(1.0 / 40320)), odd = fma(q, odd, splat(1.0 / 362880));
  even = fma(q, even, splat(1.0 / 720)), odd = fma(q, odd, splat(1.0 / 5040));
  even = fma(q, even, splat(1.0 / 24)), odd = fma(q, odd, splat(1.0 / 120));
  even = fma(q, even, splat(0.5)), odd = fma(q, odd, splat(1.0 / 6));
  return fma(q, fma(r, odd, even), r);
}
// e^x for |x| <= 1e6. The first part of ln 2 has 32 bits, so n times it is exact.
PK_INLINE Power exp_parts(vd x) {
  const vd n = fma(x, splat(0x1.71547652b82fep+0), splat(kRound)) - splat(kRound);
  const vd r = fma(-n, splat(0x1.a39ef35793c76p-33), fma(-n, splat(0x1.62e42feep-1), x));
  return {n, exp_series(r)};
}
PK_INLINE Power exp2_parts(vd x) {
  const vd n = (x + splat(kRound)) - splat(kRound);
  return {n, exp_series((x - n) * splat(kLn2))};
}
// x 2^n for |n| <= 2000; in two factors, since n may pass the range of one exponent.
PK_INLINE vd scale(vd x, vd n) {
#if defined(__AVX512F__)
  return _mm512_scalef_pd(x, n);
#else
  const vd first = fma(n, splat(0.5), splat(kRound)), half = first - splat(kRound);
  const vd second = (n - half) + splat(kRound);
  const vu one = (vu)splat(1.0);
  return x * (vd)(((vu)first << 52) + one) * (vd)(((vu)second << 52) + one);
#endif
}

// e^x for x <= 0, 0 for -inf. 1 ulp down to the denormals.
PK_INLINE vd exp_negative(vd x) {
  const Power p = exp_parts(above(x, -746.0));
  return scale(splat(1.0) + p.part, p.n);
}
PK_INLINE vd exp2_any(vd x) {  // inf above 1024, 0 below -1075
  const Power p = exp2_parts(below(above(x, -1100.0), 1100.0));
  return scale(splat(1.0) + p.part, p.n);
}
PK_INLINE vd power_less_one(const Power& p) {  // 2^n (1 + part) - 1 without cancellation at n = 0
  const vd s = scale(splat(1.0), p.n);
  return fma(s, p.part, s - splat(1.0));
}
PK_INLINE vd expm1_negative(vd x) {
  return power_less_one(exp_parts(above(x, -746.0)));
}
PK_INLINE vd exp2m1(vd x) {
  const vd most = below(above(x, -1100.0), 1100.0);
  // 2^1024 is inf and inf * part + inf may be NaN: from 60 on, the 1 is far below one ulp.
  return most > splat(60.0) ? exp2_any(x) : power_less_one(exp2_parts(below(most, 60.0)));
}

// log(1 + f) for -0.293 <= f <= 0.4143: 2 atanh(t), t = f / (2 + f), up to t^21, 7e-19 short.
PK_INLINE vd log1p_series(vd f) {
  const vd t = f / (splat(2.0) + f);
  const vd q = t * t, q2 = q * q;
  vd even = fma(q2, splat(2.0 / 19), splat(2.0 / 15));
  vd odd = fma(q2, splat(2.0 / 21), splat(2.0 / 17));
  even = fma(q2, even, splat(2.0 / 11)), odd = fma(q2, odd, splat(2.0 / 13));
  even = fma(q2, even, splat(2.0 / 7)), odd = fma(q2, odd, splat(2.0 / 9));
  even = fma(q2, even, splat(2.0 / 3)), odd = fma(q2, odd, splat(2.0 / 5));
  return fma(t * q, fma(q, odd, even), t + t);
}
constexpr double kSqrt2Less1 = 0x1.a827999fcef32p-2;
// log(1 + y) for 0 <= y <= 1. 2 ulp; log 2 exactly at 1. The halved argument is exact.
PK_INLINE vd log1p_unit(vd y) {
  const auto big = y > splat(kSqrt2Less1);
  const vd f = big ? fma(y, splat(0.5), splat(-0.5)) : y;
  return log1p_series(f) + (big ? splat(kLn2) : vd{});
}
// log(1 + y) for y >= 0. 2 ulp; NaN and inf are not for it.
PK_INLINE vd log1p_positive(vd y) {
  const vd u = splat(1.0) + y;
  const vu shifted = ((vu)u - (vu)splat(0x1.6a09e667f3bcdp-1)) >> 52;  // >= 0, since u >= 1
  const vd m = (vd)((vu)u - (shifted << 52));                          // in [0.707, 1.414)
  const vd n = (vd)(shifted + (vu)splat(kRound)) - splat(kRound);
  return fma(n, splat(kLn2), log1p_series(n == 0 ? y : m - splat(1.0)));
}

}  // namespace PK_ISA
}  // namespace prefkern
