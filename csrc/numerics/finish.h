// From the sums of a row to its statistics.
#pragma once

#include "numerics/online.h"
#include "numerics/stats.h"

namespace prefkern {

// log S_a = log sum_v r^a p^(1-a). The maxima cancel, so that only sums of order 1 are left; 0
// exactly where the models are equal, since then every part of each difference is the same number.
PK_HD double log_overlap(const RowSums& s, int which, double a) {
  const double log_s = pk_log(s.pol.sum);
  return (lse_value(s.blend[which]) - log_s) - a * (pk_log(s.ref.sum) - log_s);
}

// Writes the requested statistics of one row: put(kind, value).
template <class Put>
PK_HD void finish_first(const RowSums& s, const StatPlan& plan, bool third, int64_t y,
                        const Put& put) {
  const double log_s = pk_log(s.pol.sum), lse = safe_max(s.pol.max) + log_s;
  // zy - max first: both are logits of the row, so their difference is exact where it matters.
  const double logp = (s.zy - safe_max(s.pol.max)) - log_s;
  const double bad = lse - lse;  // 0, or NaN for a row with a NaN or +inf logit
  put(kLogp, logp);
  put(kLse, lse);
  put(kZy, s.zy + (bad == bad ? 0.0 : pk_nan()));
  const double mean_x = s.pol_x / s.pol.sum;
  put(kEnt, log_s - mean_x);
  put(kCol, pk_log(s.pol_sq) - 2.0 * log_s);
  put(kTop1, bad == bad ? (s.top == y ? 1.0 : 0.0) : pk_nan());
  put(kZmean, s.z_sum / (s.z_count > 0.0 ? s.z_count : 1.0) + (bad == bad ? 0.0 : pk_nan()));
  const double log_sr = pk_log(s.ref.sum), ref_lse = safe_max(s.ref.max) + log_sr;
  put(kRefLogp, (s.ref_zy - safe_max(s.ref.max)) - log_sr);
  put(kRefLse, ref_lse);
  put(kFkl, s.ref_cross / s.ref.sum + (log_s - log_sr));
  put(kRkl, s.pol_cross / s.pol.sum + (log_sr - log_s));
  if (plan.has(kAlpha)) {
    const double a = plan.param[kAlpha];
    put(kAlpha, -pk_expm1(log_overlap(s, 0, a)) / (a * (1.0 - a)));
  }
  if (plan.has(kRenyi)) {
    const double a = plan.param[kRenyi];
    put(kRenyi, log_overlap(s, 1, a) / (a - 1.0));
  }
  if (plan.has(kMix)) {
    const double b = plan.param[kMix];
    const double x = s.zy - safe_max(s.pol.max), xr = s.ref_zy - safe_max(s.ref.max);
    // A target without probability in either model has none in the blend (and -inf - -inf is no
    // number).
    const bool none = x == -pk_inf() || xr == -pk_inf();
    const double u = b == 0.0 ? x : b == 1.0 ? xr : none ? -pk_inf() : x + b * (xr - x);
    put(kMix, (u - safe_max(s.blend[2].max)) - pk_log(s.blend[2].sum) + bad + (ref_lse - ref_lse));
  }
  if (plan.has(kEv)) {
    put(kEv, s.adv / s.pol.sum + (third ? log_sr - pk_log(s.aux.sum) : 0.0));
  }
}

template <class Put>
PK_HD void finish_second(const RowSums& s, const StatPlan& plan, const Put& put) {
  if (plan.has(kJsd)) {
    const double b = plan.param[kJsd];
    put(kJsd, b * s.kl_ref + (1.0 - b) * s.kl_pol);
  }
  put(kTv, 0.5 * s.tv);
  if (plan.has(kBkl)) {
    const double rest = weighted(s.rest_ref, pk_log(s.rest_ref) - pk_log(s.rest_pol));
    put(kBkl, s.top_kl + rest);
  }
}

}  // namespace prefkern
