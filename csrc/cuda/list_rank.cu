#include "cuda/list_rank.h"

#include "cuda/launch.cuh"
#include "cuda/list_families.cuh"

namespace prefkern {
namespace {

template <class T, class W, class Family>
void start(const char* name, const ListArgs& a, const Stream& stream) {
  launch<ListKernel<T, W, Family>>(name, (a.groups + kListGroups - 1) / kListGroups, a, stream,
                                   [&] {
                                     return "scores [" + std::to_string(a.items) +
                                            "], cu_groups [" + std::to_string(a.groups + 1) + "]";
                                   });
}

}  // namespace

int64_t list_scratch(const ListArgs& a) {
  return a.items > kListLanes ? a.items * kListColumns * kListColumn : 0;
}

void list_rank(const ListArgs& a, const Stream& stream) {
  switch (a.family) {
    case ListFamily::pair:
      return a.doubles ? start<double, double, ListPair>("list_pairs_f64", a, stream)
                       : start<float, float, ListPair>("list_pairs", a, stream);
    case ListFamily::plackett_luce:
      return a.doubles ? start<double, double, ListStages>("list_stages_f64", a, stream)
                       : start<float, float, ListStages>("list_stages", a, stream);
    case ListFamily::softmax:
      return a.doubles ? start<double, double, ListSoftmax>("list_softmax_f64", a, stream)
                       : start<float, double, ListSoftmax>("list_softmax", a, stream);
  }
}

}  // namespace prefkern
