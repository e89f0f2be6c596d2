// The forward epilogue: one block reads one chunk of one row, once, and writes its sums.
//
// Each thread folds its packets into running sums of its own (maxima in registers, everything
// relative to them); at the end the block agrees on the maxima, every thread moves its sums there,
// and the sums are added: lanes in fp32 by a butterfly, warps in fp64 in order. Nothing depends on
// timing, so the same tile gives the same bits.
#pragma once

#include <type_traits>
#include <utility>

#include "cuda/rows.cuh"
#include "numerics/online.h"

namespace prefkern {

// What a chunk's sums are called in prefkern/backends/tiled/epilogue.py.
enum class Field {
  // clang-format off
  max, sum, x, sq, z_sum, z_count, top, round_max, round_sum,
  ref_max, ref_sum, ref_cross, pol_cross, ref_round_max, ref_round_sum, alpha_max, alpha_sum,
  renyi_max, renyi_sum, mix_max, mix_sum, plain_max, plain_sum, adv, aux_max, aux_sum,
  aux_round_max, aux_round_sum
  // clang-format on
};

// Maxima that x is relative to; those of a log-sum-exp beside it; the rest are sums.
PK_HD constexpr bool is_model_max(Field f) {
  return f == Field::max || f == Field::ref_max || f == Field::aux_max;
}
PK_HD constexpr bool is_other_max(Field f) {
  return f == Field::round_max || f == Field::ref_round_max || f == Field::aux_round_max ||
         f == Field::alpha_max || f == Field::renyi_max || f == Field::mix_max ||
         f == Field::plain_max;
}

// The fields of one kernel in the order in which they are written.
template <Field... F>
struct Fields {
  static constexpr int kCount = sizeof...(F);
  static_assert(kCount <= 32);
  // Bit k: field k is a maximum; is the column of one.
  static constexpr unsigned bits(bool maxima) {
    unsigned set = 0;
    int k = 0;
    ((set |= unsigned(maxima ? is_model_max(F) || is_other_max(F) : F == Field::top) << k++), ...);
    return set;
  }
  static constexpr unsigned kMaxima = bits(true), kColumns = bits(false);
  template <class Body>
  PK_DEVICE static void each(const Body& body) {
    int k = 0;
    (body(std::integral_constant<Field, F>(), k++), ...);
  }
};
template <bool TWO, bool SMALL>
struct FieldsOf;
template <>
struct FieldsOf<false, true> : Fields<Field::max, Field::sum> {};
template <>
struct FieldsOf<false, false>
    : Fields<Field::max, Field::sum, Field::x, Field::sq, Field::z_sum, Field::z_count, Field::top,
             Field::round_max, Field::round_sum> {};
template <>
struct FieldsOf<true, true> : Fields<Field::max, Field::sum, Field::ref_max, Field::ref_sum,
                                     Field::ref_cross, Field::pol_cross, Field::round_max,
                                     Field::round_sum, Field::ref_round_max, Field::ref_round_sum> {
};
template <>
struct FieldsOf<true, false>
    : Fields<Field::max, Field::sum, Field::ref_max, Field::ref_sum, Field::ref_cross,
             Field::pol_cross, Field::round_max, Field::round_sum, Field::ref_round_max,
             Field::ref_round_sum, Field::x, Field::sq, Field::z_sum, Field::z_count, Field::top,
             Field::alpha_max, Field::alpha_sum, Field::renyi_max, Field::renyi_sum, Field::mix_max,
             Field::mix_sum, Field::plain_max, Field::plain_sum, Field::adv, Field::aux_max,
             Field::aux_sum, Field::aux_round_max, Field::aux_round_sum> {};

using Sums = RowSumsOf<float>;

// A thread's sums, and the column of its first largest logit as a number of the field's type.
struct ThreadSums : Sums {
  float column = 0.0f;
};

template <Field F, class S>
PK_DEVICE auto& number(S& s) {
  if constexpr (F == Field::max) return s.pol.max;
  if constexpr (F == Field::sum) return s.pol.sum;
  if constexpr (F == Field::x) return s.pol_x;
  if constexpr (F == Field::sq) return s.pol_sq;
  if constexpr (F == Field::z_sum) return s.z_sum;
  if constexpr (F == Field::z_count) return s.z_count;
  if constexpr (F == Field::top) return s.column;
  if constexpr (F == Field::round_max) return s.pol_rounded.max;
  if constexpr (F == Field::round_sum) return s.pol_rounded.sum;
  if constexpr (F == Field::ref_max) return s.ref.max;
  if constexpr (F == Field::ref_sum) return s.ref.sum;
  if constexpr (F == Field::ref_cross) return s.ref_cross;
  if constexpr (F == Field::pol_cross) return s.pol_cross;
  if constexpr (F == Field::ref_round_max) return s.ref_rounded.max;
  if constexpr (F == Field::ref_round_sum) return s.ref_rounded.sum;
  if constexpr (F == Field::alpha_max) return s.blend[0].max;
  if constexpr (F == Field::alpha_sum) return s.blend[0].sum;
  if constexpr (F == Field::renyi_max) return s.blend[1].max;
  if constexpr (F == Field::renyi_sum) return s.blend[1].sum;
  if constexpr (F == Field::mix_max) return s.blend[2].max;
  if constexpr (F == Field::mix_sum) return s.blend[2].sum;
  if constexpr (F == Field::plain_max) return s.mix_plain.max;
  if constexpr (F == Field::plain_sum) return s.mix_plain.sum;
  if constexpr (F == Field::adv) return s.adv;
  if constexpr (F == Field::aux_max) return s.aux.max;
  if constexpr (F == Field::aux_sum) return s.aux.sum;
  if constexpr (F == Field::aux_round_max) return s.aux_rounded.max;
  if constexpr (F == Field::aux_round_sum) return s.aux_rounded.sum;
}
struct Smaller {
  PK_DEVICE float operator()(float a, float b) const { return a < b ? a : b; }
};

// Adds e^u of a packet to a log-sum-exp.
template <int N>
PK_DEVICE void add_logits(OnlineLseOf<float>& s, const float (&u)[N]) {
  float top = u[0];
  PK_UNROLL
  for (int j = 1; j < N; ++j) top = larger(top, u[j]);
  if (top > s.max) lse_raise(s, top);
  const float m = safe_max(s.max);
  PK_UNROLL
  for (int j = 0; j < N; ++j) s.sum += exp_fast(u[j] - m);
}

// x + a (xr - x): x for a = 0, xr for a = 1, -inf where that is not a number.
PK_DEVICE float blend_of(float x, float xr, float a) {
  const float u = a == 0.0f ? x : a == 1.0f ? xr : x + a * (xr - x);
  return u == u ? u : -float(pk_inf());
}
template <int N>
PK_DEVICE void add_blend(OnlineLseOf<float>& s, const float (&x)[N], const float (&xr)[N],
                         float a) {
  float u[N];
  PK_UNROLL
  for (int j = 0; j < N; ++j) u[j] = blend_of(x[j], xr[j], a);
  add_logits(s, u);
}

template <class E, bool TWO, bool SMALL>
struct Fold {
  using Args = FoldArgs;
  using Threads = Block<128>;
  // 48 registers for the smallest, 128 for the largest: no spill, and loads of 16 KiB (one model,
  // 10 blocks) to 24 KiB (two) on their way per multiprocessor.
  static constexpr int kMinBlocks = !TWO ? (SMALL ? 10 : 7) : SMALL ? 6 : 4;
  static constexpr int kAhead = TWO && (!SMALL || sizeof(E) == 2) ? 1 : 2;
  static constexpr int kModels = !TWO ? 1 : SMALL ? 2 : 3;
  static constexpr int N = Packet<E>::kN;
  using Reader = RowReader<E, kModels>;
  using List = FieldsOf<TWO, SMALL>;

