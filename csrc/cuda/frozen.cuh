// Frozen head: what multiplies head rows in the forward's sums, and the move of those sums to
// larger maxima.
#pragma once

#include "cuda/rows.cuh"

namespace prefkern {

// x and xr relative to the row's maxima so far: mass e^x, log e^x x, gap e^x - e^xr, cross e^x (x -
// xr), each times the part of dz/dx that is not constant.
template <class E>
struct FrozenFactor {
  using Args = FactorArgs;
  using Threads = Block<128>;
  static constexpr int kMinBlocks = 4;
  static constexpr int N = Packet<E>::kN;
  using Reader = RowReader<E, 2>;

  PK_DEVICE static void run(Threads& b, const Args& a) {
    const int64_t r = b.index() / a.blocks, block = b.index() % a.blocks;
    const int64_t begin = block * a.columns;
    const int64_t end = begin + a.columns < a.w ? begin + a.columns : a.w;
    const Reader row(a.model, r, int(begin), int(end));
    const bool counts = a.targets[r] != a.ignore;
    const bool two =
        a.model[1].x != nullptr && (a.which == Factor::gap || a.which == Factor::cross);
    b.each([&](int t) {
      const float m = a.maxima[r], mr = two ? a.maxima[a.maxima_stride + r] : 0.0f;
      char* dst = static_cast<char*>(a.out) + r * a.out_stride * bytes_of(a.out_type);
      stream<1, Threads::kThreads>(row, t, [&](const Packets<E, 2>& in, int i) {
        float z[N], zr[N] = {}, v[N];
        read_logits(row, in.of[0], i, a.model[0], a.v0, Dtype::f32, z);
        if (two) read_logits(row, in.of[1], i, a.model[1], a.v0, Dtype::f32, zr);
        PK_UNROLL
        for (int j = 0; j < N; ++j) v[j] = exp_fast(z[j] - m);
        if (a.which == Factor::gap) {
          PK_UNROLL
          for (int j = 0; j < N; ++j) v[j] -= exp_fast(zr[j] - mr);
        }
        if (a.which == Factor::log) {
          PK_UNROLL
          for (int j = 0; j < N; ++j) v[j] = weighted(v[j], z[j] - m);
        }
        if (a.which == Factor::cross) {
          PK_UNROLL
          for (int j = 0; j < N; ++j) v[j] = weighted(v[j], (z[j] - m) - (zr[j] - mr));
        }
        if (a.slope != 0.0f) {
          PK_UNROLL
          for (int j = 0; j < N; ++j) {
            const float u = a.slope * z[j];
            v[j] = weighted(v[j], 1.0f - u * u);
          }
        }
        if (!counts) {
          PK_UNROLL
          for (int j = 0; j < N; ++j) v[j] = 0.0f;
        }
        write_columns(row, i, dst, a.out_type, v);
      });
    });
  }
};

// One row per block. With the mass t before the move: mass = fp t, log = fp (log + dp t),
// gap = fr gap + (fp - fr) t, cross = fp (cross + (dp - dr) t).
struct RaiseRows {
  using Args = RaiseArgs;
  using Threads = Block<128>;
  static constexpr int kMinBlocks = 4;

  PK_DEVICE static void run(Threads& b, const Args& a) {
    const int64_t r = b.index();
    const float fp = a.shift[r], fr = a.shift[a.shift_stride + r];
    const float dp = a.shift[2 * a.shift_stride + r], dr = a.shift[3 * a.shift_stride + r];
    if (fp == 1.0f && fr == 1.0f && dp == 0.0f && dr == 0.0f) return;
    const auto sum = [&](Factor k) {
      return a.totals + a.at[int(k)] * a.sum_stride + r * a.row_stride;
    };
    b.each([&](int t) {
      for (int64_t d = t; d < a.depth; d += Threads::kThreads) {
        const float mass = sum(Factor::mass)[d];
        sum(Factor::mass)[d] = fp * mass;
        if (a.at[int(Factor::log)] >= 0)
          sum(Factor::log)[d] = fp * (sum(Factor::log)[d] + dp * mass);
        if (a.at[int(Factor::gap)] >= 0)
          sum(Factor::gap)[d] = fr * sum(Factor::gap)[d] + (fp - fr) * mass;
        if (a.at[int(Factor::cross)] >= 0)
          sum(Factor::cross)[d] = fp * (sum(Factor::cross)[d] + (dp - dr) * mass);
      }
    });
  }
};

}  // namespace prefkern
