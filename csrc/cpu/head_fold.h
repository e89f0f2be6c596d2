// The two forward sweeps over the vocabulary.
#pragma once

#include "cpu/frozen.h"
#include "cpu/second.h"

namespace prefkern {
namespace PK_ISA {

// Rows whose running sums are held at once; more rows take another pass over the weights, whose
// packing is then below 1 % of the products.
constexpr int64_t kStateRows = 4096;

inline int64_t clamp_rows(int64_t n) {
  return round_up(n < 1 ? 1 : n > kStateRows ? kStateRows : n, kUnitRows);
}

// First sweep: the sums of every computed row, and what the backward keeps.
template <class C>
struct HeadFold {
  using T = typename C::T;
  static constexpr int L = C::L;
  static constexpr bool kPairs = C::pair == 2;

  const HeadCall& call;
  UnitLogits<C> logits;
  Frozen<C> frozen;
  Memory memory;
  FoldPlan plan;
  bool teacher, sparse_adv, dense_adv;      // what `values` are
  int64_t capacity = kStateRows, base = 0;  // rows of a pass, and those before it
  int64_t k = 0;                            // size of the reference's top set
  RowSums* sums = nullptr;                  // of this pass
  double* at = nullptr;                     // [rows of a pass, AT]
  OnlineLse* chunk = nullptr;               // [tail_models, rows of a pass]: of the chunk at hand
  T* seen = nullptr;                        // per thread: a row as the backward reads it
  T* adv = nullptr;                         // per thread
  T* heap_value = nullptr;
  int32_t *heap_index = nullptr, *heap_size = nullptr;

  explicit HeadFold(const HeadCall& c) : call(c), logits(c), frozen(c) {
    plan = c.fold_plan();
    teacher = c.stats.has(Stat::xent);
    const bool given_adv = c.stats.has(Stat::ev) && !c.third();
    sparse_adv = given_adv && c.sparse;
    dense_adv = given_adv && !c.sparse;
    k = c.top_size();
  }

  bool run() {
    logits.plan(call.third() ? 3 : call.two() ? 2 : 1, false, frozen.on());
    if (k > 0) capacity = clamp_rows((2 << 20) / (k * int64_t(sizeof(T) + 4)));
    if (frozen.on()) capacity = clamp_rows(frozen.most_rows());
    capacity = clamp_rows(call.count < capacity ? call.count : capacity);
    const int threads = call.pool.threads;
    const bool placed = memory.place([&](Arena& a) {
      logits.layout(a, true);
      frozen.layout(a, logits.columns);
      sums = a.take<RowSums>(capacity);
      at = a.take<double>(capacity * kAts);
      chunk = a.take<OnlineLse>(call.tail ? call.tail_models() * capacity : 0);
      seen = a.take<T>(plan.rounded ? logits.columns * threads : 0);
      adv = a.take<T>(dense_adv ? logits.columns * threads : 0);
      heap_value = a.take<T>(k * capacity);
      heap_index = a.take<int32_t>(k * capacity);
      heap_size = a.take<int32_t>(k > 0 ? capacity : 0);
    });
    if (!placed) return false;
    for (base = 0; base < call.count; base += capacity) pass();
    return true;
  }

  void pass() {
    const int64_t n = call.count - base < capacity ? call.count - base : capacity;
    for (int64_t i = 0; i < n; ++i) sums[i] = RowSums();
    std::memset(at, 0, size_t(n) * kAts * sizeof(double));
    if (k > 0) std::memset(heap_size, 0, size_t(n) * sizeof(*heap_size));
    logits.sweep(
        base, n, [&](int64_t u, const Span& s) { frozen.pack(u, s); },
        [&](int64_t first, int64_t rows, int thread, const Span& s) {
          unit(first, rows, thread, s);
        });
    for (int64_t i = 0; i < n; ++i) put(i);
  }

