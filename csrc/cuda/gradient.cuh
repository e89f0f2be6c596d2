// The backward epilogue: dL/dx of one tile row, one read and one write, no exchange between
// threads. dx may lie where the tile lies: a packet is read and written by the same thread.
#pragma once

#include "cuda/second.cuh"
#include "numerics/gradient.h"

namespace prefkern {

// Row constants, in the order of COEFFICIENTS.
enum Coefficient : int {
  kGLse,
  kGLseLow,
  kGE,
  kGA0,
  kGEnt,
  kGEntValue,
  kGCol,
  kGColValue,
  kGRefLse,
  kGRefLseLow,
  kGFkl,
  kGRkl,
  kGRklValue,
  kGEv,
  kGEvValue,
  kGAuxLse,
  kGAlpha,
  kGRenyi,
  kGRenyiShift,
  kGMix,
  kGMixLse,
  kGMixLseLow,
  kGJsd,
  kGJsdKl,
  kGTv,
  kGTvMean,
  kGBkl,
  kGBklRatio,
  kGTopValue,
  kGTopIndex,
  kCoefficients
};

template <class E, bool TWO, bool SMALL>
struct Gradient {
  using Args = GradientArgs;
  using Threads = Block<128>;
  static constexpr int kMinBlocks = !TWO ? 10 : SMALL ? 8 : 4;
  static constexpr int kAhead = TWO && (!SMALL || sizeof(E) == 2) ? 1 : 2;
  static constexpr int kModels = !TWO ? 1 : SMALL ? 2 : 3;
  static constexpr int N = Packet<E>::kN;
  using Reader = RowReader<E, kModels>;

  // What a class reads of its row's constants.
  struct Row {
    float lse, low, ref_lse, ref_low, aux_lse, mix_lse, mix_low;
    GradCoefOf<float> g;
    float top_value, top_index;
  };
  PK_DEVICE static Row load_row(const Args& a, int64_t r) {
    const auto c = [&](Coefficient k) { return a.coefficients[k * a.coefficient_stride + r]; };
    Row w = {};
    w.lse = c(kGLse), w.low = c(kGLseLow), w.g.e = c(kGE), w.g.a0 = c(kGA0);
    if constexpr (!SMALL) {
      w.g.ent = c(kGEnt), w.g.ent_value = c(kGEntValue);
      w.g.col = c(kGCol), w.g.col_value = c(kGColValue);
    }
    if constexpr (TWO) {
      w.ref_lse = c(kGRefLse), w.ref_low = c(kGRefLseLow), w.g.fkl = c(kGFkl);
    }
    if constexpr (TWO) {
      w.g.rkl = c(kGRkl), w.g.rkl_value = c(kGRklValue);
    }
    if constexpr (TWO && !SMALL) {
      w.g.ev = c(kGEv), w.g.ev_value = c(kGEvValue), w.aux_lse = c(kGAuxLse);
      w.g.alpha = c(kGAlpha), w.g.alpha_a = a.alpha;
      w.g.renyi = c(kGRenyi), w.g.renyi_a = a.renyi, w.g.renyi_shift = c(kGRenyiShift);
      w.g.mix = c(kGMix), w.g.mix_b = a.mix, w.mix_lse = c(kGMixLse), w.mix_low = c(kGMixLseLow);
      w.g.jsd = c(kGJsd), w.g.jsd_b = a.jsd, w.g.jsd_kl = c(kGJsdKl);
      w.g.tv = c(kGTv), w.g.tv_mean = c(kGTvMean);
      w.g.bkl = c(kGBkl), w.g.bkl_ratio = c(kGBklRatio);
      w.top_value = c(kGTopValue), w.top_index = c(kGTopIndex);
    }
    return w;
  }

