// The second sweep: sums that need both normalisers first (jsd, tv, bkl).
#pragma once

#include "cuda/rows.cuh"

namespace prefkern {

// Whether a vocabulary entry is in the reference's top set, by what comes before a cap: value, then
// index. Indices are compared as fp32 numbers, exact up to V = 2^24.
PK_DEVICE bool in_top_set(float u, int64_t v, float value, float index) {
  return u > value || (u == value && float(v) <= index);
}

template <class E>
struct SecondSweep {
  using Args = SecondArgs;
  using Threads = Block<128>;
  static constexpr int kMinBlocks = 4;
  static constexpr int N = Packet<E>::kN;
  using Reader = RowReader<E, 2>;
  struct Sums {
    float v[kSeconds];  // indexed by constants only
    PK_DEVICE float& operator[](Second k) { return v[int(k)]; }
  };

  template <class S>
  PK_DEVICE static void add(Sums& s, const Args& a, const Reader& row, const Packets<E, 2>& in,
                            int i, int64_t r, S straight) {
    using Sum = Second;
    float z[N], zr[N], ur[N];
    read_logits(row, in.of[0], i, a.model[0], a.v0, Dtype::f32, straight, z);
    read_logits(row, in.of[1], i, a.model[1], a.v0, Dtype::f32, straight, zr);
    if (a.has_bkl) read_before_cap(row, in.of[1], i, a.model[1], a.v0, Dtype::f32, straight, ur);
    const auto norm = [&](Norm k) { return a.norms[int(k) * a.norm_stride + r]; };
    const float n = norm(Norm::lse), low = norm(Norm::lse_low);
    const float nr = norm(Norm::ref_lse), ref_low = norm(Norm::ref_lse_low);
    PK_UNROLL
    for (int j = 0; j < N; ++j) {
      const float lp = (z[j] - n) - low, lr = (zr[j] - nr) - ref_low;
      const float p = exp_fast(lp), q = exp_fast(lr);
      if (a.has_jsd) {
        const float d = lr - lp, l = log_mixture_ratio(d, a.jsd);
        s[Sum::kl_ref] += weighted(q, (d > 80.0f ? 80.0f : d) - l);
        s[Sum::kl_pol] -= weighted(p, l);
      }
      if (a.has_tv) {
        const float d = p - q;
        s[Sum::tv] += d < 0.0f ? -d : d;
        s[Sum::tv_mean] += lp > lr ? p : lp < lr ? -p : 0.0f;  // the sign that the gradient has
      }
      if (a.has_bkl) {
        const int64_t v = a.v0 + row.column(i) + j;
        const bool top = in_top_set(ur[j], v, norm(Norm::top_value), norm(Norm::top_index));
        s[Sum::top_kl] += top ? weighted(q, lr - lp) : 0.0f;
        s[Sum::rest_ref] += top ? 0.0f : q;
        s[Sum::rest_pol] += top ? 0.0f : p;
      }
    }
  }

  PK_DEVICE static void clear(const Args& a, float* fields, int t, int64_t block, int64_t first) {
    const int64_t left = a.chunks - block * a.span, count = left < a.span ? left : a.span;
    for (int64_t c = first; t < kSeconds && c < count; ++c) {
      fields[t * a.field_stride + c * a.chunk_stride] = 0.0f;
    }
  }

  PK_DEVICE static void run(Threads& b, const Args& a) {
    constexpr int W = Threads::kWarps;
    PK_SHARED(float, parts, kSeconds* Threads::kWarps);
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
      stream<1, Threads::kThreads>(row, t, [&](const Packets<E, 2>& in, int i, auto straight) {
        add(s, a, row, in, i, r, straight);
      });
      sums[t] = s;
    });
    PK_UNROLL
    for (int k = 0; k < kSeconds; ++k) {
      b.warp_all([&](int t) -> float& { return sums[t].v[k]; }, Add());
      b.each([&](int t) {
        if (t % kWarp == 0) parts.put(k * W + t / kWarp, sums[t].v[k]);
      });
    }
    b.sync();
    b.each([&](int t) {
      if (t >= kSeconds) return;
      clear(a, fields, t, block, 1);
      double v = 0.0;
      for (int w = 0; w < W; ++w) v += parts.get(t * W + w);
      fields[t * a.field_stride] = float(v);
    });
  }
};

}  // namespace prefkern
