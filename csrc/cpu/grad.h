// The logit gradient of one tile row: numerics/gradient.h on vectors.
#pragma once

#include "cpu/second.h"

namespace prefkern {
namespace PK_ISA {

// Row constants of the gradient, dz/dx's constant factor included.
template <class T>
struct GradRow {
  const StatPlan* plan;
  T c[kCoefs];
  T operator[](Coef k) const { return c[int(k)]; }
  Vec<T> all(Coef k) const { return splat(c[int(k)]); }
  bool on(Coef k) const { return c[int(k)] != T(0); }
  // A normaliser and its low part, which lies behind it.
  Split<T> lse(Coef k) const { return {c[int(k)], c[int(k) + 1]}; }
  // Terms beyond multiples of p and r: they take a pass of their own.
  bool special() const {
    return on(Coef::alpha) || on(Coef::renyi) || on(Coef::mix) || on(Coef::jsd) || on(Coef::tv) ||
           on(Coef::bkl);
  }
};

template <class T>
GradRow<T> read_coefficients(const HeadCall& call, int64_t slot) {
  const Coefficients& from = call.coefficients;
  const T* row = static_cast<const T*>(from.data) + slot * from.by_slot;
  GradRow<T> g{&call.stats, {}};
  for (int i = 0; i < from.count; ++i) g.c[int(from.kind[i])] = row[from.at[i]];
  return g;
}

// p (a0 [+ ent (lp + H)] [+ col (p - C)])
template <class T, bool entropy, bool collision>
PK_HOT void grad_one(const GradRow<T>& g, const TileRow<T>& t, T* d, int64_t d_stride) {
  const Vec<T> a0 = g.all(Coef::a0), ent = g.all(Coef::ent), col = g.all(Coef::col);
  const Vec<T> low = splat(min_x<T>()), value = g.all(Coef::ent_value), c = g.all(Coef::col_value);
  const Split<T> lse = g.lse(Coef::lse);
  for (int64_t k = 0; k < t.blocks; ++k) {
    const Vec<T> lp = max(low, minus<T>(load(t.z + k * t.stride), lse));
    const Vec<T> p = exp_bounded(lp);
    Vec<T> inner = a0;
    if constexpr (entropy) inner = fma(ent, lp + value, inner);
    if constexpr (collision) inner = fma(col, p - c, inner);
    store(d + k * d_stride, p * inner);
  }
}

// p (a0 + the terms in logs and p) + fkl (p - r); `plain` when only a0 and fkl are there.
template <class T, bool plain>
PK_HOT void grad_two(const GradRow<T>& g, const TileRow<T>& t, T* d, int64_t d_stride) {
  const Vec<T> a0 = g.all(Coef::a0), fkl = g.all(Coef::fkl), ent = g.all(Coef::ent);
  const Vec<T> rkl = g.all(Coef::rkl), col = g.all(Coef::col), low = splat(min_x<T>()), zero{};
  const Vec<T> h = g.all(Coef::ent_value), kl = g.all(Coef::rkl_value), c = g.all(Coef::col_value);
  const Split<T> lse = g.lse(Coef::lse), ref_lse = g.lse(Coef::ref_lse);
  const bool reverse = g.on(Coef::rkl);
  for (int64_t k = 0; k < t.blocks; ++k) {
    const Vec<T> lp = minus<T>(load(t.z + k * t.stride), lse);
    const Vec<T> lr = minus<T>(load(t.zr + k * t.ref_stride), ref_lse);
    const Vec<T> lpc = max(low, lp), p = exp_bounded(lpc), r = exp_bounded(max(low, lr));
    if constexpr (plain) {
      store(d + k * d_stride, fma(a0, p, fkl * (p - r)));
      continue;
    }
    Vec<T> inner = fma(col, p - c, fma(ent, lpc + h, a0));
    if (reverse) inner = fma(rkl, (lp - lr) - kl, inner);
    store(d + k * d_stride, fma(fkl, p - r, p == zero ? zero : p * inner));
  }
}

// Adds ev p (A - E[A]) to d (contiguous): A given, or the third head's log-ratio to the reference.
template <class T>
inline void grad_advantage(const GradRow<T>& g, const TileRow<T>& t, T* d) {
  constexpr int L = Lanes<T>::L;
  const Vec<T> ev = g.all(Coef::ev), mean = g.all(Coef::ev_value), low = splat(min_x<T>()), zero{};
  const Split<T> lse = g.lse(Coef::lse), ref_lse = g.lse(Coef::ref_lse);
  const Split<T> aux_lse = g.lse(Coef::aux_lse);
  for (int64_t k = 0; k < t.blocks; ++k) {
    const Vec<T> p = exp_bounded(max(low, minus<T>(load(t.z + k * t.stride), lse)));
    Vec<T> a;
    if (t.za != nullptr) {
      a = minus<T>(load(t.za + k * t.ref_stride), aux_lse) -
          minus<T>(load(t.zr + k * t.ref_stride), ref_lse);
    } else {
      a = load(t.adv + k * L);
    }
    const Vec<T> sum = load(d + k * L);
    store(d + k * L, p == zero ? sum : fma(ev * p, a - mean, sum));
  }
}

// Adds the terms that are no multiple of p or r to d (contiguous).
template <class T>
inline void grad_special(const GradRow<T>& g, const TileRow<T>& t, T* d) {
  constexpr int L = Lanes<T>::L;
  const StatPlan& plan = *g.plan;
  const Vec<T> zero{}, one = splat(T(1)), low = splat(min_x<T>());
  const Split<T> lse = g.lse(Coef::lse), ref_lse = g.lse(Coef::ref_lse);
  const TopSet<T> set{g[Coef::top_value], g[Coef::top_index]};
  // e^(lp + a (lr - lp) - shift)
  const auto power = [&](Vec<T> lp, Vec<T> lr, Stat stat, T shift) {
    return exp_bounded(max(low, blend<T>(lp, lr, T(plan.of(stat))) - splat(shift)));
  };
  for (int64_t k = 0; k < t.blocks; ++k) {
    const Vec<T> zr = load(t.zr + k * t.ref_stride);
    const Vec<T> lp = minus<T>(load(t.z + k * t.stride), lse), lr = minus<T>(zr, ref_lse);
    const Vec<T> p = exp_bounded(max(low, lp)), r = exp_bounded(max(low, lr));
    Vec<T> sum = load(d + k * L);
    if (g.on(Coef::alpha)) {
      sum = fma(g.all(Coef::alpha), power(lp, lr, Stat::alpha, T(0)) - p, sum);
    }
    if (g.on(Coef::renyi)) {
      sum = fma(g.all(Coef::renyi), power(lp, lr, Stat::renyi, g[Coef::renyi_shift]) - p, sum);
    }
    if (g.on(Coef::mix)) {
      sum = fma(g.all(Coef::mix), power(lp, lr, Stat::mix, g[Coef::mix_shift]) - p, sum);
    }
    if (g.on(Coef::jsd)) {
      const Vec<T> l = log_mixture_ratio<T>(clamp80<T>(lr - lp), T(plan.of(Stat::jsd)));
      sum -= p == zero ? zero : g.all(Coef::jsd) * p * (l + g.all(Coef::jsd_kl));
    }
    if (g.on(Coef::tv)) {
      const Vec<T> diff = p - r;
      const Vec<T> sign = diff > zero ? one : (diff < zero ? -one : zero);
      sum = fma(g.all(Coef::tv) * p, sign - g.all(Coef::tv_mean), sum);
    }
    if (g.on(Coef::bkl)) {
      const Vec<T> in = set.weight(zr, t.start + k * L);
      const Vec<T> other = fma(in, r, (one - in) * p * g.all(Coef::bkl_ratio));
      sum = fma(g.all(Coef::bkl), p - other, sum);
    }
    store(d + k * L, sum);
  }
}

// dL/dz of a tile row but for what lies at single entries.
template <class T>
inline void grad_terms(const GradRow<T>& g, const TileRow<T>& t, T* d, int64_t stride) {
  const bool entropy = g.on(Coef::ent), collision = g.on(Coef::col);
  if (t.zr == nullptr) {
    if (entropy && collision)
      grad_one<T, true, true>(g, t, d, stride);
    else if (entropy)
      grad_one<T, true, false>(g, t, d, stride);
    else if (collision)
      grad_one<T, false, true>(g, t, d, stride);
    else
      grad_one<T, false, false>(g, t, d, stride);
  } else if (!entropy && !collision && !g.on(Coef::rkl)) {
    grad_two<T, true>(g, t, d, stride);
  } else {
    grad_two<T, false>(g, t, d, stride);
  }
  if (g.special()) grad_special(g, t, d);
  if (g.on(Coef::ev)) grad_advantage(g, t, d);
}

// dL/dx of one tile row to `dst` (t.z's stride; it may be t.z itself). `line` holds a row.
// add(f): calls f(entry, number) for what is added at single entries of the tile.
template <class T, class Add>
inline void grad_row(const GradRow<T>& g, const TileRow<T>& t, T* dst, T* line, const Model& model,
                     const Add& add) {
  constexpr int L = Lanes<T>::L;
  const bool capped = model.softcap != 0.0, apart = capped || g.special() || g.on(Coef::ev);
  T* d = apart ? line : dst;
  const int64_t stride = apart ? L : t.stride;
  grad_terms(g, t, d, stride);
  add([&](int64_t v, T x) { d[v / L * stride + v % L] += x; });
  if (!apart) return;
  const Vec<T> one = splat(T(1)), f = splat(T(capped ? model.temperature / model.softcap : 0.0));
  for (int64_t k = 0; k < t.blocks; ++k) {
    Vec<T> v = load(line + k * L);
    if (capped) {  // the variable part of dz/dx
      const Vec<T> u = load(t.z + k * t.stride) * f;
      v = v == Vec<T>{} ? v : v * (one - u * u);
    }
    store(dst + k * t.stride, v);
  }
}

}  // namespace PK_ISA
}  // namespace prefkern
