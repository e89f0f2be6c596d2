// Scalar maths of the ranking losses in W = float or double. cpu/double_math.h has the same forms
// for vectors; a test holds the two together.
#pragma once

#include "numerics/scalar.h"

namespace prefkern {

constexpr double kLog2 = 0x1.62e42fefa39efp-1;

#if defined(__CUDACC__) || defined(__HIPCC__)
PK_HD double pk_exp2(double x) {
  return ::exp2(x);
}
#else
PK_HD double pk_exp2(double x) {
  return __builtin_exp2(x);
}
#endif

PK_HD double pk_abs(double x) {
  return __builtin_fabs(x);
}
PK_HD float pk_abs(float x) {
  return __builtin_fabsf(x);
}
template <class W>
PK_HD bool pk_finite(W x) {
  return x - x == W(0);
}

// a / x for x in [1, 3]; on the device in fp32 by the reciprocal instruction, 1 ulp.
PK_HD double divide_near_one(double a, double x) {
  return a / x;
}
PK_HD float divide_near_one(float a, float x) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return a * r;
#else
  return a / x;
#endif
}

// log(1 + e) for 0 <= e <= 1.
PK_HD double log1p_unit(double e) {
  return pk_log1p(e);
}
// 2 atanh(t), t = e / (2 + e) <= 1/3: 2 t + t^3 p(t^2), p fitted at Chebyshev's points, 1.6e-8
// relative off. 2 ulp.
PK_HD float log1p_unit(float e) {
  const float t = divide_near_one(e, 2.0f + e), q = t * t;
  float p = 0.26867547631263733f;
  p = p * q + 0.28233957290649414f;
  p = p * q + 0.4000767171382904f;
  p = p * q + 0.6666663885116577f;
  return (p * q) * t + (t + t);
}

// e^-x for x >= 0.
PK_HD double exp_of_negative(double x) {
  return pk_exp(-x);
}
// On the device 2^-(h + l) = 2^-h - 2^-h l ln 2, h + l = x log2(e) to 48 bits: 3 ulp, 0 from 88 on.
PK_HD float exp_of_negative(float x) {
#if defined(__CUDA_ARCH__)
  const float y = fminf(x, 200.0f), h = y * 1.44269502f;
  const float l = __fmaf_rn(y, 1.92596303e-8f, __fmaf_rn(y, 1.44269502f, -h));
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(-h));
  return __fmaf_rn(r, l * -0.693147182f, r);
#else
  return pk_exp(-x);
#endif
}

// 1 / log_b(1 + rank) of a 1-based rank, 0 beyond topn (0: no limit).
PK_HD double rank_discount(int64_t rank, bool base2, int64_t topn) {
  if (topn > 0 && rank > topn) return 0.0;
  return (base2 ? kLog2 : 1.0) / pk_log1p(double(rank));
}

// 2^y - 1 without cancellation near y = 0.
PK_HD double exp2_gain(double y) {
  return pk_expm1(y * kLog2);
}

// e^x for x <= 0 where 0 stands for the greatest member itself: exactly 1.
PK_HD double exp_below(double x) {
  return x == 0.0 ? 1.0 : pk_exp(x);
}

// LSE(members) - own from own = exp(own - top) and the sum of the others' exponentials, with
// above = top - own score. The 1 of the greatest member stays out of the logarithm.
PK_HD double choice_loss(double own, double rest, double above) {
  return pk_log1p(own == 1.0 ? rest : own + rest - 1.0) + above;
}

}  // namespace prefkern
