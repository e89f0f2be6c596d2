// Logits of a unit of rows over one tile of the vocabulary, by whichever way they come to be:
// multiplied, read from what a forward kept, or given. Every sweep stands on this.
#pragma once

#include "cpu/fold.h"
#include "cpu/tiles.h"

namespace prefkern {
namespace PK_ISA {

// Given logits are read row by row, 4 KiB at a time (in L1 together with the reference's); rows are
// handed out in fours.
constexpr int64_t kGivenColumns = 1024, kGivenRows = 4;

// Rows of a unit, counted among the computed ones: n in a row from `first` on, or those of a list.
struct UnitRows {
  int64_t first = 0, n = 0;
  const int64_t* list = nullptr;
  int64_t operator[](int64_t r) const { return list == nullptr ? first + r : list[r]; }
};

template <class C>
struct UnitLogits {
  using T = typename C::T;
  using W = typename C::W;
  static constexpr int L = C::L;

  const HeadCall& call;
  int models = 1;                         // those that the sweep reads
  bool reads_cache = false;               // kept products are those the sweep would make
  bool multiplies = false;                // some product must be made
  int64_t unit = kUnitRows, columns = 0;  // rows of a unit, entries of a tile
  int64_t stride = 0, left_size[3] = {};  // between the blocks of a unit
  ModelTile<C> model[3];
  W* left[3] = {};  // per thread: packed rows of a unit
  T* z[3] = {};     // per thread: logits of a unit

  explicit UnitLogits(const HeadCall& c) : call(c) {}

  // others: tiles of the head that the sweep keeps packed beside these. The size of a tile must not
  // depend on what was kept, or sums would end in other bits.
  void plan(int count, bool cached, int64_t others) {
    models = count;
    reads_cache = cached && !call.given();
    multiplies = !call.given() && (!reads_cache || call.count > call.kept || models > 2);
    int64_t deepest = 1, tiles = 1 + others;
    for (int i = 0; i < models; ++i) {
      model[i].model = &call.model[i];
      model[i].working = call.working;
      if (i > 0) model[i].share(call.model[0]);
      tiles += i > 0 && model[i].own_weight;
      const int64_t w = row_words<C>(call.model[i]);
      deepest = w > deepest ? w : deepest;
    }
    if (call.given()) {
      unit = 1, stride = L;
      const int64_t all = round_up(call.vocab, L);
      columns = all < kGivenColumns ? all : kGivenColumns;
    } else {
      columns = tile_columns<C>(deepest, call.vocab, tiles);
      stride = block_stride<C>(kUnitRows);
    }
  }
  int64_t unit_size() const { return columns / L * stride; }

  // own_policy: false where the caller has rows and logits of the policy in memory of its own.
  void layout(Arena& a, bool own_policy) {
    const int threads = call.pool.threads;
    for (int i = 0; i < models; ++i) {
      if (multiplies) {
        model[i].layout(a, columns, i > 0 ? &model[0] : nullptr);
        left_size[i] = round_up(row_words<C>(call.model[i]), L) / L * stride;
        if (own_policy || i > 0) left[i] = a.take<W>(left_size[i] * threads);
      } else if (!call.given()) {
        model[i].bias = a.take<T>(columns);
      }
      if (own_policy || i > 0) z[i] = a.take<T>(unit_size() * threads);
    }
  }
  void pack(int64_t block, const Span& s) const {
    for (int i = 0; i < models; ++i) model[i].pack_block(block, s.v0, call.vocab, multiplies);
  }
  T* own(int i, int thread) const { return z[i] + thread * unit_size(); }
  int64_t token(int64_t i) const { return call.token(call.live[i]); }

  // How many of some rows the cache holds of models 0 and 1: the first ones.
  int64_t kept(const UnitRows& rows) const {
    int64_t n = reads_cache ? rows.n : 0;
    while (n > 0 && rows[n - 1] >= call.kept) --n;
    return n;
  }
  int64_t cache_at(int i, int64_t row, const Span& s) const {
    return (i * call.kept + row) * call.vocab + s.v0;
  }

