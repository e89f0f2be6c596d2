// Running sums of one row over the vocabulary, all relative to running maxima, and how they merge.
//
// With m the maximum so far, a sum of e^(z-m) moves to a new maximum m' by the factor e^(m-m'), and
// a sum that also carries (z-m) picks up (m-m') times the plain sum. Every rule below is one of
// these two. The names are those of prefkern/backends/tables.py.
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

enum Blend : int { kAlphaBlend, kRenyiBlend, kMixBlend, kBlends };

// Everything the first sweep over the vocabulary gathers for one row. x = z - max of its own model.
template <class S>
struct RowSumsOf {
  using Number = S;
  OnlineLseOf<S> pol, ref, aux, rounded;
  OnlineLseOf<S> blend[kBlends];   // of x + a (xr - x)
  S x = 0, sq = 0;                 // sum e^x x, sum e^(2x)
  S ref_cross = 0, pol_cross = 0;  // sum e^xr (xr - x), sum e^x (x - xr)
  S adv = 0;                       // sum e^x A, or sum e^x (xa - xr) with a third head
  S z_sum = 0, z_count = 0;        // finite logits
  int64_t top = 0;                 // lowest column of the largest logit
};
using RowSums = RowSumsOf<double>;

// Calls f(field, number) for every number of the sums but `top`; merged and stored in this order.
template <class S, class F>
PK_HD void each_field(RowSumsOf<S>& s, const F& f) {
  f(Field::max, s.pol.max);
  f(Field::sum, s.pol.sum);
  f(Field::round_max, s.rounded.max);
  f(Field::round_sum, s.rounded.sum);
  f(Field::ref_max, s.ref.max);
  f(Field::ref_sum, s.ref.sum);
  f(Field::ref_cross, s.ref_cross);
  f(Field::pol_cross, s.pol_cross);
  f(Field::x, s.x);
  f(Field::sq, s.sq);
  f(Field::z_sum, s.z_sum);
  f(Field::z_count, s.z_count);
  f(Field::alpha_max, s.blend[kAlphaBlend].max);
  f(Field::alpha_sum, s.blend[kAlphaBlend].sum);
  f(Field::renyi_max, s.blend[kRenyiBlend].max);
  f(Field::renyi_sum, s.blend[kRenyiBlend].sum);
  f(Field::mix_max, s.blend[kMixBlend].max);
  f(Field::mix_sum, s.blend[kMixBlend].sum);
  f(Field::adv, s.adv);
  f(Field::aux_max, s.aux.max);
  f(Field::aux_sum, s.aux.sum);
}

// Whether a fold of such a call writes a field; fields it does not write may hold anything.
struct FoldPlan {
  StatPlan stats;
  bool two = false, third = false;  // a reference, a third head
  bool rounded = false;             // round_max and round_sum are there
  PK_HD bool writes(Field f) const {
    switch (f) {
      case Field::max:
      case Field::sum:
        return true;
      case Field::round_max:
      case Field::round_sum:
        return rounded;
      case Field::ref_max:
      case Field::ref_sum:
        return two;
      case Field::ref_cross:
        return stats.has(Stat::fkl);
      case Field::pol_cross:
        return stats.has(Stat::rkl);
      case Field::x:
        return stats.has(Stat::ent);
      case Field::sq:
        return stats.has(Stat::col);
      case Field::z_sum:
      case Field::z_count:
        return stats.has(Stat::zmean);
      case Field::top:
        return stats.has(Stat::top1);
      case Field::alpha_max:
      case Field::alpha_sum:
        return stats.has(Stat::alpha);
      case Field::renyi_max:
      case Field::renyi_sum:
        return stats.has(Stat::renyi);
      case Field::mix_max:
      case Field::mix_sum:
        return stats.has(Stat::mix);
      case Field::adv:
        return stats.has(Stat::ev);
      case Field::aux_max:
      case Field::aux_sum:
        return third;
    }
    return false;
  }
};

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
  s.x = fp * (s.x + dp * s.pol.sum);
  s.sq *= fp * fp;
  s.pol_cross = fp * (s.pol_cross + (dp - dr) * s.pol.sum);
  s.ref_cross = fr * (s.ref_cross + (dr - dp) * s.ref.sum);
  s.adv = third ? fp * (s.adv + (da - dr) * s.pol.sum) : fp * s.adv;
  s.blend[kAlphaBlend].max += dp + S(plan.of(Stat::alpha)) * (dr - dp);
  s.blend[kRenyiBlend].max += dp + S(plan.of(Stat::renyi)) * (dr - dp);
  s.blend[kMixBlend].max += dp + S(plan.of(Stat::mix)) * (dr - dp);
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
  for (int i = 0; i < kBlends; ++i) lse_merge(a.blend[i], b.blend[i]);
  a.x += b.x;
  a.sq += b.sq;
  a.ref_cross += b.ref_cross;
  a.pol_cross += b.pol_cross;
  a.adv += b.adv;
  a.z_sum += b.z_sum;
  a.z_count += b.z_count;
  lse_merge(a.rounded, b.rounded);
}

// The sums of one row over `ranges` pieces of the vocabulary: at(field, i) is what piece i wrote,
// start(i) its first column (top counts from there).
template <class At, class Start>
PK_HD RowSums merge_row(const FoldPlan& plan, int64_t ranges, const At& at, const Start& start) {
  RowSums all;
  for (int64_t i = 0; i < ranges; ++i) {
    RowSums one;
    each_field(one, [&](Field f, double& x) {
      if (plan.writes(f)) x = at(f, i);
    });
    if (plan.writes(Field::top)) one.top = int64_t(start(i)) + int64_t(at(Field::top, i));
    if (i == 0) {
      all = one;
    } else {
      merge_sums(all, one, plan.stats, plan.third);
    }
  }
  return all;
}

}  // namespace prefkern
