// Numbers per row: chunks to sums, sums to statistics, gradients of statistics to coefficients. A
// few hundred bytes per row, in double, by the functions of csrc/numerics.
#pragma once

#include "cuda/block.h"
#include "cuda/row_kernels.h"

namespace prefkern {

// 32 rows per block, each merged by 4 threads: neighbouring threads read neighbouring rows, and the
// parts of a row are merged in their order. Two rows' worth of sums in registers leave room for 3
// blocks.
struct MergeRows {
  using Args = MergeArgs;
  using Threads = Block<128>;
  static constexpr int kMinBlocks = 3, kParts = Threads::kWarps;

  PK_DEVICE static void run(Threads& b, const Args& a) {
    PK_SHARED(RowSums, parts, Threads::kThreads);
    const int64_t first = b.index() * kWarp;
    b.each([&](int t) {
      const int64_t r = first + t % kWarp, part = t / kWarp;
      if (r >= a.m) return;
      const auto range = [&](int64_t i) { return part + i * kParts; };
      parts.put(t, merge_row(
                       a.plan, (a.ranges - part + kParts - 1) / kParts,
                       [&](Field f, int64_t i) {
                         return a.fields(int(f), range(i) * a.range_stride + r);
                       },
                       [&](int64_t i) { return a.starts[range(i)]; }));
    });
    b.sync();
    b.each([&](int t) {
      const int64_t r = first + t;
      if (t >= kWarp || r >= a.m) return;
      RowSums s = parts.get(t);
      for (int part = 1; part < kParts; ++part) {
        RowSums other = parts.get(part * kWarp + t);
        merge_sums(s, other, a.plan.stats, a.plan.third);
      }
      each_field(s, [&](Field f, double& x) { a.sums.put(int(f), r, a.plan.writes(f) ? x : 0.0); });
      a.sums.put(int(Field::top), r, a.plan.writes(Field::top) ? double(s.top) : 0.0);
    });
  }
};

// One thread per row.
template <class A>
struct PerRow {
  using Args = A;
  using Threads = Block<128>;
  static constexpr int kMinBlocks = 2;

  template <class Body>
  PK_DEVICE static void each(Threads& b, int64_t m, const Body& body) {
    b.each([&](int t) {
      const int64_t r = b.index() * Threads::kThreads + t;
      if (r < m) body(r);
    });
  }
};

struct NormRows : PerRow<NormArgs> {
  PK_DEVICE static void run(Threads& b, const Args& a) {
    each(b, a.m, [&](int64_t r) {
      const auto put = [&](Norm high, Norm low, Field max, Field sum) {
        const double x = safe_max(a.sums(int(max), r)) + pk_log(a.sums(int(sum), r));
        const double rounded = a.norms.wide ? x : double(float(x)), rest = x - rounded;
        a.norms.put(int(high), r, rounded);
        a.norms.put(int(low), r, rest == rest ? rest : 0.0);
      };
      put(Norm::lse, Norm::lse_low, Field::max, Field::sum);
      put(Norm::ref_lse, Norm::ref_lse_low, Field::ref_max, Field::ref_sum);
      const bool top = a.top.data != nullptr;
      a.norms.put(int(Norm::top_value), r, top ? a.top(0, r) : 0.0);
      a.norms.put(int(Norm::top_index), r, top ? a.top(1, r) : 0.0);
    });
  }
};

struct FinishRows : PerRow<FinishArgs> {
  PK_DEVICE static void run(Threads& b, const Args& a) {
    each(b, a.m, [&](int64_t r) {
      const int64_t token = a.token(r), y = a.targets[token];
      const int saved = a.plan.two ? kSaveds : kSavedOneModel;
      if (y == a.ignore) {
        for (int k = 0; k < a.plan.stats.count; ++k) a.out.put(k, r, 0.0);
        for (int k = 0; k < saved; ++k) a.saved.put(k, r, 0.0);
        return;
      }
      RowSums s;
      each_field(s, [&](Field f, double& x) {
        if (a.plan.writes(f)) x = a.sums(int(f), r);
      });
      if (a.plan.writes(Field::top)) s.top = int64_t(a.sums(int(Field::top), r));
      RowContext c;
      c.target = y;
      c.vocab = a.vocabulary;
      PK_UNROLL
      for (int k = 0; k < kAts; ++k) c.at[k] = a.at(k, r);
      if (a.second.data != nullptr) {
        PK_UNROLL
        for (int k = 0; k < kSeconds; ++k) c.second[k] = a.second(k, r);
      }
      if (a.top.data != nullptr) c.top_value = a.top(0, r), c.top_index = a.top(1, r);
      if (a.teacher != nullptr) c.teacher = a.teacher[token];
      finish_row(s, c, a.plan,
                 [&](Stat k, double x) { a.out.put(a.plan.stats.slot[int(k)], r, x); });
      save_row(s, c, a.plan, [&](Saved k, double x) { a.saved.put(int(k), r, x); });
    });
  }
};

struct PullRows : PerRow<PullArgs> {
  PK_DEVICE static void run(Threads& b, const Args& a) {
    each(b, a.m, [&](int64_t r) {
      const auto put = [&](Coef k, double x) { a.coefficients.put(int(k), r, x); };
      if (a.targets[a.token(r)] == a.ignore) {
        for (int k = 0; k < kCoefs; ++k) put(Coef(k), 0.0);
        return;
      }
      const int saved = a.plan.two ? kSaveds : kSavedOneModel;
      const StatPlan& plan = a.plan.stats;
      const RowCoefficients g = pull_row(
          plan, a.slope, [&](Stat k) { return a.d_out(plan.slot[int(k)], r); },
          [&](Stat k) { return a.out(plan.slot[int(k)], r); },
          [&](Saved k) { return int(k) < saved ? a.saved(int(k), r) : 0.0; });
      if (a.coefficients.wide) {
        store_coefficients<double>(g, put);
      } else {
        store_coefficients<float>(g, put);
      }
    });
  }
};

}  // namespace prefkern
