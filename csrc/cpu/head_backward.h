// Backward over a head. Per vocabulary tile and block of rows: (A) by row units, logits (kept or
// recomputed), dL/dx, and its product with the head into dH; (B) by head columns, dW += dL/dx^T H.
// Every sum runs over rows or vocabulary in one fixed order, so the bits do not depend on threads.
#pragma once

#include "cpu/tiles.h"

namespace prefkern {
namespace PK_ISA {

// Rows between two phases: the depth of one dW product. 256 are 1 % faster alone, but each phase
// ends in a barrier, and a barrier on a busy machine can cost a scheduler's time slice.
constexpr int64_t kBlockRows = 512;
constexpr int64_t kBlockBytes = 2 << 20;
constexpr int64_t kWeightSlice = 96;  // head rows of one unit of phase B

template <class C>
struct HeadBackward {
  using T = typename C::T;
  using W = typename C::W;
  static constexpr int L = C::L;
  static constexpr bool kPairs = C::pair == 2;

  const HeadCall& call;
  Memory memory, wide;
  ModelTile<C> model[3];
  int models = 1;
  int64_t columns = 0, block_rows = kBlockRows, scored = 0, depth = 0;
  bool recompute = false, dense_adv = false;
  Dtype working;
  W* head = nullptr;      // [d blocks][words of columns][L]: right factor of dH
  W* left[3] = {};        // per thread: hidden rows of a unit (pairs, and the other models)
  W* right = nullptr;     // [d blocks][words of block rows][L]: right factor of dW
  T* z[3] = {};           // per thread: logits of a unit
  W* dz_left = nullptr;   // per thread: dL/dx of a unit, pairs along the vocabulary
  W* dz = nullptr;        // [column blocks][words of block rows][L]: left factor of dW
  T* line = nullptr;      // per thread: a row of terms
  T* adv = nullptr;       // dense: shared; sparse: per thread
  T* d_weight = nullptr;  // [columns][D] where the head's dtype is not the compute type
  T* d_bias = nullptr;    // [columns]
  int64_t* rows = nullptr;
  T* d_hidden = nullptr;  // [N, D], or [scored, D] where hidden is 16-bit
  bool d_hidden_wide = false;
  int64_t head_stride = 0, unit_stride = 0, left_size[3] = {}, z_size = 0, dzl_size = 0,
          line_size = 0;
  int64_t right_stride = 0, dz_stride = 0;

  explicit HeadBackward(const HeadCall& c) : call(c), working(c.policy.hidden_type) {
    model[0].head = &c.policy;
    if (c.has_ref) model[models++].head = &c.ref;
    if (c.has_aux) model[models++].head = &c.aux;
    depth = c.policy.depth;
    for (int64_t i = 0; i < c.rows; ++i) scored += c.targets[i] != c.ignore;
    recompute = scored > c.cache_rows || c.has_aux;
    dense_adv = c.values != nullptr && c.values_index == nullptr;
  }

