// Packs groups of sequences into batches of at most `budget` tokens. Plain C++, no Python, no
// torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

namespace prefkern {

// Batch b holds groups[cu_batches[b]] .. groups[cu_batches[b+1] - 1], ascending within the batch.
struct BatchPlan {
  std::vector<int64_t> groups;      // [G]
  std::vector<int64_t> cu_batches;  // [B+1]
};

// Greedy, never reorders: a batch is closed by the first group that does not fit.
inline BatchPlan plan_in_order(std::span<const int64_t> costs, int64_t budget, int64_t max_groups) {
  BatchPlan plan;
  plan.groups.resize(costs.size());
  std::iota(plan.groups.begin(), plan.groups.end(), int64_t{0});
  plan.cu_batches.push_back(0);
  int64_t used = 0, begin = 0;
  for (int64_t g = 0; g < int64_t(costs.size()); ++g) {
    if (g > begin && (costs[g] > budget - used || g - begin == max_groups)) {
      plan.cu_batches.push_back(g);
      begin = g;
      used = 0;
    }
    used += costs[g];
  }
  if (!costs.empty()) plan.cu_batches.push_back(int64_t(costs.size()));
  return plan;
}

// Room left per batch under a maximum tree, so that "the first batch with room for c" takes
// log2(batches) steps: a million groups are planned in a fraction of a second.
class RoomTree {
 public:
  RoomTree(int64_t batches, int64_t budget) {
    while (leaves_ < batches) leaves_ *= 2;
    room_.assign(size_t(2 * leaves_), budget);
  }
  int64_t room(int64_t batch) const { return room_[size_t(leaves_ + batch)]; }
  void set_room(int64_t batch, int64_t room) {
    int64_t node = leaves_ + batch;
    room_[size_t(node)] = room;
    while (node > 1) {
      node /= 2;
      room_[size_t(node)] = std::max(room_[size_t(2 * node)], room_[size_t(2 * node + 1)]);
    }
  }
  // A batch exists for every cost: there are as many batches as groups and no cost exceeds the
  // budget.
  int64_t first_with(int64_t cost) const {
    int64_t node = 1;
    while (node < leaves_) node = room_[size_t(2 * node)] >= cost ? 2 * node : 2 * node + 1;
    return node - leaves_;
  }

 private:
  int64_t leaves_ = 1;
  std::vector<int64_t> room_;
};

// Largest group first (ties: lower index) into the first open batch with room. Uses at most
// 11/9 of the fewest possible batches (plus one) when max_groups does not bind.
inline BatchPlan plan_first_fit_decreasing(std::span<const int64_t> costs, int64_t budget,
                                           int64_t max_groups) {
  const int64_t count = int64_t(costs.size());
  std::vector<int64_t> order(costs.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return costs[size_t(a)] > costs[size_t(b)]; });
  RoomTree rooms(count, budget);
  std::vector<std::vector<int64_t>> batches;
  for (const int64_t g : order) {
    const int64_t cost = costs[size_t(g)];
    const int64_t b = rooms.first_with(cost);
    if (b == int64_t(batches.size())) batches.emplace_back();
    batches[size_t(b)].push_back(g);
    // A batch that is full by count has room for nothing, not even for an empty group.
    const bool full = int64_t(batches[size_t(b)].size()) == max_groups;
    rooms.set_room(b, full ? -1 : rooms.room(b) - cost);
  }
  BatchPlan plan;
  plan.cu_batches.push_back(0);
  for (auto& batch : batches) {
    std::sort(batch.begin(), batch.end());
    plan.groups.insert(plan.groups.end(), batch.begin(), batch.end());
    plan.cu_batches.push_back(int64_t(plan.groups.size()));
  }
  return plan;
}

}  // namespace prefkern
