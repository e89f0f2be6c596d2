// Ranking losses of ragged groups: value and derivative of each group in one pass, fp64 inside.
//
// Items of a group are put in label order first (by counting, no comparison sort), so that
// "labelled below item i" is a suffix of the group, and row i visits that suffix in whole vectors.
// Row i owns its part of the loss; derivatives are summed in the group's own memory. A group is
// worked on by one thread in a fixed order: the same bits for any number of threads.
// Neighbours of like sizes, up to 32 items, share their work lane by lane where the family allows
// (list_lanes.h); which ones do follows from the sizes alone.
#pragma once

#include "cpu/list_choices.h"
#include "cpu/list_lanes.h"
#include "cpu/list_pairs.h"

namespace prefkern {
namespace PK_ISA {

constexpr int64_t kListUnit = 32;  // groups handed to a thread at a time

// Loss; derivatives in u, of the items origin (or item, in softmax, which needs no label order).
inline double list_loss(const ListGroup& g) {
  if (g.call.family == ListFamily::softmax) return ListChoices(g).softmax();
  g.sort();
  if (g.call.family == ListFamily::plackett_luce) return ListChoices(g).plackett_luce();
  const ListPairs pairs(g);
  return g.call.options.weights == PairWeights::none ? pairs.pair_plain() : pairs.pair_weighted();
}

template <class T>
void list_group(const ListCall& call, const ListScratch& t, int64_t g) {
  const T* scores = static_cast<const T*>(call.scores);
  const T* labels = static_cast<const T*>(call.labels);
  T* slope = static_cast<T*>(call.slope);
  ListGroup group{call, t};
  bool finite = true;
  for (int64_t i = call.cu[g]; i < call.cu[g + 1]; ++i) {
    if (labels[i] != labels[i]) {
      slope[i] = T(0);
      continue;
    }
    const double s = double(scores[i]), y = double(labels[i]);
    finite = finite && s - s == 0.0 && y - y == 0.0;
    t.score[group.count] = s, t.label[group.count] = y, t.item[group.count] = i;
    ++group.count;
  }
  const int64_t k = group.count;
  double loss = 0.0;
  const int64_t* order = t.item;
  if (!finite) {
    // Never hidden: the whole group is NaN, and no other group is touched.
    loss = __builtin_nan("");
    for (int64_t i = 0; i < k; ++i) t.u[i] = loss;
  } else if (k > 0) {
    group.stages = call.topk == nullptr || call.topk[g] > k ? k : call.topk[g];
    loss = list_loss(group);
    if (call.family != ListFamily::softmax) order = t.origin;
  }
  static_cast<T*>(call.loss)[g] = T(loss);
  for (int64_t i = 0; i < k; ++i) slope[order[i]] = T(t.u[i]);
}

// False when working memory could not be had.
inline bool list_rank(const ListCall& call) {
  const int64_t units = (call.groups + kListUnit - 1) / kListUnit;
  const int64_t threads = units < call.pool.threads ? units : call.pool.threads;
  const int64_t size = round_up(call.longest, Lanes<double>::L) + Lanes<double>::L;
  if (units == 0) return true;
  const bool in_lanes = lanes_serve(call);
  Memory memory;
  ListScratch* scratch = nullptr;
  const auto layout = [&](Arena& a) {
    ListScratch* all = a.take<ListScratch>(threads);
    scratch = all;
    for (int64_t i = 0; i < threads; ++i) {
      ListScratch one;
      one.layout(a, size);
      if (all != nullptr) all[i] = one;
    }
  };
  if (!memory.place(layout)) return false;
  parallel(call.pool, units, [&](int64_t unit, int thread) {
    const int64_t last =
        (unit + 1) * kListUnit < call.groups ? (unit + 1) * kListUnit : call.groups;
    for (int64_t g = unit * kListUnit; g < last; ++g) {
      constexpr int64_t L = Lanes<double>::L;
      if (in_lanes && g % L == 0 && g + L <= last &&
          (call.type == Dtype::f64 ? list_lanes<double>(call, g) : list_lanes<float>(call, g))) {
        g += L - 1;
        continue;
      }
      if (call.type == Dtype::f64)
        list_group<double>(call, scratch[thread], g);
      else
        list_group<float>(call, scratch[thread], g);
    }
  });
  return true;
}

}  // namespace PK_ISA
}  // namespace prefkern
