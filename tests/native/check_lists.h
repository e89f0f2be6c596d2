// list_rank's kernels under the sanitizers: groups in lanes against the same groups alone.
#pragma once

#include <cmath>
#include <vector>

struct Lists {
  std::vector<double> scores, labels, loss, slope;
  std::vector<int32_t> cu{0};
  std::vector<double> discount;
  void add(int64_t items) {
    for (int64_t i = 0; i < items; ++i) {
      scores.push_back(uniform() < 0.2 ? 0.0 : 6.0 * uniform() - 3.0);
      labels.push_back(uniform() < 0.2 ? __builtin_nan("") : std::floor(5.0 * uniform()) / 4.0);
    }
    cu.push_back(int32_t(scores.size()));
  }
  void run(ListCall call) {
    call.groups = int64_t(cu.size()) - 1;
    for (size_t g = 0; g + 1 < cu.size(); ++g) {
      call.longest = std::max<int64_t>(call.longest, cu[g + 1] - cu[g]);
    }
    discount.assign(size_t(call.longest + 16), 0.0);
    for (int64_t r = 1; r <= call.longest + 1; ++r) discount[size_t(r)] = 1 / std::log1p(double(r));
    loss.assign(size_t(call.groups), -1.0);
    slope.assign(scores.size(), -1.0);
    call.cu = cu.data(), call.scores = scores.data(), call.labels = labels.data();
    call.loss = loss.data(), call.slope = slope.data(), call.discount = discount.data();
    call.type = Dtype::f64;
    REQUIRE(list_rank(call), "family %d", int(call.family));
  }
};

static void check_close(double got, double want, int family, size_t at) {
  const bool near = std::fabs(got - want) <= 1e-11 * (1.0 + std::fabs(want));
  REQUIRE(near, "family %d, number %zu: %.17g against %.17g", family, at, got, want);
}

static void check_lists() {
  for (int family = 0; family <= int(ListFamily::softmax); ++family) {
    for (int variant = 0; variant < 3; ++variant) {
      ListCall call;
      call.family = ListFamily(family);
      call.options.weights = PairWeights(variant);
      call.options.ties = Ties(variant);
      call.options.normalize = variant == 2;
      Lists all;
      for (int64_t items : {16, 16, 15, 16, 16, 16, 12, 16, 0, 1, 2, 3, 0, 5, 40, 33})
        all.add(items);
      all.run(call);
      for (size_t g = 0; g + 1 < all.cu.size(); ++g) {
        const size_t begin = size_t(all.cu[g]), end = size_t(all.cu[g + 1]);
        Lists alone;
        alone.scores.assign(all.scores.begin() + begin, all.scores.begin() + end);
        alone.labels.assign(all.labels.begin() + begin, all.labels.begin() + end);
        alone.cu.push_back(int32_t(end - begin));
        alone.run(call);
        check_close(all.loss[g], alone.loss[0], family, g);
        for (size_t i = begin; i < end; ++i) {
          check_close(all.slope[i], alone.slope[i - begin], family, i);
        }
      }
    }
  }
}
