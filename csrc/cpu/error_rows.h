// Prediction errors reduced per sample and segment, fp64 inside; no squared error is ever stored.
//
// A sample is cut into blocks of a fixed number of elements; each block has partial sums of its
// own, which are added in order at the end: the same bits for any number of threads.
#pragma once

#include "cpu/tiles.h"

namespace prefkern {
namespace PK_ISA {

constexpr int64_t kErrorBlock = 16384;  // elements of one partial sum
constexpr int64_t kErrorChunk = 256;    // elements converted to fp64 at a time

PK_INLINE vd sqrt_of(vd x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_pd(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_pd(x);
#else
  for (int i = 0; i < Lanes<double>::L; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}

struct ErrorRows {
  static constexpr int64_t L = Lanes<double>::L;
  const ErrorCall& call;
  int64_t sample, blocks;  // elements and blocks of one sample

  explicit ErrorRows(const ErrorCall& c)
      : call(c),
        sample(c.outer * c.frames * c.inner),
        blocks((sample + kErrorBlock - 1) / kErrorBlock) {}

  struct Chunk {
    alignas(64) double p[kErrorChunk], t[kErrorChunk], q[kErrorChunk];
  };
  // n elements from `at` on; zeros up to a whole vector, which add nothing to any statistic.
  void read(Chunk& c, int64_t at, int64_t n, bool with_ref) const {
    read_row(c.p, call.pred, call.pred_type, at, n);
    read_row(c.t, call.target, call.target_type, at, n);
    if (with_ref) read_row(c.q, call.ref, call.ref_type, at, n);
    for (int64_t i = n; i % L != 0; ++i) c.p[i] = c.t[i] = c.q[i] = 0.0;
  }
  // body(first, n, segment) over the pieces of block `b` of sample `s` that lie in one frame.
  template <class Body>
  void pieces(int64_t s, int64_t b, const Body& body) const {
    const int64_t last = (b + 1) * kErrorBlock < sample ? (b + 1) * kErrorBlock : sample;
    for (int64_t at = b * kErrorBlock; at < last;) {
      const int64_t left = call.inner - at % call.inner;
      const int64_t n = left < last - at ? left : last - at;
      body(s * sample + at, n,
           call.segments == nullptr ? 0 : call.segments[at / call.inner % call.frames]);
      at += n;
    }
  }

  PK_HOT void sum_piece(int64_t first, int64_t n, double* out) const {
    vd err{}, ref{}, dot{}, huber{};
    const vd width = splat(call.huber), square_width = width * width;
    const bool with_err = call.err >= 0, with_ref = call.ref_err >= 0, with_dot = call.dot >= 0;
    const bool with_huber = call.huber_slot >= 0;
    Chunk c;
    for (int64_t at = 0; at < n; at += kErrorChunk) {
      const int64_t m = n - at < kErrorChunk ? n - at : kErrorChunk;
      read(c, first + at, m, with_ref || with_dot);
      for (int64_t i = 0; i < m; i += L) {
        const vd p = load(c.p + i), t = load(c.t + i), d = p - t;
        if (with_err) err = fma(d, d, err);
        if (with_ref || with_dot) {
          const vd e = t - load(c.q + i);
          if (with_ref) ref = fma(e, e, ref);
          if (with_dot) dot = fma(p, e, dot);
        }
        // sqrt(d^2 + c^2) - c without the difference of two close numbers
        if (with_huber) huber += d * d / (sqrt_of(fma(d, d, square_width)) + width);
      }
    }
    const auto add = [](double a, double b) { return a + b; };
    if (with_err) out[call.err] += fold_lanes(err, add);
    if (with_ref) out[call.ref_err] += fold_lanes(ref, add);
    if (with_dot) out[call.dot] += fold_lanes(dot, add);
    if (with_huber) out[call.huber_slot] += fold_lanes(huber, add);
  }

  PK_HOT void grad_piece(int64_t first, int64_t n, const double* slope) const {
    const double by_err = slope[0], by_dot = slope[1], by_huber = slope[2];
    const vd square_width = splat(call.huber * call.huber);
    Chunk c;
    for (int64_t at = 0; at < n; at += kErrorChunk) {
      const int64_t m = n - at < kErrorChunk ? n - at : kErrorChunk;
      read(c, first + at, m, by_dot != 0.0);
      for (int64_t i = 0; i < m; i += L) {
        const vd t = load(c.t + i), d = load(c.p + i) - t;
        vd g{};
        if (by_err != 0.0) g = splat(2.0 * by_err) * d;
        if (by_dot != 0.0) g = fma(splat(by_dot), t - load(c.q + i), g);
        if (by_huber != 0.0) g = fma(splat(by_huber), d / sqrt_of(fma(d, d, square_width)), g);
        store(c.p + i, g);
      }
      write_row(call.d_pred, call.pred_type, first + at, c.p, m);
    }
  }

  bool forward() const {
    const int64_t width = call.segment_count * call.stats, units = call.samples * blocks;
    Memory memory;
    double* partial = nullptr;
    if (!memory.place([&](Arena& a) { partial = a.take<double>(units * width); })) return false;
    parallel(call.pool, units, [&](int64_t unit, int) {
      double* mine = partial + unit * width;
      for (int64_t i = 0; i < width; ++i) mine[i] = 0.0;
      pieces(unit / blocks, unit % blocks, [&](int64_t first, int64_t n, int64_t segment) {
        if (segment >= 0) sum_piece(first, n, mine + segment * call.stats);
      });
    });
    for (int64_t k = 0; k < call.stats; ++k) {
      for (int64_t s = 0; s < call.samples; ++s) {
        for (int64_t f = 0; f < call.segment_count; ++f) {
          double sum = 0.0;
          for (int64_t b = 0; b < blocks; ++b)
            sum += partial[(s * blocks + b) * width + f * call.stats + k];
          call.out[(k * call.samples + s) * call.segment_count + f] = sum;
        }
      }
    }
    return true;
  }

  bool backward() const {
    const auto slope_of = [&](int slot, int64_t s, int64_t f) {
      return slot < 0 ? 0.0 : call.d_out[(slot * call.samples + s) * call.segment_count + f];
    };
    parallel(call.pool, call.samples * blocks, [&](int64_t unit, int) {
      const int64_t s = unit / blocks;
      pieces(s, unit % blocks, [&](int64_t first, int64_t n, int64_t segment) {
        double slope[3] = {0.0, 0.0, 0.0};  // a frame that is left out: exactly 0
        if (segment >= 0) {
          slope[0] = slope_of(call.err, s, segment);
          slope[1] = slope_of(call.dot, s, segment);
          slope[2] = slope_of(call.huber_slot, s, segment);
        }
        grad_piece(first, n, slope);
      });
    });
    return true;
  }
};

inline bool error_forward(const ErrorCall& call) {
  return ErrorRows(call).forward();
}
inline bool error_backward(const ErrorCall& call) {
  return ErrorRows(call).backward();
}

}  // namespace PK_ISA
}  // namespace prefkern
