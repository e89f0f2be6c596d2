// Frozen head: while the first sweep runs, up to four sums of weighted head rows are kept relative
// to the running maxima, like the scalar sums beside them, and no backward multiplies:
//   mass = sum e^x W      log = sum e^x x W      gap = sum (e^x - e^xr) W      cross = sum e^x (x -
//   xr) W
// each term times dz/dx's variable part, W with its low-rank columns beside it.
#pragma once

#include "cpu/unit.h"

namespace prefkern {
namespace PK_ISA {

template <class C>
struct Frozen {
  using T = typename C::T;
  using W = typename C::W;
  static constexpr int L = C::L;

  const HeadCall& call;
  int count = 0;
  Factor kind[kFactors];
  T* total[kFactors] = {};            // by factor: [M, depth + rank], where the op wants them
  W *head = nullptr, *low = nullptr;  // tile of the head as right factor: [blocks][words][L]
  W* factor = nullptr;                // per thread, [blocks of column words][unit rows][L]
  T* line = nullptr;                  // per thread, one row of factors
  int64_t head_stride = 0, factor_stride = 0, factor_size = 0, line_size = 0, width = 0;

  explicit Frozen(const HeadCall& c) : call(c) {
    if (!c.frozen) return;
    const auto need = [&](Factor f, bool wanted) {
      if (wanted) kind[count++] = f;
    };
    need(Factor::mass, true);
    need(Factor::log, c.stats.grows(Stat::ent));
    need(Factor::gap, c.stats.grows(Stat::fkl));
    need(Factor::cross, c.stats.grows(Stat::rkl));
    width = c.model[0].depth + c.model[0].rank;
    for (int i = 0; i < count; ++i) {
      total[int(kind[i])] = static_cast<T*>(c.factors) + i * c.slots * width;
    }
  }
  bool on() const { return count > 0; }
  // Rows whose sums stay in L3 while they grow.
  int64_t most_rows() const { return (6 << 20) / (count * width * int64_t(sizeof(T))); }
  T* at(Factor f, int64_t slot) const { return total[int(f)] + slot * width; }

  void layout(Arena& a, int64_t columns) {
    if (!on()) return;
    const int threads = call.pool.threads;
    head_stride = words<C>(columns) * L;
    head = a.take<W>(round_up(call.model[0].depth, L) / L * head_stride);
    low = a.take<W>(round_up(call.model[0].rank, L) / L * head_stride);
    factor_stride = block_stride<C>(kUnitRows);
    factor_size = round_up(words<C>(columns), L) / L * factor_stride;
    factor = a.take<W>(factor_size * threads);
    line_size = round_up(columns, 2 * L);
    line = a.take<T>(line_size * threads);
  }
  // Head rows [2 L u, 2 L u + 2 L) of the tile.
  void pack(int64_t u, const Span& s) const {
    if (!on()) return;
    const Model& m = call.model[0];
    pack_head<C>(head, head_stride, {m.weight, m.weight_type, call.working}, m.depth, u, s);
    if (m.rank > 0) {
      pack_head<C>(low, head_stride, {m.low_out, m.low_type, call.working}, m.rank, u, s);
    }
  }

  // After the maxima of a row went up: moves its sums to the new ones.
  void raise(const RowSums& s, int64_t slot, double old_pol, double old_ref) const {
    if (!on() || (old_pol == s.pol.max && old_ref == s.ref.max)) return;
    if (old_pol == -pk_inf() && old_ref == -pk_inf()) return;  // nothing summed yet
    const T fp = T(raise_factor(old_pol, s.pol.max)), fr = T(raise_factor(old_ref, s.ref.max));
    const T dp = T(safe_max(old_pol) - safe_max(s.pol.max));
    const T dr = T(safe_max(old_ref) - safe_max(s.ref.max));
    const auto row = [&](Factor f) { return total[int(f)] == nullptr ? nullptr : at(f, slot); };
    T *mass = row(Factor::mass), *log = row(Factor::log), *gap = row(Factor::gap),
      *cross = row(Factor::cross);
    for (int64_t d = 0; d < width; ++d) {
      if (log != nullptr) log[d] = fp * (log[d] + dp * mass[d]);
      if (gap != nullptr) gap[d] = fr * gap[d] + (fp - fr) * mass[d];
      if (cross != nullptr) cross[d] = fp * (cross[d] + (dp - dr) * mass[d]);
      mass[d] *= fp;
    }
  }

  // Adds this tile's part for the n rows of a unit: row r has the sums s[r], slot live[r] and the
  // shaped logits t.z + r L (t.zr + r L).
  void add(const RowSums* s, const int64_t* live, int64_t n, int thread, const TileRow<T>& t,
           int64_t span_width) const {
    W* f = factor + thread * factor_size;
    for (int i = 0; i < count; ++i) {
      for (int64_t r = 0; r < round_up(n, C::MR); ++r) factor_row(kind[i], s, n, r, thread, t, f);
      for (int64_t g = 0; g < n; g += C::MR) {
        T* to[C::MR] = {};
        const int m = int(n - g < C::MR ? n - g : C::MR);
        const int64_t depth = call.model[0].depth, deep = words<C>(span_width);
        for (int j = 0; j < m; ++j) to[j] = at(kind[i], live[g + j]);
        add_rows<C>(f + g * L, factor_stride, head, head_stride, deep, to, m, depth, [] {});
        if (width == depth) continue;
        for (int j = 0; j < m; ++j) to[j] += depth;
        add_rows<C>(f + g * L, factor_stride, low, head_stride, deep, to, m, width - depth, [] {});
      }
    }
  }

 private:
  // Terms of row r of a unit as the left factor; zeros beyond its n rows.
  void factor_row(Factor which, const RowSums* s, int64_t n, int64_t r, int thread,
                  const TileRow<T>& t, W* f) const {
    T* buffer = line + thread * line_size;
    if (r < n) terms(which, s[r], t, r, buffer);
    for (int64_t k = 0; k < round_up(words<C>(t.blocks * L), L); k += L) {
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
  void terms(Factor which, const RowSums& s, const TileRow<T>& t, int64_t r, T* buffer) const {
    const Model& model = call.model[0];
    const T *z = t.z + r * L, *zr = t.zr == nullptr ? nullptr : t.zr + r * L;
    const Vec<T> m = splat(T(safe_max(s.pol.max))), mr = splat(T(safe_max(s.ref.max)));
    const Vec<T> low = splat(min_x<T>()), zero{}, one = splat(T(1));
    const bool capped = model.softcap != 0.0;
    const Vec<T> cap = splat(T(capped ? model.temperature / model.softcap : 0.0));
    for (int64_t k = 0; k < t.blocks; ++k) {
      const Vec<T> zk = load(z + k * t.stride), x = zk - m;
      const Vec<T> xc = max(low, x);
      Vec<T> e = exp_bounded(xc);
      if (which == Factor::log) e = e * xc;
      if (which == Factor::gap) e -= exp_bounded(max(low, load(zr + k * t.ref_stride) - mr));
      if (which == Factor::cross) {
        e = e == zero ? zero : e * (x - (load(zr + k * t.ref_stride) - mr));
      }
      if (capped) {
        const Vec<T> u = zk * cap;
        e = e == zero ? zero : e * (one - u * u);
      }
      store(buffer + k * L, e);
    }
    if (t.blocks % 2 != 0) store(buffer + t.blocks * L, zero);
  }
};

}  // namespace PK_ISA
}  // namespace prefkern
