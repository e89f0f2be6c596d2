#include "cuda/row_kernels.cuh"

#include "cuda/launch.cuh"

namespace prefkern {
namespace {

template <class K>
void per_row(const char* name, const typename K::Args& a, const Stream& stream) {
  constexpr int kThreads = K::Threads::kThreads;
  launch<K>(name, (a.m + kThreads - 1) / kThreads, a, stream,
            [&] { return "rows [" + std::to_string(a.m) + "]"; });
}

}  // namespace

void merge_rows(const MergeArgs& a, const Stream& stream) {
  launch<MergeRows>("merge_rows", (a.m + kWarp - 1) / kWarp, a, stream, [&] {
    return std::to_string(a.ranges) + " chunks of rows [" + std::to_string(a.m) + "]";
  });
}
void norm_rows(const NormArgs& a, const Stream& stream) {
  per_row<NormRows>("norm_rows", a, stream);
}
void finish_rows(const FinishArgs& a, const Stream& stream) {
  per_row<FinishRows>("finish_rows", a, stream);
}
void pull_rows(const PullArgs& a, const Stream& stream) {
  per_row<PullRows>("pull_rows", a, stream);
}

}  // namespace prefkern
