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

// Maxima that x is relative to; those of a log-sum-exp beside it; the rest are sums.
PK_HD constexpr bool is_model_max(Field f) {
  return f == Field::max || f == Field::ref_max || f == Field::aux_max;
}
PK_HD constexpr bool is_other_max(Field f) {
  return f == Field::round_max || f == Field::alpha_max || f == Field::renyi_max ||
         f == Field::mix_max;
}

// The fields that one kernel writes.
template <Field... F>
struct Fields {
  static constexpr int kCount = sizeof...(F);
  static_assert(kCount <= kWarp);
  // body(field, its place among these)
  template <class Body>
  PK_DEVICE static void each(const Body& body) {
    int k = 0;
    (body(std::integral_constant<Field, F>(), k++), ...);
  }
  // Thread k's field; no array of the device is indexed.
  PK_DEVICE static Field at(int k) {
    Field found = Field::max;
    each([&](auto f, int i) { found = i == k ? f.value : found; });
    return found;
  }
};
template <bool TWO, bool SMALL>
struct FieldsOf;
template <>
struct FieldsOf<false, true> : Fields<Field::max, Field::sum> {};
template <>
struct FieldsOf<false, false>
    : Fields<Field::max, Field::sum, Field::round_max, Field::round_sum, Field::x, Field::sq,
             Field::z_sum, Field::z_count, Field::top, Field::adv> {};
template <>
struct FieldsOf<true, true>
    : Fields<Field::max, Field::sum, Field::round_max, Field::round_sum, Field::ref_max,
             Field::ref_sum, Field::ref_cross, Field::pol_cross> {};
template <>
struct FieldsOf<true, false>
    : Fields<Field::max, Field::sum, Field::round_max, Field::round_sum, Field::ref_max,
             Field::ref_sum, Field::ref_cross, Field::pol_cross, Field::x, Field::sq, Field::z_sum,
             Field::z_count, Field::top, Field::alpha_max, Field::alpha_sum, Field::renyi_max,
             Field::renyi_sum, Field::mix_max, Field::mix_sum, Field::adv, Field::aux_max,
             Field::aux_sum> {};

// A thread's sums, and the column of its first largest logit as a number of the field's type.
struct ThreadSums : RowSumsOf<float> {
  float column = 0.0f;
};

