// Forward over a head (linear_logps, linear_divergence): vocabulary tiles outside, row units
// inside, so that a weight tile is packed once for thousands of rows.
#pragma once

#include "cpu/frozen.h"
#include "cpu/tiles.h"

namespace prefkern {
namespace PK_ISA {

// Rows whose running sums are held at once; more rows take another pass over the weights, whose
// packing is then below 1 % of the products.
constexpr int64_t kStateRows = 4096;

template <class C>
struct HeadForward {
  using T = typename C::T;
  using W = typename C::W;
  static constexpr int L = C::L;

  const HeadCall& call;
  Memory memory;
  int64_t columns = 0, capacity = kStateRows, z_stride = 0, z_size = 0;
  ModelTile<C> model[3];
  int models = 1;
  RowSums* sums = nullptr;
  int64_t* rows = nullptr;
  T* adv = nullptr;
  T* heap_value = nullptr;
  int32_t *heap_index = nullptr, *heap_size = nullptr;
  W* hidden[3] = {};  // per thread
  T* z[3] = {};       // per thread
  T* seen[3] = {};    // per thread: a row as the backward reads it
  int64_t hidden_stride = 0, hidden_size[3] = {};
  Frozen<C> frozen;
  int64_t count = 0, base = 0;  // scored rows of this pass, and those before it

  bool rounds;  // a backward may follow and will read logits rounded to 16 bits

  explicit HeadForward(const HeadCall& c) : call(c) {
    rounds = c.frozen == nullptr && is_short(c.policy.hidden_type);
    model[0].head = &c.policy;
    if (c.has_ref) model[models++].head = &c.ref;
    if (c.has_aux) model[models++].head = &c.aux;
  }

  bool place() {
    int64_t deepest = 0, tiles = 1;
    for (int i = 0; i < models; ++i)
      deepest = model[i].head->depth > deepest ? model[i].head->depth : deepest;
    for (int i = 1; i < models; ++i) {
      const Head &a = *model[i].head, &p = call.policy;
      model[i].own_weight =
          !(a.weight == p.weight && a.weight_type == p.weight_type && a.depth == p.depth);
      tiles += model[i].own_weight;
    }
    frozen.plan(call);
    columns = tile_columns<C>(deepest, call.vocab, tiles + (call.frozen != nullptr), kTileBytes);
    int64_t scored = 0;
    for (int64_t i = 0; i < call.rows; ++i) scored += call.targets[i] != call.ignore;
    const int64_t k = call.plan.has(kBkl) ? int64_t(call.plan.param[kBkl]) : 0;
    const int64_t top = k < call.vocab ? k : call.vocab;
    if (top > 0) capacity = clamp_rows((2 << 20) / (top * int64_t(sizeof(T) + 4)));
    if (frozen.sums > 0) {
      capacity = clamp_rows((6 << 20) / (frozen.sums * call.policy.depth * int64_t(sizeof(T))));
    }
    capacity = clamp_rows(scored < capacity ? scored : capacity);
    hidden_stride = z_stride = block_stride<C>(kUnitRows);
    z_size = columns / L * z_stride;
    const int threads = call.pool.threads;
    return memory.place([&](Arena& a) {
      for (int i = 0; i < models; ++i) {
        model[i].layout(a, columns, model[i].own_weight);
        if (!model[i].own_weight) model[i].weight = model[0].weight;
        hidden_size[i] = round_up(words<C>(model[i].head->depth), L) / L * hidden_stride;
        hidden[i] = a.take<W>(hidden_size[i] * threads);
        z[i] = a.take<T>(z_size * threads);
        if (rounds) seen[i] = a.take<T>(columns * threads);
      }
      sums = a.take<RowSums>(capacity);
      rows = a.take<int64_t>(capacity);
      adv = a.take<T>(call.values != nullptr ? columns : 0);
      heap_value = a.take<T>(top * capacity);
      heap_index = a.take<int32_t>(top * capacity);
      heap_size = a.take<int32_t>(top > 0 ? capacity : 0);
      frozen.layout(a, call, columns, capacity, threads);
    });
  }
  static int64_t clamp_rows(int64_t n) {
    return round_up(n < 1 ? 1 : n > kStateRows ? kStateRows : n, kUnitRows);
  }

  bool run() {
    if (!place()) return false;
    const size_t row_bytes = size_t(call.rows) * sizeof(T);
    std::memset(call.out, 0, row_bytes * call.plan.count);
    std::memset(call.saved, 0, row_bytes * call.saved_rows);
    if (call.frozen != nullptr) {
      std::memset(call.frozen, 0, row_bytes * call.frozen_count * call.policy.depth);
    }
    for (int64_t at = 0; at < call.rows;) {
      count = next_rows(call.targets, call.rows, call.ignore, at, rows, capacity);
      if (count > 0) pass();
      base += count;
    }
    return true;
  }

