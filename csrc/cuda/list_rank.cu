#include "cuda/list_rank.h"

#include "cuda/launch.cuh"
#include "cuda/list_choices.cuh"
#include "cuda/list_pairs.cuh"

namespace prefkern {
namespace {

template <class W>
constexpr int64_t spill(int64_t items) {
  return items > kListItems<W> ? list_spill_bytes<W>(items) : 0;
}

template <class W, class Work>
void start(const char* name, const ListArgs& a, const Stream& stream) {
  const int64_t blocks = (a.groups + a.groups_per_block - 1) / a.groups_per_block;
  launch<ListKernel<W, Work>>(name, blocks, a, stream, [&] {
    return "scores [" + std::to_string(a.items) + "], cu_groups [" + std::to_string(a.groups + 1) +
           "]";
  });
}

enum class Core { pairs, stages, singles };

Core core_of(ListFamily family) {
  switch (family) {
    case ListFamily::pair:
    case ListFamily::hinge:
    case ListFamily::rank_hinge:
    case ListFamily::approx_ndcg:
      return Core::pairs;
    case ListFamily::plackett_luce:
      return Core::stages;
    case ListFamily::softmax:
    case ListFamily::nca:
    case ListFamily::anchor:
    case ListFamily::set_contrast:
    case ListFamily::pro:
      return Core::singles;
    default:
      throw std::runtime_error("prefkern: list_rank has no CUDA kernel for this family.");
  }
}

}  // namespace

int64_t list_spill(const ListArgs& a) {
  const bool doubles = a.doubles || core_of(a.family) == Core::singles;
  return doubles ? spill<double>(a.items) : spill<float>(a.items);
}

void list_rank(ListArgs a, const Stream& stream) {
  // Sizes of groups are known to the device only. A block gets as many groups as fill 7/8 of its
  // threads at the mean size, and at least one: more, and ragged lists often need a second round.
  const int64_t fill = a.items > 0 ? a.groups * (kListThreads * 7 / 8) / a.items : kListGroups;
  a.groups_per_block = int(fill < 1 ? 1 : fill > kListGroups ? kListGroups : fill);
  switch (core_of(a.family)) {
    case Core::singles:
      return start<double, ListSingles>("list_singles", a, stream);
    case Core::stages:
      return a.doubles ? start<double, ListStages>("list_stages_f64", a, stream)
                       : start<float, ListStages>("list_stages", a, stream);
    case Core::pairs:
      return a.doubles ? start<double, ListPairs>("list_pairs_f64", a, stream)
                       : start<float, ListPairs>("list_pairs", a, stream);
  }
}

}  // namespace prefkern