  // The parameters of the blends in the form that raise_maxima takes.
  PK_DEVICE static StatPlan plan_of(const Args& a) {
    StatPlan plan;
    plan.param[kAlpha] = a.alpha;
    plan.param[kRenyi] = a.renyi;
    plan.param[kMix] = a.mix;
    return plan;
  }

  PK_DEVICE static void raise(ThreadSums& s, const Args& a, float pol, float ref, float aux) {
    raise_maxima(s, plan_of(a), pol, ref, aux, a.model[2].x != nullptr);
  }

  PK_DEVICE static void add(ThreadSums& s, const Args& a, const Reader& row,
                            const Packets<E, kModels>& in, int i, int64_t r) {
    float z[N], zr[N] = {}, za[N] = {};
    const bool third = !SMALL && TWO && a.model[2].x != nullptr;
    read_logits(row, in.of[0], i, a.model[0], a.v0, Dtype::f32, z);
    if constexpr (TWO) read_logits(row, in.of[1], i, a.model[1], a.v0, Dtype::f32, zr);
    if constexpr (TWO && !SMALL) {
      if (third) read_logits(row, in.of[2], i, a.model[2], a.v0, Dtype::f32, za);
    }
    const float top = largest<E>(z);
    float ref_top = -float(pk_inf()), aux_top = ref_top;
    if constexpr (TWO) ref_top = largest<E>(zr);
    if (third) aux_top = largest<E>(za);
    if constexpr (!SMALL) {
      if (top > s.pol.max) {
        PK_UNROLL
        for (int j = N - 1; j >= 0; --j) {
          if (z[j] == top) s.column = float(row.column(i) + j - row.begin);
        }
      }
    }
    if (top > s.pol.max || ref_top > s.ref.max || aux_top > s.aux.max) {
      raise(s, a, top, ref_top, aux_top);
    }
    const float m = safe_max(s.pol.max), mr = safe_max(s.ref.max), ma = safe_max(s.aux.max);
    float x[N], xr[N];
    PK_UNROLL
    for (int j = 0; j < N; ++j) {
      x[j] = z[j] - m;
      const float e = exp_fast(x[j]);
      s.pol.sum += e;
      if constexpr (!SMALL) {
        s.pol_x += weighted(e, x[j]);
        s.pol_sq += e * e;
        const bool finite = z[j] > -float(pk_inf());
        s.z_sum += finite ? z[j] : 0.0f;
        s.z_count += finite ? 1.0f : 0.0f;
      }
      if constexpr (TWO) {
        xr[j] = zr[j] - mr;
        const float er = exp_fast(xr[j]), d = xr[j] - x[j];
        s.ref.sum += er;
        s.ref_cross += weighted(er, d);
        s.pol_cross -= weighted(e, d);
        if constexpr (!SMALL) {
          if (third) {
            const float xa = za[j] - ma;
            s.aux.sum += exp_fast(xa);
            s.adv += weighted(e, xa - xr[j]);
          } else if (a.adv != nullptr) {
            const int c = row.column(i) + j;
            s.adv += row.inside(c) ? weighted(e, a.adv[r * a.adv_stride + c]) : 0.0f;
          }
        }
      }
    }
    if constexpr (TWO && !SMALL) {
      if (a.has_alpha) add_blend(s.blend[0], x, xr, a.alpha);
      if (a.has_renyi) add_blend(s.blend[1], x, xr, a.renyi);
      if (a.has_mix) add_blend(s.blend[2], x, xr, a.mix);
    }
    if constexpr (TWO || !SMALL) {
      const Dtype type = a.rounds ? a.working : Dtype::f32;
      if (a.rounds) {
        read_logits(row, in.of[0], i, a.model[0], a.v0, type, z);
        add_logits(s.pol_rounded, z);
        if constexpr (TWO) {
          read_logits(row, in.of[1], i, a.model[1], a.v0, type, zr);
          add_logits(s.ref_rounded, zr);
        }
        if constexpr (TWO && !SMALL) {
          if (third) {
            read_logits(row, in.of[2], i, a.model[2], a.v0, type, za);
            add_logits(s.aux_rounded, za);
          }
        }
      }
      if constexpr (TWO && !SMALL) {
        if (a.has_mix) add_blend(s.mix_plain, z, zr, a.mix);
      }
    }
    PK_UNROLL
    for (int k = 0; k < (TWO ? 2 : 1); ++k) {
      if (a.keep[k] == nullptr) continue;
      float raw[N];
      PK_UNROLL
      for (int j = 0; j < N; ++j) raw[j] = in.of[k].at(j);
      char* dst = static_cast<char*>(a.keep[k]) + r * a.keep_stride[k] * bytes_of(a.working);
      write_columns(row, i, dst, a.working, raw);
    }
  }