  void pass() {
    for (int64_t i = 0; i < count; ++i) sums[i] = RowSums();
    if (heap_size != nullptr && call.plan.has(kBkl)) std::memset(heap_size, 0, size_t(count) * 4);
    frozen.start(count, call.policy.depth);
    sweep(false);
    for (int64_t i = 0; i < count; ++i) finish(i);
    if (call.frozen != nullptr) {
      parallel(call.pool, count,
               [&](int64_t i, int) { frozen.finish(call, sums[i], i, rows[i], out_of(i)); });
    }
    if (!needs_second_sweep(call.plan)) return;
    sweep(true);
    for (int64_t i = 0; i < count; ++i) finish_again(i);
  }

  void sweep(bool second) {
    const int used = second && models > 2 ? 2 : models;
    // fp32 and fp64 logits that were kept are the logits of the first sweep, bit for bit.
    const bool reuse = second && !is_short(call.policy.hidden_type);
    const bool all_kept = reuse && base + count <= call.cache_rows;
    for (int64_t v0 = 0; v0 < call.vocab; v0 += columns) {
      const int64_t width = call.vocab - v0 < columns ? call.vocab - v0 : columns;
      const int64_t blocks = (width + L - 1) / L;
      parallel(call.pool, round_up(blocks, 2) / 2, [&](int64_t unit, int) {
        for (int64_t b = 2 * unit; b < 2 * unit + 2 && b < blocks; ++b) {
          for (int i = 0; i < used; ++i) model[i].pack_block(b, v0, call.vocab, !all_kept);
        }
        if (!second) frozen.pack(call, unit, v0, width);
      });
      if (call.values != nullptr && call.values_index == nullptr && !second) {
        read_row(adv, call.values, call.values_type, v0, width);
        for (int64_t i = width; i < blocks * L; ++i) adv[i] = T(0);
      }
      parallel(call.pool, (count + kUnitRows - 1) / kUnitRows, [&](int64_t unit, int thread) {
        const int64_t first = unit * kUnitRows;
        const int64_t n = count - first < kUnitRows ? count - first : kUnitRows;
        unit_rows(first, n, thread, v0, width, blocks, used, second, reuse);
      });
    }
  }

  void unit_rows(int64_t first, int64_t n, int thread, int64_t v0, int64_t width, int64_t blocks,
                 int used, bool second, bool reuse) {
    T* zt[3] = {};
    const int64_t kept = !reuse ? 0 : clip(call.cache_rows - base - first, n);
    const int64_t groups = (n + C::MR - 1) / C::MR;
    for (int i = 0; i < used; ++i) {
      const Head& head = *model[i].head;
      zt[i] = z[i] + thread * z_size;
      if (kept < n) {
        W* h = hidden[i] + thread * hidden_size[i];
        for (int64_t r = 0; r < groups * C::MR; ++r) {
          if (r < n) {
            pack_left<C>(h, hidden_stride, r, head.hidden, head.hidden_type,
                         rows[first + r] * head.depth, head.depth);
          } else {
            zero_left<C>(h, hidden_stride, r, head.depth);
          }
        }
        model[i].logits(h, hidden_stride, groups, blocks, zt[i], z_stride);
      }
      for (int64_t r = 0; r < kept; ++r) {
        plain_to_tile(zt[i] + r * L, z_stride, blocks, call.cache, head.hidden_type,
                      cache_at(i, first + r, v0), width);
      }
    }
    const auto tile_row = [&](int64_t r) {
      return TileRow<T>{zt[0] + r * L,
                        used > 1 ? zt[1] + r * L : nullptr,
                        used > 2 ? zt[2] + r * L : nullptr,
                        call.values != nullptr && call.values_index == nullptr ? adv : nullptr,
                        z_stride,
                        z_stride,
                        blocks,
                        v0};
    };
    RowTop<T> top[kUnitRows];
    for (int64_t r = 0; r < n; ++r) {
      const bool keep = !second && base + first + r < call.cache_rows;
      for (int i = 0; i < used && i < 2 && keep; ++i) {
        tile_to_plain(call.cache, call.policy.hidden_type, cache_at(i, first + r, v0),
                      zt[i] + r * L, z_stride, width);
      }
      const TileRow<T> view = rounds ? rounded_row(tile_row(r), thread, width, used) : tile_row(r);
      for (int i = 0; i < used; ++i) model[i].shape(zt[i] + r * L, z_stride, blocks, width);
      RowSums& s = sums[first + r];
      if (second) {
        fold_second(s, call.plan, tile_row(r), lse_value(s.pol), lse_value(s.ref),
                    rounds ? view.zr : nullptr);
        continue;
      }
      if (rounds) fold_normalisers(s, view);
      if (call.plan.has(kMix)) fold_plain_blend(s.mix_plain, view, call.plan.param[kMix]);
      if (call.plan.has(kBkl)) heap(first + r).scan(view, width);
      top[r] = row_tops(tile_row(r));
    }
    for (int64_t r = 0; r < n && !second; ++r) {
      RowSums& s = sums[first + r];
      const TileRow<T> t = tile_row(r);
      const double old_pol = s.pol.max, old_ref = s.ref.max;
      fold_first(s, call.plan, t, top[r]);
      if (frozen.sums > 0) frozen.raise(s, first + r, old_pol, old_ref);
      at_target(s, t, rows[first + r], width);
    }
    if (!second && frozen.sums > 0) {
      frozen.add(call, sums + first, first, n, thread, zt[0], used > 1 ? zt[1] : nullptr, z_stride,
                 blocks, width);
    }
  }

