// Backward over a head. Per vocabulary tile and block of rows: (A) by row units, logits (kept or
// recomputed), dL/dx, and its products with the head into dH; (B) by head columns, dW += dL/dx^T H.
// Low-rank terms are a second, narrow pair of factors in both. Every sum runs over rows or
// vocabulary in one fixed order, so the bits do not depend on threads.
#pragma once

#include "cpu/grad.h"
#include "cpu/sides.h"
#include "cpu/unit.h"

namespace prefkern {
namespace PK_ISA {

// Rows between two phases: the depth of one dW product. 256 are 1 % faster alone, but each phase
// ends in a barrier, and a barrier on a busy machine can cost a scheduler's time slice.
constexpr int64_t kBlockRows = 512;
constexpr int64_t kBlockBytes = 2 << 20;

template <class C>
struct HeadUnfold {
  using T = typename C::T;
  using W = typename C::W;
  static constexpr int L = C::L;
  static constexpr bool kPairs = C::pair == 2;

  const HeadCall& call;
  UnitLogits<C> logits;
  Sides<C> sides;
  Memory memory;
  bool given_adv;  // the gradient reads given values
  int64_t block_rows = kBlockRows, dz_stride = 0, dz_left_size = 0;
  W* dz = nullptr;       // [column blocks][words of block rows][L]: left factor of dW
  W* dz_left = nullptr;  // per thread: dL/dx of a unit, pairs along the vocabulary
  T* line = nullptr;     // per thread: a row of terms
  T* adv = nullptr;      // per thread

  explicit HeadUnfold(const HeadCall& c) : call(c), logits(c), sides(c) {
    given_adv = c.stats.grows(Stat::ev) && !c.third();
  }

  bool run() {
    sides.clear();
    if (call.given()) clear_gaps();
    if (call.count == 0) return true;
    const bool third = call.stats.grows(Stat::ev) && call.third();
    logits.plan(third ? 3 : call.reads_reference() ? 2 : 1, true, sides.tiles());
    if (!place()) return false;
    if (call.given()) {
      logits.sweep(
          0, call.count, [](int64_t, const Span&) {},
          [&](int64_t first, int64_t n, int thread, const Span& s) {
            given_unit(first, n, thread, s);
          });
      return true;
    }
    for (int64_t v0 = 0; v0 < call.vocab; v0 += logits.columns) {
      tile(span_at<L>(v0, logits.columns, call.vocab));
    }
    sides.finish();
    return true;
  }

  bool place() {
    const int threads = call.pool.threads;
    // Products of fp32 and fp64 are written where dW reads dL/dx from, over packed rows that both
    // products share.
    const bool shared = !call.given() && !kPairs;
    const int64_t row_bytes = sides.deepest() * int64_t(sizeof(W));
    const int64_t fit = round_up(kBlockBytes / row_bytes, kUnitRows);
    block_rows = fit < kUnitRows ? kUnitRows : fit > kBlockRows ? kBlockRows : fit;
    if (block_rows > call.count) block_rows = round_up(call.count, kUnitRows);
    dz_stride = block_stride<C>(words<C>(block_rows));
    dz_left_size = round_up(words<C>(logits.columns), L) / L * logits.stride;
    const bool placed = memory.place([&](Arena& a) {
      logits.layout(a, !shared);
      line = a.take<T>(logits.columns * threads);
      adv = a.take<T>(given_adv ? logits.columns * threads : 0);
      if (call.given()) return;
      dz = a.take<W>(logits.columns / L * dz_stride);
      if (kPairs) dz_left = a.take<W>(dz_left_size * threads);
      sides.layout(a, logits.columns, dz_stride, shared && logits.multiplies);
    });
    return placed && sides.place_wide();
  }

  void tile(const Span& s) {
    const int64_t* list = nullptr;  // rows of this tile, where they are not all
    int64_t count = call.count;
    if (call.picked_at != nullptr) {
      const int64_t c = s.v0 / kChunk;
      list = call.picked + call.picked_at[c], count = call.picked_at[c + 1] - call.picked_at[c];
      if (call.spread != nullptr) {
        sides.start = static_cast<const T*>(call.spread) + c * (sides.width() + 1);
      }
    }
    if (count == 0) {
      sides.outer_none(s);
      return sides.finish_tile(s);
    }
    parallel(call.pool, (s.blocks + 1) / 2, [&](int64_t u, int) {
      for (int64_t b = 2 * u; b < 2 * u + 2 && b < s.blocks; ++b) logits.pack(b, s);
      sides.pack_heads(u, s);
    });
    for (int64_t base = 0; base < count; base += block_rows) {
      const int64_t n = count - base < block_rows ? count - base : block_rows;
      parallel(call.pool, (n + kUnitRows - 1) / kUnitRows, [&](int64_t u, int thread) {
        const int64_t first = u * kUnitRows;
        const int64_t here = n - first < kUnitRows ? n - first : kUnitRows;
        const auto rows_at = [&](int64_t at, int64_t size) {
          return UnitRows{at, size, list == nullptr ? nullptr : list + at};
        };
        const int64_t later = base + first + call.pool.threads * kUnitRows, left = count - later;
        unit(rows_at(base + first, here),
             left <= 0 ? UnitRows{} : rows_at(later, left < kUnitRows ? left : kUnitRows), first,
             thread, s);
      });
      sides.outer(dz, dz_stride, n, s, base == 0);
    }
    sides.finish_tile(s);
  }

