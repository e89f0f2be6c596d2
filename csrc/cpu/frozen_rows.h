// A frozen head after its fold: sums of head rows relative to the maxima become those of
// probabilities, and with the coefficients of a backward a gradient. The arithmetic and its order
// are those of prefkern/backends/frozen.py, which serves the other backends and sharded heads.
#pragma once

#include "cpu/frozen.h"
#include "cpu/grad.h"

namespace prefkern {
namespace PK_ISA {

constexpr int64_t kFrozenRows = 8;  // computed rows that a thread takes at once

// body(row, thread) for every computed row.
template <class Body>
void each_computed(const HeadCall& call, const Body& body) {
  parallel(call.pool, (call.count + kFrozenRows - 1) / kFrozenRows, [&](int64_t u, int thread) {
    const int64_t end = (u + 1) * kFrozenRows < call.count ? (u + 1) * kFrozenRows : call.count;
    for (int64_t i = u * kFrozenRows; i < end; ++i) body(i, thread);
  });
}

// Reads `sums`, scales `factors` in place.
template <class C>
struct FrozenNormalise {
  using T = typename C::T;
  const HeadCall& call;
  Frozen<C> kept;

  explicit FrozenNormalise(const HeadCall& c) : call(c), kept(c) {}

  bool run() {
    each_computed(call, [&](int64_t i, int) { row(call.live[i]); });
    return true;
  }

 private:
  double shift(Field sum, int64_t slot) const {  // log-probability less (logit less maximum)
    return -pk_log(call.sums[int64_t(sum) * call.slots + slot]);
  }
  T* at(Factor f, int64_t slot) const {
    return kept.total[int(f)] == nullptr ? nullptr : kept.at(f, slot);
  }
  // Differences in float64: they are 0 where the models are equal.
  void row(int64_t slot) const {
    T *mass = at(Factor::mass, slot), *log = at(Factor::log, slot), *gap = at(Factor::gap, slot),
      *cross = at(Factor::cross, slot);
    const double own = shift(Field::sum, slot), e = pk_exp(own);
    const double ref = call.two() ? shift(Field::ref_sum, slot) : 0.0, er = pk_exp(ref);
    const T scale = T(e), ref_scale = T(er), gained = T(e - er), further = T(own - ref);
    for (int64_t d = 0; d < kept.width; ++d) {
      if (gap != nullptr) gap[d] = gap[d] * ref_scale + mass[d] * gained;
      if (cross != nullptr) cross[d] = (cross[d] + mass[d] * further) * scale;
      mass[d] *= scale;
      if (log != nullptr) log[d] = log[d] * scale + mass[d] * T(own);
    }
  }
};

// Reads normalised `factors`, `coefficients` and `saved_zy`, writes d.hidden and d.low_in.
template <class C>
struct FrozenGradient {
  using T = typename C::T;
  const HeadCall& call;
  const Model& policy;
  Frozen<C> kept;
  T *line = nullptr, *target = nullptr;  // per thread: a row of the gradient, of the head
  uint16_t* narrow = nullptr;            // per thread: a row of the head in 16 bits

  explicit FrozenGradient(const HeadCall& c) : call(c), policy(c.model[0]), kept(c) {}

  bool run() {
    clear(call.d.hidden, policy.depth);
    clear(call.d.low_in, policy.rank);
    Memory memory;
    const bool placed = memory.place([&](Arena& a) {
      const int64_t size = kept.width * call.pool.threads;
      line = a.take<T>(size), target = a.take<T>(size), narrow = a.take<uint16_t>(size);
    });
    if (!placed) return false;
    each_computed(call, [&](int64_t i, int thread) { row(call.live[i], thread); });
    return true;
  }

 private:
  void clear(void* d, int64_t depth) const {
    if (d == nullptr || call.count == call.tokens) return;
    std::memset(d, 0, size_t(call.tokens * depth * dtype_bytes(call.working)));
  }
  void row(int64_t slot, int thread) const {
    const GradRow<T> g = read_coefficients<T>(call, slot);
    T* d = line + thread * kept.width;
    const T a0 =
        g[Coef::a0] + g[Coef::ent] * g[Coef::ent_value] - g[Coef::rkl] * g[Coef::rkl_value];
    const T* mass = kept.at(Factor::mass, slot);
    for (int64_t i = 0; i < kept.width; ++i) d[i] = mass[i] * a0;
    add(d, Factor::log, g[Coef::ent], slot);
    add(d, Factor::gap, g[Coef::fkl], slot);
    add(d, Factor::cross, g[Coef::rkl], slot);
    if (g.on(Coef::e)) add_target(d, g[Coef::e], slot, thread);
    const int64_t token = call.token(slot);
    put(call.d.hidden, policy.depth, token, d);
    put(call.d.low_in, policy.rank, token, d + policy.depth);
  }
  void add(T* d, Factor f, T c, int64_t slot) const {
    if (kept.total[int(f)] == nullptr) return;
    const T* from = kept.at(f, slot);
    for (int64_t i = 0; i < kept.width; ++i) d[i] += from[i] * c;
  }
  void add_target(T* d, T e, int64_t slot, int thread) const {
    if (policy.softcap != 0.0) {
      const T u = T(call.saved_zy[slot]) * T(policy.temperature / policy.softcap);
      e *= T(1) - u * u;
    }
    T* w = target + thread * kept.width;
    const int64_t y = call.targets[call.token(slot)];
    head_row(w, policy.weight, policy.weight_type, policy.depth, y, thread);
    head_row(w + policy.depth, policy.low_out, policy.low_type, policy.rank, y, thread);
    for (int64_t i = 0; i < kept.width; ++i) d[i] += w[i] * e;
  }
  // Row y of the head as products read it: rounded to the working type.
  void head_row(T* to, const void* from, Dtype type, int64_t depth, int64_t y, int thread) const {
    if (depth == 0) return;
    read_row(to, from, type, y * depth, depth);
    if (type == call.working || dtype_bytes(call.working) != 2) return;
    uint16_t* bits = narrow + thread * kept.width;
    write_row(bits, call.working, 0, to, depth);
    read_row(to, bits, call.working, 0, depth);
  }
  void put(void* to, int64_t depth, int64_t token, const T* d) const {
    if (to != nullptr) write_row(to, call.working, token * depth, d, depth);
  }
};

}  // namespace PK_ISA
}  // namespace prefkern
