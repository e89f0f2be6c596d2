// Ragged groups of scored items in a block: who works on what, and where the numbers lie.
//
// A block owns consecutive groups and takes as many whole ones at a time as fit its threads, one
// item per thread ("packed"), so that lists of any length keep every lane busy; a group with more
// items than threads has the block to itself, a thread taking every 256th item. An item's thread
// forms everything about that item by walking over the items of its group in order of storage: a
// pair is evaluated from both sides, no sum is shared between threads, and results have the same
// bits whatever else is in the batch.
//
// W is the precision of what is evaluated per pair: float for fp32 scores in the families whose
// sums over pairs decide the time, double otherwise. Terms in float are added up over 32 columns,
// then in double; whatever is formed once per item is double.
#pragma once

#include "cuda/block.h"
#include "cuda/list_rank.h"
#include "numerics/list.h"

namespace prefkern {

constexpr int kListChunk = 32;  // columns of one partial sum in W

template <class W>
struct alignas(2 * sizeof(W)) ListItem {
  W score, label;  // both NaN for a masked item: every comparison with it is false
};

// A double as two floats where pairs are evaluated in float: differences keep its digits.
template <class W>
struct ListCell;
template <>
struct ListCell<double> {
  double value;
};
template <>
struct alignas(8) ListCell<float> {
  float value, rest;
};
PK_DEVICE ListCell<double> list_cell(double x, double) {
  return {x};
}
PK_DEVICE ListCell<float> list_cell(double x, float) {
  return {float(x), float(x - double(float(x)))};
}
PK_DEVICE double less(const ListCell<double>& a, const ListCell<double>& b) {
  return a.value - b.value;
}
PK_DEVICE float less(const ListCell<float>& a, const ListCell<float>& b) {
  return (a.value - b.value) + (a.rest - b.rest);
}
PK_DEVICE double whole(const ListCell<double>& a) {
  return a.value;
}
PK_DEVICE double whole(const ListCell<float>& a) {
  return double(a.value) + double(a.rest);
}

// Items that fit shared memory (48 KiB with all else); larger groups use global memory.
template <class W>
constexpr int kListItems = sizeof(W) == 4 ? 640 : 896;
// Cells per thread in which the float kernel hands pushes from item to item, two to a cell.
constexpr int kListCells = 9;

// One column of numbers per item, in shared memory or, for a group that does not fit, in global.
template <class T>
struct ListColumn {
#if defined(__CUDACC__)
  T* at;
  PK_DEVICE ListColumn(const Shared<T>& shared, T* global)
      : at(global == nullptr ? shared.p : global) {}
  PK_DEVICE const T& get(int i) const { return at[i]; }
  PK_DEVICE void put(int i, const T& v) const { at[i] = v; }
#else
  const Shared<T>& shared;
  T* at;
  ListColumn(const Shared<T>& s, T* global) : shared(s), at(global) {}
  const T& get(int i) const { return at == nullptr ? shared.get(i) : at[i]; }
  void put(int i, const T& v) const { at == nullptr ? shared.put(i, v) : void(at[i] = v); }
#endif
};

template <class W>
struct ListColumns {
  ListColumn<ListItem<W>> item;
  ListColumn<ListCell<W>> place, value, gain;  // of the families, which say what they hold
  ListColumn<double> term;                     // in the end an item's part of the loss
  ListColumn<int32_t> tally;  // first: its score is no number; then the pairs that it wins
};

// Bytes of the columns of `items` items in global memory: one column after the other.
template <class W>
constexpr int64_t list_spill_bytes(int64_t items) {
  return items * int64_t(sizeof(ListItem<W>) + 3 * sizeof(ListCell<W>) + 8 + 4);
}

// What an item's thread sees: its group's columns from `begin` on.
template <class W>
struct ListRows {
  const ListColumns<W>& columns;
  int begin, count;
  int64_t group;