  PK_DEVICE static void run(Threads& b, const Args& a) {
    PK_SHARED(float, parts, List::kCount* Threads::kWarps);
    const int64_t r = b.index() / a.blocks, block = b.index() % a.blocks;
    const int64_t y = a.targets[r];
    float* fields = a.fields + block * a.span * a.chunk_stride + r;
    if (y == a.ignore) {
      b.each([&](int t) { fill(a, fields, t, block, 0, 0.0f, 0.0f); });
      return;
    }
    const int64_t begin = block * a.columns;
    const int64_t end = begin + a.columns < a.w ? begin + a.columns : a.w;
    const Reader row(a.model, r, int(begin), int(end));
    typename Threads::template Local<ThreadSums> sums;
    b.each([&](int t) {
      ThreadSums s;
      stream<kAhead, Threads::kThreads>(
          row, t, [&](const Packets<E, kModels>& in, int i) { add(s, a, row, in, i, r); });
      sums[t] = s;
      if (t == 0) at_target(a, row, r, y - a.v0);
    });
    agree(b, a, parts, sums);
    b.each([&](int t) {
      fill(a, fields, t, block, 1, -float(pk_inf()), 0.0f);
      if (t >= List::kCount) return;
      const bool max = List::kMaxima >> t & 1;
      const bool min = List::kColumns >> t & 1;
      double v = parts.get(t * Threads::kWarps);
      for (int w = 1; w < Threads::kWarps; ++w) {
        const double p = parts.get(t * Threads::kWarps + w);
        v = max ? Larger()(v, p) : min ? (p < v ? p : v) : v + p;
      }
      fields[t * a.field_stride] = float(v);
    });
  }

