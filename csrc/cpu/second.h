// What needs both normalisers: the second sweep over one tile row, and the reference's top set.
#pragma once

#include "cpu/fold.h"

namespace prefkern {
namespace PK_ISA {

// A log-normaliser as two numbers, so that z - lse loses nothing to a large lse.
template <class T>
struct Split {
  Vec<T> high, low;
  Split(T h, T l) : high(splat(h)), low(splat(l)) {}
};
template <class T>
PK_INLINE Vec<T> minus(Vec<T> z, const Split<T>& lse) {
  return (z - lse.high) - lse.low;
}

// log of (b r + (1-b) p) / p from d = log r - log p. Beyond |d| = 80 one of the two is e^-80 of the
// other; the clamp keeps e^d finite. d = 0 gives exactly 0.
template <class T>
PK_INLINE Vec<T> log_mixture_ratio(Vec<T> d, T b) {
  return log1p(splat(b) * expm1(d));
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

// Row constants of the second sweep.
template <class T>
struct NormRow {
  T n[kNorms];
  T operator[](Norm k) const { return n[int(k)]; }
};

// Adds one tile row to second[SECOND].
template <class T>
inline void fold_second(double* second, const StatPlan& plan, const TileRow<T>& t,
                        const NormRow<T>& n) {
  const Split<T> lse(n[Norm::lse], n[Norm::lse_low]);
  const Split<T> ref_lse(n[Norm::ref_lse], n[Norm::ref_lse_low]);
  const Vec<T> zero{}, one = splat(T(1));
  const bool jsd = plan.has(Stat::jsd), tv = plan.has(Stat::tv), bkl = plan.has(Stat::bkl);
  const T b = T(plan.of(Stat::jsd));
  const TopSet<T> set{n[Norm::top_value], n[Norm::top_index]};
  Vec<T> kl_r{}, kl_p{}, dist{}, mean{}, top{}, rest_r{}, rest_p{};
  for (int64_t k = 0; k < t.blocks; ++k) {
    const Vec<T> zr = load(t.zr + k * t.ref_stride);
    const Vec<T> lp = minus<T>(load(t.z + k * t.stride), lse), lr = minus<T>(zr, ref_lse);
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
      const Vec<T> in = set.weight(zr, t.start + k * Lanes<T>::L), out = one - in;
      const Vec<T> ri = r * in;
      top += ri == zero ? zero : ri * (lr - lp);
      rest_r = fma(r, out, rest_r);
      rest_p = fma(p, out, rest_p);
    }
  }
  const auto add = [&](Second k, Vec<T> v) { second[int(k)] += sum_lanes(v); };
  add(Second::kl_ref, kl_r);
  add(Second::kl_pol, kl_p);
  add(Second::tv, dist);
  add(Second::tv_mean, mean);
  add(Second::top_kl, top);
  add(Second::rest_ref, rest_r);
  add(Second::rest_pol, rest_p);
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
    sink();
  }
  inline void drop_worst() {
    swap(0, --*size);
    sink();
  }
  inline void sink() {
    for (int32_t at = 0;;) {
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

}  // namespace PK_ISA
}  // namespace prefkern
