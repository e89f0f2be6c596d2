// One group of ranked items, its working memory and its label order.
#pragma once

#include "cpu/double_math.h"
#include "cpu/tiles.h"

namespace prefkern {
namespace PK_ISA {

// Working memory of one group, one number per item; `size` is the largest group in whole vectors.
struct ListScratch {
  double *score, *label;          // as stored, masked items left out
  double *s, *y, *u;              // in label order: score, label, derivative
  double *place, *gain;           // of lambda weights: discount or rank; 2^label
  double *line, *above, *log_of;  // one row; running maxima; arguments of the logarithms
  int64_t *item, *origin, *slot,
      *end;  // index of an item; the same in label order; its rank; end of its tied block
  void layout(Arena& a, int64_t size) {
    double** const numbers[] = {&score, &label, &s, &y, &u, &place, &gain, &line, &above, &log_of};
    int64_t** const indices[] = {&item, &origin, &slot, &end};
    for (double** p : numbers) *p = a.take<double>(size);
    for (int64_t** p : indices) *p = a.take<int64_t>(size);
  }
};

PK_INLINE vl lanes_from(int64_t first) {
  vl v;
  for (int i = 0; i < Lanes<double>::L; ++i) v[i] = first + i;
  return v;
}
PK_INLINE double sum_of(vd v) {
  return fold_lanes(v, [](double a, double b) { return a + b; });
}

// One group whose valid items are in `score`, `label` [count].
struct ListGroup {
  static constexpr int64_t L = Lanes<double>::L;
  const ListCall& call;
  const ListScratch& t;
  int64_t count = 0;
  int64_t stages = 0;  // plackett_luce

  // body(v, lanes, inside) over the whole vectors that hold items [begin, count); `inside` marks
  // them.
  template <class Body>
  PK_INLINE void each(int64_t begin, const Body& body) const {
    const vl last = vl{} + count, first = vl{} + begin;
    for (int64_t v = begin / L * L; v < count; v += L) {
      const vl lanes = lanes_from(0) + v;
      body(v, lanes, (lanes >= first) & (lanes < last));
    }
  }

  // 0-based ranks in descending order, equal values by position. `values` is padded with NaN.
  void ranks(const double* values, int64_t* out) const {
    for (int64_t v = 0; v < count; v += L) {
      const vd own = load(values + v);
      const vl lanes = lanes_from(0) + v;
      vl ahead{};
      for (int64_t j = 0; j < count; ++j) {
        const vd other = splat(values[j]);
        ahead -= (other > own) | ((other == own) & (vl{} + j < lanes));
      }
      std::memcpy(out + v, &ahead, sizeof ahead);
    }
  }
  void pad(double* values) const {
    for (int64_t i = count; i % L != 0; ++i) values[i] = __builtin_nan("");
  }

  void sort() const {
    pad(t.label);
    ranks(t.label, t.slot);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = t.slot[i];
      t.s[r] = t.score[i], t.y[r] = t.label[i], t.origin[r] = t.item[i];
    }
    for (int64_t i = count; i % L != 0; ++i) t.s[i] = t.y[i] = 0.0;
    for (int64_t i = 0; i < round_up(count, L); ++i) t.u[i] = 0.0;
    for (int64_t i = count; i-- > 0;) {
      t.end[i] = i + 1 < count && t.y[i + 1] == t.y[i] ? t.end[i + 1] : i + 1;
    }
  }
};

}  // namespace PK_ISA
}  // namespace prefkern
