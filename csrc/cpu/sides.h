// Products of dL/dx with the policy's factors: dH += dz W and dW += dz^T H, and the same for the
// low-rank terms, of which either side may ask for either gradient.
#pragma once

#include "cpu/unit.h"

namespace prefkern {
namespace PK_ISA {

constexpr int64_t kWeightSlice = 96;  // head rows of one unit of phase B

template <class C>
struct Side {
  using T = typename C::T;
  using W = typename C::W;
  Operand rows, head;  // [N, depth], [V, depth]
  int64_t depth = 0;
  void *d_rows = nullptr, *d_head = nullptr;  // null: not needed
  W* packed_head = nullptr;  // [d blocks][words of columns][L]: a tile of the head, for d_rows
  W* packed_rows = nullptr;  // [d blocks][words of block rows][L]: a block of rows, for d_head
  T* wide_rows = nullptr;    // [count, depth] where d_rows is 16-bit
  T* wide_head = nullptr;    // [columns, depth] where d_head has another type than T
  int64_t blocks() const { return (depth + C::L - 1) / C::L; }
};

template <class C>
struct Sides {
  using T = typename C::T;
  using W = typename C::W;
  static constexpr int L = C::L;
  static constexpr bool kPairs = C::pair == 2;

  const HeadCall& call;
  Side<C> side[2];
  int count = 0;
  bool packs_rows = false;  // packed rows are needed whoever asks: they are a left factor too
  int64_t head_stride = 0, rows_stride = 0;
  T* d_bias = nullptr;       // [columns]
  const T* start = nullptr;  // [depth + rank + 1]: what the rows of a chunk begin with; null: 0
  Memory wide;

  explicit Sides(const HeadCall& c) : call(c) {
    if (c.given()) return;
    const Model& m = c.model[0];
    add({m.hidden, c.working, c.working}, {m.weight, m.weight_type, c.working}, m.depth, c.d.hidden,
        c.d.weight);
    if (m.rank > 0) {
      add({m.low_in, c.working, c.working}, {m.low_out, m.low_type, c.working}, m.rank, c.d.low_in,
          c.d.low_out);
    }
  }
  void add(const Operand& rows, const Operand& head, int64_t depth, void* d_rows, void* d_head) {
    Side<C>& s = side[count++];
    s.rows = rows, s.head = head, s.depth = depth, s.d_rows = d_rows, s.d_head = d_head;
  }
  static bool is_T(Dtype type) { return type == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32); }

  // Packed tiles of the head's size that these products add.
  int64_t tiles() const {
    if (count == 0) return 0;
    return (side[0].d_rows != nullptr) + (side[0].d_head != nullptr && !is_T(side[0].head.type));
  }
  // Words of a row of every model, padded as they lie.
  int64_t deepest() const {
    int64_t most = 1;
    for (int i = 0; i < call.models; ++i) {
      const int64_t w = row_words<C>(call.model[i]);
      most = w > most ? w : most;
    }
    return most;
  }
  W* right() const { return side[0].packed_rows; }

  // Gradients that grow by addition, and those of a call without computed rows, begin as 0.
  void clear() const {
    for (int i = 0; i < count; ++i) {
      const Side<C>& s = side[i];
      zero(s.d_rows, call.tokens * s.depth, call.working);
      if (call.count == 0) zero(s.d_head, call.vocab * s.depth, s.head.type);
    }
    if (call.count == 0) zero(call.d.bias, call.vocab, call.model[0].bias_type);
  }
  static void zero(void* p, int64_t n, Dtype type) {
    if (p != nullptr && n > 0) std::memset(p, 0, size_t(n * dtype_bytes(type)));
  }

