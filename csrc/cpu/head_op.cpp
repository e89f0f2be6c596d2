#include "cpu/head_op.h"

#include <cstring>

#include <torch/csrc/stable/ops.h>

#include "checks.h"

namespace prefkern {

using torch::headeronly::ScalarType;

Pool torch_pool() {
  Pool pool;
  pool.threads = int(torch::stable::get_num_threads());
  pool.run = [](int threads, void (*fn)(void*, int), void* arg) {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) fn(arg, int(i));
    });
  };
  return pool;
}

Tensor empty_stats(const Tensor& like, std::initializer_list<int64_t> sizes) {
  const bool wide = like.scalar_type() == ScalarType::Double;
  return torch::stable::new_empty(like, sizes, wide ? ScalarType::Double : ScalarType::Float);
}

void check_done(bool done) {
  STD_TORCH_CHECK(done,
                  "prefkern could not get working memory (16 MiB or less); free some memory.");
}

void check_same_dtype(const Tensor& t, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name,
                  " must have the dtype of hidden; cast it first.");
}

Head make_head(const Tensor& hidden, const Tensor& weight, const OptTensor& bias, int64_t vocab,
               double scale, std::optional<double> softcap, double temperature,
               const char* prefix) {
  const std::string p = prefix;
  Head head;
  head.depth = hidden.dim() == 2 ? hidden.size(1) : -1;
  check_shape(hidden, (p + "hidden").c_str(), {-1, -1});
  check_shape(weight, (p + "weight").c_str(), {vocab, head.depth});
  head.hidden = hidden.const_data_ptr();
  head.weight = weight.const_data_ptr();
  head.hidden_type = check_float(hidden, (p + "hidden").c_str());
  head.weight_type = check_float(weight, (p + "weight").c_str());
  if (bias.has_value()) {
    check_shape(*bias, (p + "bias").c_str(), {vocab});
    head.bias = bias->const_data_ptr();
    head.bias_type = check_float(*bias, (p + "bias").c_str());
  }
  STD_TORCH_CHECK(temperature > 0.0 && (!softcap.has_value() || *softcap > 0.0), p,
                  "temperature and softcap must be > 0.");
  head.scale = scale;
  head.softcap = softcap.value_or(0.0);
  head.temperature = temperature;
  return head;
}

namespace {

void fill(HeadCall& call, const Tensor& hidden, const Tensor& targets, const std::string& stats,
          int models) {
  call.rows = hidden.size(0);
  check_targets(targets, call.rows, call.vocab, call.ignore);
  call.targets = static_cast<const int64_t*>(targets.const_data_ptr());
  call.plan = parse_plan(stats);
  call.saved_rows = models == 1 ? 1 : int(kSavedRows);
  call.pool = torch_pool();
  call.frozen_count = 0;
  StatKind by_slot[kStatCount] = {};
  for (int k = 0; k < kStatCount; ++k) {
    if (call.plan.slot[k] >= 0) by_slot[call.plan.slot[k]] = StatKind(k);
  }
  for (int i = 0; i < call.plan.count; ++i) {
    if (has_gradient(by_slot[i])) call.frozen_kind[call.frozen_count++] = by_slot[i];
  }
}

}  // namespace

Four run_forward(HeadCall& call, const Tensor& hidden, const Tensor& targets,
                 const std::string& stats, int64_t cache_rows, bool frozen, int models) {
  fill(call, hidden, targets, stats, models);
  Tensor out = empty_stats(hidden, {call.plan.count, call.rows});
  Tensor saved = empty_stats(hidden, {call.saved_rows, call.rows});
  Tensor cache = models == 1 ? torch::stable::new_empty(hidden, {cache_rows, call.vocab})
                             : torch::stable::new_empty(hidden, {2, cache_rows, call.vocab});
  Tensor rows = frozen ? empty_stats(hidden, {call.frozen_count, call.rows, call.policy.depth})
                       : empty_stats(hidden, {0});
  call.out = out.mutable_data_ptr();
  call.saved = saved.mutable_data_ptr();
  call.cache = cache.mutable_data_ptr();
  call.cache_rows = cache_rows;
  if (frozen) {
    for (int i = 0; i < call.frozen_count; ++i) {
      const StatKind k = call.frozen_kind[i];
      STD_TORCH_CHECK(
          k == kLogp || k == kLse || k == kZy || k == kEnt || k == kFkl || k == kRkl,
          "frozen rows exist for logp, lse, zy, ent, fkl and rkl only; pass frozen=False.");
    }
    call.frozen = call.frozen_count > 0 && rows.numel() > 0 ? rows.mutable_data_ptr() : nullptr;
  }
  check_done(kernels().head_forward(call));
  return {out, saved, cache, rows};
}

Three run_backward(HeadCall& call, const Kept& kept, const Tensor& hidden, const Tensor& weight,
                   const OptTensor& bias, const Tensor& targets, const std::string& stats,
                   bool need_hidden, bool need_weight, bool need_bias, int models) {
  fill(call, hidden, targets, stats, models);
  const int64_t n = call.rows;
  check_shape(kept.d_out, "d_out", {call.plan.count, n});
  check_shape(kept.out, "out", {call.plan.count, n});
  check_shape(kept.saved, "saved", {call.saved_rows, n});
  check_dense(kept.cache, "cache");
  check_dense(kept.rows, "rows");
  check_same_dtype(kept.cache, "cache", hidden);
  for (const Tensor* t : {&kept.d_out, &kept.out, &kept.saved}) {
    STD_TORCH_CHECK(t->scalar_type() == empty_stats(hidden, {0}).scalar_type(),
                    "d_out, out and saved must have the dtype of the statistics.");
  }
  call.d_out = kept.d_out.const_data_ptr();
  call.out = const_cast<void*>(kept.out.const_data_ptr());
  call.saved = const_cast<void*>(kept.saved.const_data_ptr());
  call.cache = const_cast<void*>(kept.cache.const_data_ptr());
  call.cache_rows = kept.cache.dim() == models + 1 ? kept.cache.size(models - 1) : 0;
  Tensor d_hidden =
      need_hidden ? torch::stable::empty_like(hidden) : torch::stable::new_empty(hidden, {0});
  const bool frozen = kept.rows.dim() == 3;
  need_weight = need_weight && !frozen;
  need_bias = need_bias && !frozen && bias.has_value();
  Tensor d_weight =
      need_weight ? torch::stable::empty_like(weight) : torch::stable::new_empty(weight, {0});
  Tensor d_bias =
      need_bias ? torch::stable::empty_like(*bias) : torch::stable::new_empty(hidden, {0});
  call.d_hidden = need_hidden ? d_hidden.mutable_data_ptr() : nullptr;
  call.d_weight = need_weight ? d_weight.mutable_data_ptr() : nullptr;
  call.d_bias = need_bias ? d_bias.mutable_data_ptr() : nullptr;
  if (frozen) {
    check_shape(kept.rows, "rows", {call.frozen_count, n, call.policy.depth});
    if (!need_hidden || n == 0 || call.policy.depth == 0) return {d_hidden, d_weight, d_bias};
    // Statistics without a gradient leave no rows: any non-null address will do for an empty list.
    call.frozen = const_cast<void*>(call.frozen_count > 0 ? kept.rows.const_data_ptr()
                                                          : kept.out.const_data_ptr());
  }
  if (need_hidden || need_weight || need_bias) check_done(kernels().head_backward(call));
  return {d_hidden, d_weight, d_bias};
}

}  // namespace prefkern