  // Phase A for some rows, those of a block from `first` on; `next` is likely this thread's next
  // unit.
  void unit(const UnitRows& rows, const UnitRows& next, int64_t first, int thread,
            const Span& s) const {
    const int64_t n = rows.n;
    sides.pack_rows(rows, first);
    T* z[3] = {};
    int64_t stride[3] = {};
    for (int i = 0; i < logits.models; ++i) {
      const bool shared = !kPairs && i == 0;
      z[i] = shared ? reinterpret_cast<T*>(dz) + first * L : logits.own(i, thread);
      stride[i] = shared ? dz_stride : logits.stride;
      logits.fill(i, rows, s, thread, z[i], stride[i], shared ? sides.right() + first * L : nullptr,
                  dz_stride);
      shape(i, rows, z[i], stride[i], s);
    }
    for (int64_t r = 0; r < n; ++r) {
      const auto at = [&](int i) { return z[i] == nullptr ? nullptr : z[i] + r * L; };
      gradient(rows[r], {at(0), at(1), at(2), nullptr, stride[0], logits.stride, s.blocks, s.v0},
               z[0] + r * L, thread, s);
    }
    W* factor = reinterpret_cast<W*>(z[0]);
    if constexpr (kPairs) {
      factor = dz_left + thread * dz_left_size;
      to_pairs(z[0], factor, first, n, s.blocks);
    }
    typename UnitLogits<C>::Ahead ahead(logits, next, s, sides.products(n));
    sides.inner(factor, stride[0], rows, s, ahead);
    if (!sides.wants_rows()) ahead();
  }
  void given_unit(int64_t first, int64_t n, int thread, const Span& s) const {
    for (int i = 0; i < logits.models; ++i) {
      logits.fill(i, first, n, s, thread);
      shape(i, {first, n}, logits.own(i, thread), logits.stride, s);
    }
    for (int64_t r = 0; r < n; ++r) {
      T* z = logits.own(0, thread) + r * L;
      gradient(first + r, logits.row(thread, r, s), z, thread, s);
      tile_to_plain(call.d.logits, call.working, logits.token(first + r) * call.vocab + s.v0, z,
                    logits.stride, s.width);
    }
  }

  // Products of some rows become the logits that the forward's normaliser is of.
  void shape(int i, const UnitRows& rows, T* z, int64_t stride, const Span& s) const {
    const int64_t rounded = i < 2 ? logits.kept(rows) : 0;  // these came rounded
    for (int64_t r = 0; r < rows.n; ++r) {
      T* row = z + r * L;
      if (call.rounds() && r >= rounded) {
        round_row(row, stride, row, stride, s.blocks, call.working);
      }
      logits.model[i].shape(row, stride, s);
    }
  }

  // dL/dx of one computed row, to dst (t.z's stride).
  void gradient(int64_t row, TileRow<T> t, T* dst, int thread, const Span& s) const {
    const int64_t token = logits.token(row), y = call.targets[token] - s.v0;
    const GradRow<T> g = read_coefficients<T>(call, call.live[row]);
    if (given_adv) {
      T* a = adv + thread * logits.columns;
      read_advantage(a, call, token, s);
      t.adv = a;
    }
    grad_row(g, t, dst, line + thread * logits.columns, call.model[0], [&](const auto& put) {
      if (y >= 0 && y < s.width) put(y, g[Coef::e]);
      if (!g.on(Coef::teach) || !call.sparse) return;
      for (int64_t j = token * call.values_k; j < (token + 1) * call.values_k; ++j) {
        const int64_t v = call.values_index[j] - s.v0;
        if (v < 0 || v >= s.width) continue;
        put(v, g[Coef::teach] * element<T>(call.values, call.values_type, j));
      }
    });
  }

  // fp32 gradients of a unit, rounded to bf16 and paired along the vocabulary (for dH, into
  // `by_column`) and along the rows (for dW, into dz).
  void to_pairs(const T* g, W* by_column, int64_t first, int64_t n, int64_t blocks) const {
    if constexpr (kPairs) {
      for (int64_t r = 0; r < n && sides.wants_rows(); ++r) {
        for (int64_t k = 0; k < blocks; k += 2) {
          const T* p = g + k * logits.stride + r * L;
          const Vec<T> next = k + 1 < blocks ? load(p + logits.stride) : Vec<T>{};
          pair_words(by_column + k / 2 * logits.stride + r * L, load(p), next);
        }
      }
      for (int64_t r = 0; r < n && sides.wants_head(); r += 2) {
        W* d = dz + (first + r) / 2 * L;
        for (int64_t k = 0; k < blocks; ++k, d += dz_stride) {
          const T* p = g + k * logits.stride + r * L;
          zip_words(d, load(p), r + 1 < n ? load(p + L) : Vec<T>{});
        }
      }
    }
  }

  // Rows of the logits' gradient that are not computed are 0.
  void clear_gaps() const {
    const int64_t bytes = call.vocab * dtype_bytes(call.working);
    char* d = static_cast<char*>(call.d.logits);
    int64_t done = 0;
    const auto clear = [&](int64_t end) {
      if (end > done) std::memset(d + done * bytes, 0, size_t((end - done) * bytes));
    };
    for (int64_t i = 0; i < call.count; ++i) {
      clear(logits.token(i));
      done = logits.token(i) + 1;
    }
    clear(call.tokens);
  }
};

}  // namespace PK_ISA
}  // namespace prefkern
