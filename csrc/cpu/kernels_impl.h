// Everything an instruction set's translation unit exports: one table of entry points.
// Included by kernels_<isa>.cpp, which names the namespace in PK_ISA.
#pragma once

#include <ctime>

#include "cpu/error_rows.h"
#include "cpu/frozen_rows.h"
#include "cpu/head_fold.h"
#include "cpu/head_unfold.h"
#include "cpu/list_rows.h"

namespace prefkern {
namespace PK_ISA {

template <template <class> class Driver>
bool run_head(const HeadCall& call) {
  switch (call.working) {
    case Dtype::f64:
      return Driver<Plain<double>>(call).run();
#if defined(__AVX512BF16__)
    case Dtype::bf16:
      // Given logits need no product.
      if (call.given()) return Driver<Plain<float>>(call).run();
      return Driver<Bf16>(call).run();
#endif
    default:
      return Driver<Plain<float>>(call).run();
  }
}

inline double seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// Nanoseconds per logit on tiles that stay in L2: the fold reads one, the gradient reads it and
// writes another.
inline EpilogueTimes bench_epilogue(int64_t rows, int64_t cols, int64_t repeats) {
  constexpr int L = Lanes<float>::L;
  cols = round_up(cols, L);
  const int64_t stride = block_stride<Plain<float>>(rows), size = cols / L * stride;
  Memory memory;
  float *z = nullptr, *work = nullptr, *line = nullptr;
  RowSums* s = nullptr;
  const auto layout = [&](Arena& a) {
    z = a.take<float>(size), work = a.take<float>(size), line = a.take<float>(cols),
    s = a.take<RowSums>(rows);
  };
  if (!memory.place(layout)) return {};
  uint32_t state = 1;
  for (int64_t i = 0; i < size; ++i) {
    state = state * 1664525u + 1013904223u;
    z[i] = float(state >> 8) * 0x1p-21f - 4.0f;
  }
  StatPlan plain, entropy;
  plain.slot[int(Stat::logp)] = entropy.slot[int(Stat::logp)] = 0;
  entropy.slot[int(Stat::ent)] = 1;
  const int64_t blocks = cols / L;
  const auto row = [&](const float* p, int64_t r) {
    return TileRow<float>{p + r * L, nullptr, nullptr, nullptr, stride, 0, blocks, 0};
  };
  const auto best = [&](const auto& body) {
    double least = 1e30;
    for (int64_t i = 0; i < repeats; ++i) {
      const double start = seconds();
      for (int k = 0; k < 8; ++k) body();
      const double t = (seconds() - start) / 8;
      least = t < least ? t : least;
    }
    return least * 1e9 / double(rows * cols);
  };
  const auto fold = [&](const StatPlan& p) {
    return best([&] {
      RowTop<float> top[kUnitRows];
      for (int64_t first = 0; first < rows; first += kUnitRows) {
        const int64_t n = rows - first < kUnitRows ? rows - first : kUnitRows;
        for (int64_t r = 0; r < n; ++r) top[r] = row_tops(row(z, first + r));
        for (int64_t r = 0; r < n; ++r) {
          s[first + r] = RowSums();
          fold_first(s[first + r], p, row(z, first + r), top[r]);
        }
      }
    });
  };
  const auto grad = [&](double ent) {
    GradRow<float> g{&plain, {}};
    g.c[int(Coef::lse)] = 10.0f, g.c[int(Coef::a0)] = -0.1f, g.c[int(Coef::ent)] = float(ent);
    const Model model;
    return best([&] {
      for (int64_t r = 0; r < rows; ++r) {
        grad_row(g, row(z, r), work + r * L, line, model, [](const auto&) {});
      }
    });
  };
  return {fold(plain), fold(entropy), grad(0.0), grad(0.05)};
}

extern const Kernels table;
const Kernels table = {PK_NAME,
                       &run_head<HeadFold>,
                       &run_head<HeadFoldAgain>,
                       &run_head<HeadUnfold>,
                       &run_head<FrozenNormalise>,
                       &run_head<FrozenGradient>,
                       &list_rank,
                       &error_forward,
                       &error_backward,
                       &bench_epilogue};

}  // namespace PK_ISA
}  // namespace prefkern
