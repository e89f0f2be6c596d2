// Ragged groups of scored items on threads: who works on what, and how items see each other.
//
// A block owns 32 consecutive groups. Groups of up to 32 items get 8, 16 or 32 neighbouring lanes
// each, as many as the largest of them needs; an item's numbers stay in its lane's registers and
// reach the others by shuffles, so there is no shared memory and no barrier. A larger group has the
// block to itself, a thread taking every 256th item; its numbers are in global memory, with a
// barrier between what is written and what is read. Families are written once for both.
//
// Items meet in an order that follows from their own group alone: results have the same bits
// whatever else is in the batch. W is the precision of what is evaluated per pair: float for fp32
// scores, double otherwise. Sums are double (a lane's terms of pairs are added up in W four at a
// time), as is whatever is formed once per item.
#pragma once

#include <cstring>

#include "cuda/block.h"
#include "cuda/list_rank.h"
#include "numerics/list.h"

namespace prefkern {

constexpr int kListThreads = 256;
constexpr int kListGroups = 32;  // of a block
constexpr int kListLanes = 32;   // items of the largest group that lanes serve
constexpr int kListColumn = 8;   // bytes of the widest number of a column
constexpr int kListColumns = 6;  // that a family keeps, at most

template <class W>
struct ListItem {
  W score, label;  // both NaN where there is no item: every comparison with it is false
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

// Loss of a pair and what it adds to dl/ds of its first item, the opposite of what it adds to the
// other's.
template <class W>
struct PairTerm {
  W loss, push;
  W pairs;  // 1 or 0
};

struct PairSums {
  double loss = 0.0, push = 0.0, count = 0.0;
  template <class W>
  PK_DEVICE void add(const PairTerm<W>& x) {
    loss += double(x.loss), push += double(x.push), count += double(x.pairs);
  }
};

// T: what scores, labels, losses and slopes are stored in.
template <class T, class W>
PK_DEVICE ListItem<W> list_item(const ListArgs& a, int64_t i) {
  const W s = W(static_cast<const T*>(a.scores)[i]), y = W(static_cast<const T*>(a.labels)[i]);
  return {y == y ? s : y, y};
}
PK_DEVICE int list_size(const ListArgs& a, int64_t g) {
  return g < a.groups ? a.cu[g + 1] - a.cu[g] : 0;
}
// An item that makes the loss of its group NaN.
template <class W>
PK_DEVICE bool broken(const ListItem<W>& x) {
  return x.label == x.label && !(pk_finite(x.score) && pk_finite(x.label));
}

#if defined(__CUDACC__)
#define PK_UNROLL_STEPS _Pragma("unroll 4")
#else
#define PK_UNROLL_STEPS
#endif

// Groups [first, first + 256 / lanes), each on `lanes` = 8, 16 or 32 lanes; larger ones are left
// out.
template <class T, class W>
struct LaneTeam {
  using Work = W;
  using Threads = Block<kListThreads>;
  template <class V>
  using Local = typename Threads::template Local<V>;
  template <class V>
  struct Column {
    Local<V> of;
    PK_DEVICE Column(LaneTeam&, int) {}
    PK_DEVICE V& at(int t, int) { return of[t]; }
    PK_DEVICE const V& at(int t, int) const { return of[t]; }
  };

  Threads& b;
  const ListArgs& a;
  const int64_t first;
  const int power, lanes;  // lanes = 2^power
  Local<int> start, size;  // size -1: no group, or one that is not for lanes
  Local<int> width;        // the least of 8, 16 and 32 lanes that hold the group
  Local<ListItem<W>> own;

  PK_DEVICE LaneTeam(Threads& threads, const ListArgs& args, int64_t first_group, int log2_lanes)
      : b(threads), a(args), first(first_group), power(log2_lanes), lanes(1 << log2_lanes) {
    b.each([&](int t) {
      const int64_t g = group(t);
      const int items = list_size(a, g);
      start[t] = g < a.groups ? a.cu[g] : 0;
      size[t] = g < a.groups && items <= kListLanes ? items : -1;
      width[t] = items <= 8 ? 8 : items <= 16 ? 16 : 32;
      own[t] = {W(pk_nan()), W(pk_nan())};
      if (lane(t) < size[t]) own[t] = list_item<T, W>(a, int64_t(start[t]) + lane(t));
    });
  }

  PK_DEVICE int lane(int t) const { return t & (lanes - 1); }
  PK_DEVICE int64_t group(int t) const { return first + (t >> power); }
  PK_DEVICE ListItem<W> item(int t, int) const { return own[t]; }

  // body(t, i) for every valid item.
  template <class Body>
  PK_DEVICE void each(const Body& body) {
    b.each([&](int t) {
      if (own[t].label == own[t].label) body(t, lane(t));
    });
  }

