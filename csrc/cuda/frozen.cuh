// Frozen head: what multiplies head rows in the forward's sums, and the move of those sums to
// larger maxima.
#pragma once

#include "cuda/rows.cuh"

namespace prefkern {

// x and xr relative to the row's maxima so far: mass e^x, log e^x x, ref e^xr, cross e^x (x - xr),
// each times the part of dz/dx that is not constant.
template <class E>
struct Factors {
  using Args = FactorArgs;
  using Threads = Block<128>;
  static constexpr int kMinBlocks = 4;
  static constexpr int N = Packet<E>::kN;
  using Reader = RowReader<E, 2>;

  PK_DEVICE static void put(const Args& a, const Reader& row, int i, int64_t r, int which,
                            const float (&v)[N]) {
    char* dst = static_cast<char*>(a.out[which]) + r * a.out_stride[which] * bytes_of(a.working);
    write_columns(row, i, dst, a.working, v);
  }

  PK_DEVICE static void run(Threads& b, const Args& a) {
    const int64_t r = b.index() / a.blocks, block = b.index() % a.blocks;
    const int64_t begin = block * a.columns;
    const int64_t end = begin + a.columns < a.w ? begin + a.columns : a.w;
    const Reader row(a.model, r, int(begin), int(end));
    const bool counts = a.targets[r] != a.ignore;
    b.each([&](int t) {
      const bool two = a.model[1].x != nullptr;
      const float m = a.maxima[r], mr = two ? a.maxima[a.maxima_stride + r] : 0.0f;
      stream<1, Threads::kThreads>(row, t, [&](const Packets<E, 2>& in, int i) {
        float z[N], zr[N] = {}, cap[N], v[N];
        read_logits(row, in.of[0], i, a.model[0], a.v0, Dtype::f32, z);
        if (two) read_logits(row, in.of[1], i, a.model[1], a.v0, Dtype::f32, zr);
        PK_UNROLL
        for (int j = 0; j < N; ++j) {
          const float u = a.slope * z[j];
          cap[j] = !counts ? 0.0f : a.slope == 0.0f ? 1.0f : 1.0f - u * u;
        }
        PK_UNROLL
        for (int k = 0; k < kFactors; ++k) {
          if (a.out[k] == nullptr) continue;
          PK_UNROLL
          for (int j = 0; j < N; ++j) {
            const float x = z[j] - m, xr = zr[j] - mr, e = k == kRef ? exp_fast(xr) : exp_fast(x);
            const float f = k == kLog ? x : k == kCross ? x - xr : 1.0f;
            v[j] = cap[j] == 0.0f ? 0.0f : weighted(e, f * cap[j]);
          }
          put(a, row, i, r, k, v);
        }
      });
    });
  }
};

// One row per block. With the mass t before the move: mass = fp t, log = fp (log + dp t),
// ref = fr ref, cross = fp (cross + (dp - dr) t).
struct RaiseRows {
  using Args = RaiseArgs;
  using Threads = Block<128>;
  static constexpr int kMinBlocks = 4;

  PK_DEVICE static void run(Threads& b, const Args& a) {
    const int64_t r = b.index();
    const float fp = a.shift[r], fr = a.shift[a.shift_stride + r];
    const float dp = a.shift[2 * a.shift_stride + r], dr = a.shift[3 * a.shift_stride + r];
    if (fp == 1.0f && fr == 1.0f && dp == 0.0f && dr == 0.0f) return;
    const auto sum = [&](Factor k) { return a.totals + a.at[k] * a.sum_stride + r * a.row_stride; };
    b.each([&](int t) {
      for (int64_t d = t; d < a.depth; d += Threads::kThreads) {
        const float mass = sum(kMass)[d];
        sum(kMass)[d] = fp * mass;
        if (a.at[kLog] >= 0) sum(kLog)[d] = fp * (sum(kLog)[d] + dp * mass);
        if (a.at[kRef] >= 0) sum(kRef)[d] *= fr;
        if (a.at[kCross] >= 0) sum(kCross)[d] = fp * (sum(kCross)[d] + (dp - dr) * mass);
      }
    });
  }
};

}  // namespace prefkern