  PK_DEVICE static void write(const Row& w, const Args& a, const Reader& row,
                              const Packets<E, kModels>& in, int i, int64_t r, int y) {
    float z[N], zr[N] = {}, za[N] = {}, d[N];
    const bool third = !SMALL && TWO && a.model[2].x != nullptr;
    read_logits(row, in.of[0], i, a.model[0], a.v0, a.working, z);
    if constexpr (TWO) read_logits(row, in.of[1], i, a.model[1], a.v0, a.working, zr);
    if constexpr (TWO && !SMALL) {
      if (third) read_logits(row, in.of[2], i, a.model[2], a.v0, a.working, za);
    }
    const int c = row.column(i);
    PK_UNROLL
    for (int j = 0; j < N; ++j) {
      const float lp = (z[j] - w.lse) - w.low;
      if constexpr (!TWO) {
        const float p = exp_fast(lp);
        float inner = w.g.a0;
        if constexpr (!SMALL) {
          inner += w.g.ent * (lp + w.g.ent_value) + w.g.col * (p - w.g.col_value);
        }
        d[j] = weighted(p, inner);
      } else {
        const float lr = (zr[j] - w.ref_lse) - w.ref_low;
        if constexpr (SMALL) {
          const float p = exp_fast(lp), q = exp_fast(lr);
          float inner = w.g.a0;
          if (w.g.rkl != 0.0f) inner += w.g.rkl * ((lp - lr) - w.g.rkl_value);
          d[j] = weighted(p, inner) + w.g.fkl * (p - q);
        } else {
          float adv = 0.0f;
          if (w.g.ev != 0.0f) {
            adv = third               ? (za[j] - w.aux_lse) - lr
                  : row.inside(c + j) ? a.adv[r * a.adv_stride + c + j]
                                      : 0.0f;
          }
          bool top = false;
          if (w.g.bkl != 0.0f) {
            top = in_top_set(zr[j], a.v0 + c + j, w.top_value, w.top_index);
          }
          // The blend of normalised logits: its log-normaliser taken from both models' beforehand.
          const float zm = (z[j] - w.mix_lse) - w.mix_low, zrm = (zr[j] - w.mix_lse) - w.mix_low;
          d[j] = logit_gradient(w.g, zm, zrm, lp, lr, adv, false, top);
        }
      }
    }
    if (y >= c && y < c + N) {
      PK_UNROLL
      for (int j = 0; j < N; ++j) d[j] += y == c + j ? w.g.e : 0.0f;
    }
    if (a.slope != 0.0f) {
      PK_UNROLL
      for (int j = 0; j < N; ++j) {
        const float u = a.slope * z[j];
        d[j] = weighted(d[j], 1.0f - u * u);
      }
    }
    char* dst = static_cast<char*>(a.dx) + r * a.dx_stride * bytes_of(a.dx_type);
    write_columns(row, i, dst, a.dx_type, d);
  }

  PK_DEVICE static void run(Threads& b, const Args& a) {
    const int64_t r = b.index() / a.blocks, block = b.index() % a.blocks;
    const int64_t begin = block * a.columns;
    const int64_t end = begin + a.columns < a.w ? begin + a.columns : a.w;
    const Reader row(a.model, r, int(begin), int(end));
    if (a.targets[r] == a.ignore) {
      b.each([&](int t) {
        const float zero[N] = {};
        char* dst = static_cast<char*>(a.dx) + r * a.dx_stride * bytes_of(a.dx_type);
        for (int i = t; i < row.packets; i += Threads::kThreads) {
          write_columns(row, i, dst, a.dx_type, zero);
        }
      });
      return;
    }
    const int64_t target = a.targets[r] - a.v0;
    const int y = target >= begin && target < end ? int(target) : -1;
    b.each([&](int t) {
      const Row w = load_row(a, r);
      stream<kAhead, Threads::kThreads>(
          row, t, [&](const Packets<E, kModels>& in, int i) { write(w, a, row, in, i, r, y); });
    });
  }
};

}  // namespace prefkern
