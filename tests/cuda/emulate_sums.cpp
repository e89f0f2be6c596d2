// Runs the CUDA kernels of segment_sum block by block on the CPU.
//
//   call doubles weights(0 none, 1 float, 2 double) per_row m n s reverse
//                                                              cu, values, weights, d_out
//                                                              -> out, d_values, d_weights
//   far                                                        elements past 2^31 -> "ok"
#include "cuda/segment_sum.cuh"
#include "emulate.h"

static void run_segment() {
  int weights;
  bool reverse;
  SegmentArgs a;
  std::cin >> a.doubles >> weights >> a.weights_per_row >> a.m >> a.n >> a.s >> reverse;
  std::cin.get();
  const size_t size = a.doubles ? 8 : 4, count = a.m * a.n, weight_size = weights == 2 ? 8 : 4;
  const size_t weight_count = weights == 0 ? 0 : a.weights_per_row ? count : a.n;
  const Bytes cu = read_bytes(4 * (a.s + 1)), values = read_bytes(size * count);
  const Bytes w = read_bytes(weight_size * weight_count), d_out = read_bytes(8 * a.m * a.s);
  Bytes out = unwritten(8 * a.m * a.s), d_values = unwritten(size * count);
  Bytes d_weights = unwritten(weight_size * weight_count), part = unwritten(8 * segment_part(a));
  a.cu = reinterpret_cast<const int32_t*>(cu.data());
  a.values = values.data();
  a.weights = weights == 0 ? nullptr : w.data();
  a.weight_doubles = weights == 2;
  a.out = reinterpret_cast<double*>(out.data());
  a.part = reinterpret_cast<double*>(part.data());
  reverse_threads(reverse);
  segment_forward(a, Stream());
  a.d_out = reinterpret_cast<const double*>(d_out.data());
  a.d_values = d_values.data();
  a.d_weights = weights == 0 ? nullptr : d_weights.data();
  segment_backward(a, Stream());
  write_bytes(out);
  write_bytes(d_values);
  write_bytes(d_weights);
}

// The last 700 tokens of 3 rows of 2^30.
static void run_far_segment() {
  constexpr int64_t kN = int64_t(1) << 30, kLast = 700;
  const int32_t cu[] = {0, int32_t(kN - kLast), int32_t(kN)};
  float* values = far_array<float>(3 * kN);
  float* d_values = far_array<float>(3 * kN);
  for (int64_t r = 0; r < 3; ++r) {
    for (int64_t i = kN - kLast; i < kN; ++i) values[r * kN + i] = float(r + 1);
  }
  SegmentArgs a;
  a.m = 3, a.n = kN, a.s = 2, a.cu = cu, a.values = values, a.d_values = d_values;
  double out[6] = {}, d_out[6] = {0, 1, 0, 2, 0, 3};
  a.out = out, a.part = far_array<double>(segment_part(a)), a.d_out = d_out;
  const auto run = [&]<class Kernel>(int64_t index) {
    typename Kernel::Threads block;
    block.block = index;
    ++emulation().epoch;
    Kernel::run(block, a);
  };
  for (int64_t place = segment_first_place(cu, 1); place < a.places(); ++place) {
    run.operator()<SegmentSums<float>>(place);
    run.operator()<SegmentSlopes<float>>(place);
  }
  for (int64_t r = 0; r < 3; ++r) run.operator()<SegmentMerge>(2 * r + 1);
  for (int64_t r = 0; r < 3; ++r) {
    want(out[2 * r + 1] == 700.0 * double(r + 1), "sums of far tokens");
    want(d_values[r * kN + kN - 1] == float(r + 1), "slopes of far tokens");
  }
}

int main() {
  return serve(run_segment, run_far_segment);
}
