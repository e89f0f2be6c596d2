// Arguments of segment_sum's CUDA kernels and the functions that launch them: raw pointers and
// numbers, no torch and no CUDA types, so that the emulation on a CPU has the very same interface.
#pragma once

#include "cuda/sweep.h"
#include "numerics/scalar.h"

namespace prefkern {

// Tokens of a sequence that one warp adds up.
constexpr int kSegmentChunk = 512;

struct SegmentArgs {
  const int32_t* cu = nullptr;    // [S+1]
  const void* values = nullptr;   // [m, N] float or double
  const void* weights = nullptr;  // [N], [m, N] or null; float or double
  const double* d_out = nullptr;  // [m, S], backward
  double* out = nullptr;          // [m, S], forward
  double* part = nullptr;         // segment_part(args) numbers, forward
  void* d_values = nullptr;       // like values, or null; backward
  void* d_weights = nullptr;      // like weights, or null; backward
  int64_t m = 0, n = 0, s = 0;
  bool doubles = false, weight_doubles = false, weights_per_row = false;
  PK_HD int64_t places() const { return n / kSegmentChunk + s; }
};

// Partial sums of sequences longer than one chunk: how many numbers; 0 where none can be.
int64_t segment_part(const SegmentArgs& args);

// Each throws std::runtime_error with the kernel's name, the launch and the shapes on a CUDA error.
void segment_forward(const SegmentArgs& args, const Stream& stream);
void segment_backward(const SegmentArgs& args, const Stream& stream);

}  // namespace prefkern
