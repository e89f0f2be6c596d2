// Scalar helpers and the host/device macro. always_inline keeps these functions out of the symbol
// table: a copy compiled for AVX-512 can then never be linked into code that must run without it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(__HIPCC__)
#include <cmath>
#define PK_HD __host__ __device__ __forceinline__
#else
#define PK_HD inline __attribute__((always_inline))
#endif

namespace prefkern {

#if defined(__CUDACC__) || defined(__HIPCC__)
PK_HD double pk_exp(double x) {
  return ::exp(x);
}
PK_HD double pk_log(double x) {
  return ::log(x);
}
PK_HD double pk_expm1(double x) {
  return ::expm1(x);
}
PK_HD float pk_exp(float x) {
  return ::expf(x);
}
PK_HD float pk_log(float x) {
  return ::logf(x);
}
PK_HD double pk_log1p(double x) {
  return ::log1p(x);
}
PK_HD float pk_expm1(float x) {
  return ::expm1f(x);
}
PK_HD float pk_log1p(float x) {
  return ::log1pf(x);
}
#else
PK_HD double pk_exp(double x) {
  return __builtin_exp(x);
}
PK_HD double pk_log(double x) {
  return __builtin_log(x);
}
PK_HD double pk_expm1(double x) {
  return __builtin_expm1(x);
}
PK_HD float pk_exp(float x) {
  return __builtin_expf(x);
}
PK_HD float pk_log(float x) {
  return __builtin_logf(x);
}
PK_HD double pk_log1p(double x) {
  return __builtin_log1p(x);
}
PK_HD float pk_expm1(float x) {
  return __builtin_expm1f(x);
}
PK_HD float pk_log1p(float x) {
  return __builtin_log1pf(x);
}
#endif

PK_HD double pk_inf() {
  return __builtin_huge_val();
}
PK_HD double pk_nan() {
  return __builtin_nan("");
}

// log of (b r + (1-b) p) / p from d = log r - log p. Beyond |d| = 80 one of the two is e^-80 of the
// other; the clamp keeps e^d finite. d = 0 gives exactly 0.
template <class T>
PK_HD T log_mixture_ratio(T d, T b) {
  d = d > T(80) ? T(80) : d < T(-80) ? T(-80) : d;
  return pk_log1p(b * pk_expm1(d));
}

// 0 * anything = 0: entries without probability never contribute, whatever their log is.
template <class T>
PK_HD T weighted(T p, T x) {
  return p == T(0) ? T(0) : p * x;
}

}  // namespace prefkern
