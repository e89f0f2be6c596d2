// error_sum on CUDA: prediction errors reduced per sample and segment, in double; no squared error
// is ever stored. One warp adds up one chunk of one frame in a fixed order; a second kernel adds
// the chunks of each segment's frames in order.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/error_sum.h"
#include "numerics/list.h"

namespace prefkern {

constexpr int kErrorWarps = 8;  // of a CUDA block
constexpr int kErrorStats = 4;  // err, ref_err, dot, huber

// Four neighbours in memory: one access of 8 or 16 bytes, two of 16 for double.
template <class E>
struct alignas(sizeof(E) < 4 ? 8 : 16) Quad {
  E of[4];
};
struct Four {
  double of[4];
};

PK_DEVICE double to_double(double x) {
  return x;
}
template <class E>
PK_DEVICE double to_double(E x) {
  return double(to_float(x));
}
template <class E>
PK_DEVICE Four load_quad(const void* p, int64_t at) {
  const Quad<E> q = *reinterpret_cast<const Quad<E>*>(static_cast<const E*>(p) + at);
  return {{to_double(q.of[0]), to_double(q.of[1]), to_double(q.of[2]), to_double(q.of[3])}};
}
template <class E>
PK_DEVICE Four load_single(const void* p, int64_t at) {
  return {{to_double(static_cast<const E*>(p)[at]), 0.0, 0.0, 0.0}};
}
// Four elements from `at` on, or one and zeros.
PK_DEVICE Four load_elements(const void* p, Dtype type, int64_t at, bool quads) {
  switch (type) {
    case Dtype::f32:
      return quads ? load_quad<float>(p, at) : load_single<float>(p, at);
    case Dtype::bf16:
      return quads ? load_quad<Bf16>(p, at) : load_single<Bf16>(p, at);
    case Dtype::f16:
      return quads ? load_quad<F16>(p, at) : load_single<F16>(p, at);
    case Dtype::f64:
      break;
  }
  return quads ? load_quad<double>(p, at) : load_single<double>(p, at);
}

template <class E>
PK_DEVICE void store_quad(void* p, int64_t at, const Quad<E>& q, bool quads) {
  E* to = static_cast<E*>(p) + at;
  if (quads) {
    *reinterpret_cast<Quad<E>*>(to) = q;
  } else {
    *to = q.of[0];
  }
}
template <class E>
PK_DEVICE void store_short(void* p, int64_t at, const Four& x, bool quads) {
  const uint32_t a = pack2(float(x.of[0]), float(x.of[1]), E()),
                 b = pack2(float(x.of[2]), float(x.of[3]), E());
  store_quad<E>(p, at,
                {{E{uint16_t(a & 0xffff)}, E{uint16_t(a >> 16)}, E{uint16_t(b & 0xffff)},
                  E{uint16_t(b >> 16)}}},
                quads);
}
PK_DEVICE void store_elements(void* p, Dtype type, int64_t at, const Four& x, bool quads) {
  switch (type) {
    case Dtype::f32:
      return store_quad<float>(
          p, at, {{float(x.of[0]), float(x.of[1]), float(x.of[2]), float(x.of[3])}}, quads);
    case Dtype::bf16:
      return store_short<Bf16>(p, at, x, quads);
    case Dtype::f16:
      return store_short<F16>(p, at, x, quads);
    case Dtype::f64:
      return store_quad<double>(p, at, {{x.of[0], x.of[1], x.of[2], x.of[3]}}, quads);
  }
}

// The chunk of one warp, for index = (sample * frames + frame) * chunks + chunk.
struct ErrorPiece {
  int64_t sample, frame, begin, end;  // begin, end: within the O * I elements of the frame
  int segment;                        // negative: left out

  PK_DEVICE ErrorPiece(const ErrorArgs& a, int64_t index) {
    const int64_t chunk = index % a.chunks(), unit = index / a.chunks();
    sample = unit / a.frames, frame = unit % a.frames;
    begin = chunk * kErrorChunk;
    end = begin + kErrorChunk < a.frame() ? begin + kErrorChunk : a.frame();
    segment = a.segments == nullptr ? 0 : a.segments[frame];
  }
  // use(at, n) for a thread's elements: n = 1 or 4 of them from `at` on.
  template <class Use>
  PK_DEVICE void each(const ErrorArgs& a, int t, const Use& use) const {
    const int n = a.quads ? 4 : 1;
    for (int64_t e = begin + t * n; e < end; e += kWarp * n) {
      const int64_t o = a.outer == 1 ? 0 : e / a.inner;
      use(((sample * a.outer + o) * a.frames + frame) * a.inner + (e - o * a.inner), n);
    }
  }
};

struct ErrorSums {
  using Args = ErrorArgs;
  using Threads = Block<kWarp, kErrorWarps>;
  static constexpr int kMinBlocks = 3;
  struct Sums {
    double of[kErrorStats] = {};
  };

