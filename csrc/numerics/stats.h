// Which statistics a call asks for.
#pragma once

#include "numerics/scalar.h"

namespace prefkern {

enum StatKind : int {
  kLogp,
  kLse,
  kZy,
  kEnt,
  kCol,
  kTop1,
  kZmean,  // one model
  kRefLogp,
  kRefLse,
  kFkl,
  kRkl,
  kJsd,
  kAlpha,
  kRenyi,
  kTv,
  kBkl,
  kMix,
  kEv,  // two models
  kStatCount
};

// slot[kind] is the row of `out` that holds a statistic, -1 where it was not asked for.
struct StatPlan {
  int count = 0;
  int slot[kStatCount] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  double param[kStatCount] = {};
  PK_HD bool has(StatKind k) const { return slot[k] >= 0; }
};

// Statistics whose value needs both normalisers before the sweep, hence a second one.
PK_HD bool needs_second_sweep(const StatPlan& p) {
  return p.has(kJsd) || p.has(kTv) || p.has(kBkl);
}

PK_HD bool has_gradient(StatKind k) {
  return k != kTop1 && k != kZmean && k != kRefLogp && k != kRefLse;
}

// Rows of `saved` that the forward hands to the backward. One-model calls keep kSavedLse alone.
enum SavedRow : int {
  kSavedLse,
  kSavedRefLse,
  kSavedAuxLse,
  kSavedKlMix,     // KL(policy || b r + (1-b) p)
  kSavedTvMean,    // sum_v p_v sign(p_v - r_v)
  kSavedRestRef,   // reference mass outside the top set
  kSavedRestPol,   // policy mass outside the top set
  kSavedTopValue,  // smallest reference logit of the top set, rounded to the working dtype
  kSavedTopIndex,  // and its index: ties beyond it are outside. Exact in fp32 up to V = 2^24
  kSavedMixLse,    // log-normaliser of (1-b) z + b z_ref
  kSavedRows
};

}  // namespace prefkern
