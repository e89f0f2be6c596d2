// Frozen head: the forward forms rows[s] = sum_v (d stat_s / dx_v) W_v, so that the backward is a
// multiplication. While the sweep runs, up to four sums of weighted head rows are kept relative to
// the running maxima, like the scalar sums beside them:
//   mass = sum e^x W      log = sum e^x x W      ref = sum e^xr W      cross = sum e^x (x - xr) W
#pragma once

#include "cpu/tiles.h"

namespace prefkern {
namespace PK_ISA {

template <class C>
struct Frozen {
  using T = typename C::T;
  using W = typename C::W;
  static constexpr int L = C::L;
  enum Which { kMass, kLog, kRef, kCross, kWhich };

  int sums = 0;
  int slot[kWhich] = {-1, -1, -1, -1};
  T* total[kWhich] = {};  // [capacity][D]
  W* head = nullptr;      // [d blocks][words of columns][L]
  W* factor = nullptr;    // per thread, [blocks of column words][unit rows][L]
  T* line = nullptr;      // per thread, one row of factors
  int64_t head_stride = 0, factor_stride = 0, factor_size = 0, line_size = 0, width_d = 0;

  void plan(const HeadCall& call) {
    width_d = call.policy.depth;
    if (call.frozen == nullptr) return;
    const StatPlan& p = call.plan;
    auto need = [&](Which w) {
      if (slot[w] < 0) slot[w] = sums++;
    };
    if (p.has(kLogp) || p.has(kLse) || p.has(kEnt) || p.has(kFkl) || p.has(kRkl)) need(kMass);
    if (p.has(kEnt)) need(kLog);
    if (p.has(kFkl)) need(kRef);
    if (p.has(kRkl)) need(kCross);
  }
  void layout(Arena& a, const HeadCall& call, int64_t columns, int64_t capacity, int threads) {
    if (sums == 0) return;
    for (int w = 0; w < kWhich; ++w) {
      if (slot[w] >= 0) total[w] = a.take<T>(capacity * width_d);
    }
    head_stride = words<C>(columns) * L;
    head = a.take<W>(round_up(width_d, L) / L * head_stride);
    factor_stride = block_stride<C>(kUnitRows);
    factor_size = round_up(words<C>(columns), L) / L * factor_stride;
    factor = a.take<W>(factor_size * threads);
    line_size = round_up(columns, 2 * L);
    line = a.take<T>(line_size * threads);
  }
  void start(int64_t count, int64_t depth) {
    for (T* t : total) {
      if (t != nullptr) std::memset(t, 0, size_t(count * depth) * sizeof(T));
    }
  }
  // Head rows [2 L unit, 2 L unit + 2 L) of the tile as the right factor of the row products.
  void pack(const HeadCall& call, int64_t unit, int64_t v0, int64_t width) const {
    if (sums == 0) return;
    const int64_t end = 2 * L * (unit + 1) < width ? 2 * L * (unit + 1) : width;
    for (int64_t v = 2 * L * unit; v < end; v += C::pair) {
      const int64_t row[2] = {v0 + v, v0 + v + 1};
      pack_right<C>(head, head_stride, v / C::pair, call.policy.weight, call.policy.weight_type,
                    row, end - v < C::pair ? 1 : C::pair, width_d);
    }
  }

  // After the maxima of row i went up: moves its sums to the new ones.
  void raise(const RowSums& s, int64_t i, double old_pol, double old_ref) const {
    if (old_pol == s.pol.max && old_ref == s.ref.max) return;
    if (old_pol == -pk_inf() && old_ref == -pk_inf()) return;  // nothing summed yet
    const T fp = T(raise_factor(old_pol, s.pol.max)), fr = T(raise_factor(old_ref, s.ref.max));
    const T dp = T(safe_max(old_pol) - safe_max(s.pol.max)),
            dr = T(safe_max(old_ref) - safe_max(s.ref.max));
    T* mass = total[kMass] + i * width_d;
    for (int64_t d = 0; d < width_d; ++d) {
      const T m = mass[d];
      mass[d] = fp * m;
      if (total[kLog] != nullptr)
        total[kLog][i * width_d + d] = fp * (total[kLog][i * width_d + d] + dp * m);
      if (total[kRef] != nullptr) total[kRef][i * width_d + d] *= fr;
      if (total[kCross] != nullptr) {
        total[kCross][i * width_d + d] = fp * (total[kCross][i * width_d + d] + (dp - dr) * m);
      }
    }
  }