  PK_DEVICE static void run(Threads& b, const ErrorArgs& a) {
    if (b.index() >= a.units()) return;
    const ErrorPiece piece(a, b.index());
    if (piece.segment < 0) return;
    const bool with_ref = a.ref_err >= 0 || a.dot >= 0;
    typename Threads::template Local<Sums> sums;
    b.each([&](int t) {
      Sums mine;
      piece.each(a, t, [&](int64_t at, int n) {
        const Four p = load_elements(a.pred, a.pred_type, at, a.quads);
        const Four y = load_elements(a.target, a.target_type, at, a.quads);
        Four q = {};
        if (with_ref) q = load_elements(a.ref, a.ref_type, at, a.quads);
        PK_UNROLL
        for (int k = 0; k < 4; ++k) {
          if (k >= n) continue;
          const double d = p.of[k] - y.of[k], e = y.of[k] - q.of[k];
          mine.of[0] += d * d;
          mine.of[1] += e * e;
          mine.of[2] += p.of[k] * e;
          // sqrt(d^2 + c^2) - c without the difference of two close numbers
          if (a.huber_slot >= 0) {
            mine.of[3] += d * d / (pk_sqrt(d * d + a.huber * a.huber) + a.huber);
          }
        }
      });
      sums[t] = mine;
    });
    PK_UNROLL
    for (int k = 0; k < kErrorStats; ++k) {
      b.warp_all([&](int t) -> double& { return sums[t].of[k]; }, Add());
    }
    b.each([&](int t) {
      if (t != 0) return;
      const int slot[kErrorStats] = {a.err, a.ref_err, a.dot, a.huber_slot};
      PK_UNROLL
      for (int k = 0; k < kErrorStats; ++k) {
        if (slot[k] >= 0) a.part[slot[k] * a.units() + b.index()] = sums[t].of[k];
      }
    });
  }
};

// Adds up the chunks of a segment's frames, for index = (statistic * B + sample) * segments +
// segment.
struct ErrorMerge {
  using Args = ErrorArgs;
  using Threads = Block<kWarp, kErrorWarps>;
  static constexpr int kMinBlocks = 3;

  PK_DEVICE static void run(Threads& b, const ErrorArgs& a) {
    if (b.index() >= a.stats * a.samples * a.segment_count) return;
    const int segment = int(b.index() % a.segment_count);
    const int64_t row = b.index() / a.segment_count, pieces = a.frames * a.chunks();
    const double* part = a.part + row * pieces;
    typename Threads::template Local<double> sum;
    b.each([&](int t) {
      double mine = 0.0;
      for (int64_t i = t; i < pieces; i += kWarp) {
        if (a.segments == nullptr || a.segments[i / a.chunks()] == segment) mine += part[i];
      }
      sum[t] = mine;
    });
    b.warp_all([&](int t) -> double& { return sum[t]; }, Add());
    b.each([&](int t) {
      if (t == 0) a.out[b.index()] = sum[t];
    });
  }
};

struct ErrorSlopes {
  using Args = ErrorArgs;
  using Threads = Block<kWarp, kErrorWarps>;
  static constexpr int kMinBlocks = 3;

  PK_DEVICE static void run(Threads& b, const ErrorArgs& a) {
    if (b.index() >= a.units()) return;
    const ErrorPiece piece(a, b.index());
    const auto slope_of = [&](int slot) {
      return slot < 0 || piece.segment < 0
                 ? 0.0
                 : a.d_out[(slot * a.samples + piece.sample) * a.segment_count + piece.segment];
    };
    const double by_err = slope_of(a.err), by_dot = slope_of(a.dot),
                 by_huber = slope_of(a.huber_slot);
    const bool reads = by_err != 0.0 || by_dot != 0.0 || by_huber != 0.0;
    b.each([&](int t) {
      piece.each(a, t, [&](int64_t at, int) {
        Four g = {};  // what is left out or has no slope: exactly 0, whatever the elements hold
        if (reads) {
          const Four p = load_elements(a.pred, a.pred_type, at, a.quads);
          const Four y = load_elements(a.target, a.target_type, at, a.quads);
          Four q = {};
          if (by_dot != 0.0) q = load_elements(a.ref, a.ref_type, at, a.quads);
          PK_UNROLL
          for (int k = 0; k < 4; ++k) {
            const double d = p.of[k] - y.of[k];
            g.of[k] = weighted(2.0 * by_err, d) + weighted(by_dot, y.of[k] - q.of[k]);
            if (by_huber != 0.0) g.of[k] += by_huber * (d / pk_sqrt(d * d + a.huber * a.huber));
          }
        }
        store_elements(a.d_pred, a.pred_type, at, g, a.quads);
      });
    });
  }
};

}  // namespace prefkern