  // Computed rows [first, first + n) over one tile.
  void unit(int64_t first, int64_t n, int thread, const Span& s) {
    for (int i = 0; i < logits.models; ++i) logits.fill(i, first, n, s, thread);
    RowTop<T> top[kUnitRows];
    const bool apart = plan.rounded && !logits.model[0].plain();
    for (int64_t r = 0; r < n; ++r) {
      TileRow<T> t = logits.row(thread, r, s);
      if (first + r < call.kept) keep(first + r, t, s);
      if (apart) fold_shaped(first + r, t, thread, s);
      for (int i = 0; i < logits.models; ++i) {
        logits.model[i].shape(logits.own(i, thread) + r * L, logits.stride, s);
      }
      if (k > 0) heap(first - base + r).scan(t, s.width);
      top[r] = row_tops(t);
    }
    if (dense_adv) read_advantage(adv + thread * logits.columns, call, 0, s);
    for (int64_t r = 0; r < n; ++r) {
      const TileRow<T> t = logits.row(thread, r, s);
      gather(first + r, t, top[r], thread, s);
      if (!plan.rounded || apart) continue;
      fold_rounded<T, kPairs>(sums[first + r - base].rounded, t.z, t.stride, t.blocks, top[r].pol,
                              call.working);
    }
    if (frozen.on()) {
      frozen.add(sums + (first - base), call.live + first, n, thread, logits.row(thread, 0, s),
                 s.width);
    }
  }

  // Products of a row go to the cache as they come: before any bias, scale or cap.
  void keep(int64_t row, const TileRow<T>& t, const Span& s) const {
    const T* from[2] = {t.z, t.zr};
    for (int i = 0; i < call.kept_models(); ++i) {
      tile_to_plain<T, kPairs>(call.cache, call.cache_type(), logits.cache_at(i, row, s), from[i],
                               t.stride, s.width);
    }
  }
  // The policy's normaliser of the products that a 16-bit backward reads, where they have yet to be
  // shaped.
  void fold_shaped(int64_t row, const TileRow<T>& t, int thread, const Span& s) {
    T* z = seen + thread * logits.columns;
    round_row(z, L, t.z, t.stride, t.blocks, call.working);
    logits.model[0].shape(z, L, s);
    fold_normaliser(sums[row - base].rounded, z, L, t.blocks);
  }

  // A shaped row into its running sums.
  void gather(int64_t row, TileRow<T> t, const RowTop<T>& top, int thread, const Span& s) {
    RowSums& sum = sums[row - base];
    double* found = at + (row - base) * kAts;
    if (dense_adv) t.adv = adv + thread * logits.columns;
    const double old_pol = sum.pol.max, old_ref = sum.ref.max;
    const TileSums<T> here = fold_first(sum, call.stats, t, top);
    if (call.tail) add_to_chunk(row, sum, here, s);
    frozen.raise(sum, call.live[row], old_pol, old_ref);
    const int64_t token = logits.token(row), y = call.targets[token] - s.v0;
    if (y >= 0 && y < s.width) {
      const int64_t place = y / L * t.stride + y % L;
      found[int(At::zy)] = double(t.z[place]);
      if (t.zr != nullptr) found[int(At::ref_zy)] = double(t.zr[place]);
    }
    if (!teacher && !sparse_adv) return;
    const double m = safe_max(sum.pol.max);
    each_sparse(t, call.values_index, call.values, call.values_type, token * call.values_k,
                call.values_k, [&](double z, double value) {
                  if (teacher)
                    found[int(At::taught)] += weighted(value, z);
                  else
                    sum.adv += weighted(pk_exp(z - m), value);
                });
  }

