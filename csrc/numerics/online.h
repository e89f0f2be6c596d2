// Running sums of one row over the vocabulary, all relative to running maxima.
//
// With m the maximum so far, a sum of e^(z-m) moves to a new maximum m' by the factor e^(m-m'), and
// a sum that also carries (z-m) picks up (m-m') times the plain sum. Every rule below is one of
// these two.
#pragma once

#include "numerics/stats.h"

namespace prefkern {

// A log-sum-exp in two parts: value = max + log(sum).
struct OnlineLse {
  double max = -__builtin_huge_val();
  double sum = 0.0;
};

// Factor that rescales sums taken relative to `from` to the larger maximum `to`; 0 for an empty
// sum.
PK_HD double raise_factor(double from, double to) {
  if (from == to) return 1.0;
  return from == -pk_inf() ? 0.0 : pk_exp(from - to);
}

// The maximum to subtract: a row of nothing but -inf so far subtracts 0, so that -inf - max is not
// NaN.
PK_HD double safe_max(double m) {
  return m == -pk_inf() ? 0.0 : m;
}

PK_HD void lse_raise(OnlineLse& a, double max) {
  if (!(max > a.max)) return;
  a.sum *= raise_factor(a.max, max);
  a.max = max;
}

PK_HD void lse_merge(OnlineLse& a, const OnlineLse& b) {
  lse_raise(a, b.max);
  a.sum += b.sum * raise_factor(b.max, a.max);
}

PK_HD double lse_value(const OnlineLse& a) {
  return safe_max(a.max) + pk_log(a.sum);
}

// Everything one sweep over the vocabulary gathers for one row. x = z - max of its own model.
struct RowSums {
  OnlineLse pol, ref, aux;
  OnlineLse blend[3];                 // of x + a (xr - x): alpha, renyi, mix
  double pol_x = 0.0;                 // sum e^x x
  double pol_sq = 0.0;                // sum e^(2x)
  double ref_cross = 0.0;             // sum e^xr (xr - x)
  double pol_cross = 0.0;             // sum e^x (x - xr)
  double adv = 0.0;                   // sum e^x A, or sum e^x (xa - xr) with a third head
  double z_sum = 0.0, z_count = 0.0;  // finite logits
  double zy = 0.0, ref_zy = 0.0;
  int64_t top = 0;  // lowest index of the largest logit
  // The same normalisers over logits rounded to a 16-bit working dtype, which is what the backward
  // reads: with the exact ones, the gradient of a token with p = 0.99 would be lost in the 2^-9 |z|
  // by which its probability is off.
  OnlineLse pol_rounded, ref_rounded, aux_rounded;
  OnlineLse mix_plain;  // of z + b (z_ref - z), from the logits the backward reads
  // Second sweep, from normalised probabilities.
  double kl_ref = 0.0, kl_pol = 0.0;  // KL(r || mix), KL(p || mix)
  double tv = 0.0, tv_mean = 0.0;     // sum |p-r|, sum p sign(p-r)
  double top_kl = 0.0, rest_ref = 0.0, rest_pol = 0.0;
  double top_value = 0.0;
  int64_t top_index = -1;
};

// Moves the row to larger maxima. `third` says that adv is relative to aux and ref as well.
PK_HD void raise_maxima(RowSums& s, const StatPlan& plan, double pol, double ref, double aux,
                        bool third) {
  pol = pol > s.pol.max ? pol : s.pol.max;
  ref = ref > s.ref.max ? ref : s.ref.max;
  aux = aux > s.aux.max ? aux : s.aux.max;
  // Shift of x, 0 while there is nothing to shift.
  const double dp = s.pol.sum == 0.0 ? 0.0 : safe_max(s.pol.max) - safe_max(pol);
  const double dr = s.ref.sum == 0.0 ? 0.0 : safe_max(s.ref.max) - safe_max(ref);
  const double da = s.aux.sum == 0.0 ? 0.0 : safe_max(s.aux.max) - safe_max(aux);
  const double fp = raise_factor(s.pol.max, pol), fr = raise_factor(s.ref.max, ref);
  s.pol_x = fp * (s.pol_x + dp * s.pol.sum);
  s.pol_sq *= fp * fp;
  s.pol_cross = fp * (s.pol_cross + (dp - dr) * s.pol.sum);
  s.ref_cross = fr * (s.ref_cross + (dr - dp) * s.ref.sum);
  s.adv = third ? fp * (s.adv + (da - dr) * s.pol.sum) : fp * s.adv;
  s.blend[0].max += dp + plan.param[kAlpha] * (dr - dp);
  s.blend[1].max += dp + plan.param[kRenyi] * (dr - dp);
  s.blend[2].max += dp + plan.param[kMix] * (dr - dp);
  lse_raise(s.pol, pol);
  lse_raise(s.ref, ref);
  lse_raise(s.aux, aux);
}

}  // namespace prefkern
