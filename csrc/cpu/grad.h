// Passes that need both normalisers: the second forward sweep and the logit gradient of a tile row.
#pragma once

#include "cpu/fold.h"

namespace prefkern {
namespace PK_ISA {

// A log-normaliser as two numbers, so that z - lse loses nothing to a large lse. (A head's lse is
// saved as one number; the low part is then 0 and costs one addition.)
template <class T>
struct Split {
  Vec<T> high, low;
  explicit Split(double x) : high(splat(T(x))), low(splat(T(x - double(T(x))))) {}
};
template <>
PK_INLINE Split<double>::Split(double x) : high(splat(x)), low(splat(0.0)) {}

template <class T>
PK_INLINE Vec<T> minus(Vec<T> z, const Split<T>& lse) {
  return (z - lse.high) - lse.low;
}

// log of (b r + (1-b) p) / p from d = log r - log p. Beyond |d| = 80 one of the two is e^-80 of the
// other; the clamp keeps e^d finite. d = 0 gives exactly 0.
template <class T>
PK_INLINE Vec<T> log_mixture_ratio(Vec<T> d, T b) {
  return log1p(splat(b) * (exp(d) - splat(T(1))));
}
template <class T>
PK_INLINE Vec<T> clamp80(Vec<T> d) {
  return max(splat(T(-80)), min_second(splat(T(80)), d));
}

// Lanes of the reference's top set: value, then index, as the forward's heap ordered them. Indices
// are compared as numbers of type T, exact up to V = 2^24 in fp32.
template <class T>
struct TopSet {
  T value;
  T index;
  PK_INLINE Vec<T> weight(Vec<T> zr, int64_t start) const {  // 1 inside, 0 outside
    Vec<T> v;
    for (int i = 0; i < Lanes<T>::L; ++i) v[i] = T(start + i);
    const Vec<T> one = splat(T(1)), zero{}, cut = splat(value);
    const Vec<T> tie = v <= splat(index) ? one : zero;
    return zr > cut ? one : zr == cut ? tie : zero;
  }
};

// `seen`: the reference's logits as the backward reads them, contiguous; null where they are t.zr.
template <class T>
inline void fold_second(RowSums& s, const StatPlan& plan, const TileRow<T>& t, double lse,
                        double ref_lse, const T* seen) {
  constexpr int L = Lanes<T>::L;
  const Split<T> n(lse), nr(ref_lse);
  const Vec<T> zero{}, one = splat(T(1));
  const bool jsd = plan.has(kJsd), tv = plan.has(kTv), bkl = plan.has(kBkl);
  const T b = T(plan.param[kJsd]);
  const TopSet<T> set{T(s.top_value), T(s.top_index)};
  Vec<T> kl_r{}, kl_p{}, dist{}, mean{}, top{}, rest_r{}, rest_p{};
  for (int64_t k = 0; k < t.blocks; ++k) {
    const Vec<T> zr = load(t.zr + k * t.ref_stride);
    const Vec<T> lp = minus<T>(load(t.z + k * t.stride), n), lr = minus<T>(zr, nr);
    const Vec<T> p = exp(lp), r = exp(lr);
    if (jsd) {
      const Vec<T> d = clamp80<T>(lr - lp), l = log_mixture_ratio<T>(d, b);
      kl_p -= p == zero ? zero : p * l;
      kl_r += r == zero ? zero : r * (d - l);
    }
    if (tv) {
      const Vec<T> d = p - r;
      dist += abs(d);
      mean += d > zero ? p : (d < zero ? -p : zero);
    }
    if (bkl) {
      const Vec<T> in = set.weight(seen ? load(seen + k * L) : zr, t.start + k * L), out = one - in;
      const Vec<T> ri = r * in;
      top += ri == zero ? zero : ri * (lr - lp);
      rest_r = fma(r, out, rest_r);
      rest_p = fma(p, out, rest_p);
    }
  }
  s.kl_ref += sum_lanes(kl_r);
  s.kl_pol += sum_lanes(kl_p);
  s.tv += sum_lanes(dist);
  s.tv_mean += sum_lanes(mean);
  s.top_kl += sum_lanes(top);
  s.rest_ref += sum_lanes(rest_r);
  s.rest_pol += sum_lanes(rest_p);
}

// Keeps the k largest reference logits of a row, ties to the lower index: a heap with the
// worst member (smallest value, then largest index) at its root.
template <class T>
struct TopHeap {
  T* value;
  int32_t* index;
  int32_t* size;
  int32_t k;
  PK_INLINE bool worse(int32_t a, int32_t b) const {
    return value[a] < value[b] || (value[a] == value[b] && index[a] > index[b]);
  }
  PK_INLINE void swap(int32_t a, int32_t b) {
    const T v = value[a];
    const int32_t i = index[a];
    value[a] = value[b], index[a] = index[b];
    value[b] = v, index[b] = i;
  }
  inline void insert(T v, int32_t i) {
    int32_t at;
    if (*size < k) {
      at = (*size)++;
      value[at] = v, index[at] = i;
      for (; at > 0 && worse(at, (at - 1) / 2); at = (at - 1) / 2) swap(at, (at - 1) / 2);
      return;
    }
    if (!(v > value[0])) return;
    value[0] = v, index[0] = i;
    for (at = 0;;) {
      int32_t child = 2 * at + 1;
      if (child >= *size) return;
      if (child + 1 < *size && worse(child + 1, child)) ++child;
      if (!worse(child, at)) return;
      swap(at, child);
      at = child;
    }
  }
  inline void scan(const TileRow<T>& t, int64_t width) {
    constexpr int L = Lanes<T>::L;
    for (int64_t b = 0; b < t.blocks; ++b) {
      const Vec<T> z = load(t.zr + b * t.ref_stride);
      if (*size == k && !(max_lanes<T>(z) > value[0])) continue;
      for (int i = 0; i < L && b * L + i < width; ++i) insert(z[i], int32_t(t.start + b * L + i));
    }
  }
};

// Row constants of the gradient in the compute type. With a constant slope dz/dx the coefficients
// of the sum already carry it.
template <class T>
struct GradRow {
  GradCoef c;
  Split<T> lse, ref_lse, aux_lse;
};

PK_INLINE void scale_coefficients(GradCoef& c, double f) {
  c.e *= f, c.a0 *= f, c.fkl *= f, c.ent *= f, c.rkl *= f, c.ev *= f, c.col *= f;
  c.alpha *= f, c.renyi *= f, c.mix *= f, c.jsd *= f, c.tv *= f, c.bkl *= f;
}

// p (a0 [+ ent (lp + H)] [+ col (p - C)])
template <class T, bool entropy, bool collision>
PK_HOT void grad_one(const GradRow<T>& g, const TileRow<T>& t, T* d, int64_t d_stride) {
  const Vec<T> a0 = splat(T(g.c.a0)), ent = splat(T(g.c.ent)), col = splat(T(g.c.col));
  const Vec<T> low = splat(min_x<T>()), value = splat(T(g.c.ent_value)),
               c = splat(T(g.c.col_value));
  for (int64_t k = 0; k < t.blocks; ++k) {
    const Vec<T> lp = max(low, minus<T>(load(t.z + k * t.stride), g.lse));
    const Vec<T> p = exp_bounded(lp);
    Vec<T> inner = a0;
    if constexpr (entropy) inner = fma(ent, lp + value, inner);
    if constexpr (collision) inner = fma(col, p - c, inner);
    store(d + k * d_stride, p * inner);
  }
}

// p (a0 + the terms in logs, A and p) + fkl (p - r); `plain` when only a0 and fkl are there.
template <class T, bool plain>
PK_HOT void grad_two(const GradRow<T>& g, const TileRow<T>& t, T* d, int64_t d_stride) {
  constexpr int L = Lanes<T>::L;
  const Vec<T> a0 = splat(T(g.c.a0)), fkl = splat(T(g.c.fkl)), ent = splat(T(g.c.ent)),
               rkl = splat(T(g.c.rkl));
  const Vec<T> ev = splat(T(g.c.ev)), col = splat(T(g.c.col)), low = splat(min_x<T>()), zero{};
  const Vec<T> h = splat(T(g.c.ent_value)), kl = splat(T(g.c.rkl_value)),
               mean = splat(T(g.c.ev_value));
  const Vec<T> c = splat(T(g.c.col_value));
  const bool reverse = g.c.rkl != 0, advantage = g.c.ev != 0;
  for (int64_t k = 0; k < t.blocks; ++k) {
    const Vec<T> lp = minus<T>(load(t.z + k * t.stride), g.lse);
    const Vec<T> lr = minus<T>(load(t.zr + k * t.ref_stride), g.ref_lse);
    const Vec<T> lpc = max(low, lp), p = exp_bounded(lpc), r = exp_bounded(max(low, lr));
    if constexpr (plain) {
      store(d + k * d_stride, fma(a0, p, fkl * (p - r)));
      continue;
    }
    Vec<T> inner = fma(col, p - c, fma(ent, lpc + h, a0));
    if (reverse) inner = fma(rkl, (lp - lr) - kl, inner);
    if (advantage) {
      const Vec<T> a =
          t.za ? minus<T>(load(t.za + k * t.ref_stride), g.aux_lse) - lr : load(t.adv + k * L);
      inner = fma(ev, a - mean, inner);
    }
    store(d + k * d_stride, fma(fkl, p - r, p == zero ? zero : p * inner));
  }
}

// The statistics of 2.2 that are no multiple of p or r; adds to d (contiguous).
template <class T>
inline void grad_special(const GradRow<T>& g, const TileRow<T>& t, T* d) {
  constexpr int L = Lanes<T>::L;
  const GradCoef& c = g.c;
  const Vec<T> zero{}, one = splat(T(1)), low = splat(min_x<T>());
  const Split<T> mix(c.mix_lse);
  const TopSet<T> set{T(c.top_value), T(c.top_index)};
  for (int64_t k = 0; k < t.blocks; ++k) {
    const Vec<T> z = load(t.z + k * t.stride), zr = load(t.zr + k * t.ref_stride);
    const Vec<T> lp = minus<T>(z, g.lse), lr = minus<T>(zr, g.ref_lse);
    const Vec<T> p = exp_bounded(max(low, lp)), r = exp_bounded(max(low, lr));
    Vec<T> sum = load(d + k * L);
    if (c.alpha != 0) {
      const Vec<T> u = blend<T>(lp, lr, T(c.alpha_a));
      sum = fma(splat(T(c.alpha)), exp_bounded(max(low, u)) - p, sum);
    }
    if (c.renyi != 0) {
      const Vec<T> u = blend<T>(lp, lr, T(c.renyi_a)) - splat(T(c.renyi_shift));
      sum = fma(splat(T(c.renyi)), exp_full(max(low, u)) - p, sum);
    }
    if (c.mix != 0) {
      const Vec<T> u = minus<T>(blend<T>(z, zr, T(c.mix_b)), mix);
      sum = fma(splat(T(c.mix)), exp_bounded(max(low, u)) - p, sum);
    }
    if (c.jsd != 0) {
      const Vec<T> l = log_mixture_ratio<T>(clamp80<T>(lr - lp), T(c.jsd_b));
      sum -= p == zero ? zero : splat(T(c.jsd)) * p * (l + splat(T(c.jsd_kl)));
    }
    if (c.tv != 0) {
      const Vec<T> diff = p - r;
      const Vec<T> sign = diff > zero ? one : (diff < zero ? -one : zero);
      sum = fma(splat(T(c.tv)) * p, sign - splat(T(c.tv_mean)), sum);
    }
    if (c.bkl != 0) {
      const Vec<T> in = set.weight(zr, t.start + k * L);
      const Vec<T> other = fma(in, r, (one - in) * p * splat(T(c.bkl_ratio)));
      sum = fma(splat(T(c.bkl)), p - other, sum);
    }
    store(d + k * L, sum);
  }
}

PK_INLINE bool has_special(const GradCoef& c) {
  return c.alpha != 0 || c.renyi != 0 || c.mix != 0 || c.jsd != 0 || c.tv != 0 || c.bkl != 0;
}

// dL/dx of one tile row, written over t.z's own storage (`dst`, same stride). `scratch` holds a
// row. target: index of y within the tile, or negative. softcap and temperature give the slope
// where it is not constant (softcap 0: already in the coefficients); its constant factor is in them
// either way.
template <class T>
inline void grad_row(const GradRow<T>& g, const TileRow<T>& t, T* dst, T* scratch, int64_t target,
                     double softcap, double temperature) {
  constexpr int L = Lanes<T>::L;
  const GradCoef& c = g.c;
  const bool special = has_special(c), apart = special || softcap != 0.0;
  T* d = apart ? scratch : dst;
  const int64_t stride = apart ? L : t.stride;
  if (t.zr == nullptr && t.adv == nullptr) {
    if (c.ent != 0 && c.col != 0)
      grad_one<T, true, true>(g, t, d, stride);
    else if (c.ent != 0)
      grad_one<T, true, false>(g, t, d, stride);
    else if (c.col != 0)
      grad_one<T, false, true>(g, t, d, stride);
    else
      grad_one<T, false, false>(g, t, d, stride);
  } else if (c.ent == 0 && c.rkl == 0 && c.ev == 0 && c.col == 0) {
    grad_two<T, true>(g, t, d, stride);
  } else {
    grad_two<T, false>(g, t, d, stride);
  }
  if (special) grad_special(g, t, d);
  if (target >= 0) d[target / L * stride + target % L] += T(c.e);
  if (!apart) return;
  const Vec<T> one = splat(T(1)), f = splat(T(softcap != 0.0 ? temperature / softcap : 0.0));
  for (int64_t k = 0; k < t.blocks; ++k) {
    Vec<T> v = load(scratch + k * L);
    if (softcap != 0.0) {
      const Vec<T> u = load(t.z + k * t.stride) * f;
      v = v == Vec<T>{} ? v : v * (one - u * u);
    }
    store(dst + k * t.stride, v);
  }
}

}  // namespace PK_ISA
}  // namespace prefkern