  template <class R>
  struct Words {
    uint32_t of[sizeof(R) / 4];
    PK_DEVICE R get() const {
      R r;
      memcpy(&r, of, sizeof(R));
      return r;
    }
    PK_DEVICE void put(const R& r) { memcpy(of, &r, sizeof(R)); }
  };
  // to[t] = the record `by` lanes further in a circle of circle(t) lanes.
  template <class R, class Circle>
  PK_DEVICE void rotate(Local<Words<R>>& at, int by, const Circle& circle, Local<Words<R>>& to) {
    PK_UNROLL
    for (int k = 0; k < int(sizeof(R) / 4); ++k) {
      b.rotate([&](int t) -> uint32_t& { return at[t].of[k]; }, by, circle,
               [&](int t) -> uint32_t& { return to[t].of[k]; });
    }
  }

  // Every valid item i meets all others j of its group: body(acc, t, i, j, record j), then
  // done(t, i, acc). A record is what get(t, i) gives; where there is no item, it must leave acc as
  // it is, so that the number of lanes changes nothing.
  template <class Get, class Acc, class Body, class Done>
  PK_DEVICE void visit(const Get& get, const Acc& begin, const Body& body, const Done& done) {
    using Record = decltype(get(0, 0));
    Local<Words<Record>> mine, found;
    Local<Acc> acc;
    b.each([&](int t) {
      mine[t].put(get(t, lane(t)));
      acc[t] = begin;
    });
    PK_UNROLL_STEPS
    for (int step = 1; step < lanes; ++step) {
      rotate<Record>(mine, step, [&](int) { return lanes; }, found);
      b.each([&](int t) { body(acc[t], t, lane(t), lane(t + step), found[t].get()); });
    }
    each([&](int t, int i) { done(t, i, acc[t]); });
  }

  // term(record i, record j, whether) once for every pair of items, by one of the two: an item
  // meets those on half the circle after it.
  template <class Get, class Term, class Done>
  PK_DEVICE void pairs(const Get& get, const Term& term, const Done& done) {
    using Record = decltype(get(0, 0));
    Local<Words<Record>> mine, found;
    Local<PairSums> sums;
    Local<PairTerm<W>> part;
    Local<int> steps;
    Local<W> give, back;
    b.each([&](int t) {
      mine[t].put(get(t, lane(t)));
      steps[t] = lane(t) < width[t] / 2 ? width[t] / 2 : width[t] / 2 - 1;
      sums[t] = {};
    });
    const auto circle = [&](int t) { return width[t]; };
    for (int from = 0; from < lanes / 2; from += 4) {
      b.each([&](int t) { part[t] = {W(0), W(0), W(0)}; });
      PK_UNROLL
      for (int step = from + 1; step <= from + 4; ++step) {
        rotate<Record>(mine, step, circle, found);
        b.each([&](int t) {
          const PairTerm<W> x = term(mine[t].get(), found[t].get(), step <= steps[t]);
          part[t].loss += x.loss, part[t].push += x.push, part[t].pairs += x.pairs;
          give[t] = x.push;
        });
        b.rotate([&](int t) -> W& { return give[t]; }, -step, circle,
                 [&](int t) -> W& { return back[t]; });
        b.each([&](int t) { part[t].push -= back[t]; });
      }
      b.each([&](int t) { sums[t].add(part[t]); });
    }
    each([&](int t, int i) { done(t, i, sums[t]); });
  }

  // op over value(t, i) of a group's valid items, `idle` for the rest; for every thread of the
  // group. Adding up in steps of 1, 2, 4 ..., idle lanes change nothing.
  template <class Value, class Op>
  PK_DEVICE Local<double> reduce(const Value& value, const Op& op, double idle) {
    Local<double> all, next;
    b.each(
        [&](int t) { all[t] = own[t].label == own[t].label ? double(value(t, lane(t))) : idle; });
    for (int step = 1; step < lanes; step *= 2) {
      b.exchange([&](int t) -> double& { return all[t]; }, [&](int t) { return t ^ step; },
                 [&](int t) -> double& { return next[t]; });
      b.each([&](int t) { all[t] = op(all[t], next[t]); });
    }
    return all;
  }

  // slope(t, i) of every valid item, 0 of a masked one; then the group's loss(t).
  template <class Slope, class Loss>
  PK_DEVICE void put(const Slope& slope, const Loss& loss) {
    b.each([&](int t) {
      if (lane(t) < size[t]) {
        const bool valid = own[t].label == own[t].label;
        static_cast<T*>(a.slope)[int64_t(start[t]) + lane(t)] = valid ? T(slope(t, lane(t))) : T(0);
      }
      if (lane(t) == 0 && size[t] >= 0) static_cast<T*>(a.loss)[group(t)] = T(loss(t));
    });
  }
};

// One group of any size on all threads of the block.
template <class T, class W>
struct BlockTeam {
  using Work = W;
  using Threads = Block<kListThreads>;
  template <class V>
  using Local = typename Threads::template Local<V>;
  template <class V>
  struct Column {
    V* of;
    PK_DEVICE Column(BlockTeam& m, int place) : of(m.template column<V>(place)) {}
    PK_DEVICE V& at(int, int i) const { return of[i]; }
  };

  Threads& b;
  const ListArgs& a;
  const int64_t index;
  const int64_t start;
  const int size;

  PK_DEVICE BlockTeam(Threads& threads, const ListArgs& args, int64_t g)
      : b(threads), a(args), index(g), start(args.cu[g]), size(list_size(args, g)) {}