  bool place() {
    const bool same_weight = dtype_bytes(call.policy.weight_type) == int64_t(sizeof(T));
    int64_t deepest = depth, tiles = (call.d_hidden != nullptr) +
                                     (call.d_weight != nullptr && !same_weight) + recompute;
    for (int i = 1; i < models; ++i) {
      const Head &a = *model[i].head, &p = call.policy;
      deepest = a.depth > deepest ? a.depth : deepest;
      model[i].own_weight =
          !(a.weight == p.weight && a.weight_type == p.weight_type && a.depth == p.depth);
      tiles += recompute && model[i].own_weight;
    }
    columns = tile_columns<C>(deepest, call.vocab, tiles < 1 ? 1 : tiles, kTileBytes);
    const int64_t row_bytes = words<C>(deepest) * int64_t(sizeof(W));
    block_rows = round_up(kBlockBytes / row_bytes, kUnitRows);
    block_rows = block_rows < kBlockRows ? block_rows : kBlockRows;
    block_rows = block_rows < scored ? block_rows : round_up(scored, kUnitRows);
    unit_stride = block_stride<C>(kUnitRows);
    right_stride = dz_stride = block_stride<C>(words<C>(block_rows));
    head_stride = words<C>(columns) * L;
    z_size = columns / L * unit_stride;
    dzl_size = round_up(words<C>(columns), L) / L * unit_stride;
    line_size = columns;
    const int threads = call.pool.threads;
    const bool rows_needed = (recompute && !kPairs) || call.d_weight != nullptr;
    const bool placed = memory.place([&](Arena& a) {
      for (int i = 0; i < models; ++i) {
        model[i].layout(a, columns, recompute && model[i].own_weight);
        if (!model[i].own_weight) model[i].weight = model[0].weight;
        left_size[i] = round_up(words<C>(model[i].head->depth), L) / L * unit_stride;
        if (recompute && (kPairs || i > 0)) left[i] = a.take<W>(left_size[i] * threads);
        if (kPairs || i > 0) z[i] = a.take<T>(z_size * threads);
      }
      if (call.d_hidden != nullptr) head = a.take<W>(round_up(depth, L) / L * head_stride);
      if (rows_needed) right = a.take<W>(round_up(depth, L) / L * right_stride);
      dz = a.take<W>(columns / L * dz_stride);
      if (kPairs) dz_left = a.take<W>(dzl_size * threads);
      line = a.take<T>(line_size * threads);
      if (call.values != nullptr) adv = a.take<T>(dense_adv ? columns : columns * threads);
      if (call.d_weight != nullptr && !same_weight) d_weight = a.take<T>(columns * depth);
      if (call.d_bias != nullptr) d_bias = a.take<T>(columns);
      rows = a.take<int64_t>(block_rows);
    });
    if (!placed || call.d_hidden == nullptr) return placed;
    d_hidden_wide = dtype_bytes(working) != int64_t(sizeof(T));
    if (!d_hidden_wide) {
      d_hidden = static_cast<T*>(call.d_hidden);
      return true;
    }
    return wide.place([&](Arena& a) { d_hidden = a.take<T>(scored * depth); });
  }

  bool run() {
    const int64_t wt = dtype_bytes(call.policy.weight_type);
    if (call.d_hidden != nullptr)
      std::memset(call.d_hidden, 0, size_t(call.rows * depth * dtype_bytes(working)));
    if (scored == 0) {
      if (call.d_weight != nullptr) std::memset(call.d_weight, 0, size_t(call.vocab * depth * wt));
      if (call.d_bias != nullptr)
        std::memset(call.d_bias, 0, size_t(call.vocab * dtype_bytes(call.policy.bias_type)));
      return true;
    }
    if (!place()) return false;
    if (d_hidden_wide) std::memset(d_hidden, 0, size_t(scored * depth) * sizeof(T));
    for (int64_t v0 = 0; v0 < call.vocab; v0 += columns) tile(v0);
    if (d_hidden_wide) {
      int64_t at = 0, base = 0;
      while (const int64_t n =
                 next_rows(call.targets, call.rows, call.ignore, at, rows, block_rows)) {
        parallel(call.pool, n, [&](int64_t i, int) {
          write_row(call.d_hidden, working, rows[i] * depth, d_hidden + (base + i) * depth, depth);
        });
        base += n;
      }
    }
    return true;
  }