  void layout(Arena& a, int64_t columns, int64_t stride, bool left_factor) {
    packs_rows = left_factor;
    head_stride = words<C>(columns) * L, rows_stride = stride;
    bool any = left_factor;
    int64_t blocks = 0;
    for (int i = 0; i < count; ++i) {
      any = any || side[i].d_head != nullptr;
      blocks += side[i].blocks();
    }
    W* rows = any ? a.take<W>(blocks * rows_stride) : nullptr;
    for (int i = 0; i < count; ++i) {
      Side<C>& s = side[i];
      s.packed_rows = rows;
      if (rows != nullptr) rows += s.blocks() * rows_stride;
      if (s.d_rows != nullptr) s.packed_head = a.take<W>(s.blocks() * head_stride);
      if (s.d_head != nullptr && !is_T(s.head.type)) s.wide_head = a.take<T>(columns * s.depth);
    }
    if (call.d.bias != nullptr) d_bias = a.take<T>(columns);
  }
  // fp32 sums of gradients that are 16-bit in the end.
  bool place_wide() {
    if (is_T(call.working) || count == 0) return true;
    const bool placed = wide.place([&](Arena& a) {
      for (int i = 0; i < count; ++i) {
        if (side[i].d_rows != nullptr) side[i].wide_rows = a.take<T>(call.count * side[i].depth);
      }
    });
    for (int i = 0; i < count && placed; ++i) {
      if (side[i].wide_rows == nullptr) continue;
      std::memset(side[i].wide_rows, 0, size_t(call.count * side[i].depth) * sizeof(T));
    }
    return placed;
  }

  void pack_heads(int64_t u, const Span& s) const {
    for (int i = 0; i < count; ++i) {
      if (side[i].d_rows == nullptr) continue;
      pack_head<C>(side[i].packed_head, head_stride, side[i].head, side[i].depth, u, s);
    }
  }
  // Some rows, which are those of a block from `first` on. Once per tile: as dW's right factor, and
  // as the logits' left factor.
  void pack_rows(const UnitRows& rows, int64_t first) const {
    const int64_t n = rows.n;
    for (int i = 0; i < count; ++i) {
      const Side<C>& s = side[i];
      if (!packs_rows && s.d_head == nullptr) continue;
      for (int64_t r = 0; r < n; r += C::pair) {
        const bool second = r + 1 < n;
        const int64_t token[2] = {token_of(rows[r]), second ? token_of(rows[r + 1]) : 0};
        pack_right<C>(s.packed_rows, rows_stride, (first + r) / C::pair, s.rows, token,
                      second && kPairs ? 2 : 1, s.depth);
      }
      for (int64_t r = n; !kPairs && r < round_up(n, C::MR); ++r) {
        zero_left<C>(s.packed_rows, rows_stride, first + r, s.depth);
      }
    }
  }
  int64_t token_of(int64_t row) const { return call.token(call.live[row]); }

  // Products that `inner` makes of n rows.
  int64_t products(int64_t n) const {
    int64_t all = 0;
    for (int i = 0; i < count; ++i) {
      if (side[i].d_rows != nullptr) all += (side[i].blocks() + kNR - 1) / kNR;
    }
    return all * ((n + C::MR - 1) / C::MR);
  }
  bool wants_rows() const { return side[0].d_rows != nullptr || side[1].d_rows != nullptr; }
  bool wants_head() const {
    return side[0].d_head != nullptr || side[1].d_head != nullptr || d_bias != nullptr;
  }

  // d_rows of some rows += dz (left factor) times the tile of the head.
  template <class Between>
  void inner(const W* dz, int64_t dz_stride, const UnitRows& rows, const Span& s,
             Between& between) const {
    const int64_t n = rows.n;
    for (int i = 0; i < count; ++i) {
      const Side<C>& f = side[i];
      if (f.d_rows == nullptr) continue;
      for (int64_t g = 0; g < n; g += C::MR) {
        T* to[C::MR] = {};
        const int m = int(n - g < C::MR ? n - g : C::MR);
        for (int j = 0; j < m; ++j) {
          to[j] = f.wide_rows != nullptr
                      ? f.wide_rows + rows[g + j] * f.depth
                      : static_cast<T*>(f.d_rows) + token_of(rows[g + j]) * f.depth;
        }
        add_rows<C>(dz + g * L, dz_stride, f.packed_head, head_stride, words<C>(s.width), to, m,
                    f.depth, between);
      }
    }
  }