  PK_DEVICE ListItem<W> item(int j) const { return columns.item.get(begin + j); }
  PK_DEVICE ListCell<W> place(int j) const { return columns.place.get(begin + j); }
  PK_DEVICE ListCell<W> value(int j) const { return columns.value.get(begin + j); }
  PK_DEVICE ListCell<W> gain(int j) const { return columns.gain.get(begin + j); }
  PK_DEVICE double term(int j) const { return columns.term.get(begin + j); }
  PK_DEVICE int tally(int j) const { return columns.tally.get(begin + j); }
  PK_DEVICE void set_place(int i, double x) const {
    columns.place.put(begin + i, list_cell(x, W()));
  }
  PK_DEVICE void set_value(int i, double x) const {
    columns.value.put(begin + i, list_cell(x, W()));
  }
  PK_DEVICE void set_gain(int i, double x) const { columns.gain.put(begin + i, list_cell(x, W())); }
  PK_DEVICE void set_term(int i, double x) const { columns.term.put(begin + i, x); }
  PK_DEVICE void set_tally(int i, int x) const { columns.tally.put(begin + i, x); }

  // body(j, item j) over the valid items in order of storage.
  template <class Body>
  PK_DEVICE void each(const Body& body) const {
    for (int j = 0; j < count; ++j) {
      const ListItem<W> other = item(j);
      if (other.label == other.label) body(j, other);
    }
  }
  // Sum over the valid items of body(j, item j), a W.
  template <class Body>
  PK_DEVICE double sum(const Body& body) const {
    double total = 0.0;
    for (int first = 0; first < count; first += kListChunk) {
      const int last = first + kListChunk < count ? first + kListChunk : count;
      W part = 0;
      for (int j = first; j < last; ++j) {
        const ListItem<W> other = item(j);
        if (other.label == other.label) part += body(j, other);
      }
      total += double(part);
    }
    return total;
  }
  PK_DEVICE int valid() const {
    int n = 0;
    each([&](int, const ListItem<W>&) { ++n; });
    return n;
  }
  // 1-based rank by label in descending order, equal labels by position.
  PK_DEVICE int label_rank(int i) const {
    const W own = item(i).label;
    int rank = 1;
    each([&](int j, const ListItem<W>& x) {
      rank += int(x.label > own || (x.label == own && j < i));
    });
    return rank;
  }
  PK_DEVICE int score_rank(int i) const {
    const W own = item(i).score;
    int rank = 1;
    each([&](int j, const ListItem<W>& x) {
      rank += int(x.score > own || (x.score == own && j < i));
    });
    return rank;
  }
};

// The groups that a block works on together, and the phases over their items.
template <class W, class Threads>
struct ListFrame {
  Threads& b;
  const ListArgs& args;
  const ListColumns<W>& columns;
  const Shared<ListItem<W>>& items_here;  // shared memory behind columns.item, if packed
  const Shared<ListCell<W>>& pushes;      // [kListCells, kListThreads], float kernels only
  const Shared<int32_t>& broken;          // by the first item of a group; read where any_broken
  // Packed: where the group of a thread's item starts, its size and its place in the block.
  const typename Threads::template Local<int>&begin, &count, &place;
  int64_t base, first;  // first item; first group of the block
  int alone;            // place of the group of a frame that is not packed
  int items;
  bool packed;
  int longest;      // packed: items of the largest group, or more
  bool any_broken;  // some group has a score that is no number