  void tile(int64_t v0) {
    const int64_t width = call.vocab - v0 < columns ? call.vocab - v0 : columns;
    const int64_t blocks = (width + L - 1) / L;
    parallel(call.pool, round_up(blocks, 2) / 2, [&](int64_t unit, int) {
      for (int64_t b = 2 * unit; b < 2 * unit + 2 && b < blocks; ++b) {
        for (int i = 0; i < models; ++i) model[i].pack_block(b, v0, call.vocab, recompute);
      }
      if (call.d_hidden == nullptr) return;
      const int64_t end = 2 * L * (unit + 1) < width ? 2 * L * (unit + 1) : width;
      for (int64_t v = 2 * L * unit; v < end; v += C::pair) {
        const int64_t row[2] = {v0 + v, v0 + v + 1};
        pack_right<C>(head, head_stride, v / C::pair, call.policy.weight, call.policy.weight_type,
                      row, end - v < C::pair ? 1 : C::pair, depth);
      }
    });
    if (dense_adv) {
      read_row(adv, call.values, call.values_type, v0, width);
      for (int64_t i = width; i < blocks * L; ++i) adv[i] = T(0);
    }
    int64_t at = 0, base = 0;
    while (const int64_t n =
               next_rows(call.targets, call.rows, call.ignore, at, rows, block_rows)) {
      parallel(call.pool, (n + kUnitRows - 1) / kUnitRows, [&](int64_t unit, int thread) {
        const int64_t first = unit * kUnitRows;
        unit_rows(base, first, n - first < kUnitRows ? n - first : kUnitRows, thread, v0, width,
                  blocks);
      });
      if (call.d_weight != nullptr || call.d_bias != nullptr)
        weight_block(n, v0, width, blocks, base == 0);
      base += n;
    }
    if (d_weight != nullptr) {
      parallel(call.pool, width, [&](int64_t v, int) {
        write_row(call.d_weight, call.policy.weight_type, (v0 + v) * depth, d_weight + v * depth,
                  depth);
      });
    }
    if (d_bias != nullptr) write_row(call.d_bias, call.policy.bias_type, v0, d_bias, width);
  }

  int64_t cache_at(int which, int64_t i, int64_t v0) const {
    return (which * call.cache_rows + i) * call.vocab + v0;
  }

  // Phase A for rows [first, first + n) of a block whose first row is the base-th scored one.
  void unit_rows(int64_t base, int64_t first, int64_t n, int thread, int64_t v0, int64_t width,
                 int64_t blocks) {
    const int64_t room = call.cache_rows - base - first, kept = room < 0 ? 0 : room > n ? n : room;
    const int64_t groups = (n + C::MR - 1) / C::MR;
    // Fresh hidden rows: once per tile as dW's right factor, and as the logits' left factor.
    if (right != nullptr) {
      for (int64_t r = 0; r < round_up(n, C::pair); r += C::pair) {
        pack_right<C>(right, right_stride, (first + r) / C::pair, call.policy.hidden, working,
                      rows + first + r, n - r < C::pair ? 1 : C::pair, depth);
      }
      for (int64_t r = n; !kPairs && r < groups * C::MR; ++r)
        zero_left<C>(right, right_stride, first + r, depth);
    }
    T* zt[3] = {};
    int64_t stride[3];
    for (int i = 0; i < models; ++i) {
      const bool shared =
          !kPairs && i == 0;  // the policy's logits become dW's left factor in place
      zt[i] = shared ? reinterpret_cast<T*>(dz) + first * L : z[i] + thread * z_size;
      stride[i] = shared ? dz_stride : unit_stride;
      const Head& h = *model[i].head;
      const int64_t have = i < 2 ? kept : 0;
      if (have < n) {
        const W* packed = right + first * L;
        int64_t packed_stride = right_stride;
        if (!shared) {
          W* mine = left[i] + thread * left_size[i];
          for (int64_t r = 0; r < groups * C::MR; ++r) {
            if (r < n)
              pack_left<C>(mine, unit_stride, r, h.hidden, h.hidden_type, rows[first + r] * h.depth,
                           h.depth);
            else
              zero_left<C>(mine, unit_stride, r, h.depth);
          }
          packed = mine, packed_stride = unit_stride;
        }
        model[i].logits(packed, packed_stride, groups, blocks, zt[i], stride[i]);
      }
      for (int64_t r = 0; r < n; ++r) {
        T* row = zt[i] + r * L;
        if (r < have) {
          plain_to_tile(row, stride[i], blocks, call.cache, working,
                        cache_at(i, base + first + r, v0), width, call.vocab);
        } else if (is_short(working)) {
          round_row(row, stride[i], row, stride[i], blocks, working);
        }
        model[i].shape(row, stride[i], blocks, width);
      }
    }
    for (int64_t r = 0; r < n; ++r) {
      const TileRow<T> t{zt[0] + r * L,
                         zt[1] ? zt[1] + r * L : nullptr,
                         zt[2] ? zt[2] + r * L : nullptr,
                         nullptr,
                         stride[0],
                         unit_stride,
                         blocks,
                         v0};
      gradient(t, zt[0] + r * L, rows[first + r], thread, width);
    }
    W* factor = reinterpret_cast<W*>(zt[0]);
    int64_t factor_stride = stride[0];
    if constexpr (kPairs) {
      factor = dz_left + thread * dzl_size;
      factor_stride = unit_stride;
      to_pairs(zt[0], factor, first, n, blocks);
    }
    if (call.d_hidden == nullptr) return;
    for (int64_t g = 0; g < n; g += C::MR) {
      T* to[C::MR] = {};
      const int count = int(n - g < C::MR ? n - g : C::MR);
      for (int i = 0; i < count; ++i) {
        to[i] = d_hidden + (d_hidden_wide ? base + first + g + i : rows[first + g + i]) * depth;
      }
      add_rows<C>(factor + g * L, factor_stride, head, head_stride, words<C>(width), to, count,
                  depth, false);
    }
  }

