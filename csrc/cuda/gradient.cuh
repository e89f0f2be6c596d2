// The backward epilogue: dL/dx of one tile row, one read and one write, no exchange between
// threads. dx may lie where the tile lies: a packet is read and written by the same thread.
#pragma once

#include "cuda/second.cuh"
#include "numerics/gradient.h"

namespace prefkern {

template <class E, bool TWO, bool SMALL>
struct Gradient {
  using Args = GradientArgs;
  using Threads = Block<128>;
  static constexpr int kMinBlocks = TWO ? (SMALL ? 8 : 4) : SMALL || sizeof(E) == 4 ? 10 : 8;
  static constexpr int kAhead = TWO && (!SMALL || sizeof(E) == 2) ? 1 : 2;
  // Of two models, a third head and given values come with fp32 products alone.
  static constexpr bool kValues = !SMALL && (!TWO || sizeof(E) == 4);
  static constexpr int kModels = !TWO ? 1 : kValues ? 3 : 2;
  static constexpr int N = Packet<E>::kN;
  using Reader = RowReader<E, kModels>;
  using Writer = RowWriter<E, kModels>;

  // What a class reads of its row's constants.
  PK_HD static constexpr bool reads(Coef k) {
    switch (k) {
      case Coef::lse:
      case Coef::lse_low:
      case Coef::e:
      case Coef::a0:
        return true;
      case Coef::ent:
      case Coef::ent_value:
      case Coef::col:
      case Coef::col_value:
      case Coef::teach:
      case Coef::ev:
      case Coef::ev_value:
        return !SMALL;
      case Coef::ref_lse:
      case Coef::ref_lse_low:
      case Coef::fkl:
      case Coef::rkl:
      case Coef::rkl_value:
        return TWO;
      default:
        return TWO && !SMALL;
    }
  }
  struct Row {
    float c[kCoefs];  // indexed by constants only
    PK_DEVICE float operator()(Coef k) const { return c[int(k)]; }
  };
  PK_DEVICE static Row load_row(const Args& a, int64_t r) {
    Row w = {};
    PK_UNROLL
    for (int k = 0; k < kCoefs; ++k) {
      if (reads(Coef(k))) w.c[k] = a.coefficients[k * a.coefficient_stride + r];
    }
    return w;
  }
  PK_DEVICE static StatPlan plan_of(const Args& a) {
    StatPlan plan;
    plan.param[int(Stat::alpha)] = a.alpha;
    plan.param[int(Stat::renyi)] = a.renyi;
    plan.param[int(Stat::mix)] = a.mix;
    plan.param[int(Stat::jsd)] = a.jsd;
    return plan;
  }

