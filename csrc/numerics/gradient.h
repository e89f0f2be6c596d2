// The unified logit gradient of one row. Every statistic's part is written as a difference that
// vanishes where its gradient does (p - r, lp + ent, p - C, ...), so that a small gradient is not
// what is left of large terms:
//   dL/dz_v = e 1[v=y] + p (a0 - ent (lp + H) + rkl (lp - lr - KL) + ev (A - E[A]) + col (p - C)) +
//   fkl (p - r) + ...
#pragma once

#include "numerics/finish.h"

namespace prefkern {

template <class S>
struct GradCoefOf {
  S e = 0, a0 = 0, fkl = 0;
  S ent = 0, ent_value = 0, rkl = 0, rkl_value = 0, ev = 0, ev_value = 0, col = 0, col_value = 0;
  S alpha = 0, alpha_a = 0;  // alpha (e^(lp + alpha_a (lr - lp)) - p)
  S renyi = 0, renyi_a = 0,
    renyi_shift = 0;                  // renyi (e^(lp + renyi_a (lr - lp) - renyi_shift) - p)
  S mix = 0, mix_b = 0, mix_lse = 0;  // mix (e^(z + mix_b (zr - z) - mix_lse) - p)
  S jsd = 0, jsd_b = 0, jsd_kl = 0;   // jsd p (lp - lmix - jsd_kl)
  S tv = 0, tv_mean = 0;              // tv p (sign(p-r) - tv_mean)
  S bkl = 0, bkl_ratio = 0,
    top_value = 0;  // bkl (p - r inside the top set, p - p ratio outside)
  int64_t top_index = -1;
};
using GradCoef = GradCoefOf<double>;

// c(kind): upstream number of a statistic; out(kind): its value; saved(row): what the forward kept.
template <class Up, class Out, class Saved>
PK_HD GradCoef grad_coefficients(const StatPlan& plan, const Up& c, const Out& out,
                                 const Saved& saved) {
  GradCoef g;
  if (plan.has(kLogp)) {
    g.e += c(kLogp);
    g.a0 -= c(kLogp);
  }
  if (plan.has(kLse)) g.a0 += c(kLse);
  if (plan.has(kZy)) g.e += c(kZy);
  if (plan.has(kEnt)) {
    g.ent = -c(kEnt);
    g.ent_value = out(kEnt);
  }
  if (plan.has(kCol)) {
    g.col_value = pk_exp(out(kCol));
    g.col = 2.0 * c(kCol) / g.col_value;
  }
  if (plan.has(kFkl)) g.fkl = c(kFkl);
  if (plan.has(kRkl)) {
    g.rkl = c(kRkl);
    g.rkl_value = out(kRkl);
  }
  if (plan.has(kEv)) {
    g.ev = c(kEv);
    g.ev_value = out(kEv);
  }
  if (plan.has(kAlpha)) {
    const double a = plan.param[kAlpha];
    g.a0 -= c(kAlpha) * (1.0 - a) * out(kAlpha);  // (S_a - 1) / a
    g.alpha = -c(kAlpha) / a;
    g.alpha_a = a;
  }
  if (plan.has(kRenyi)) {
    const double a = plan.param[kRenyi];
    g.renyi = -c(kRenyi);
    g.renyi_a = a;
    g.renyi_shift = (a - 1.0) * out(kRenyi);  // log S_a
  }
  if (plan.has(kMix)) {
    const double b = plan.param[kMix];
    g.e += (1.0 - b) * c(kMix);
    g.a0 -= (1.0 - b) * c(kMix);
    g.mix = -(1.0 - b) * c(kMix);
    g.mix_b = b;
    g.mix_lse = saved(kSavedMixLse);
  }
  if (plan.has(kJsd)) {
    g.jsd = (1.0 - plan.param[kJsd]) * c(kJsd);
    g.jsd_b = plan.param[kJsd];
    g.jsd_kl = saved(kSavedKlMix);
  }
  if (plan.has(kTv)) {
    g.tv = 0.5 * c(kTv);
    g.tv_mean = saved(kSavedTvMean);
  }
  if (plan.has(kBkl)) {
    g.bkl = c(kBkl);
    const double rest = saved(kSavedRestPol);
    g.bkl_ratio = rest > 0.0 ? saved(kSavedRestRef) / rest : 0.0;
    g.top_value = saved(kSavedTopValue);
    g.top_index = int64_t(saved(kSavedTopIndex));
  }
  return g;
}

// e^(x + a (y - x) - shift), 0 where a term with weight is -inf.
template <class T>
PK_HD T blend_exp(T x, T y, T a, T shift) {
  const T u = a == T(0) ? x : a == T(1) ? y : x + a * (y - x);
  return u == u ? pk_exp(u - shift) : T(0);
}

// One entry in scalar form (CUDA, tests); the CPU kernels evaluate the same terms on vectors.
// zr, lr, adv may be anything where the plan has no statistic that reads them.
template <class S, class T>
PK_HD T logit_gradient(const GradCoefOf<S>& g, T z, T zr, T lp, T lr, T adv, bool is_target,
                       bool in_top) {
  const T p = pk_exp(lp), r = pk_exp(lr);
  T inner = T(g.a0);
  if (g.ent != 0) inner += T(g.ent) * (lp + T(g.ent_value));
  if (g.rkl != 0) inner += T(g.rkl) * ((lp - lr) - T(g.rkl_value));
  if (g.ev != 0) inner += T(g.ev) * (adv - T(g.ev_value));
  if (g.col != 0) inner += T(g.col) * (p - T(g.col_value));
  if (g.tv != 0) inner += T(g.tv) * (T(p > r) - T(p < r) - T(g.tv_mean));
  if (g.jsd != 0 && p > T(0)) {
    inner -= T(g.jsd) * (log_mixture_ratio(lr - lp, T(g.jsd_b)) + T(g.jsd_kl));
  }
  T d = weighted(p, inner);
  if (g.fkl != 0) d += T(g.fkl) * (p - r);
  if (g.alpha != 0) d += T(g.alpha) * (blend_exp(lp, lr, T(g.alpha_a), T(0)) - p);
  if (g.renyi != 0) d += T(g.renyi) * (blend_exp(lp, lr, T(g.renyi_a), T(g.renyi_shift)) - p);
  if (g.mix != 0) d += T(g.mix) * (blend_exp(z, zr, T(g.mix_b), T(g.mix_lse)) - p);
  if (g.bkl != 0) d += T(g.bkl) * (p - (in_top ? r : p * T(g.bkl_ratio)));
  return is_target ? d + T(g.e) : d;
}

}  // namespace prefkern