  void gradient(TileRow<T> t, T* dst, int64_t row, int thread, int64_t width) const {
    const Head& h = call.policy;
    const T* up = static_cast<const T*>(call.d_out);
    const T* out = static_cast<const T*>(call.out);
    const T* saved = static_cast<const T*>(call.saved);
    const int* slot = call.plan.slot;
    const auto kept = [&](SavedRow k) {
      return k < call.saved_rows ? double(saved[k * call.rows + row]) : 0.0;
    };
    GradRow<T> g{grad_coefficients(
                     call.plan, [&](StatKind k) { return double(up[slot[k] * call.rows + row]); },
                     [&](StatKind k) { return double(out[slot[k] * call.rows + row]); }, kept),
                 Split<T>(kept(kSavedLse)), Split<T>(kept(kSavedRefLse)),
                 Split<T>(kept(kSavedAuxLse))};
    scale_coefficients(g.c, h.scale / h.temperature);
    if (dense_adv) t.adv = adv;
    if (call.values_index != nullptr) t.adv = sparse_advantage(row, thread, t.start, t.blocks);
    const int64_t y = call.targets[row] - t.start;
    grad_row(g, t, dst, line + thread * line_size, y >= 0 && y < width ? y : -1, h.softcap,
             h.temperature);
  }
  const T* sparse_advantage(int64_t row, int thread, int64_t v0, int64_t blocks) const {
    T* a = adv + thread * columns;
    std::memset(a, 0, size_t(blocks * L) * sizeof(T));
    for (int64_t j = row * call.values_k; j < (row + 1) * call.values_k; ++j) {
      const int64_t v = call.values_index[j] - v0;
      if (v >= 0 && v < blocks * L) a[v] += element<T>(call.values, call.values_type, j);
    }
    return a;
  }

  // fp32 gradients of a unit, rounded to bf16 and paired along the vocabulary (for dH, into
  // `by_column`) and along the rows (for dW, into dz).
  void to_pairs(const T* g, W* by_column, int64_t first, int64_t n, int64_t blocks) const {
    if constexpr (kPairs) {
      for (int64_t r = 0; r < n; ++r) {
        for (int64_t k = 0; k < blocks; k += 2) {
          const T* p = g + k * unit_stride + r * L;
          const Vec<T> next = k + 1 < blocks ? load(p + unit_stride) : Vec<T>{};
          pair_words(by_column + k / 2 * unit_stride + r * L, load(p), next);
        }
      }
      for (int64_t r = 0; r < n; r += 2) {
        W* d = dz + (first + r) / 2 * L;
        for (int64_t k = 0; k < blocks; ++k, d += dz_stride) {
          const T* p = g + k * unit_stride + r * L;
          zip_words(d, load(p), r + 1 < n ? load(p + L) : Vec<T>{});
        }
      }
    }
  }

