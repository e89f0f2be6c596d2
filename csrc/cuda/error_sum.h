// Arguments of error_sum's CUDA kernels and the functions that launch them: raw pointers and
// numbers, no torch and no CUDA types, so that the emulation on a CPU has the very same interface.
#pragma once

#include "cuda/sweep.h"
#include "numerics/scalar.h"

namespace prefkern {

// Elements of a frame that one warp adds up.
constexpr int kErrorChunk = 2048;

struct ErrorArgs {
  const void *pred = nullptr, *target = nullptr, *ref = nullptr;  // [B, O, F, I]; ref may be null
  Dtype pred_type = Dtype::f32, target_type = Dtype::f32, ref_type = Dtype::f32;
  const int32_t* segments = nullptr;  // [F], negative: left out; null: one segment
  int64_t samples = 0, outer = 1, frames = 1, inner = 0;
  int64_t segment_count = 1, stats = 0;
  int err = -1, ref_err = -1, dot = -1, huber_slot = -1;  // rows of out, -1: not wanted
  double huber = 0.0;
  double* out = nullptr;          // [n, B, segments], forward
  double* part = nullptr;         // error_part(args) numbers, forward
  const double* d_out = nullptr;  // [n, B, segments], backward
  void* d_pred = nullptr;         // like pred, backward
  bool quads = false;             // four neighbours of every tensor are one access; set on launch

  PK_HD int64_t frame() const { return outer * inner; }  // elements of one frame
  PK_HD int64_t chunks() const { return (frame() + kErrorChunk - 1) / kErrorChunk; }
  PK_HD int64_t units() const { return samples * frames * chunks(); }
};

// Partial sums, one per statistic and warp.
int64_t error_part(const ErrorArgs& args);

// Each throws std::runtime_error with the kernel's name, the launch and the shapes on a CUDA error.
void error_forward(ErrorArgs args, const Stream& stream);
void error_backward(ErrorArgs args, const Stream& stream);

}  // namespace prefkern
