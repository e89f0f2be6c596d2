// Frozen head: what multiplies head rows in the forward's sums, and the move of those sums to
// larger maxima.
#pragma once

#include "cuda/fold.cuh"

namespace prefkern {

// Writes the terms of one row: x and xr relative to the maxima m and mr, mass e^x, log e^x x, gap
// e^x
// - e^xr, cross e^x (x - xr), each times the part of dz/dx that is not constant; 0 where the row
// does not count.
template <int THREADS, class E, int MODELS>
PK_DEVICE void write_terms(const TermArgs& a, const RowReader<E, MODELS>& row,
                           const RowWriter<E, MODELS>& out, int t, bool counts, float m, float mr) {
  constexpr int N = Packet<E>::kN;
  const bool two =
      MODELS > 1 && a.model[1].x != nullptr && (a.which == Factor::gap || a.which == Factor::cross);
  stream<1, THREADS>(row, t, [&](const Packets<E, MODELS>& in, int i, auto straight) {
    float z[N], zr[N] = {}, v[N];
    read_logits(row, in.of[0], i, a.model[0], a.v0, Dtype::f32, straight, z);
    if constexpr (MODELS > 1) {
      if (two) read_logits(row, in.of[1], i, a.model[1], a.v0, Dtype::f32, straight, zr);
    }
    PK_UNROLL
    for (int j = 0; j < N; ++j) v[j] = exp_fast(z[j] - m);
    if (two && a.which == Factor::gap) {
      PK_UNROLL
      for (int j = 0; j < N; ++j) v[j] -= exp_fast(zr[j] - mr);
    }
    if (a.which == Factor::log) {
      PK_UNROLL
      for (int j = 0; j < N; ++j) v[j] = weighted(v[j], z[j] - m);
    }
    if (two && a.which == Factor::cross) {
      PK_UNROLL
      for (int j = 0; j < N; ++j) v[j] = weighted(v[j], (z[j] - m) - (zr[j] - mr));
    }
    if (!straight && a.slope != 0.0f) {  // there is a cap
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
    out.put(row, i, straight, v);
  });
}

template <class E>
struct FrozenFactor {
  using Args = FactorArgs;
  using Threads = Block<128>;
  static constexpr int kMinBlocks = 4;

  PK_DEVICE static void run(Threads& b, const Args& a) {
    const int64_t r = b.index() / a.blocks, block = b.index() % a.blocks;
    const int64_t begin = block * a.columns;
    const int64_t end = begin + a.columns < a.w ? begin + a.columns : a.w;
    const RowReader<E, 2> row(a.model, r, int(begin), int(end));
    const RowWriter<E, 2> out(row, a.out, a.out_stride, r, a.out_type);
    const bool counts = a.targets[r] != a.ignore, two = a.model[1].x != nullptr;
    b.each([&](int t) {
      const auto maximum = [&](Maximum k) { return a.maxima[int(k) * a.maxima_stride + r]; };
      const float m = maximum(Maximum::policy), mr = two ? maximum(Maximum::reference) : 0.0f;
      write_terms<Threads::kThreads>(a, row, out, t, counts, m, mr);
    });
  }
};

// Where one row's maxima go: fp = e^dp, dp = old - new of the policy, fr and dr of the reference.
struct Shift {
  float fp, fr, dp, dr;
  PK_DEVICE bool none() const { return fp == 1.0f && fr == 1.0f && dp == 0.0f && dr == 0.0f; }
};
// Thread t's part of a row's sums. With the mass t0 before the move: mass = fp t0, log = fp (log +
// dp t0), gap = fr gap + (fp - fr) t0, cross = fp (cross + (dp - dr) t0).
template <int THREADS>
PK_DEVICE void move_sums(const TotalArgs& a, int64_t r, int t, const Shift& s) {
  const auto sum = [&](Factor k) {
    return a.totals + a.at[int(k)] * a.sum_stride + r * a.row_stride;
  };
  for (int64_t d = t; d < a.depth; d += THREADS) {
    const float mass = sum(Factor::mass)[d];
    sum(Factor::mass)[d] = s.fp * mass;
    if (a.at[int(Factor::log)] >= 0) {
      sum(Factor::log)[d] = s.fp * (sum(Factor::log)[d] + s.dp * mass);
    }
    if (a.at[int(Factor::gap)] >= 0) {
      sum(Factor::gap)[d] = s.fr * sum(Factor::gap)[d] + (s.fp - s.fr) * mass;
    }
    if (a.at[int(Factor::cross)] >= 0) {
      sum(Factor::cross)[d] = s.fp * (sum(Factor::cross)[d] + (s.dp - s.dr) * mass);
    }
  }
}

// One row per block.
struct RaiseRows {
  using Args = RaiseArgs;
  using Threads = Block<128>;
  static constexpr int kMinBlocks = 4;

  PK_DEVICE static void run(Threads& b, const Args& a) {
    const int64_t r = b.index();
    const auto move = [&](Move k) { return a.shift[int(k) * a.shift_stride + r]; };
    const Shift s = {move(Move::fp), move(Move::fr), move(Move::dp), move(Move::dr)};
    if (s.none()) return;
    b.each([&](int t) { move_sums<Threads::kThreads>(a.totals, r, t, s); });
  }
};

// Everything that a tile of a frozen head needs before its first product, one block per row of the
// tile: the fold; the maxima so far, raised; the sums so far, moved there; the terms of the mass.
// The tile is read twice by a block that is alone on half a multiprocessor, so that the second read
// finds in the second-level cache what the first left there (17 MB of rows of 64 KiB at a time).
template <class E, bool TWO, bool SMALL>
struct FrozenFold : FoldRow<E, TWO, SMALL, 512> {
  using Row = FoldRow<E, TWO, SMALL, 512>;
  using Args = FrozenArgs;
  using typename Row::Threads;
  static constexpr int kMinBlocks = 2;

  PK_DEVICE static void run(Threads& b, const Args& a) {
    PK_SHARED(float, parts, Row::List::kCount* Threads::kWarps);
    const int64_t r = b.index();
    const typename Row::Reader row(a.fold.model, r, 0, int(a.fold.w));
    const RowReader<E, 1> policy(a.terms.model, r, 0, int(a.terms.w));
    const RowWriter<E, 1> out(policy, a.terms.out, a.terms.out_stride, r, a.terms.out_type);
    const bool counts = a.fold.targets[r] != a.fold.ignore;
    const auto maximum = [&](Maximum k) -> float& {
      return a.maxima[int(k) * a.maxima_stride + r];
    };
    float m = 0.0f, mr = 0.0f;
    if (counts) {
      Row::fold(b, a.fold, row, r, 0, parts, Again());
      const float old = maximum(Maximum::policy);
      const float old_ref = TWO ? maximum(Maximum::reference) : 0.0f;
      m = larger(old, Row::template maximum<Field::max>(parts));
      if constexpr (TWO) mr = larger(old_ref, Row::template maximum<Field::ref_max>(parts));
      b.sync();  // every thread has read the old maxima
      const float dp = old - m, dr = TWO ? old_ref - mr : 0.0f;
      const Shift s = {pk_exp(dp), pk_exp(dr), dp, dr};
      const bool moves = a.moves && !s.none();
      b.each([&](int t) {
        if (t == 0) {
          maximum(Maximum::policy) = m;
          if (TWO) maximum(Maximum::reference) = mr;
        }
        if (moves) move_sums<Threads::kThreads>(a.totals, r, t, s);
      });
    } else {
      b.each([&](int t) { Row::fill(a.fold, a.fold.fields + r, t, 0, 0, 0.0f, 0.0f); });
    }
    b.each([&](int t) { write_terms<Threads::kThreads>(a.terms, policy, out, t, counts, m, mr); });
  }
};

}  // namespace prefkern
