// The logit gradient of one entry. Every statistic's part is written as a difference that vanishes
// where its gradient does (p - r, lp + ent, p - C, ...), so that a small gradient is not what is
// left of large terms. The formula stands beside COEFFICIENTS in prefkern/backends/tables.py.
#pragma once

#include "numerics/finish.h"

namespace prefkern {

// e^(x + a (y - x) - shift), 0 where a term with weight is -inf.
template <class T>
PK_HD T blend_exp(T x, T y, T a, T shift) {
  const T u = a == T(0) ? x : a == T(1) ? y : x + a * (y - x);
  return u == u ? pk_exp(u - shift) : T(0);
}

// In scalar form (CUDA, tests); the CPU kernels evaluate the same terms on vectors. g(coefficient)
// in T; lp, lr are log-probabilities; lr, adv may be anything where no statistic reads them. The
// sign of p - r is taken from these, so that it does not depend on which exponential a forward
// used.
template <class T, class G>
PK_HD T logit_gradient(const StatPlan& plan, const G& g, T lp, T lr, T adv, bool is_target,
                       bool in_top) {
  const T p = pk_exp(lp), r = pk_exp(lr);
  T inner = g(Coef::a0);
  if (g(Coef::ent) != T(0)) inner += g(Coef::ent) * (lp + g(Coef::ent_value));
  if (g(Coef::rkl) != T(0)) inner += g(Coef::rkl) * ((lp - lr) - g(Coef::rkl_value));
  if (g(Coef::ev) != T(0)) inner += g(Coef::ev) * (adv - g(Coef::ev_value));
  if (g(Coef::col) != T(0)) inner += g(Coef::col) * (p - g(Coef::col_value));
  if (g(Coef::tv) != T(0)) inner += g(Coef::tv) * (T(lp > lr) - T(lp < lr) - g(Coef::tv_mean));
  if (g(Coef::jsd) != T(0) && p > T(0)) {
    const T ratio = log_mixture_ratio(lr - lp, T(plan.of(Stat::jsd)));
    inner -= g(Coef::jsd) * (ratio + g(Coef::jsd_kl));
  }
  T d = weighted(p, inner);
  if (g(Coef::fkl) != T(0)) d += g(Coef::fkl) * (p - r);
  if (g(Coef::alpha) != T(0)) {
    d += g(Coef::alpha) * (blend_exp(lp, lr, T(plan.of(Stat::alpha)), T(0)) - p);
  }
  if (g(Coef::renyi) != T(0)) {
    d += g(Coef::renyi) * (blend_exp(lp, lr, T(plan.of(Stat::renyi)), g(Coef::renyi_shift)) - p);
  }
  if (g(Coef::mix) != T(0)) {
    d += g(Coef::mix) * (blend_exp(lp, lr, T(plan.of(Stat::mix)), g(Coef::mix_shift)) - p);
  }
  if (g(Coef::bkl) != T(0)) d += g(Coef::bkl) * (p - (in_top ? r : p * g(Coef::bkl_ratio)));
  return is_target ? d + g(Coef::e) : d;
}

}  // namespace prefkern