  // Phase B: rows of d_head of this tile, and the bias, from the n rows of a block.
  void outer(const W* dz, int64_t dz_stride, int64_t n, const Span& s, bool fresh) const {
    const int64_t slices = (s.width + kWeightSlice - 1) / kWeightSlice;
    int64_t units[2] = {};
    for (int i = 0; i < count; ++i) {
      if (side[i].d_head != nullptr) units[i] = (side[i].blocks() + kNR - 1) / kNR * slices;
    }
    const int64_t all = units[0] + units[1];
    parallel(call.pool, all + (d_bias != nullptr), [&](int64_t unit, int) {
      if (unit == all) return bias_block(dz, dz_stride, words<C>(n), s.blocks, fresh);
      const int i = unit >= units[0];
      outer_unit(side[i], i == 0 ? unit : unit - units[0], dz, dz_stride, words<C>(n), s, fresh);
    });
  }
  void outer_unit(const Side<C>& f, int64_t unit, const W* dz, int64_t dz_stride, int64_t deep,
                  const Span& s, bool fresh) const {
    const int64_t groups = (f.blocks() + kNR - 1) / kNR;
    const int64_t first = unit % groups * kNR, v_first = unit / groups * kWeightSlice;
    const int64_t v_end = v_first + kWeightSlice < s.width ? v_first + kWeightSlice : s.width;
    const int64_t here = f.blocks() - first < kNR ? f.blocks() - first : kNR;
    T* base = target(f, s);
    for_blocks(here, [&](int64_t j, auto nr) {
      for (int64_t v = v_first; v < v_end; v += C::MR) {
        T* to[C::MR] = {};
        const int m = int(v_end - v < C::MR ? v_end - v : C::MR);
        for (int i = 0; i < m; ++i) to[i] = base + (v + i) * f.depth;
        product_add<C, nr.value, true>(dz + v / L * dz_stride + v % L, 0,
                                       f.packed_rows + (first + j) * rows_stride, rows_stride, deep,
                                       to, m, (first + j) * L, f.depth, fresh, begin(f));
      }
    });
  }
  void bias_block(const W* dz, int64_t dz_stride, int64_t deep, int64_t blocks, bool fresh) const {
    const T first = start == nullptr ? T(0) : start[width()];
    for (int64_t k = 0; k < blocks; ++k) {
      const W* p = dz + k * dz_stride;
      Vec<T> sum = fresh ? splat(first) : load(d_bias + k * L);
      for (int64_t r = 0; r < deep; ++r) {
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

  int64_t width() const { return side[0].depth + (count > 1 ? side[1].depth : 0); }
  const T* begin(const Side<C>& f) const {
    return start == nullptr ? nullptr : start + (&f == side ? 0 : side[0].depth);
  }
  // A tile of which no unit is computed.
  void outer_none(const Span& s) const {
    parallel(call.pool, s.width, [&](int64_t v, int) {
      for (int i = 0; i < count; ++i) {
        const Side<C>& f = side[i];
        if (f.d_head == nullptr) continue;
        T* to = target(f, s) + v * f.depth;
        const size_t bytes = size_t(f.depth) * sizeof(T);
        if (start == nullptr) {
          std::memset(to, 0, bytes);
        } else {
          std::memcpy(to, begin(f), bytes);
        }
      }
    });
    if (d_bias != nullptr) bias_block(nullptr, 0, 0, s.blocks, true);
  }
  T* target(const Side<C>& f, const Span& s) const {
    return f.wide_head != nullptr ? f.wide_head : static_cast<T*>(f.d_head) + s.v0 * f.depth;
  }

  // Rounds what was summed in T: d_head and the bias of one tile, d_rows after the last.
  void finish_tile(const Span& s) const {
    for (int i = 0; i < count; ++i) {
      const Side<C>& f = side[i];
      if (f.wide_head == nullptr) continue;
      parallel(call.pool, s.width, [&](int64_t v, int) {
        write_row(f.d_head, f.head.type, (s.v0 + v) * f.depth, f.wide_head + v * f.depth, f.depth);
      });
    }
    if (d_bias != nullptr) write_row(call.d.bias, call.model[0].bias_type, s.v0, d_bias, s.width);
  }
  void finish() const {
    for (int i = 0; i < count; ++i) {
      const Side<C>& f = side[i];
      if (f.wide_rows == nullptr) continue;
      parallel(call.pool, call.count, [&](int64_t row, int) {
        write_row(f.d_rows, call.working, token_of(row) * f.depth, f.wide_rows + row * f.depth,
                  f.depth);
      });
    }
  }
};

}  // namespace PK_ISA
}  // namespace prefkern
