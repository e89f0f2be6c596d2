// Runs the CUDA kernels of list_rank block by block on the CPU.
//
//   call FAMILY OPTIONS|- doubles groups items topk reverse    cu, topk, scores, labels
//                                                              -> loss, slope
//   far                                                        items past 2^31 -> "ok"
#include "cuda/list_families.cuh"
#include "emulate.h"
#include "list_parse.h"

static void run_list() {
  std::string family, options;
  bool topk, reverse;
  ListArgs a;
  std::cin >> family >> options >> a.doubles >> a.groups >> a.items >> topk >> reverse;
  std::cin.get();
  const size_t size = a.doubles ? 8 : 4;
  const Bytes cu = read_bytes(4 * (a.groups + 1)), stages = read_bytes(topk ? 8 * a.groups : 0);
  const Bytes scores = read_bytes(size * a.items), labels = read_bytes(size * a.items);
  Bytes loss = unwritten(size * a.groups), slope = unwritten(size * a.items);
  a.cu = reinterpret_cast<const int32_t*>(cu.data());
  a.topk = topk ? reinterpret_cast<const int64_t*>(stages.data()) : nullptr;
  a.scores = scores.data(), a.labels = labels.data();
  a.loss = loss.data(), a.slope = slope.data();
  a.family = parse_list_family(family);
  a.options = parse_list_options(options == "-" ? "" : options);
  Bytes scratch = unwritten(list_scratch(a));
  a.scratch = scratch.data();
  reverse_threads(reverse);
  list_rank(a, Stream());
  write_bytes(loss);
  write_bytes(slope);
}

// Three lists at the end of 2^31 - 1 items, the last of them too large for shared memory.
static void run_far_lists() {
  constexpr int64_t kItems = 0x7fffffff;
  constexpr int32_t kEnd = 0x7fffffff;
  const int32_t cu[] = {kEnd - 1203, kEnd - 1203, kEnd - 1200, kEnd};
  double* scores = far_array<double>(kItems);
  double* labels = far_array<double>(kItems);
  double* slope = far_array<double>(kItems);
  for (int64_t i = cu[0]; i < kItems; ++i) labels[i] = i == cu[1] || i == cu[2] ? 1.0 : 0.0;
  double loss[3];
  ListArgs a;
  a.cu = cu, a.scores = scores, a.labels = labels, a.loss = loss, a.slope = slope;
  a.groups = 3, a.items = kItems, a.doubles = true;
  a.options.mean_pairs = true;
  a.scratch = far_array<unsigned char>(list_scratch(a));
  want(list_scratch(a) > 0x7fffffff, "the memory of large groups is past 2^31 bytes");
  ListKernel<double, double, ListPair>::Threads block;
  ++emulation().epoch;
  LaneTeam<double, double> lanes(block, a, 0, 3);
  ListPair::run(lanes);
  BlockTeam<double, double> alone(block, a, 2);
  ListPair::run(alone);
  const auto near = [](double x, double y) { return x - y < 1e-12 && y - x < 1e-12; };
  want(loss[0] == 0.0 && near(loss[1], kLog2) && near(loss[2], kLog2), "losses of far lists");
  want(slope[cu[2]] == -0.5 && near(slope[kItems - 1], 0.5 / 1199), "slopes of far lists");
}

int main() {
  return serve(run_list, run_far_lists);
}