  PK_DEVICE ListRows<W> rows_of(int t) const {
    return {columns, packed ? begin[t] : 0, packed ? count[t] : items,
            first + (packed ? place[t] : alone)};
  }
  // body(rows, i) for every valid item i of every group, by the item's thread; then a barrier.
  template <class Body>
  PK_DEVICE void each(const Body& body) const {
    b.each([&](int t) {
      const ListRows<W> rows = rows_of(t);
      const int stride = packed ? items : kListThreads;
      for (int i = packed ? t - rows.begin : t; i < rows.count; i += stride) {
        const ListItem<W> own = rows.item(i);
        if (own.label == own.label) body(rows, i);
      }
    });
    b.sync();
  }
  // dl/ds of an item; NaN in a group with a score that is no number.
  PK_DEVICE void put_slope(const ListRows<W>& rows, int i, double u) const {
    const double x = any_broken && broken.get(rows.begin) ? pk_nan() : u;
    const int64_t at = base + rows.begin + i;
    if (args.doubles) {
      static_cast<double*>(args.slope)[at] = x;
    } else {
      static_cast<float*>(args.slope)[at] = float(x);
    }
  }
};

PK_DEVICE double list_number(const void* p, bool doubles, int64_t i) {
  return doubles ? static_cast<const double*>(p)[i] : double(static_cast<const float*>(p)[i]);
}

// The columns of the items from `base` on in global memory, or null where shared memory has them.
template <class T>
PK_DEVICE T* list_spilled(const ListArgs& a, bool spilled, int64_t& offset, int64_t base) {
  T* column = spilled ? reinterpret_cast<T*>(a.spill + offset) + base : nullptr;
  offset += a.items * int64_t(sizeof(T));
  return column;
}

// Runs Core::run(frame) on every group of a block and adds up the items' parts of the losses.
template <class W, class Core>
struct ListKernel {
  using Args = ListArgs;
  using Threads = Block<kListThreads>;
  static constexpr int kMinBlocks = 3;  // 80 registers; with 4, the pair families spill

  PK_DEVICE static void run(Threads& b, const ListArgs& a) {
    PK_SHARED(int32_t, bound, kListGroups + 1);
    PK_SHARED(int32_t, broken, kListThreads);
    PK_SHARED(int32_t, largest, Threads::kWarps);
    PK_SHARED(ListCell<W>, pushes, sizeof(W) == 4 ? kListCells * kListThreads : 1);
    PK_SHARED(ListItem<W>, item, kListItems<W>);
    PK_SHARED(ListCell<W>, place, kListItems<W>);
    PK_SHARED(ListCell<W>, value, kListItems<W>);
    PK_SHARED(ListCell<W>, gain, kListItems<W>);
    PK_SHARED(double, term, kListItems<W>);
    PK_SHARED(int32_t, tally, kListItems<W>);
    typename Threads::template Local<int> begin, count, owner, bad, most;

    const int64_t first = b.index() * a.groups_per_block;
    const int64_t left = a.groups - first;
    const int groups = int(left < a.groups_per_block ? left : a.groups_per_block);
    b.each([&](int t) {
      for (int g = t; g <= groups; g += kListThreads) bound.put(g, a.cu[first + g]);
    });
    b.sync();
    for (int at = 0; at < groups;) {
      const int32_t from = bound.get(at);
      // The groups [at, until) fit the threads; with none, group `at` has the block to itself.
      int until = at, beyond = groups + 1;
      while (beyond - until > 1) {
        const int middle = (until + beyond) / 2;
        (bound.get(middle) - from <= kListThreads ? until : beyond) = middle;
      }
      const bool packed = until > at;
      if (!packed) until = at + 1;
      const int items = bound.get(until) - from;
      const bool spilled = items > kListItems<W>;
      int64_t offset = 0;
      // Columns of 8 bytes and more first: each starts on a multiple of its element's size.
      const ListColumns<W> columns{{item, list_spilled<ListItem<W>>(a, spilled, offset, from)},
                                   {place, list_spilled<ListCell<W>>(a, spilled, offset, from)},
                                   {value, list_spilled<ListCell<W>>(a, spilled, offset, from)},
                                   {gain, list_spilled<ListCell<W>>(a, spilled, offset, from)},
                                   {term, list_spilled<double>(a, spilled, offset, from)},
                                   {tally, list_spilled<int32_t>(a, spilled, offset, from)}};
      ListFrame<W, Threads> frame{b,     a,    columns, item, pushes, broken, begin, count,
                                  owner, from, first,   at,   items,  packed, 0,     false};
      b.each([&](int t) {
        begin[t] = 0, count[t] = 0, owner[t] = at, bad[t] = 0;
        if (packed && t < items) {
          int low = at, high = until;  // the last group that starts at or before the item
          while (high - low > 1) {
            const int middle = (low + high) / 2;
            (bound.get(middle) - from <= t ? low : high) = middle;
          }
          begin[t] = bound.get(low) - from, count[t] = bound.get(low + 1) - bound.get(low);
          owner[t] = low;
        }
        for (int i = t; i < items; i += kListThreads) bad[t] |= load(frame, i);
      });
      // One number tells both: the size of the largest group, or more than any if one is broken.
      b.each([&](int t) { most[t] = bad[t] ? kListThreads + 1 : count[t]; });
      b.warp_all([&](int t) -> int& { return most[t]; }, Larger());
      b.each([&](int t) {
        if (t % kWarp == 0) largest.put(t / kWarp, most[t]);
      });
      b.sync();
      for (int warp = 0; warp < Threads::kWarps; ++warp) {
        frame.longest = Larger()(frame.longest, largest.get(warp));
      }
      frame.any_broken = frame.longest > kListThreads;
      if (frame.any_broken) {
        b.each([&](int t) {
          if (at + t < until)
            find_broken(frame, bound.get(at + t) - from, bound.get(at + t + 1) - from);
        });
        b.sync();
      }
      Core::run(frame);
      b.each([&](int t) {
        if (at + t < until) add_up(frame, bound, first, at + t, from);
      });
      b.sync();
      at = until;
    }
  }