  // The unshaped row as a backward reads it, in this thread's own memory.
  TileRow<T> rounded_row(const TileRow<T>& raw, int thread, int64_t width, int used) const {
    const T* from[3] = {raw.z, raw.zr, raw.za};
    const T* to[3] = {};
    for (int i = 0; i < used; ++i) {
      T* row = seen[i] + thread * columns;
      round_row(row, L, from[i], raw.stride, raw.blocks, call.policy.hidden_type);
      model[i].shape(row, L, raw.blocks, width);
      to[i] = row;
    }
    return {to[0], to[1], to[2], nullptr, L, L, raw.blocks, raw.start};
  }

  static int64_t clip(int64_t x, int64_t n) { return x < 0 ? 0 : x > n ? n : x; }
  int64_t cache_at(int which, int64_t i, int64_t v0) const {
    return (which * call.cache_rows + base + i) * call.vocab + v0;
  }
  TopHeap<T> heap(int64_t i) const {
    const int64_t k =
        int64_t(call.plan.param[kBkl]) < call.vocab ? int64_t(call.plan.param[kBkl]) : call.vocab;
    return {heap_value + i * k, heap_index + i * k, heap_size + i, int32_t(k)};
  }

  void at_target(RowSums& s, const TileRow<T>& t, int64_t row, int64_t width) const {
    const int64_t y = call.targets[row] - t.start;
    if (y >= 0 && y < width) {
      s.zy = double(t.z[y / L * t.stride + y % L]);
      if (t.zr != nullptr) s.ref_zy = double(t.zr[y / L * t.stride + y % L]);
    }
    if (call.values_index != nullptr) {
      fold_sparse(s, t, call.values_index, call.values, call.values_type, row * call.values_k,
                  call.values_k);
    }
  }

  auto put_at(int64_t i) const {
    return [this, i](StatKind k, double v) {
      if (call.plan.slot[k] >= 0)
        static_cast<T*>(call.out)[call.plan.slot[k] * call.rows + rows[i]] = T(v);
    };
  }
  auto out_of(int64_t i) const {
    return [this, i](StatKind k) {
      return double(static_cast<const T*>(call.out)[call.plan.slot[k] * call.rows + rows[i]]);
    };
  }
  void save(int64_t i, SavedRow row, double v) const {
    static_cast<T*>(call.saved)[row * call.rows + rows[i]] = T(v);
  }

  void finish(int64_t i) {
    RowSums& s = sums[i];
    finish_first(s, call.plan, call.has_aux, call.targets[rows[i]], put_at(i));
    const auto kept = [&](const OnlineLse& a, const OnlineLse& rounded) {
      return lse_value(rounds ? rounded : a);
    };
    save(i, kSavedLse, kept(s.pol, s.pol_rounded));
    if (call.saved_rows == 1) return;
    save(i, kSavedRefLse, kept(s.ref, s.ref_rounded));
    if (call.has_aux) save(i, kSavedAuxLse, kept(s.aux, s.aux_rounded));
    if (call.plan.has(kMix)) save(i, kSavedMixLse, lse_value(s.mix_plain));
    if (call.plan.has(kBkl)) {
      s.top_value = double(heap(i).value[0]);
      s.top_index = heap(i).index[0];
      save(i, kSavedTopValue, s.top_value);
      save(i, kSavedTopIndex, double(s.top_index));
    }
  }
  void finish_again(int64_t i) {
    const RowSums& s = sums[i];
    finish_second(s, call.plan, put_at(i));
    if (call.plan.has(kJsd)) save(i, kSavedKlMix, s.kl_pol);
    if (call.plan.has(kTv)) save(i, kSavedTvMean, s.tv_mean);
    if (call.plan.has(kBkl)) {
      save(i, kSavedRestRef, s.rest_ref);
      save(i, kSavedRestPol, s.rest_pol);
    }
  }
};

}  // namespace PK_ISA
}  // namespace prefkern
