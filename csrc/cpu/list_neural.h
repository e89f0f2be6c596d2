// neural_ndcg: the DCG under NeuralSort's soft permutation, scaled by Sinkhorn rounds.
#pragma once

#include "cpu/list_group.h"

namespace prefkern {
namespace PK_ISA {

// P_ij = softmax_j(((K + 1 - 2i) s_j - sum_k |s_j - s_k|) / T), then `sinkhorn_iters` times columns
// and rows over their sums; l = -sum_i D_i sum_j P_ij G_j / Z. Matrices have rows i of `stride`
// numbers, 0 beyond the last item.
struct ListNeural : ListGroup {
  int64_t stride;
  double *first, *scaled, *push, *sums;  // matrices; 2 rows per Sinkhorn round
  explicit ListNeural(const ListGroup& g) : ListGroup(g), stride((g.count + L - 1) / L * L) {
    first = t.grid, scaled = first + stride * stride, push = scaled + stride * stride;
    sums = push + stride * stride;
  }
  double place(int64_t i) const { return double(count - 1 - 2 * i); }

  // Ranks are those of label order: 1 + i. Shares G_j / Z go to `gain`; false where they are 0.
  bool shares() const {
    vd total{};
    each(0, [&](int64_t v, vl, vl inside) {
      const vd gain = inside ? exp2m1(load(t.y + v)) : vd{};
      store(t.gain + v, gain);
      total += inside ? gain * load(call.discount + 1 + v) : vd{};
    });
    const double ideal = sum_of(total);
    for (int64_t v = 0; v < count; v += L) store(t.gain + v, load(t.gain + v) / splat(ideal));
    return ideal != 0.0;
  }
  void soft_rows() const {
    for (int64_t j = 0; j < count; ++j) {
      vd apart{};
      each(0, [&](int64_t v, vl, vl inside) {
        apart += inside ? magnitude(splat(t.s[j]) - load(t.s + v)) : vd{};
      });
      t.place[j] = sum_of(apart);
    }
    for (int64_t j = count; j < stride; ++j) t.place[j] = 0.0;
    const vd width = splat(call.options.temperature);
    for (int64_t i = 0; i < count; ++i) {
      double* row = first + i * stride;
      vd highest = splat(-pk_inf());
      each(0, [&](int64_t v, vl, vl inside) {
        const vd x = (splat(place(i)) * load(t.s + v) - load(t.place + v)) / width;
        store(row + v, x);
        highest = inside & (x > highest) ? x : highest;
      });
      const vd top = splat(max_of(highest));
      vd total{};
      each(0, [&](int64_t v, vl, vl inside) {
        const vd e = inside ? exp_negative(load(row + v) - top) : vd{};
        store(row + v, e);
        total += e;
      });
      const vd sum = splat(sum_of(total));
      for (int64_t v = 0; v < stride; v += L) store(row + v, load(row + v) / sum);
    }
  }
  static vd whole(vd total) { return total > vd{} ? total : splat(1.0); }
  void scale_round(double* of_columns, double* of_rows) const {
    for (int64_t v = 0; v < stride; v += L) {
      vd total{};
      for (int64_t i = 0; i < count; ++i) total += load(scaled + i * stride + v);
      store(of_columns + v, whole(total));
    }
    for (int64_t i = 0; i < count; ++i) {
      double* row = scaled + i * stride;
      vd total{};
      for (int64_t v = 0; v < stride; v += L) {
        const vd x = load(row + v) / load(of_columns + v);
        store(row + v, x);
        total += x;
      }
      const double sum = sum_of(total);
      of_rows[i] = sum > 0.0 ? sum : 1.0;
      for (int64_t v = 0; v < stride; v += L) store(row + v, load(row + v) / splat(of_rows[i]));
    }
  }
  // Back through y = x / sum(x): dx = (dy - sum(dy y)) / sum(x), rows first, then columns.
  void undo_round(const double* of_columns, const double* of_rows) const {
    for (int64_t i = 0; i < count; ++i) {
      double *row = scaled + i * stride, *p = push + i * stride;
      vd total{};
      for (int64_t v = 0; v < stride; v += L) total = fma(load(p + v), load(row + v), total);
      const vd mean = splat(sum_of(total)), sum = splat(of_rows[i]);
      for (int64_t v = 0; v < stride; v += L) {
        store(p + v, (load(p + v) - mean) / sum);
        store(row + v, load(row + v) * sum);
      }
    }
    for (int64_t v = 0; v < stride; v += L) {
      vd total{};
      for (int64_t i = 0; i < count; ++i) {
        total = fma(load(push + i * stride + v), load(scaled + i * stride + v), total);
      }
      const vd sum = load(of_columns + v);
      for (int64_t i = 0; i < count; ++i) {
        double *row = scaled + i * stride + v, *p = push + i * stride + v;
        store(p, (load(p) - total) / sum);
        store(row, load(row) * sum);
      }
    }
  }

  PK_HOT double neural_ndcg() const {
    if (t.end[0] == count || !shares()) return 0.0;
    const int64_t rounds = call.options.sinkhorn_iters;
    soft_rows();
    std::memcpy(scaled, first, size_t(count * stride) * sizeof(double));
    for (int64_t k = 0; k < rounds; ++k) {
      scale_round(sums + 2 * k * stride, sums + (2 * k + 1) * stride);
    }
    double loss = 0.0;
    for (int64_t i = 0; i < count; ++i) {
      const vd value = splat(call.discount[1 + i]);
      vd total{};
      for (int64_t v = 0; v < stride; v += L) {
        const vd gain = value * load(t.gain + v);
        total = fma(load(scaled + i * stride + v), gain, total);
        store(push + i * stride + v, -gain);
      }
      loss -= sum_of(total);
    }
    for (int64_t k = rounds; k-- > 0;) {
      undo_round(sums + 2 * k * stride, sums + (2 * k + 1) * stride);
    }
    // Through the softmax of each row, then through place * s - apart; |.| has slope 0 at a tie.
    for (int64_t v = 0; v < stride; v += L) store(t.u + v, vd{}), store(t.line + v, vd{});
    const vd width = splat(call.options.temperature);
    for (int64_t i = 0; i < count; ++i) {
      const double *row = first + i * stride, *p = push + i * stride;
      vd total{};
      for (int64_t v = 0; v < stride; v += L) total = fma(load(p + v), load(row + v), total);
      const vd mean = splat(sum_of(total));
      for (int64_t v = 0; v < stride; v += L) {
        const vd d = load(row + v) * (load(p + v) - mean) / width;
        store(t.u + v, fma(d, splat(place(i)), load(t.u + v)));
        store(t.line + v, load(t.line + v) - d);
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      const vd own = splat(t.s[j]), through = splat(t.line[j]);
      vd total{};
      each(0, [&](int64_t v, vl, vl inside) {
        const vd other = load(t.s + v), both = through + load(t.line + v);
        const vd signed_sum = own > other ? both : own < other ? -both : vd{};
        total += inside ? signed_sum : vd{};
      });
      t.u[j] += sum_of(total);
    }
    return loss;
  }
};

}  // namespace PK_ISA
}  // namespace prefkern