  template <class S>
  PK_DEVICE static void write(const Row& g, const Args& a, const Reader& row, const Writer& out,
                              const Packets<E, kModels>& in, int i, int64_t r, int y, S straight) {
    float z[N], d[N];
    const Dtype type = !TWO && a.rounds ? a.dx_type : Dtype::f32;
    read_logits(row, in.of[0], i, a.model[0], a.v0, type, straight, z);
    const int c = row.column(i);
    if constexpr (!TWO) {
      PK_UNROLL
      for (int j = 0; j < N; ++j) {
        const float lp = (z[j] - g(Coef::lse)) - g(Coef::lse_low), p = exp_fast(lp);
        float inner = g(Coef::a0);
        if constexpr (!SMALL) {
          inner += g(Coef::ent) * (lp + g(Coef::ent_value));
          inner += g(Coef::col) * (p - g(Coef::col_value));
        }
        d[j] = weighted(p, inner);
      }
      if constexpr (!SMALL) {
        if (a.adv != nullptr) {
          const float* values = a.adv + r * a.adv_stride;
          PK_UNROLL
          for (int j = 0; j < N; ++j) {
            const float p = exp_fast((z[j] - g(Coef::lse)) - g(Coef::lse_low));
            const float adv = value_at(row, values, c + j, straight);
            d[j] += g(Coef::teach) * adv;
            d[j] += weighted(p, g(Coef::ev) * (adv - g(Coef::ev_value)));
          }
        }
      }
    } else {
      float zr[N], ur[N];
      read_before_cap(row, in.of[1], i, a.model[1], a.v0, Dtype::f32, straight, ur);
      PK_UNROLL
      for (int j = 0; j < N; ++j) zr[j] = ur[j];
      cap_logits(row, i, a.model[1], straight, zr);
      if constexpr (SMALL) {
        PK_UNROLL
        for (int j = 0; j < N; ++j) {
          const float lp = (z[j] - g(Coef::lse)) - g(Coef::lse_low);
          const float lr = (zr[j] - g(Coef::ref_lse)) - g(Coef::ref_lse_low);
          const float p = exp_fast(lp), q = exp_fast(lr);
          float inner = g(Coef::a0);
          if (g(Coef::rkl) != 0.0f) inner += g(Coef::rkl) * ((lp - lr) - g(Coef::rkl_value));
          d[j] = weighted(p, inner) + g(Coef::fkl) * (p - q);
        }
      } else {
        float za[N] = {};
        const bool third = kValues && a.model[2].x != nullptr;
        if constexpr (kValues) {
          if (third) read_logits(row, in.of[2], i, a.model[2], a.v0, Dtype::f32, straight, za);
        }
        const float* values = a.adv + r * a.adv_stride;
        PK_UNROLL
        for (int j = 0; j < N; ++j) {
          const float lp = (z[j] - g(Coef::lse)) - g(Coef::lse_low);
          const float lr = (zr[j] - g(Coef::ref_lse)) - g(Coef::ref_lse_low);
          float adv = 0.0f;
          if (kValues && g(Coef::ev) != 0.0f) {
            adv = third ? ((za[j] - g(Coef::aux_lse)) - g(Coef::aux_lse_low)) - lr
                        : value_at(row, values, c + j, straight);
          }
          bool top = false;
          if (g(Coef::bkl) != 0.0f) {
            top = in_top_set(ur[j], a.v0 + c + j, g(Coef::top_value), g(Coef::top_index));
          }
          d[j] = logit_gradient(plan_of(a), g, lp, lr, adv, false, top);
        }
        if constexpr (kValues) {
          if (g(Coef::teach) != 0.0f) {
            PK_UNROLL
            for (int j = 0; j < N; ++j)
              d[j] += g(Coef::teach) * value_at(row, values, c + j, straight);
          }
        }
      }
    }
    if (y >= c && y < c + N) {
      PK_UNROLL
      for (int j = 0; j < N; ++j) d[j] += y == c + j ? g(Coef::e) : 0.0f;
    }
    if (!straight && a.slope != 0.0f) {  // there is a cap
      PK_UNROLL
      for (int j = 0; j < N; ++j) {
        const float u = a.slope * z[j];
        d[j] = weighted(d[j], 1.0f - u * u);
      }
    }
    out.put(row, i, straight, d);
  }

  PK_DEVICE static void run(Threads& b, const Args& a) {
    const int64_t r = b.index() / a.blocks, block = b.index() % a.blocks;
    const int64_t begin = block * a.columns;
    const int64_t end = begin + a.columns < a.w ? begin + a.columns : a.w;
    const Reader row(a.model, r, int(begin), int(end));
    const Writer out(row, a.dx, a.dx_stride, r, a.dx_type);
    if (a.targets[r] == a.ignore) {
      b.each([&](int t) {
        const float zero[N] = {};
        for (int i = t; i < row.packets; i += Threads::kThreads) out.put(row, i, Any(), zero);
      });
      return;
    }
    const int64_t target = a.targets[r] - a.v0;
    const int y = target >= begin && target < end ? int(target) : -1;
    b.each([&](int t) {
      const Row w = load_row(a, r);
      stream<kAhead, Threads::kThreads>(row, t,
                                        [&](const Packets<E, kModels>& in, int i, auto straight) {
                                          write(w, a, row, out, in, i, r, y, straight);
                                        });
    });
  }
};

}  // namespace prefkern