  // Products (or given logits) of model i, unshaped. `packed`: the rows as left factor, where the
  // caller has them.
  void fill(int i, const UnitRows& rows, const Span& s, int thread, T* to, int64_t to_stride,
            const W* packed, int64_t packed_stride) const {
    const int64_t n = rows.n;
    if (call.given()) {
      for (int64_t r = 0; r < n; ++r) {
        plain_to_tile(to + r * L, to_stride, s.blocks, call.model[i].logits, call.working,
                      token(rows[r]) * call.vocab + s.v0, s.width);
      }
      return;
    }
    const int64_t have = i < 2 ? kept(rows) : 0;
    if (have < n) {
      const int64_t groups = (n + C::MR - 1) / C::MR;
      if (packed == nullptr) {
        W* mine = left[i] + thread * left_size[i];
        for (int64_t r = 0; r < n; ++r) model[i].pack_row(mine, stride, r, token(rows[r]));
        for (int64_t r = n; r < groups * C::MR; ++r) model[i].zero_row(mine, stride, r);
        packed = mine, packed_stride = stride;
      }
      model[i].multiply(packed, packed_stride, groups, s.blocks, to, to_stride);
    }
    for (int64_t r = 0; r < have; ++r) {
      plain_to_tile(to + r * L, to_stride, s.blocks, call.cache, call.cache_type(),
                    cache_at(i, rows[r], s), s.width);
    }
  }
  void fill(int i, int64_t first, int64_t n, const Span& s, int thread) const {
    fill(i, {first, n}, s, thread, own(i, thread), stride, nullptr, 0);
  }
  // Asks for what the cache holds of some rows, a part of it at every call: their reader would wait
  // for memory, which the products in between leave idle.
  class Ahead {
   public:
    Ahead(const UnitLogits& of, const UnitRows& rows, const Span& s, int64_t calls) {
      const int64_t bytes = dtype_bytes(of.call.cache_type());
      const int64_t models = of.models < 2 ? 1 : 2, kept = of.kept(rows);
      for (int64_t i = 0; i < models * kept; ++i) {
        from[i] = static_cast<const char*>(of.call.cache) +
                  of.cache_at(int(i / kept), rows[i % kept], s) * bytes;
      }
      width = s.width * bytes, rest = models * kept;
      step = (rest * ((width + kLine - 1) / kLine) + calls - 1) / (calls < 1 ? 1 : calls);
    }
    void operator()() {
      for (int64_t i = 0; i < step && rest > 0; ++i) {
        __builtin_prefetch(*row + at, 0, 2);
        at += kLine;
        if (at >= width) at = 0, ++row, --rest;
      }
    }

   private:
    static constexpr int64_t kLine = 64;
    const char* from[2 * kUnitRows];
    const char* const* row = from;
    int64_t width = 0, rest = 0, step = 0, at = 0;  // bytes of a row, rows left, lines of a call
  };
  TileRow<T> row(int thread, int64_t r, const Span& s) const {
    const auto at = [&](int i) { return i < models ? own(i, thread) + r * L : nullptr; };
    return {at(0), at(1), at(2), nullptr, stride, stride, s.blocks, s.v0};
  }

  // One sweep over rows [base, base + n): a tile of the head is packed once for all rows,
  // body(first, n, thread, span) per unit; given logits are read row by row, whole rows at a time.
  template <class Pack, class Body>
  void sweep(int64_t base, int64_t n, const Pack& pack_tile, const Body& body) const {
    if (call.given()) {
      parallel(call.pool, (n + kGivenRows - 1) / kGivenRows, [&](int64_t u, int thread) {
        for (int64_t r = kGivenRows * u; r < kGivenRows * (u + 1) && r < n; ++r) {
          for (int64_t v0 = 0; v0 < call.vocab; v0 += columns) {
            body(base + r, 1, thread, span_at<L>(v0, columns, call.vocab));
          }
        }
      });
      return;
    }
    for (int64_t v0 = 0; v0 < call.vocab; v0 += columns) {
      const Span s = span_at<L>(v0, columns, call.vocab);
      // two blocks a unit: a pair of bf16 blocks shares a cache line
      parallel(call.pool, (s.blocks + 1) / 2, [&](int64_t u, int) {
        for (int64_t b = 2 * u; b < 2 * u + 2 && b < s.blocks; ++b) pack(b, s);
        pack_tile(u, s);
      });
      parallel(call.pool, (n + unit - 1) / unit, [&](int64_t u, int thread) {
        const int64_t first = u * unit;
        body(base + first, n - first < unit ? n - first : unit, thread, s);
      });
    }
  }
};

// Given A of `ev` on one tile, or 0 beyond it: dense, or the entries of one row added up.
template <class T>
inline void read_advantage(T* a, const HeadCall& call, int64_t token, const Span& s) {
  constexpr int L = Lanes<T>::L;
  if (!call.sparse) {
    read_row(a, call.values, call.values_type, s.v0, s.width);
    for (int64_t i = s.width; i < s.blocks * L; ++i) a[i] = T(0);
    return;
  }
  std::memset(a, 0, size_t(s.blocks * L) * sizeof(T));
  for (int64_t j = token * call.values_k; j < (token + 1) * call.values_k; ++j) {
    const int64_t v = call.values_index[j] - s.v0;
    if (v >= 0 && v < s.width) a[v] += element<T>(call.values, call.values_type, j);
  }
}

}  // namespace PK_ISA
}  // namespace prefkern