  // Phase B: dW rows of this tile, and the bias, from the block's n rows.
  void weight_block(int64_t n, int64_t v0, int64_t width, int64_t blocks, bool fresh) {
    const int64_t d_blocks = (depth + L - 1) / L, groups = (d_blocks + kNR - 1) / kNR;
    const int64_t slices = (width + kWeightSlice - 1) / kWeightSlice;
    const int64_t units = call.d_weight != nullptr ? groups * slices : 0;
    const int64_t rows_words = words<C>(n);
    T* base = d_weight != nullptr ? d_weight : static_cast<T*>(call.d_weight) + v0 * depth;
    parallel(call.pool, units + (call.d_bias != nullptr), [&](int64_t unit, int) {
      if (unit == units) return bias_block(rows_words, blocks, fresh);
      const int64_t first = unit % groups * kNR, v_first = unit / groups * kWeightSlice;
      const int64_t v_end = v_first + kWeightSlice < width ? v_first + kWeightSlice : width;
      const int64_t here = d_blocks - first < kNR ? d_blocks - first : kNR;
      for_blocks(here, [&](int64_t j, auto nr) {
        for (int64_t v = v_first; v < v_end; v += C::MR) {
          T* to[C::MR] = {};
          const int count = int(v_end - v < C::MR ? v_end - v : C::MR);
          for (int i = 0; i < count; ++i) to[i] = base + (v + i) * depth;
          product_add<C, nr.value, true>(dz + v / L * dz_stride + v % L, 0,
                                         right + (first + j) * right_stride, right_stride,
                                         rows_words, to, count, (first + j) * L, depth, fresh);
        }
      });
    });
  }
  void bias_block(int64_t rows_words, int64_t blocks, bool fresh) const {
    for (int64_t k = 0; k < blocks; ++k) {
      const W* p = dz + k * dz_stride;
      Vec<T> sum = fresh ? Vec<T>{} : load(d_bias + k * L);
      for (int64_t r = 0; r < rows_words; ++r) {
        if constexpr (kPairs) {
          const vi w = (vi)load(p + r * L);
          sum += (vf)(w << 16) + (vf)(w & ~0xffff);
        } else {
          sum += load(p + r * L);
        }
      }
      store(d_bias + k * L, sum);
    }
  }
};

// Frozen head: d_hidden[n] = sum_s d_out[s, n] rows[s, n].
template <class T>
void frozen_backward(const HeadCall& call) {
  const int64_t d = call.policy.depth;
  parallel(call.pool, (call.rows + 63) / 64, [&](int64_t unit, int) {
    T sum[256];
    for (int64_t n = 64 * unit; n < 64 * unit + 64 && n < call.rows; ++n) {
      const bool scored = call.targets[n] != call.ignore;
      for (int64_t at = 0; at < d; at += 256) {
        const int64_t m = d - at < 256 ? d - at : 256;
        for (int64_t i = 0; i < m; ++i) sum[i] = T(0);
        for (int s = 0; s < call.frozen_count && scored; ++s) {
          const T c = static_cast<const T*>(
              call.d_out)[call.plan.slot[call.frozen_kind[s]] * call.rows + n];
          const T* row = static_cast<const T*>(call.frozen) + (s * call.rows + n) * d + at;
          for (int64_t i = 0; i < m; ++i) sum[i] += c * row[i];
        }
        write_row(call.d_hidden, call.policy.hidden_type, n * d + at, sum, m);
      }
    }
  });
}

}  // namespace PK_ISA
}  // namespace prefkern
