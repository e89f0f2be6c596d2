// What an op hands to the kernels of one instruction set: raw pointers and sizes, no torch.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "list_options.h"
#include "numerics/online.h"

namespace prefkern {

// Runs fn(arg, i) for i in [0, threads), possibly at the same time.
struct Pool {
  int threads = 1;
  void (*run)(int threads, void (*fn)(void*, int), void* arg) = nullptr;
};

// One model of a call: hidden states and head, or logits that exist already.
struct Model {
  const void *hidden = nullptr, *weight = nullptr;   // [N, depth], [V, depth]
  const void* bias = nullptr;                        // [V] or null
  const void *low_in = nullptr, *low_out = nullptr;  // [N, rank], [V, rank]
  const void* logits = nullptr;                      // [N, V] instead of all of them
  // Hidden states, low_in and logits have the call's working type.
  Dtype weight_type = Dtype::f32, bias_type = Dtype::f32, low_type = Dtype::f32;
  int64_t depth = 0, rank = 0;
  double scale = 1.0, softcap = 0.0, temperature = 1.0;  // softcap 0: none
};

// Where a gradient of the policy goes; a null one is not needed. In the dtype of what it belongs
// to.
struct Gradients {
  void *hidden = nullptr, *weight = nullptr, *bias = nullptr;  // [N, depth], [V, depth], [V]
  void *low_in = nullptr, *low_out = nullptr;                  // [N, rank], [V, rank]
  void* logits = nullptr;                                      // [N, V]
};

// Coefficients of the logit gradient, float (double): those that the plan pulls with, number i of a
// slot at data[slot * by_slot + at[i]].
struct Coefficients {
  const void* data = nullptr;
  int count = 0;
  Coef kind[kCoefs];
  int64_t at[kCoefs] = {}, by_slot = 0;
};

// One call of a head op (prefkern/backends/contract.py), forward or backward. Numbers per row lie
// as prefkern/backends/tables.py says, in slots: one for every token, or for every row that was
// named.
struct HeadCall {
  Dtype working = Dtype::f32;
  bool exact = false;   // the backward reads products in the fold type
  bool frozen = false;  // the forward keeps sums of head rows
  bool tail = false;    // the first sweep writes `chunks`, the backward may skip units
  bool moves = true;    // a statistic has a gradient, so that a backward may follow
  Model model[3];       // policy, reference, third head
  int models = 1;
  int64_t tokens = 0, vocab = 0;
  int64_t slots = 0;                 // M
  const int64_t* targets = nullptr;  // [N]
  const int64_t* rows = nullptr;     // [M] tokens of the slots, rising; null: slot i is token i
  const int64_t* live = nullptr;     // [count] slots that are computed, rising
  int64_t count = 0;
  const void* values = nullptr;  // [V], or where sparse [N, values_k] at values_index
  Dtype values_type = Dtype::f32;
  bool sparse = false;
  const int64_t* values_index = nullptr;
  int64_t values_k = 0;
  StatPlan stats;
  void* cache = nullptr;  // [kept_models, kept, V] products of the first `kept` computed rows
  int64_t kept = 0;
  // the first sweep writes these
  double *sums = nullptr, *at = nullptr;  // [FIELDS, M], [AT, M]
  double* top = nullptr;                  // [2, top_kept, M]: last members of bkl's top set
  int64_t top_kept = 0;
  double* teacher = nullptr;  // [N] or null: sum_k q_k of xent's teacher
  // [factors, M, depth + rank] float (double): relative to maxima, then normalised
  void* factors = nullptr;
  void* chunks = nullptr;  // [tail_models, C, M] float (double): log-sum-exp
  // the second reads and writes
  const void* norms = nullptr;  // [NORMS, M] float (double)
  double* second = nullptr;     // [SECOND, M]
  // the backward reads and writes
  Coefficients coefficients;
  const double* saved_zy = nullptr;  // [M] the target's logit, where a frozen head's is capped
  Gradients d;
  // Of a chunk c, the computed rows whose units the backward computes: picked[picked_at[c]] to
  // before picked[picked_at[c + 1]], rising; null: every row of every chunk.
  const int64_t *picked = nullptr, *picked_at = nullptr;
  const void* spread = nullptr;  // [C, depth + rank + 1] float (double) or null: added to the rows
                                 // of a chunk in d.weight, d.low_out and d.bias
  Pool pool;