  // Adds this tile's part for rows [first, first + n).
  void add(const HeadCall& call, const RowSums* s, int64_t first, int64_t n, int thread, const T* z,
           const T* zr, int64_t z_stride, int64_t blocks, int64_t width) const {
    W* f = factor + thread * factor_size;
    T* buffer = line + thread * line_size;
    for (int w = 0; w < kWhich; ++w) {
      if (slot[w] < 0) continue;
      for (int64_t r = 0; r < round_up(n, C::MR); ++r) {
        if (r < n)
          factors(w, s[r], call.policy, z + r * L, zr ? zr + r * L : nullptr, z_stride, blocks,
                  buffer);
        const int64_t depth = words<C>(blocks * L);
        for (int64_t k = 0; k < round_up(depth, L); k += L) {
          W* d = f + k / L * factor_stride + r * L;
          if (r >= n) {
            store(d, Vec<W>{});
          } else if constexpr (C::pair == 2) {
            pair_words(d, load(buffer + 2 * k), load(buffer + 2 * k + L));
          } else {
            store(d, load(buffer + k));
          }
        }
      }
      for (int64_t g = 0; g < n; g += C::MR) {
        T* to[C::MR] = {};
        const int count = int(n - g < C::MR ? n - g : C::MR);
        for (int i = 0; i < count; ++i) to[i] = total[w] + (first + g + i) * width_d;
        add_rows<C>(f + g * L, factor_stride, head, head_stride, words<C>(width), to, count,
                    width_d, false);
      }
    }
  }
  static void factors(int which, const RowSums& s, const Head& head, const T* z, const T* zr,
                      int64_t stride, int64_t blocks, T* buffer) {
    const Vec<T> m = splat(T(safe_max(s.pol.max))), mr = splat(T(safe_max(s.ref.max)));
    const Vec<T> low = splat(min_x<T>()), zero{}, one = splat(T(1));
    const Vec<T> cap = splat(T(head.softcap != 0.0 ? head.temperature / head.softcap : 0.0));
    for (int64_t k = 0; k < blocks; ++k) {
      const Vec<T> zk = load(z + k * stride), x = zk - m;
      Vec<T> e;
      if (which == kRef) {
        e = exp_bounded(max(low, load(zr + k * stride) - mr));
      } else {
        const Vec<T> xc = max(low, x);
        e = exp_bounded(xc);
        if (which == kLog) e = e * xc;
        if (which == kCross) e = e == zero ? zero : e * (x - (load(zr + k * stride) - mr));
      }
      if (head.softcap != 0.0) {
        const Vec<T> u = zk * cap;
        e = e == zero ? zero : e * (one - u * u);
      }
      store(buffer + k * L, e);
    }
    if (blocks % 2 != 0) store(buffer + blocks * L, zero);
  }

  // rows[s] of row i, from its sums and the head row of the target.
  template <class Out>
  void finish(const HeadCall& call, const RowSums& s, int64_t i, int64_t row,
              const Out& out) const {
    const Head& head = call.policy;
    const double slope = head.scale / head.temperature;
    const double u = head.softcap != 0.0 ? s.zy * head.temperature / head.softcap : 0.0;
    const double at_target = slope * (1.0 - u * u);
    const int64_t y = call.targets[row] * width_d;
    const double log_s = pk_log(s.pol.sum), shift = pk_log(s.ref.sum) - log_s;
    const T p = T(slope / s.pol.sum), r = T(slope / s.ref.sum);
    for (int j = 0; j < call.frozen_count; ++j) {
      const StatKind kind = call.frozen_kind[j];
      T* to = static_cast<T*>(call.frozen) + (j * call.rows + row) * width_d;
      const T ent = kind == kEnt ? T(slope / s.pol.sum * (log_s - out(kEnt))) : T(0);
      const T rkl = kind == kRkl ? T(slope / s.pol.sum * (shift - out(kRkl))) : T(0);
      const bool target = kind == kLogp || kind == kZy;
      for (int64_t d = 0; d < width_d; ++d) {
        const int64_t at = i * width_d + d;
        T v = target ? T(at_target) * element<T>(head.weight, head.weight_type, y + d) : T(0);
        switch (kind) {
          case kLogp:
            v -= p * total[kMass][at];
            break;
          case kLse:
            v = p * total[kMass][at];
            break;
          case kEnt:
            v = ent * total[kMass][at] - p * total[kLog][at];
            break;
          case kFkl:
            v = p * total[kMass][at] - r * total[kRef][at];
            break;
          case kRkl:
            v = p * total[kCross][at] + rkl * total[kMass][at];
            break;
          default:
            break;
        }
        to[d] = v;
      }
    }
  }
};

}  // namespace PK_ISA
}  // namespace prefkern
