// Which statistics a call asks for.
#pragma once

#include "numerics/scalar.h"
#include "numerics/tables.h"

namespace prefkern {

// slot[stat] is the row of `out` that holds a statistic, -1 where it was not asked for; `moves`
// says that a gradient may come back for it.
struct StatPlan {
  int count = 0;
  int slot[kStats];
  bool moves[kStats] = {};
  double param[kStats] = {};
  PK_HD StatPlan() {
    for (int& s : slot) s = -1;
  }
  PK_HD bool has(Stat k) const { return slot[int(k)] >= 0; }
  PK_HD bool grows(Stat k) const { return moves[int(k)]; }
  PK_HD double of(Stat k) const { return param[int(k)]; }
};

// Statistics whose value needs both normalisers before the sweep, hence a second one.
PK_HD bool needs_second_sweep(const StatPlan& p) {
  return p.has(Stat::jsd) || p.has(Stat::tv) || p.has(Stat::bkl);
}

// Statistics whose logit gradient holds the reference's probabilities.
PK_HD bool reads_reference(const StatPlan& p) {
  return p.grows(Stat::fkl) || p.grows(Stat::rkl) || p.grows(Stat::jsd) || p.grows(Stat::alpha) ||
         p.grows(Stat::renyi) || p.grows(Stat::tv) || p.grows(Stat::bkl) || p.grows(Stat::mix);
}

PK_HD bool has_gradient(Stat k) {
  return k != Stat::top1 && k != Stat::zmean && k != Stat::ref_logp && k != Stat::ref_lse;
}

}  // namespace prefkern