  // Puts item i into the columns; 1 if its score is no number.
  PK_DEVICE static int load(const ListFrame<W, Threads>& f, int i) {
    const ListArgs& a = f.args;
    const double s = list_number(a.scores, a.doubles, f.base + i);
    const double y = list_number(a.labels, a.doubles, f.base + i);
    const bool masked = y != y, broken = !masked && !pk_finite(s);
    // A score that is no number is read as 0, so that ranks stay a permutation; its group's results
    // are replaced. A masked item differs from everything, itself included.
    f.columns.item.put(i,
                       masked ? ListItem<W>{W(y), W(y)} : ListItem<W>{W(broken ? 0.0 : s), W(y)});
    f.columns.term.put(i, 0.0);
    f.columns.tally.put(i, broken);
    if (masked) {
      if (a.doubles) {
        static_cast<double*>(a.slope)[f.base + i] = 0.0;
      } else {
        static_cast<float*>(a.slope)[f.base + i] = 0.0f;
      }
    }
    return broken;
  }

  PK_DEVICE static void find_broken(const ListFrame<W, Threads>& f, int begin, int end) {
    int found = 0;
    for (int i = begin; i < end; ++i) found |= f.columns.tally.get(i);
    if (end > begin) f.broken.put(begin, found);
  }

  // The loss of group g of the block: four partial sums in a fixed order.
  PK_DEVICE static void add_up(const ListFrame<W, Threads>& f, const Shared<int32_t>& bound,
                               int64_t first, int g, int32_t from) {
    const int begin = bound.get(g) - from, count = bound.get(g + 1) - bound.get(g);
    double part[4] = {0.0, 0.0, 0.0, 0.0};
    int i = begin;
    for (; i + 4 <= begin + count; i += 4) {
      PK_UNROLL
      for (int k = 0; k < 4; ++k) part[k] += f.columns.term.get(i + k);
    }
    for (; i < begin + count; ++i) part[0] += f.columns.term.get(i);
    double loss = (part[0] + part[1]) + (part[2] + part[3]);
    if (f.any_broken && count > 0 && f.broken.get(begin)) loss = pk_nan();
    if (f.args.doubles) {
      static_cast<double*>(f.args.loss)[first + g] = loss;
    } else {
      static_cast<float*>(f.args.loss)[first + g] = float(loss);
    }
  }
};

}  // namespace prefkern
