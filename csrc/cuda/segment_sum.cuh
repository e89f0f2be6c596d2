// segment_sum on CUDA: weighted double sums over the tokens of each sequence, in one pass.
//
// A sequence is cut into chunks of kSegmentChunk tokens counted from its own start, one warp per
// chunk, so that long sequences are shared and a sum has the same bits wherever its sequence lies
// in the batch. A warp adds in a fixed order; the chunks of a long sequence are added in order by
// a second kernel, which runs only where some sequence could be longer than one chunk.
//
// Lengths are known to the device only. Sequence s owns the places from (cu[s] - cu[0]) / C + s on,
// which is room enough for its ceil(length / C) chunks, and N / C + S places hold all of them; a
// place without tokens has nothing to do.
//
// Token weights (completion mask, LD-DPO's tail, SparsePO's masks, TGDPO's guidance) are one number
// per token, applied while summing. Their formulas are not evaluated here, since that would move as
// many bytes: TGDPO's three inputs would be read forward and backward, 24 bytes per token, where
// making the weight takes 16 and reading it twice 8; learned masks exist as tensors anyway; LD-DPO
// needs the number of scored tokens before each one, a pass of its own.
//
// Loads are one element per lane, 128 bytes per warp: sequences start anywhere, and an element of
// every row in turn keeps up to 16 loads per lane on their way.
#pragma once

#include "cuda/block.h"
#include "cuda/segment_sum.h"
#include "numerics/scalar.h"

namespace prefkern {

#if defined(__CUDACC__)
#define PK_UNROLL_4 _Pragma("unroll 4")
#else
#define PK_UNROLL_4
#endif

constexpr int kSegmentRows = 4;   // rows of values that share one read of their weights
constexpr int kSegmentWarps = 8;  // of a CUDA block

// The piece of a sequence at one place.
struct SegmentPiece {
  int64_t sequence, begin, end;  // end <= begin: a place without tokens
  bool lead, whole;              // the first place of its sequence; all of the sequence
};
PK_DEVICE int64_t segment_first_place(const int32_t* cu, int64_t s) {
  return (cu[s] - cu[0]) / kSegmentChunk + s;
}
PK_DEVICE SegmentPiece segment_piece(const SegmentArgs& a, int64_t place) {
  int64_t low = 0, high = a.s;  // the last sequence whose first place is at or before `place`
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (segment_first_place(a.cu, middle) <= place ? low : high) = middle;
  }
  const int64_t first = a.cu[low], last = a.cu[low + 1];
  const int64_t chunk = place - segment_first_place(a.cu, low);
  const int64_t begin = first + chunk * kSegmentChunk;
  const int64_t end = begin + kSegmentChunk < last ? begin + kSegmentChunk : last;
  return {low, begin, end, chunk == 0, last - first <= kSegmentChunk};
}

PK_DEVICE double segment_weight(const SegmentArgs& a, int64_t at) {
  return a.weight_doubles ? static_cast<const double*>(a.weights)[at]
                          : double(static_cast<const float*>(a.weights)[at]);
}

// Partial sums of kSegmentRows rows over one piece, for index = rows' place * places + place.
template <class V>
struct SegmentSums {
  using Args = SegmentArgs;
  using Threads = Block<kWarp, kSegmentWarps>;
  static constexpr int kMinBlocks = 2;  // up to 128 registers: loads of four rows under way
  struct Sums {
    double of[kSegmentRows] = {};
  };

  PK_DEVICE static void run(Threads& b, const SegmentArgs& a) {
    const int64_t first_row = b.index() / a.places() * kSegmentRows, place = b.index() % a.places();
    if (first_row >= a.m) return;  // warps that fill up the last block
    const SegmentPiece p = segment_piece(a, place);
    if (p.begin >= p.end && !p.lead) return;  // an empty sequence still has a sum, 0
    const V* values = static_cast<const V*>(a.values) + first_row * a.n;
    const int rows = int(a.m - first_row < kSegmentRows ? a.m - first_row : kSegmentRows);
    typename Threads::template Local<Sums> sums;
    b.each([&](int t) {
      Sums mine;
      const auto fold = [&](const auto& weight_of) {
        PK_UNROLL_4
        for (int64_t i = p.begin + t; i < p.end; i += kWarp) {
          PK_UNROLL
          for (int r = 0; r < kSegmentRows; ++r) {
            if (r >= rows) continue;
            // A weight of 0 hides any value.
            mine.of[r] += weighted(weight_of(r, i), double(values[r * a.n + i]));
          }
        }
      };
      if (a.weights == nullptr) {
        fold([](int, int64_t) { return 1.0; });
      } else if (a.weights_per_row) {
        fold([&](int r, int64_t i) { return segment_weight(a, (first_row + r) * a.n + i); });
      } else {
        fold([&](int, int64_t i) { return segment_weight(a, i); });
      }
      sums[t] = mine;
    });
    PK_UNROLL
    for (int r = 0; r < kSegmentRows; ++r) {
      b.warp_all([&](int t) -> double& { return sums[t].of[r]; }, Add());
    }
    b.each([&](int t) {
      if (t != 0) return;
      for (int r = 0; r < kSegmentRows; ++r) {
        if (r >= rows) continue;
        double* to = p.whole ? a.out + (first_row + r) * a.s + p.sequence
                             : a.part + (first_row + r) * a.places() + place;
        *to = sums[t].of[r];
      }
    });
  }
};