  // Writes the block's chunks from `first` on: one value in fields that are maxima, one elsewhere.
  PK_DEVICE static void fill(const Args& a, float* fields, int t, int64_t block, int64_t first,
                             float maximum, float other) {
    const int64_t left = a.chunks - block * a.span, count = left < a.span ? left : a.span;
    if (t >= List::kCount) return;
    const float value = List::kMaxima >> t & 1 ? maximum : other;
    for (int64_t c = first; c < count; ++c) {
      fields[t * a.field_stride + c * a.chunk_stride] = value;
    }
  }

  // Every thread's sums moved to the block's maxima, and each field reduced over the lanes of a
  // warp: parts[field][warp].
  template <class Parts, class Sums>
  PK_DEVICE static void agree(const Threads& b, const Args& a, const Parts& parts, Sums& sums) {
    constexpr int W = Threads::kWarps;
    const auto reduce = [&](auto f, int k, const auto& op) {
      typename Threads::template Local<float> v;
      b.each([&](int t) { v[t] = number<f.value>(sums[t]); });
      b.warp_all([&](int t) -> float& { return v[t]; }, op);
      b.each([&](int t) {
        if (t % kWarp == 0) parts.put(k * W + t / kWarp, v[t]);
      });
    };
    const auto block_max = [&](int k) {
      float v = parts.get(k * W);
      for (int w = 1; w < W; ++w) v = larger(v, parts.get(k * W + w));
      return v;
    };
    List::each([&](auto f, int k) {
      if constexpr (is_model_max(f.value)) reduce(f, k, Larger());
    });
    b.sync();
    b.each([&](int t) {
      float top[3] = {-float(pk_inf()), -float(pk_inf()), -float(pk_inf())};
      List::each([&](auto f, int k) {
        if constexpr (f.value == Field::max) top[0] = block_max(k);
        if constexpr (f.value == Field::ref_max) top[1] = block_max(k);
        if constexpr (f.value == Field::aux_max) top[2] = block_max(k);
      });
      ThreadSums& s = sums[t];
      if (s.pol.max != top[0]) s.column = 3e38f;
      raise(s, a, top[0], top[1], top[2]);
    });
    List::each([&](auto f, int k) {
      if constexpr (is_other_max(f.value)) reduce(f, k, Larger());
    });
    b.sync();
    b.each([&](int t) {
      List::each([&](auto f, int k) {
        if constexpr (is_other_max(f.value)) {
          // The sum beside its maximum is the next field in every list.
          lse_raise(pair_of<f.value>(sums[t]), block_max(k));
        }
      });
    });
    List::each([&](auto f, int k) {
      if constexpr (f.value == Field::top) {
        reduce(f, k, Smaller());
      } else if constexpr (!is_model_max(f.value) && !is_other_max(f.value)) {
        reduce(f, k, Add());
      }
    });
    b.sync();
  }
  template <Field F>
  PK_DEVICE static OnlineLseOf<float>& pair_of(Sums& s) {
    if constexpr (F == Field::round_max) return s.pol_rounded;
    if constexpr (F == Field::ref_round_max) return s.ref_rounded;
    if constexpr (F == Field::aux_round_max) return s.aux_rounded;
    if constexpr (F == Field::alpha_max) return s.blend[0];
    if constexpr (F == Field::renyi_max) return s.blend[1];
    if constexpr (F == Field::mix_max) return s.blend[2];
    if constexpr (F == Field::plain_max) return s.mix_plain;
  }

  PK_DEVICE static void at_target(const Args& a, const Reader& row, int64_t r, int64_t column) {
    if (column < row.begin || column >= row.end) return;
    const int c = int(column);
    PK_UNROLL
    for (int k = 0; k < (TWO ? 2 : 1); ++k) {
      const Model& m = a.model[k];
      const float bias = m.bias == nullptr ? 0.0f : load_as_float(m.bias, m.bias_type, a.v0 + c);
      a.at_target[k * a.at_stride + r] = shape_logit(to_float(row.row[k][c]), bias, m);
    }
  }
};

}  // namespace prefkern
