// Families of list_rank and their options: names and meaning are those of
// prefkern/backends/list_options.py.
#pragma once

#include <cstdint>

namespace prefkern {

enum class ListFamily { pair, plackett_luce, softmax };
enum class PairWeights { none, labeldiff, lambda };
enum class Ties { strict, stable, breslow };
enum class Target { softmax, sum, none };

struct ListOptions {
  PairWeights weights = PairWeights::none;
  bool linear_gain = false, dcg2 = false, normalize = false, rank_by_score = true,
       tie_average = false;
  bool scale_by_list_size = false, mean_pairs = false, item_gain = false, base2 = false;
  int64_t topn = 0;
  double alpha = 1.0;
  Ties ties = Ties::strict;
  Target target = Target::softmax;
};

}  // namespace prefkern
