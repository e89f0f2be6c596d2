// The second sweep: sums that need both normalisers first (jsd, tv, bkl), and the logits that bkl's
// top set is picked from.
#pragma once

#include "cuda/rows.cuh"

namespace prefkern {

// Row constants of the second sweep, in the order of NORMS.
enum Norm : int { kLseHigh, kLseLow, kRefHigh, kRefLow, kTopValue, kTopIndex };

// Whether a vocabulary entry is in the reference's top set: value, then index. Indices are compared
// as fp32 numbers, exact up to V = 2^24.
PK_DEVICE bool in_top_set(float seen, int64_t v, float value, float index) {
  return seen > value || (seen == value && float(v) <= index);
}

template <class E>
struct Second {
  using Args = SecondArgs;
  using Threads = Block<128>;
  static constexpr int kMinBlocks = 4, kFields = 7;
  static constexpr int N = Packet<E>::kN;
  using Reader = RowReader<E, 2>;
  struct Sums {
    float v[kFields];  // indexed by constants only
  };

  PK_DEVICE static void add(Sums& s, const Args& a, const Reader& row, const Packets<E, 2>& in,
                            int i, int64_t r) {
    float z[N], zr[N], seen[N];
    read_logits(row, in.of[0], i, a.model[0], a.v0, Dtype::f32, z);
    read_logits(row, in.of[1], i, a.model[1], a.v0, Dtype::f32, zr);
    if (a.has_bkl) read_logits(row, in.of[1], i, a.model[1], a.v0, a.working, seen);
    const auto norm = [&](Norm k) { return a.norms[k * a.norm_stride + r]; };
    const float n = norm(kLseHigh), low = norm(kLseLow), nr = norm(kRefHigh),
                ref_low = norm(kRefLow);
    PK_UNROLL
    for (int j = 0; j < N; ++j) {
      const float lp = (z[j] - n) - low, lr = (zr[j] - nr) - ref_low;
      const float p = exp_fast(lp), q = exp_fast(lr);
      if (a.has_jsd) {
        const float d = lr - lp, l = log_mixture_ratio(d, a.jsd);
        s.v[0] += weighted(q, (d > 80.0f ? 80.0f : d) - l);
        s.v[1] -= weighted(p, l);
      }
      if (a.has_tv) {
        const float d = p - q;
        s.v[2] += d < 0.0f ? -d : d;
        s.v[3] += d > 0.0f ? p : d < 0.0f ? -p : 0.0f;
      }
      if (a.has_bkl) {
        const int64_t v = a.v0 + row.column(i) + j;
        const bool top = in_top_set(seen[j], v, norm(kTopValue), norm(kTopIndex));
        s.v[4] += top ? weighted(q, lr - lp) : 0.0f;
        s.v[5] += top ? 0.0f : q;
        s.v[6] += top ? 0.0f : p;
      }
    }
  }

  PK_DEVICE static void clear(const Args& a, float* fields, int t, int64_t block, int64_t first) {
    const int64_t left = a.chunks - block * a.span, count = left < a.span ? left : a.span;
    for (int64_t c = first; t < kFields && c < count; ++c) {
      fields[t * a.field_stride + c * a.chunk_stride] = 0.0f;
    }
  }

  PK_DEVICE static void run(Threads& b, const Args& a) {
    constexpr int W = Threads::kWarps;
    PK_SHARED(float, parts, kFields* Threads::kWarps);
    const int64_t r = b.index() / a.blocks, block = b.index() % a.blocks;
    float* fields = a.fields + block * a.span * a.chunk_stride + r;
    if (a.targets[r] == a.ignore) {
      b.each([&](int t) { clear(a, fields, t, block, 0); });
      return;
    }
    const int64_t begin = block * a.columns;
    const int64_t end = begin + a.columns < a.w ? begin + a.columns : a.w;
    const Reader row(a.model, r, int(begin), int(end));
    typename Threads::template Local<Sums> sums;
    b.each([&](int t) {
      Sums s = {};
      stream<1, Threads::kThreads>(
          row, t, [&](const Packets<E, 2>& in, int i) { add(s, a, row, in, i, r); });
      sums[t] = s;
    });
    PK_UNROLL
    for (int k = 0; k < kFields; ++k) {
      b.warp_all([&](int t) -> float& { return sums[t].v[k]; }, Add());
      b.each([&](int t) {
        if (t % kWarp == 0) parts.put(k * W + t / kWarp, sums[t].v[k]);
      });
    }
    b.sync();
    b.each([&](int t) {
      if (t >= kFields) return;
      clear(a, fields, t, block, 1);
      double v = 0.0;
      for (int w = 0; w < W; ++w) v += parts.get(t * W + w);
      fields[t * a.field_stride] = float(v);
    });
  }
};

// One row per block: reference logits of products rounded to the working dtype.
template <class E>
struct Seen {
  using Args = SeenArgs;
  using Threads = Block<128>;
  static constexpr int kMinBlocks = 4;
  static constexpr int N = Packet<E>::kN;

  PK_DEVICE static void run(Threads& b, const Args& a) {
    const int64_t r = b.index();
    const Model models[3] = {a.model[1], {}, {}};
    const RowReader<E, 1> row(models, r, 0, int(a.w));
    b.each([&](int t) {
      stream<2, Threads::kThreads>(row, t, [&](const Packets<E, 1>& in, int i) {
        float z[N];
        read_logits(row, in.of[0], i, models[0], a.v0, a.working, z);
        write_columns(row, i, a.out + r * a.out_stride, Dtype::f32, z);
      });
    });
  }
};

}  // namespace prefkern
