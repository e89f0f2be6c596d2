// The forward fold: one row of a logit tile into the row's running sums.
//
// A tile row is stored as blocks of L logits, `stride` apart; entries beyond the vocabulary are
// -inf. Sums over a tile row are fp32 vectors, sums over tiles fp64 (the merge costs nothing
// there).
#pragma once

#include "cpu/dtype.h"
#include "numerics.h"

namespace prefkern {
namespace PK_ISA {

template <class T>
PK_INLINE T min_x() {
  return sizeof(T) == 4 ? T(-104) : T(-746);
}  // e^x is 0 below

PK_INLINE vf abs(vf x) {
  return x < 0 ? -x : x;
}
PK_INLINE vd abs(vd x) {
  return x < 0 ? -x : x;
}

// One row of one tile.
template <class T>
struct TileRow {
  const T* z = nullptr;
  const T* zr = nullptr;
  const T* za = nullptr;
  const T* adv = nullptr;              // given A of this tile, contiguous, or null
  int64_t stride = 0, ref_stride = 0;  // of z; of zr and za
  int64_t blocks = 0;
  int64_t start = 0;  // vocabulary index of the first entry
};

template <class T>
PK_HOT T row_max(const T* z, int64_t stride, int64_t blocks) {
  Vec<T> a = load(z), b = a;
  int64_t k = 1;
  for (; k + 2 <= blocks; k += 2) {
    a = max(load(z + k * stride), a);
    b = max(load(z + (k + 1) * stride), b);
  }
  if (k < blocks) a = max(load(z + k * stride), a);
  return max_lanes<T>(max(a, b));
}

template <class T>
inline int64_t first_equal(const T* z, int64_t stride, int64_t blocks, T value) {
  constexpr int L = Lanes<T>::L;
  for (int64_t k = 0; k < blocks; ++k) {
    for (int i = 0; i < L; ++i) {
      if (z[k * stride + i] == value) return k * L + i;
    }
  }
  return -1;
}

// Sums of e^x over one tile row, relative to the running maxima.
template <class T>
struct TileSums {
  T pol, ref;
};

// Sums of e^x, with entropy also e^x x, with collision also e^(2x).
template <class T, bool entropy, bool collision>
PK_HOT TileSums<T> fold_one(RowSums& s, const TileRow<T>& t) {
  const Vec<T> m = splat(T(safe_max(s.pol.max))), low = splat(min_x<T>());
  Vec<T> sum{}, sum_x{}, sum_sq{};
  for (int64_t k = 0; k < t.blocks; ++k) {
    const Vec<T> x = max(low, load(t.z + k * t.stride) - m);
    const Vec<T> e = exp_bounded(x);
    sum += e;
    if constexpr (entropy) sum_x = fma(e, x, sum_x);
    if constexpr (collision) sum_sq = fma(e, e, sum_sq);
  }
  const TileSums<T> here{T(sum_lanes(sum)), T(0)};
  s.pol.sum += here.pol;
  if constexpr (entropy) s.x += sum_lanes(sum_x);
  if constexpr (collision) s.sq += sum_lanes(sum_sq);
  return here;
}

// Both models: also sums of e^xr (xr - x) and e^x (x - xr).
template <class T, bool single, bool forward_kl, bool reverse_kl>
PK_HOT TileSums<T> fold_two(RowSums& s, const TileRow<T>& t) {
  const Vec<T> m = splat(T(safe_max(s.pol.max))), mr = splat(T(safe_max(s.ref.max)));
  const Vec<T> low = splat(min_x<T>()), zero{};
  Vec<T> sum{}, sum_x{}, sum_sq{}, sum_r{}, cross_r{}, cross_p{};
  for (int64_t k = 0; k < t.blocks; ++k) {
    const Vec<T> x = load(t.z + k * t.stride) - m, xr = load(t.zr + k * t.ref_stride) - mr;
    const Vec<T> xc = max(low, x);
    const Vec<T> e = exp_bounded(xc), er = exp_bounded(max(low, xr));
    const Vec<T> d = xr - x;
    sum += e;
    sum_r += er;
    if constexpr (single) {
      sum_x = fma(e, xc, sum_x);
      sum_sq = fma(e, e, sum_sq);
    }
    if constexpr (forward_kl) cross_r += er == zero ? zero : er * d;
    if constexpr (reverse_kl) cross_p -= e == zero ? zero : e * d;
  }
  const TileSums<T> here{T(sum_lanes(sum)), T(sum_lanes(sum_r))};
  s.pol.sum += here.pol;
  s.ref.sum += here.ref;
  if constexpr (single) {
    s.x += sum_lanes(sum_x);
    s.sq += sum_lanes(sum_sq);
  }
  if constexpr (forward_kl) s.ref_cross += sum_lanes(cross_r);
  if constexpr (reverse_kl) s.pol_cross += sum_lanes(cross_p);
  return here;
}

// z + a (z_ref - z); -inf where either is -inf and has weight. Equal logits give z itself.
template <class T>
PK_INLINE Vec<T> blend(Vec<T> z, Vec<T> zr, T a) {
  if (a == T(0)) return z;
  if (a == T(1)) return zr;
  const Vec<T> u = fma(splat(a), zr - z, z);
  return u == u ? u : splat(T(-pk_inf()));
}

// Log-sum-exp of at(block) over a tile row.
template <class T, class At>
PK_INLINE void fold_lse(OnlineLse& s, int64_t blocks, const At& at) {
  Vec<T> top = splat(T(-pk_inf()));
  for (int64_t k = 0; k < blocks; ++k) top = max(at(k), top);
  lse_raise(s, max_lanes<T>(top));
  const Vec<T> m = splat(T(safe_max(s.max))), low = splat(min_x<T>());
  Vec<T> sum{};
  for (int64_t k = 0; k < blocks; ++k) sum += exp_bounded(max(low, at(k) - m));
  s.sum += sum_lanes(sum);
}
// Of x + a (xr - x).
template <class T>
inline void fold_blend(OnlineLse& s, const RowSums& r, const TileRow<T>& t, double a) {
  const Vec<T> m = splat(T(safe_max(r.pol.max))), mr = splat(T(safe_max(r.ref.max)));
  fold_lse<T>(s, t.blocks, [&](int64_t k) {
    return blend<T>(load(t.z + k * t.stride) - m, load(t.zr + k * t.ref_stride) - mr, T(a));
  });
}
// A normaliser alone: of the logits that a 16-bit backward reads.
template <class T>
PK_HOT void fold_normaliser(OnlineLse& s, const T* z, int64_t stride, int64_t blocks) {
  lse_raise(s, row_max(z, stride, blocks));
  const Vec<T> m = splat(T(safe_max(s.max))), low = splat(min_x<T>());
  Vec<T> sum{};
  for (int64_t k = 0; k < blocks; ++k) sum += exp_bounded(max(low, load(z + k * stride) - m));
  s.sum += sum_lanes(sum);
}
// The same of logits that are products, rounded here; top: the largest of them. `pairs`: of bf16
// pairs.
template <class T, bool pairs>
PK_HOT void fold_rounded(OnlineLse& s, const T* z, int64_t stride, int64_t blocks, T top,
                         Dtype type) {
  lse_raise(s, round_product<pairs>(splat(top), type)[0]);  // rounding keeps the order
  const Vec<T> m = splat(T(safe_max(s.max))), low = splat(min_x<T>());
  Vec<T> sum{};
  for (int64_t k = 0; k < blocks; ++k) {
    sum += exp_bounded(max(low, round_product<pairs>(load(z + k * stride), type) - m));
  }
  s.sum += sum_lanes(sum);
}

template <class T>
inline void fold_mean(RowSums& s, const TileRow<T>& t) {
  const Vec<T> floor = splat(T(-pk_inf())), zero{}, one = splat(T(1));
  Vec<T> sum{}, count{};
  for (int64_t k = 0; k < t.blocks; ++k) {
    const Vec<T> z = load(t.z + k * t.stride);
    sum += z > floor ? z : zero;
    count += z > floor ? one : zero;
  }
  s.z_sum += sum_lanes(sum);
  s.z_count += sum_lanes(count);
}

// Sum of e^x A, A being given or the difference of two models' x.
template <class T>
inline void fold_advantage(RowSums& s, const TileRow<T>& t) {
  constexpr int L = Lanes<T>::L;
  const Vec<T> m = splat(T(safe_max(s.pol.max))), low = splat(min_x<T>()), zero{};
  const Vec<T> mr = splat(T(safe_max(s.ref.max))), ma = splat(T(safe_max(s.aux.max)));
  Vec<T> sum{}, sum_a{};
  for (int64_t k = 0; k < t.blocks; ++k) {
    const Vec<T> e = exp_bounded(max(low, load(t.z + k * t.stride) - m));
    Vec<T> a;
    if (t.za != nullptr) {
      const Vec<T> xa = load(t.za + k * t.ref_stride) - ma;
      sum_a += exp_bounded(max(low, xa));
      a = xa - (load(t.zr + k * t.ref_stride) - mr);
    } else {
      a = load(t.adv + k * L);
    }
    sum += e == zero ? zero : e * a;
  }
  s.adv += sum_lanes(sum);
  s.aux.sum += sum_lanes(sum_a);
}

// The largest logits of one tile row, found before the fold: rows of a unit overlap better that
// way.
template <class T>
struct RowTop {
  T pol, ref, aux;
};
template <class T>
PK_INLINE RowTop<T> row_tops(const TileRow<T>& t) {
  const T none = T(-pk_inf());
  return {row_max(t.z, t.stride, t.blocks), t.zr ? row_max(t.zr, t.ref_stride, t.blocks) : none,
          t.za ? row_max(t.za, t.ref_stride, t.blocks) : none};
}

// First sweep: raises the maxima, then runs the passes the plan needs. The tile is in L1 or L2,
// where a pass costs about a tenth of a nanosecond per logit.
template <class T>
inline TileSums<T> fold_first(RowSums& s, const StatPlan& plan, const TileRow<T>& t,
                              const RowTop<T>& top) {
  if (plan.has(Stat::top1) && top.pol > s.pol.max)
    s.top = t.start + first_equal(t.z, t.stride, t.blocks, top.pol);
  if (top.pol > s.pol.max || top.ref > s.ref.max || top.aux > s.aux.max) {
    raise_maxima(s, plan, top.pol, top.ref, top.aux, t.za != nullptr);
  }
  const bool entropy = plan.has(Stat::ent), collision = plan.has(Stat::col);
  TileSums<T> here;
  if (t.zr == nullptr) {
    if (entropy && collision)
      here = fold_one<T, true, true>(s, t);
    else if (entropy)
      here = fold_one<T, true, false>(s, t);
    else if (collision)
      here = fold_one<T, false, true>(s, t);
    else
      here = fold_one<T, false, false>(s, t);
  } else {
    const bool f = plan.has(Stat::fkl), r = plan.has(Stat::rkl);
    if (entropy || collision || r)
      here = fold_two<T, true, true, true>(s, t);
    else if (f)
      here = fold_two<T, false, true, false>(s, t);
    else
      here = fold_two<T, false, false, false>(s, t);
    if (plan.has(Stat::alpha)) fold_blend(s.blend[kAlphaBlend], s, t, plan.of(Stat::alpha));
    if (plan.has(Stat::renyi)) fold_blend(s.blend[kRenyiBlend], s, t, plan.of(Stat::renyi));
    if (plan.has(Stat::mix)) fold_blend(s.blend[kMixBlend], s, t, plan.of(Stat::mix));
  }
  if (plan.has(Stat::zmean)) fold_mean(s, t);
  if (t.za != nullptr || t.adv != nullptr) fold_advantage(s, t);
  return here;
}

// Calls f(z, value) for the sparse values [first, first + k) of a row that lie in its tile.
template <class T, class F>
inline void each_sparse(const TileRow<T>& t, const int64_t* index, const void* values, Dtype type,
                        int64_t first, int64_t k, const F& f) {
  constexpr int L = Lanes<T>::L;
  for (int64_t j = first; j < first + k; ++j) {
    const int64_t v = index[j] - t.start;
    if (v < 0 || v >= t.blocks * L) continue;
    f(double(t.z[v / L * t.stride + v % L]), element<double>(values, type, j));
  }
}

}  // namespace PK_ISA
}  // namespace prefkern
