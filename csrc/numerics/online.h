// Running sums of one row over the vocabulary, all relative to running maxima.
//
// With m the maximum so far, a sum of e^(z-m) moves to a new maximum m' by the factor e^(m-m'), and
// a sum that also carries (z-m) picks up (m-m') times the plain sum. Every rule below is one of
// these two.
#pragma once

#include "numerics/stats.h"

namespace prefkern {

// A log-sum-exp in two parts: value = max + log(sum).
template <class S>
struct OnlineLseOf {
  using Number = S;
  S max = S(-__builtin_huge_val());
  S sum = S(0);
};
using OnlineLse = OnlineLseOf<double>;

// Factor that rescales sums taken relative to `from` to the larger maximum `to`; 0 for an empty
// sum.
template <class S>
PK_HD S raise_factor(S from, S to) {
  if (from == to) return S(1);
  return from == S(-pk_inf()) ? S(0) : pk_exp(from - to);
}

// The maximum to subtract: a row of nothing but -inf so far subtracts 0, so that -inf - max is not
// NaN.
template <class S>
PK_HD S safe_max(S m) {
  return m == S(-pk_inf()) ? S(0) : m;
}

template <class S>
PK_HD void lse_raise(OnlineLseOf<S>& a, typename OnlineLseOf<S>::Number max) {
  if (!(max > a.max)) return;
  a.sum *= raise_factor(a.max, max);
  a.max = max;
}

template <class S>
PK_HD void lse_merge(OnlineLseOf<S>& a, const OnlineLseOf<S>& b) {
  lse_raise(a, b.max);
  a.sum += b.sum * raise_factor(b.max, a.max);
}

PK_HD double lse_value(const OnlineLse& a) {
  return safe_max(a.max) + pk_log(a.sum);
}

// Everything one sweep over the vocabulary gathers for one row. x = z - max of its own model.
template <class S>
struct RowSumsOf {
  using Number = S;
  OnlineLseOf<S> pol, ref, aux;
  OnlineLseOf<S> blend[3];   // of x + a (xr - x): alpha, renyi, mix
  S pol_x = 0;               // sum e^x x
  S pol_sq = 0;              // sum e^(2x)
  S ref_cross = 0;           // sum e^xr (xr - x)
  S pol_cross = 0;           // sum e^x (x - xr)
  S adv = 0;                 // sum e^x A, or sum e^x (xa - xr) with a third head
  S z_sum = 0, z_count = 0;  // finite logits
  S zy = 0, ref_zy = 0;
  int64_t top = 0;  // lowest index of the largest logit
  // The same normalisers over logits rounded to a 16-bit working dtype, which is what the backward
  // reads: with the exact ones, the gradient of a token with p = 0.99 would be lost in the 2^-9 |z|
  // by which its probability is off.
  OnlineLseOf<S> pol_rounded, ref_rounded, aux_rounded;
  OnlineLseOf<S> mix_plain;  // of z + b (z_ref - z), from the logits the backward reads
  // Second sweep, from normalised probabilities.
  S kl_ref = 0, kl_pol = 0;  // KL(r || mix), KL(p || mix)
  S tv = 0, tv_mean = 0;     // sum |p-r|, sum p sign(p-r)
  S top_kl = 0, rest_ref = 0, rest_pol = 0;
  S top_value = 0;
  int64_t top_index = -1;
};
using RowSums = RowSumsOf<double>;

// Moves the row to larger maxima. `third` says that adv is relative to aux and ref as well.
template <class S>
PK_HD void raise_maxima(RowSumsOf<S>& s, const StatPlan& plan, typename RowSumsOf<S>::Number pol,
                        typename RowSumsOf<S>::Number ref, typename RowSumsOf<S>::Number aux,
                        bool third) {
  pol = pol > s.pol.max ? pol : s.pol.max;
  ref = ref > s.ref.max ? ref : s.ref.max;
  aux = aux > s.aux.max ? aux : s.aux.max;
  // Shift of x, 0 while there is nothing to shift.
  const S dp = s.pol.sum == S(0) ? S(0) : safe_max(s.pol.max) - safe_max(pol);
  const S dr = s.ref.sum == S(0) ? S(0) : safe_max(s.ref.max) - safe_max(ref);
  const S da = s.aux.sum == S(0) ? S(0) : safe_max(s.aux.max) - safe_max(aux);
  const S fp = raise_factor(s.pol.max, pol), fr = raise_factor(s.ref.max, ref);
  s.pol_x = fp * (s.pol_x + dp * s.pol.sum);
  s.pol_sq *= fp * fp;
  s.pol_cross = fp * (s.pol_cross + (dp - dr) * s.pol.sum);
  s.ref_cross = fr * (s.ref_cross + (dr - dp) * s.ref.sum);
  s.adv = third ? fp * (s.adv + (da - dr) * s.pol.sum) : fp * s.adv;
  s.blend[0].max += dp + S(plan.param[kAlpha]) * (dr - dp);
  s.blend[1].max += dp + S(plan.param[kRenyi]) * (dr - dp);
  s.blend[2].max += dp + S(plan.param[kMix]) * (dr - dp);
  lse_raise(s.pol, pol);
  lse_raise(s.ref, ref);
  lse_raise(s.aux, aux);
}

// Adds the first-sweep sums of other vocabulary entries of the same row. Both sides move to the
// common maxima first; b is left there. Equal largest logits: the lower index.
template <class S>
PK_HD void merge_sums(RowSumsOf<S>& a, RowSumsOf<S>& b, const StatPlan& plan, bool third) {
  if (b.pol.max > a.pol.max || (b.pol.max == a.pol.max && b.top < a.top)) a.top = b.top;
  raise_maxima(a, plan, b.pol.max, b.ref.max, b.aux.max, third);
  raise_maxima(b, plan, a.pol.max, a.ref.max, a.aux.max, third);
  a.pol.sum += b.pol.sum;
  a.ref.sum += b.ref.sum;
  a.aux.sum += b.aux.sum;
  for (int i = 0; i < 3; ++i) lse_merge(a.blend[i], b.blend[i]);
  a.pol_x += b.pol_x;
  a.pol_sq += b.pol_sq;
  a.ref_cross += b.ref_cross;
  a.pol_cross += b.pol_cross;
  a.adv += b.adv;
  a.z_sum += b.z_sum;
  a.z_count += b.z_count;
  // A row has one target: the side that has not met it holds 0.
  a.zy += b.zy;
  a.ref_zy += b.ref_zy;
  lse_merge(a.pol_rounded, b.pol_rounded);
  lse_merge(a.ref_rounded, b.ref_rounded);
  lse_merge(a.aux_rounded, b.aux_rounded);
  lse_merge(a.mix_plain, b.mix_plain);
}

}  // namespace prefkern