  bool given() const { return model[0].logits != nullptr; }
  bool two() const { return models > 1; }
  bool third() const { return models > 2 && stats.has(Stat::ev); }
  FoldPlan fold_plan() const {
    FoldPlan plan;
    plan.stats = stats, plan.two = two(), plan.third = third(), plan.rounded = rounds();
    return plan;
  }
  // The backward reads products rounded to the working type.
  bool rounds() const {
    return moves && dtype_bytes(working) == 2 && !given() && !exact && !frozen;
  }
  // The backward reads the reference's logits.
  bool reads_reference() const {
    return two() && (prefkern::reads_reference(stats) || (third() && stats.grows(Stat::ev)));
  }
  // Models whose products are kept: those that are read again.
  int kept_models() const {
    const bool again = two() && needs_second_sweep(stats) && keeps_products();
    return reads_reference() || again ? 2 : 1;
  }
  int64_t chunk_count() const { return (vocab + kChunk - 1) / kChunk; }
  // Models whose chunk masses the choice of units reads.
  int tail_models() const { return stats.grows(Stat::fkl) ? 2 : 1; }
  // Size of bkl's top set, 0 without it.
  int64_t top_size() const {
    const double k = stats.has(Stat::bkl) ? stats.of(Stat::bkl) : 0.0;
    return k < double(vocab) ? int64_t(k) : vocab;
  }
  // Products in the cache are those of the first sweep, bit for bit.
  bool keeps_products() const { return dtype_bytes(working) != 2 || exact; }
  Dtype cache_type() const {
    return keeps_products() && dtype_bytes(working) != 8 ? Dtype::f32 : working;
  }
  int64_t token(int64_t slot) const { return rows == nullptr ? slot : rows[slot]; }
};

struct ListCall {
  int64_t groups = 0, longest = 0;   // longest: items of the largest group
  const int32_t* cu = nullptr;       // [G+1]
  const int64_t* topk = nullptr;     // [G] or null
  const void* scores = nullptr;      // [S] float or double, as are labels, loss and slope
  const void* labels = nullptr;      // [S], NaN where masked
  void* loss = nullptr;              // [G]
  void* slope = nullptr;             // [S]
  const double* discount = nullptr;  // by 1-based rank; 16 entries longer than the largest group
  Dtype type = Dtype::f32;
  ListFamily family = ListFamily::pair;
  ListOptions options;
  Pool pool;
};

struct ErrorCall {
  int64_t samples = 0, outer = 1, frames = 1, inner = 0;  // [B, O, F, I]
  const void *pred = nullptr, *target = nullptr, *ref = nullptr;
  Dtype pred_type = Dtype::f32, target_type = Dtype::f32, ref_type = Dtype::f32;
  const int32_t* segments = nullptr;  // [F], negative: left out; null: one segment
  int64_t segment_count = 1, stats = 0;
  int err = -1, ref_err = -1, dot = -1, huber_slot = -1;  // rows of out, -1: not wanted
  double huber = 0.0;
  double* out = nullptr;          // [n, B, segments]
  const double* d_out = nullptr;  // like out
  void* d_pred = nullptr;
  Pool pool;
};

// Times the epilogue alone on one tile of `rows` x `cols` fp32 logits that stays in L2: nanoseconds
// per logit of the forward fold (with entropy) and of the gradient.
struct EpilogueTimes {
  double forward, forward_entropy, backward, backward_entropy;
};

struct Kernels {
  const char* name;
  // False when working memory could not be had.
  bool (*head_fold)(const HeadCall&);
  bool (*head_fold_again)(const HeadCall&);
  bool (*head_unfold)(const HeadCall&);
  bool (*frozen_normalise)(const HeadCall&);
  bool (*frozen_gradient)(const HeadCall&);
  bool (*list_rank)(const ListCall&);
  bool (*error_forward)(const ErrorCall&);
  bool (*error_backward)(const ErrorCall&);
  EpilogueTimes (*bench_epilogue)(int64_t rows, int64_t cols, int64_t repeats);
};

// The kernels for this CPU, or those PREFKERN_CPU_ISA names. Throws std::runtime_error with a full
// sentence when that variable names something this CPU or this build lacks.
const Kernels& kernels();

}  // namespace prefkern
