// logits_logps: chunks of a row to its statistics, and statistics to gradient coefficients. A few
// hundred bytes per row, in fp64, with the formulas of csrc/numerics.
#pragma once

#include "cuda/fold.cuh"
#include "cuda/gradient.cuh"
#include "numerics/finish.h"

namespace prefkern {

// Low part of lse, in the row of `saved` that only a third head uses: logits of any size keep exact
// gradients.
constexpr SavedRow kSavedLseLow = kSavedAuxLse;

struct RowTotals : RowSums {
  double column = 0.0;
};

// One warp per row: lanes merge chunks lane, lane + 32, ..., then each other's sums.
template <bool TWO, bool SMALL>
struct Finish {
  using Args = FinishArgs;
  using Threads = Block<32, 4>;
  static constexpr int kMinBlocks = 2;
  using List = FieldsOf<TWO, SMALL>;

  PK_DEVICE static void run(Threads& b, const Args& a) {
    const int64_t r = b.index();
    if (r >= a.rows) return;
    const int64_t y = a.targets[r];
    if (y == a.ignore) {
      b.each([&](int t) {
        for (int k = t; k < a.plan.count; k += kWarp) a.out[k * a.rows + r] = 0.0f;
        if (t < kSavedRows) a.saved[t * a.rows + r] = 0.0f;
        if (a.norms != nullptr && t < 4) a.norms[t * a.rows + r] = 0.0f;
      });
      return;
    }
    typename Threads::template Local<RowTotals> totals, other;
    b.each([&](int t) {
      RowTotals s;
      for (int64_t c = t; c < a.chunks; c += kWarp) {
        RowTotals part = load(a, r, c);
        merge_sums(s, part, a.plan, false);
      }
      totals[t] = s;
    });
    for (int step = kWarp / 2; step > 0 && a.chunks > 1; step /= 2) {
      List::each([&](auto f, int) {
        b.exchange([&](int t) -> double { return number<f.value>(totals[t]); },
                   [&](int t) { return (t ^ step) % kWarp; },
                   [&](int t) -> double& { return number<f.value>(other[t]); });
      });
      b.exchange([&](int t) { return totals[t].top; }, [&](int t) { return (t ^ step) % kWarp; },
                 [&](int t) -> int64_t& { return other[t].top; });
      b.each([&](int t) { merge_sums(totals[t], other[t], a.plan, false); });
    }
    b.each([&](int t) {
      if (t == 0) finish(a, r, y, totals[t]);
    });
  }

  PK_DEVICE static RowTotals load(const Args& a, int64_t r, int64_t chunk) {
    RowTotals s;
    List::each([&](auto f, int k) {
      number<f.value>(s) = double(a.fields[(k * a.chunks + chunk) * a.rows + r]);
    });
    s.top = chunk * a.chunk + int64_t(s.column);
    return s;
  }

  PK_DEVICE static void finish(const Args& a, int64_t r, int64_t y, RowTotals& s) {
    const bool valid = y >= 0 && y < a.vocab;  // else nothing at hand for it: NaN, never a number
    s.zy = valid ? double(a.at_target[r]) : pk_nan();
    if constexpr (TWO) s.ref_zy = valid ? double(a.at_target[a.rows + r]) : pk_nan();
    finish_first(s, a.plan, false, y, [&](StatKind k, double v) {
      if (a.plan.slot[k] >= 0) a.out[a.plan.slot[k] * a.rows + r] = float(v);
    });
    const auto save = [&](SavedRow k, double v) { a.saved[k * a.rows + r] = float(v); };
    PK_UNROLL
    for (int k = 0; k < kSavedRows; ++k) save(SavedRow(k), 0.0);
    const double lse = lse_value(s.pol);
    const auto low = [](double x) { return x - x == 0.0 ? x - double(float(x)) : 0.0; };
    save(kSavedLse, lse);
    save(kSavedLseLow, low(lse));
    if constexpr (TWO) {
      const double ref = lse_value(s.ref);
      save(kSavedRefLse, ref);
      if (a.plan.has(kMix)) save(kSavedMixLse, lse_value(s.mix_plain));
      if (a.norms == nullptr) return;
      const double norm[4] = {lse, low(lse), ref, low(ref)};
      PK_UNROLL
      for (int k = 0; k < 4; ++k) a.norms[k * a.rows + r] = float(norm[k]);
      if (a.top == nullptr) return;
      a.norms[kTopValue * a.rows + r] = a.top[r];
      a.norms[kTopIndex * a.rows + r] = a.top[a.rows + r];
    }
  }
};

// One thread per row.
struct RowThreads {
  using Args = FinishArgs;
  using Threads = Block<128>;
  static constexpr int kMinBlocks = 2;