// Adds up the pieces of sequences longer than one chunk, for index = row * S + sequence.
struct SegmentMerge {
  using Args = SegmentArgs;
  using Threads = Block<kWarp, kSegmentWarps>;
  static constexpr int kMinBlocks = 3;

  PK_DEVICE static void run(Threads& b, const SegmentArgs& a) {
    if (b.index() >= a.m * a.s) return;
    const int64_t row = b.index() / a.s, sequence = b.index() % a.s;
    const int64_t length = int64_t(a.cu[sequence + 1]) - a.cu[sequence];
    if (length <= kSegmentChunk) return;
    const double* part = a.part + row * a.places() + segment_first_place(a.cu, sequence);
    const int64_t pieces = (length + kSegmentChunk - 1) / kSegmentChunk;
    typename Threads::template Local<double> sum;
    b.each([&](int t) {
      double mine = 0.0;
      for (int64_t k = t; k < pieces; k += kWarp) mine += part[k];
      sum[t] = mine;
    });
    b.warp_all([&](int t) -> double& { return sum[t]; }, Add());
    b.each([&](int t) {
      if (t == 0) a.out[b.index()] = sum[t];
    });
  }
};

// Gradients of the tokens of one piece, for index = place.
template <class V>
struct SegmentSlopes {
  using Args = SegmentArgs;
  using Threads = Block<kWarp, kSegmentWarps>;
  static constexpr int kMinBlocks = 3;

  PK_DEVICE static void run(Threads& b, const SegmentArgs& a) {
    if (b.index() >= a.places()) return;
    const SegmentPiece p = segment_piece(a, b.index());
    const int64_t before = a.cu[0], after = a.cu[a.s], outside = before + (a.n - after);
    b.each([&](int t) {
      for (int64_t i = p.begin + t; i < p.end; i += kWarp) token(a, p.sequence, i);
      // Tokens before the first boundary and behind the last, shared by all warps.
      for (int64_t k = b.index() * kWarp + t; k < outside; k += a.places() * kWarp) {
        no_sequence(a, k < before ? k : after + (k - before));
      }
    });
  }

  PK_DEVICE static void no_sequence(const SegmentArgs& a, int64_t i) {
    if (a.d_weights != nullptr && !a.weights_per_row) put_weight(a, i, 0.0);
    for (int64_t row = 0; row < a.m; ++row) {
      if (a.d_values != nullptr) static_cast<V*>(a.d_values)[row * a.n + i] = V(0);
      if (a.d_weights != nullptr && a.weights_per_row) put_weight(a, row * a.n + i, 0.0);
    }
  }

  PK_DEVICE static void token(const SegmentArgs& a, int64_t sequence, int64_t i) {
    const V* values = static_cast<const V*>(a.values);
    double w = 1.0, shared = 0.0;  // shared: gradient of a weight that serves every row
    if (a.weights != nullptr && !a.weights_per_row) w = segment_weight(a, i);
    PK_UNROLL_4
    for (int64_t row = 0; row < a.m; ++row) {
      const double d = a.d_out[row * a.s + sequence];
      const int64_t at = row * a.n + i;
      if (a.d_values != nullptr) {
        if (a.weights_per_row) w = segment_weight(a, at);
        static_cast<V*>(a.d_values)[at] = V(d * w);
      }
      if (a.d_weights != nullptr) {
        const double slope = weighted(d, double(values[at]));
        if (a.weights_per_row) {
          put_weight(a, at, slope);
        } else {
          shared += slope;
        }
      }
    }
    if (a.d_weights != nullptr && !a.weights_per_row) put_weight(a, i, shared);
  }

  PK_DEVICE static void put_weight(const SegmentArgs& a, int64_t at, double slope) {
    if (a.weight_doubles) {
      static_cast<double*>(a.d_weights)[at] = slope;
    } else {
      static_cast<float*>(a.d_weights)[at] = float(slope);
    }
  }
};

}  // namespace prefkern
