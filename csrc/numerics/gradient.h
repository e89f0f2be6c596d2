// The unified logit gradient of one row:
//   dL/dz_v = e 1[v=y] + p (a0 + a1 lp + a2 lr + a3 A + a4 p) + b1 r + special terms
#pragma once

#include "numerics/finish.h"

namespace prefkern {

struct GradCoef {
  double e = 0, a0 = 0, a1 = 0, a2 = 0, a3 = 0, a4 = 0, b1 = 0;
  double alpha = 0, alpha_a = 0;                   // alpha * e^(lp + alpha_a (lr - lp))
  double renyi = 0, renyi_a = 0, renyi_shift = 0;  // renyi * e^(lp + renyi_a (lr - lp) - renyi_shift)
  double mix = 0, mix_b = 0, mix_lse = 0;          // mix * e^(z + mix_b (zr - z) - mix_lse)
  double jsd = 0, jsd_b = 0, jsd_kl = 0;           // jsd p (lp - lmix - jsd_kl)
  double tv = 0, tv_mean = 0;                      // tv p (sign(p-r) - tv_mean)
  double bkl = 0, bkl_ratio = 0, top_value = 0;    // bkl (p - r inside the top set, p ratio outside)
  int64_t top_index = -1;
};

// c(kind): upstream number of a statistic; out(kind): its value; saved(row): what the forward kept.
template <class Up, class Out, class Saved>
PK_HD GradCoef grad_coefficients(const StatPlan& plan, const Up& c, const Out& out, const Saved& saved) {
  GradCoef g;
  if (plan.has(kLogp)) { g.e += c(kLogp); g.a0 -= c(kLogp); }
  if (plan.has(kLse)) g.a0 += c(kLse);
  if (plan.has(kZy)) g.e += c(kZy);
  if (plan.has(kEnt)) { g.a1 -= c(kEnt); g.a0 -= c(kEnt) * out(kEnt); }
  if (plan.has(kCol)) { g.a4 += 2.0 * c(kCol) / pk_exp(out(kCol)); g.a0 -= 2.0 * c(kCol); }
  if (plan.has(kFkl)) { g.a0 += c(kFkl); g.b1 -= c(kFkl); }
  if (plan.has(kRkl)) { g.a1 += c(kRkl); g.a2 -= c(kRkl); g.a0 -= c(kRkl) * out(kRkl); }
  if (plan.has(kEv)) { g.a3 += c(kEv); g.a0 -= c(kEv) * out(kEv); }
  if (plan.has(kAlpha)) {
    const double a = plan.param[kAlpha];
    g.a0 += c(kAlpha) * (1.0 - a * (1.0 - a) * out(kAlpha)) / a;  // S_a from the value
    g.alpha = -c(kAlpha) / a;
    g.alpha_a = a;
  }
  if (plan.has(kRenyi)) {
    const double a = plan.param[kRenyi];
    g.a0 += c(kRenyi);
    g.renyi = -c(kRenyi);
    g.renyi_a = a;
    g.renyi_shift = (a - 1.0) * out(kRenyi);  // log S_a
  }
  if (plan.has(kMix)) {
    const double b = plan.param[kMix];
    g.e += (1.0 - b) * c(kMix);
    g.mix = -(1.0 - b) * c(kMix);
    g.mix_b = b;
    g.mix_lse = saved(kSavedMixLse);
  }
  if (plan.has(kJsd)) {
    g.jsd = (1.0 - plan.param[kJsd]) * c(kJsd);
    g.jsd_b = plan.param[kJsd];
    g.jsd_kl = saved(kSavedKlMix);
  }
  if (plan.has(kTv)) { g.tv = 0.5 * c(kTv); g.tv_mean = saved(kSavedTvMean); }
  if (plan.has(kBkl)) {
    g.bkl = c(kBkl);
    const double rest = saved(kSavedRestPol);
    g.bkl_ratio = rest > 0.0 ? saved(kSavedRestRef) / rest : 0.0;
    g.top_value = saved(kSavedTopValue);
    g.top_index = int64_t(saved(kSavedTopIndex));
  }
  return g;
}

// One entry in scalar form (CUDA, tests); the CPU kernels evaluate the same terms on vectors.
// zr, lr, adv may be anything where the plan has no statistic that reads them.
template <class T>
PK_HD T logit_gradient(const GradCoef& g, T z, T zr, T lp, T lr, T adv, bool is_target, bool in_top) {
  const T p = pk_exp(lp), r = pk_exp(lr);
  T inner = T(g.a0);
  if (g.a1 != 0) inner += T(g.a1) * lp;
  if (g.a2 != 0) inner += T(g.a2) * lr;
  if (g.a3 != 0) inner += T(g.a3) * adv;
  if (g.a4 != 0) inner += T(g.a4) * p;
  if (g.tv != 0) inner += T(g.tv) * (T(p > r) - T(p < r) - T(g.tv_mean));
  if (g.jsd != 0 && p > T(0)) {
    const T ratio = pk_exp(lr - lp);  // lp - lmix = -log(1 - b + b r/p)
    inner += T(g.jsd) * (-pk_log(T(1 - g.jsd_b) + T(g.jsd_b) * ratio) - T(g.jsd_kl));
  }
  T d = weighted(p, inner);
  if (g.b1 != 0) d += T(g.b1) * r;
  if (g.alpha != 0 && r > T(0) && p > T(0)) d += T(g.alpha) * pk_exp(lp + T(g.alpha_a) * (lr - lp));
  if (g.renyi != 0 && r > T(0) && p > T(0)) {
    d += T(g.renyi) * pk_exp(lp + T(g.renyi_a) * (lr - lp) - T(g.renyi_shift));
  }
  if (g.mix != 0) {
    const T u = g.mix_b == 0 ? z : z + T(g.mix_b) * (zr - z);
    if (u == u) d += T(g.mix) * pk_exp(u - T(g.mix_lse));
  }
  if (g.bkl != 0) d += T(g.bkl) * (p - (in_top ? r : p * T(g.bkl_ratio)));
  return is_target ? d + T(g.e) : d;
}

}  // namespace prefkern