  PK_DEVICE static int64_t row(const Threads& b, int t) { return b.index() * 128 + t; }
};

struct FinishSecond : RowThreads {
  PK_DEVICE static void run(Threads& b, const Args& a) {
    b.each([&](int t) {
      const int64_t r = row(b, t);
      if (r >= a.rows || a.targets[r] == a.ignore) return;
      const auto sum = [&](int k) {
        double v = 0.0;
        for (int64_t c = 0; c < a.chunks; ++c) {
          v += double(a.second[(k * a.chunks + c) * a.rows + r]);
        }
        return v;
      };
      RowSums s;
      s.kl_ref = sum(0), s.kl_pol = sum(1), s.tv = sum(2), s.tv_mean = sum(3);
      s.top_kl = sum(4), s.rest_ref = sum(5), s.rest_pol = sum(6);
      finish_second(s, a.plan, [&](StatKind k, double v) {
        if (a.plan.slot[k] >= 0) a.out[a.plan.slot[k] * a.rows + r] = float(v);
      });
      const auto save = [&](SavedRow k, double v) { a.saved[k * a.rows + r] = float(v); };
      if (a.plan.has(kJsd)) save(kSavedKlMix, s.kl_pol);
      if (a.plan.has(kTv)) save(kSavedTvMean, s.tv_mean);
      if (a.plan.has(kBkl)) {
        save(kSavedRestRef, s.rest_ref);
        save(kSavedRestPol, s.rest_pol);
        save(kSavedTopValue, double(a.top[r]));
        save(kSavedTopIndex, double(a.top[a.rows + r]));
      }
    });
  }
};

struct Coefficients : RowThreads {
  PK_DEVICE static void run(Threads& b, const Args& a) {
    b.each([&](int t) {
      const int64_t r = row(b, t);
      if (r >= a.rows || a.targets[r] == a.ignore) return;
      const auto saved = [&](SavedRow k) { return double(a.saved[k * a.rows + r]); };
      const GradCoef g = grad_coefficients(
          a.plan, [&](StatKind k) { return double(a.d_out[a.plan.slot[k] * a.rows + r]); },
          [&](StatKind k) { return double(a.out[a.plan.slot[k] * a.rows + r]); }, saved);
      const double f = 1.0 / a.temperature;  // dz/dx
      const auto put = [&](Coefficient k, double v) { a.coefficients[k * a.rows + r] = float(v); };
      put(kGLse, saved(kSavedLse)), put(kGLseLow, saved(kSavedLseLow));
      put(kGE, f * g.e), put(kGA0, f * g.a0);
      put(kGEnt, f * g.ent), put(kGEntValue, g.ent_value);
      put(kGCol, f * g.col), put(kGColValue, g.col_value);
      put(kGRefLse, saved(kSavedRefLse)), put(kGRefLseLow, 0.0), put(kGFkl, f * g.fkl);
      put(kGRkl, f * g.rkl), put(kGRklValue, g.rkl_value);
      put(kGEv, 0.0), put(kGEvValue, 0.0), put(kGAuxLse, 0.0);
      put(kGAlpha, f * g.alpha), put(kGRenyi, f * g.renyi), put(kGRenyiShift, g.renyi_shift);
      put(kGMix, f * g.mix), put(kGMixLse, g.mix_lse);
      put(kGMixLseLow, g.mix_lse - double(float(g.mix_lse)));
      put(kGJsd, f * g.jsd), put(kGJsdKl, g.jsd_kl), put(kGTv, f * g.tv), put(kGTvMean, g.tv_mean);
      put(kGBkl, f * g.bkl), put(kGBklRatio, g.bkl_ratio);
      put(kGTopValue, g.top_value), put(kGTopIndex, double(g.top_index));
    });
  }
};

}  // namespace prefkern
