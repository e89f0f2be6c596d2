// Runs the CUDA kernels of error_sum block by block on the CPU.
//
//   call STATS pred target ref(-1: none; codes of a Dtype) samples outer frames inner segments(0:
//        none) misaligned reverse                              pred, target, ref, segments, d_out
//                                                              -> out, d_pred
//   far                                                        elements past 2^31 -> "ok"
#include "cuda/error_sum.cuh"
#include "emulate.h"
#include "error_parse.h"

static void run_error() {
  std::string stats;
  int types[3], segmented;
  bool misaligned, reverse;
  ErrorArgs a;
  std::cin >> stats >> types[0] >> types[1] >> types[2] >> a.samples >> a.outer >> a.frames >>
      a.inner >> segmented >> misaligned >> reverse;
  std::cin.get();
  const size_t count = a.samples * a.outer * a.frames * a.inner;
  a.segment_count = segmented > 0 ? segmented : 1;
  parse_error_stats(a, stats);
  Bytes tensors[3];
  const void* at[3] = {};
  for (int i = 0; i < 3; ++i) {
    if (types[i] < 0) continue;
    const size_t size = dtype_bytes(Dtype(types[i]));
    // One element in front: four neighbours are then no access of their own.
    tensors[i] = Bytes(misaligned ? size : 0);
    const Bytes body = read_bytes(size * count);
    tensors[i].insert(tensors[i].end(), body.begin(), body.end());
    at[i] = tensors[i].data() + (misaligned ? size : 0);
  }
  a.pred = at[0], a.target = at[1], a.ref = at[2];
  a.pred_type = Dtype(types[0]), a.target_type = Dtype(types[1]);
  if (types[2] >= 0) a.ref_type = Dtype(types[2]);
  const Bytes segments = read_bytes(segmented > 0 ? 4 * a.frames : 0);
  if (segmented > 0) a.segments = reinterpret_cast<const int32_t*>(segments.data());
  const size_t sums = a.stats * a.samples * a.segment_count;
  const Bytes d_out = read_bytes(8 * sums);
  Bytes out = unwritten(8 * sums), part = unwritten(8 * error_part(a));
  Bytes d_pred = unwritten(dtype_bytes(a.pred_type) * count);
  a.out = reinterpret_cast<double*>(out.data());
  a.part = reinterpret_cast<double*>(part.data());
  reverse_threads(reverse);
  error_forward(a, Stream());
  a.d_out = reinterpret_cast<const double*>(d_out.data());
  a.d_pred = d_pred.data();
  error_backward(a, Stream());
  write_bytes(out);
  write_bytes(d_pred);
}

// The last sample of 2^31 + 4000 elements; the others are address space only.
static void run_far_errors() {
  ErrorArgs a;
  a.samples = 4, a.inner = (int64_t(1) << 29) + 1000;
  const int64_t last = a.samples * a.inner - 1;
  float* pred = far_array<float>(last + 1);
  float* d_pred = far_array<float>(last + 1);
  pred[last] = 3.0f;
  double out[4] = {};
  const double d_out[4] = {0, 0, 0, 2};
  parse_error_stats(a, "err");
  a.pred = pred, a.target = far_array<float>(last + 1), a.d_pred = d_pred;
  a.part = far_array<double>(error_part(a)), a.out = out, a.d_out = d_out;
  const auto run = [&]<class Kernel>(int64_t index) {
    typename Kernel::Threads block;
    block.block = index;
    ++emulation().epoch;
    Kernel::run(block, a);
  };
  run.operator()<ErrorSums>(a.units() - 1);
  run.operator()<ErrorSlopes>(a.units() - 1);
  want(a.part[a.units() - 1] == 9.0, "sums of far elements");
  want(d_pred[last] == 12.0f, "slopes of far elements");
}

int main() {
  return serve(run_error, run_far_errors);
}