  // The tile's sums into those of its chunk, which leave with the chunk's last tile.
  void add_to_chunk(int64_t row, const RowSums& sum, const TileSums<T>& here, const Span& s) const {
    const OnlineLse part[2] = {{sum.pol.max, double(here.pol)}, {sum.ref.max, double(here.ref)}};
    const int64_t end = s.v0 + s.width;
    for (int i = 0; i < call.tail_models(); ++i) {
      OnlineLse& c = chunk[i * capacity + row - base];
      if (s.v0 % kChunk == 0) c = OnlineLse();
      lse_merge(c, part[i]);
      if (end % kChunk != 0 && end != call.vocab) continue;
      const int64_t place = i * call.chunk_count() + s.v0 / kChunk;
      static_cast<T*>(call.chunks)[place * call.slots + call.live[row]] = T(lse_value(c));
    }
  }

  TopHeap<T> heap(int64_t i) const {
    return {heap_value + i * k, heap_index + i * k, heap_size + i, int32_t(k)};
  }
  // What a finished row of this pass leaves.
  void put(int64_t i) const {
    const int64_t slot = call.live[base + i], m = call.slots;
    each_field(sums[i], [&](Field f, double x) {
      if (plan.writes(f)) call.sums[int64_t(f) * m + slot] = x;
    });
    if (plan.writes(Field::top)) call.sums[int64_t(Field::top) * m + slot] = double(sums[i].top);
    for (int j = 0; j < kAts; ++j) call.at[j * m + slot] = at[i * kAts + j];
    if (k > 0) put_top(heap(i), slot);
    if (call.teacher == nullptr) return;
    const int64_t token = logits.token(base + i);
    double mass = 0.0;
    for (int64_t j = token * call.values_k; j < (token + 1) * call.values_k; ++j) {
      mass += element<double>(call.values, call.values_type, j);
    }
    call.teacher[token] = mass;
  }
  // The last `top_kept` members of the top set in descending order: a heap yields its worst first.
  void put_top(TopHeap<T> h, int64_t slot) const {
    for (int64_t j = call.top_kept; j-- > 0;) {
      call.top[j * call.slots + slot] = double(h.value[0]);
      call.top[(call.top_kept + j) * call.slots + slot] = double(h.index[0]);
      h.drop_worst();
    }
  }
};

// Second sweep, from normalised probabilities: both normalisers are known.
template <class C>
struct HeadFoldAgain {
  using T = typename C::T;

  const HeadCall& call;
  UnitLogits<C> logits;
  Memory memory;

  explicit HeadFoldAgain(const HeadCall& c) : call(c), logits(c) {}

  bool run() {
    logits.plan(2, call.keeps_products(), 0);
    if (!memory.place([&](Arena& a) { logits.layout(a, true); })) return false;
    for (int64_t base = 0; base < call.count; base += kStateRows) {
      logits.sweep(
          base, call.count - base < kStateRows ? call.count - base : kStateRows,
          [](int64_t, const Span&) {},
          [&](int64_t first, int64_t n, int thread, const Span& s) { unit(first, n, thread, s); });
    }
    return true;
  }

  void unit(int64_t first, int64_t n, int thread, const Span& s) const {
    for (int i = 0; i < 2; ++i) {
      logits.fill(i, first, n, s, thread);
      for (int64_t r = 0; r < n; ++r) {
        logits.model[i].shape(logits.own(i, thread) + r * C::L, logits.stride, s);
      }
    }
    for (int64_t r = 0; r < n; ++r) {
      const int64_t slot = call.live[first + r];
      double sum[kSeconds];
      NormRow<T> norm;
      for (int j = 0; j < kNorms; ++j) {
        norm.n[j] = static_cast<const T*>(call.norms)[j * call.slots + slot];
      }
      for (int j = 0; j < kSeconds; ++j) sum[j] = call.second[j * call.slots + slot];
      fold_second(sum, call.stats, logits.row(thread, r, s), norm);
      for (int j = 0; j < kSeconds; ++j) call.second[j * call.slots + slot] = sum[j];
    }
  }
};

}  // namespace PK_ISA
}  // namespace prefkern