// The number of a field that is known when compiled.
template <Field F>
PK_DEVICE float& number(ThreadSums& s) {
  if constexpr (F == Field::top) {
    return s.column;
  } else {
    float* found = nullptr;
    each_field<float>(s, [&](Field f, float& x) { found = f == F ? &x : found; });
    return *found;
  }
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

// What blocks of THREADS do with one row.
template <class E, bool TWO, bool SMALL, int THREADS>
struct FoldRow {
  using Args = FoldArgs;
  using Threads = Block<THREADS>;
  static constexpr int kAhead = TWO && (!SMALL || sizeof(E) == 2) ? 1 : 2;
  // A third head and given values come with fp32 products: rounded ones would not do for ev.
  static constexpr bool kValues = !SMALL && sizeof(E) == 4;
  static constexpr int kModels = !TWO ? 1 : kValues ? 3 : 2;
  static constexpr int N = Packet<E>::kN;
  using Reader = RowReader<E, kModels>;
  using List = FieldsOf<TWO, SMALL>;

  // The parameters of the blends in the form that raise_maxima takes.
  PK_DEVICE static StatPlan plan_of(const Args& a) {
    StatPlan plan;
    plan.param[int(Stat::alpha)] = a.alpha;
    plan.param[int(Stat::renyi)] = a.renyi;
    plan.param[int(Stat::mix)] = a.mix;
    return plan;
  }

  PK_DEVICE static void raise(ThreadSums& s, const Args& a, float pol, float ref, float aux) {
    raise_maxima(s, plan_of(a), pol, ref, aux, a.model[2].x != nullptr);
  }

  template <class S>
  PK_DEVICE static void add(ThreadSums& s, const Args& a, const Reader& row,
                            const Packets<E, kModels>& in, int i, int64_t r, S straight) {
    float z[N], zr[N] = {}, za[N] = {};
    const bool third = TWO && kValues && a.model[2].x != nullptr;
    read_logits(row, in.of[0], i, a.model[0], a.v0, Dtype::f32, straight, z);
    if constexpr (TWO) read_logits(row, in.of[1], i, a.model[1], a.v0, Dtype::f32, straight, zr);
    if constexpr (TWO && kValues) {
      if (third) read_logits(row, in.of[2], i, a.model[2], a.v0, Dtype::f32, straight, za);
    }
    const float top = largest<E>(z);
    float ref_top = -float(pk_inf()), aux_top = ref_top;
    if constexpr (TWO) ref_top = largest<E>(zr);
    if (third) aux_top = largest<E>(za);
    if constexpr (!SMALL) {
      // a packet that is not straight may come after others that lie behind it
      const bool again = !straight && top == s.pol.max && top > -float(pk_inf());
      if (top > s.pol.max || again) {
        float column = s.column;
        PK_UNROLL
        for (int j = N - 1; j >= 0; --j) {
          if (z[j] == top) column = float(row.column(i) + j - row.begin);
        }
        s.column = top > s.pol.max || column < s.column ? column : s.column;
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
        s.x += weighted(e, x[j]);
        s.sq += e * e;
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
        if constexpr (kValues) {
          if (third) {
            const float xa = za[j] - ma;
            s.aux.sum += exp_fast(xa);
            s.adv += weighted(e, xa - xr[j]);
          }
        }
      }
    }
    if constexpr (kValues) {
      if (a.adv != nullptr) {
        const float* adv = a.adv + r * a.adv_stride;
        PK_UNROLL
        for (int j = 0; j < N; ++j) {
          s.adv += weighted(exp_fast(x[j]), value_at(row, adv, row.column(i) + j, straight));
        }
      }
    }
    if constexpr (TWO && !SMALL) {
      if (a.has_alpha) add_blend(s.blend[kAlphaBlend], x, xr, a.alpha);
      if (a.has_renyi) add_blend(s.blend[kRenyiBlend], x, xr, a.renyi);
      if (a.has_mix) add_blend(s.blend[kMixBlend], x, xr, a.mix);
    }
    if constexpr ((TWO || !SMALL) && sizeof(E) == 4) {
      if (a.working != Dtype::f32) add_rounded(s, a, row, in, i, r, straight);
    }
  }

  // The policy's products as a backward reads them: their normaliser, and where they are kept.
  template <class S>
  PK_DEVICE static void add_rounded(ThreadSums& s, const Args& a, const Reader& row,
                                    const Packets<E, kModels>& in, int i, int64_t r, S straight) {
    float z[N];
    read_logits(row, in.of[0], i, a.model[0], a.v0, a.working, straight, z);
    add_logits(s.rounded, z);
    if (a.keep == nullptr) return;
    PK_UNROLL
    for (int j = 0; j < N; ++j) z[j] = in.of[0].at(j);
    const RowWriter<E, kModels> keep(row, a.keep, a.keep_stride, r, a.working);
    keep.put(row, i, straight, z);
  }

  // The sums of the columns of `row`, of a row that counts, in the first of the block's chunks;
  // parts[field][warp] then holds them too.
  template <class Parts, class Load>
  PK_DEVICE static void fold(const Threads& b, const Args& a, const Reader& row, int64_t r,
                             int64_t block, const Parts& parts, Load load) {
    float* fields = a.fields + block * a.span * a.chunk_stride + r;
    typename Threads::template Local<ThreadSums> sums;
    b.each([&](int t) {
      ThreadSums s;
      stream<kAhead, THREADS>(
          row, t,
          [&](const Packets<E, kModels>& in, int i, auto straight) {
            add(s, a, row, in, i, r, straight);
          },
          load);
      sums[t] = s;
      if (t == 0) at_target(a, row, r, a.targets[r] - a.v0);
    });
    agree(b, a, parts, sums);
    b.each([&](int t) {
      fill(a, fields, t, block, 1, -float(pk_inf()), 0.0f);
      if (t >= List::kCount) return;
      const Field f = List::at(t);
      const bool max = is_model_max(f) || is_other_max(f), min = f == Field::top;
      double v = parts.get(t * Threads::kWarps);
      for (int w = 1; w < Threads::kWarps; ++w) {
        const double p = parts.get(t * Threads::kWarps + w);
        v = max ? Larger()(v, p) : min ? (p < v ? p : v) : v + p;
      }
      fields[int(f) * a.field_stride] = float(v);
    });
  }
  // The largest logit of the policy or the reference, once `fold` is through.
  template <Field F, class Parts>
  PK_DEVICE static float maximum(const Parts& parts) {
    float v = 0.0f;
    List::each([&](auto f, int k) {
      if constexpr (f.value == F) {
        v = parts.get(k * Threads::kWarps);
        for (int w = 1; w < Threads::kWarps; ++w) v = larger(v, parts.get(k * Threads::kWarps + w));
      }
    });
    return v;
  }

  // Writes the block's chunks from `first` on: one value in fields that are maxima, one elsewhere.
  PK_DEVICE static void fill(const Args& a, float* fields, int t, int64_t block, int64_t first,
                             float maximum, float other) {
    const int64_t left = a.chunks - block * a.span, count = left < a.span ? left : a.span;
    if (t >= List::kCount) return;
    const Field f = List::at(t);
    const float value = is_model_max(f) || is_other_max(f) ? maximum : other;
    for (int64_t c = first; c < count; ++c) {
      fields[int(f) * a.field_stride + c * a.chunk_stride] = value;
    }
  }

  // Every thread's sums moved to the block's maxima, and each field reduced over the lanes of a
  // warp: parts[field][warp].
  template <class Parts, class All>
  PK_DEVICE static void agree(const Threads& b, const Args& a, const Parts& parts, All& sums) {
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
  PK_DEVICE static OnlineLseOf<float>& pair_of(ThreadSums& s) {
    if constexpr (F == Field::round_max) return s.rounded;
    if constexpr (F == Field::alpha_max) return s.blend[kAlphaBlend];
    if constexpr (F == Field::renyi_max) return s.blend[kRenyiBlend];
    if constexpr (F == Field::mix_max) return s.blend[kMixBlend];
  }

  PK_DEVICE static void at_target(const Args& a, const Reader& row, int64_t r, int64_t column) {
    if (column < row.begin || column >= row.end) return;
    const int c = int(column);
    PK_UNROLL
    for (int k = 0; k < (TWO ? 2 : 1); ++k) {
      const Model& m = a.model[k];
      const float bias = m.bias == nullptr ? 0.0f : m.bias[a.v0 + c];
      const float u = before_cap(to_float(row.row[k][c]), bias, m);
      a.at[(k == 0 ? int(At::zy) : int(At::ref_zy)) * a.at_stride + r] = double(capped(u, m));
    }
  }
};

template <class E, bool TWO, bool SMALL>
struct Fold : FoldRow<E, TWO, SMALL, 128> {
  using Row = FoldRow<E, TWO, SMALL, 128>;
  using typename Row::Args;
  using typename Row::Threads;
  // 48 registers for the smallest, 128 for the largest: no spill, and loads of 16 KiB (one model,
  // 10 blocks) to 24 KiB (two) on their way per multiprocessor.
  static constexpr int kMinBlocks = !TWO ? (SMALL ? 10 : 7) : SMALL ? 6 : 4;

  PK_DEVICE static void run(Threads& b, const Args& a) {
    PK_SHARED(float, parts, Row::List::kCount* Threads::kWarps);
    const int64_t r = b.index() / a.blocks, block = b.index() % a.blocks;
    if (a.targets[r] == a.ignore) {
      float* fields = a.fields + block * a.span * a.chunk_stride + r;
      b.each([&](int t) { Row::fill(a, fields, t, block, 0, 0.0f, 0.0f); });
      return;
    }
    const int64_t begin = block * a.columns;
    const int64_t end = begin + a.columns < a.w ? begin + a.columns : a.w;
    Row::fold(b, a, typename Row::Reader(a.model, r, int(begin), int(end)), r, block, parts,
              Once());
  }
};

}  // namespace prefkern
