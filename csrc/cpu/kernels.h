// What an op hands to the kernels of one instruction set: raw pointers and sizes, no torch.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "list_options.h"
#include "numerics/stats.h"

namespace prefkern {

// Runs fn(arg, i) for i in [0, threads), possibly at the same time.
struct Pool {
  int threads = 1;
  void (*run)(int threads, void (*fn)(void*, int), void* arg) = nullptr;
};

struct Head {
  const void* hidden = nullptr;  // [N, depth]
  const void* weight = nullptr;  // [V, depth]
  const void* bias = nullptr;    // [V] or null
  Dtype hidden_type = Dtype::f32, weight_type = Dtype::f32, bias_type = Dtype::f32;
  int64_t depth = 0;
  double scale = 1.0, softcap = 0.0, temperature = 1.0;  // softcap 0: none
};

struct HeadCall {
  int64_t rows = 0, vocab = 0;
  const int64_t* targets = nullptr;  // [N]
  int64_t ignore = -100;
  Head policy, ref, aux;
  bool has_ref = false, has_aux = false;
  const void* values = nullptr;  // [V], or [N, values_k] with values_index
  Dtype values_type = Dtype::f32;
  const int64_t* values_index = nullptr;
  int64_t values_k = 0;
  StatPlan plan;
  void* out = nullptr;    // [n, N] float (double for an fp64 hidden)
  void* saved = nullptr;  // [saved_rows, N]
  int saved_rows = 1;
  void* cache = nullptr;  // [models, cache_rows, V] in hidden's dtype
  int64_t cache_rows = 0;
  void* frozen = nullptr;  // [frozen_count, N, D] float (double)
  int frozen_count = 0;
  StatKind frozen_kind[kStatCount] = {};
  // backward only; a null gradient is not needed
  const void* d_out = nullptr;
  void* d_hidden = nullptr;
  void* d_weight = nullptr;
  void* d_bias = nullptr;
  Pool pool;
};

struct LogitsCall {
  int64_t rows = 0, vocab = 0;
  const void* logits = nullptr;      // [N, V]
  const void* ref_logits = nullptr;  // [N, V] or null
  Dtype type = Dtype::f32, ref_type = Dtype::f32;
  const int64_t* targets = nullptr;
  int64_t ignore = -100;
  double temperature = 1.0;
  StatPlan plan;
  void* out = nullptr;    // [n, N]
  void* saved = nullptr;  // [kSavedRows, N]
  const void* d_out = nullptr;
  void* d_logits = nullptr;  // [N, V] in the logits' dtype
  Pool pool;
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
  bool (*head_forward)(const HeadCall&);
  bool (*head_backward)(const HeadCall&);
  bool (*logits_forward)(const LogitsCall&);
  bool (*logits_backward)(const LogitsCall&);
  bool (*list_rank)(const ListCall&);
  bool (*error_forward)(const ErrorCall&);
  bool (*error_backward)(const ErrorCall&);
  EpilogueTimes (*bench_epilogue)(int64_t rows, int64_t cols, int64_t repeats);
};

// The kernels for this CPU, or those PREFKERN_CPU_ISA names. Throws std::runtime_error with a full
// sentence when that variable names something this CPU or this build lacks.
const Kernels& kernels();

}  // namespace prefkern