  // Column `place` of the group's items; the last one is reduce's.
  template <class V>
  PK_DEVICE V* column(int place) const {
    static_assert(sizeof(V) <= kListColumn);
    return reinterpret_cast<V*>(a.scratch + kListColumn * (place * a.items + start));
  }
  PK_DEVICE int64_t group(int) const { return index; }
  PK_DEVICE ListItem<W> item(int, int i) const { return list_item<T, W>(a, start + i); }

  template <class Body>
  PK_DEVICE void all(const Body& body) {
    b.each([&](int t) {
      for (int i = t; i < size; i += kListThreads) body(t, i);
    });
    b.sync();
  }
  template <class Body>
  PK_DEVICE void each(const Body& body) {
    all([&](int t, int i) {
      const ListItem<W> x = item(t, i);
      if (x.label == x.label) body(t, i);
    });
  }
  template <class Get, class Acc, class Body, class Done>
  PK_DEVICE void visit(const Get& get, const Acc& begin, const Body& body, const Done& done) {
    each([&](int t, int i) {
      Acc acc = begin;
      for (int j = 0; j < size; ++j) {
        if (j != i) body(acc, t, i, j, get(t, j));
      }
      done(t, i, acc);
    });
  }
  // Every pair from both sides: no thread writes what is another's.
  template <class Get, class Term, class Done>
  PK_DEVICE void pairs(const Get& get, const Term& term, const Done& done) {
    using Record = decltype(get(0, 0));
    visit(
        get, PairSums(),
        [&](PairSums& acc, int t, int i, int, const Record& x) {
          const Record own = get(t, i);
          const PairTerm<W> found = term(own, x, true);
          const bool wins = x.item.label < own.item.label;
          acc.add(PairTerm<W>{wins ? found.loss : W(0), found.push, wins ? found.pairs : W(0)});
        },
        done);
  }
  template <class Value, class Op>
  PK_DEVICE Local<double> reduce(const Value& value, const Op& op, double idle) {
    double* const of = column<double>(kListColumns - 1);
    all([&](int t, int i) {
      const ListItem<W> x = item(t, i);
      of[i] = x.label == x.label ? double(value(t, i)) : idle;
    });
    Local<double> found;
    b.each([&](int t) {
      double part[4] = {idle, idle, idle, idle};
      int i = 0;
      for (; i + 4 <= size; i += 4) {
        PK_UNROLL
        for (int k = 0; k < 4; ++k) part[k] = op(part[k], of[i + k]);
      }
      for (; i < size; ++i) part[0] = op(part[0], of[i]);
      found[t] = op(op(part[0], part[1]), op(part[2], part[3]));
    });
    b.sync();
    return found;
  }
  template <class Slope, class Loss>
  PK_DEVICE void put(const Slope& slope, const Loss& loss) {
    all([&](int t, int i) {
      const ListItem<W> x = item(t, i);
      static_cast<T*>(a.slope)[start + i] = x.label == x.label ? T(slope(t, i)) : T(0);
    });
    b.each([&](int t) {
      if (t == 0) static_cast<T*>(a.loss)[index] = T(loss(t));
    });
  }
};

// Runs Family::run(team) on every group of a block.
template <class T, class W, class Family>
struct ListKernel {
  using Args = ListArgs;
  using Threads = Block<kListThreads>;
  static constexpr int kMinBlocks = sizeof(W) == 4 ? 3 : 2;  // 80 registers, 128 for double

  PK_DEVICE static void run(Threads& b, const ListArgs& a) {
    const int64_t first = b.index() * kListGroups;
    typename Threads::template Local<int> size;
    b.each([&](int t) {
      size[t] = list_size(a, first + t % kWarp);
      zero_outside(b, a, t);
    });
    // Every warp looks at all 32 groups, and finds the same.
    const auto any = [&](int from, int to) {
      return b.warp_any([&](int t) { return size[t] > from && size[t] <= to; });
    };
    const int power = any(16, kListLanes) ? 5 : any(8, 16) ? 4 : 3;
    for (int64_t g = first; g < first + kListGroups; g += kListThreads >> power) {
      LaneTeam<T, W> team(b, a, g, power);
      Family::run(team);
    }
    if (!any(kListLanes, 0x7fffffff)) return;
    for (int64_t g = first; g < first + kListGroups && g < a.groups; ++g) {
      if (list_size(a, g) <= kListLanes) continue;
      BlockTeam<T, W> team(b, a, g);
      Family::run(team);
    }
  }
  // Items before the first boundary and behind the last belong to no group.
  PK_DEVICE static void zero_outside(const Threads& b, const ListArgs& a, int t) {
    const int64_t blocks = (a.groups + kListGroups - 1) / kListGroups;
    const int64_t before = a.cu[0], after = a.cu[a.groups];
    for (int64_t i = b.index() * kListThreads + t; i < before + (a.items - after);
         i += blocks * kListThreads) {
      static_cast<T*>(a.slope)[i < before ? i : after + (i - before)] = T(0);
    }
  }
};

}  // namespace prefkern
