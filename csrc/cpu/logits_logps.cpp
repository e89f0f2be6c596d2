#include "cpu/logits_logps.h"

#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "cpu/head_op.h"

namespace prefkern {
namespace {

LogitsCall make_call(const Tensor& logits, const Tensor& targets, const OptTensor& ref_logits,
                     double temperature, int64_t ignore_index, const std::string& stats) {
  LogitsCall call;
  check_shape(logits, "logits", {-1, -1});
  call.rows = logits.size(0);
  call.vocab = logits.size(1);
  call.type = check_float(logits, "logits");
  call.logits = logits.const_data_ptr();
  check_targets(targets, call.rows, call.vocab, ignore_index);
  call.targets = static_cast<const int64_t*>(targets.const_data_ptr());
  call.ignore = ignore_index;
  STD_TORCH_CHECK(temperature > 0.0, "temperature must be > 0, got ", temperature, ".");
  call.temperature = temperature;
  call.plan = parse_plan(stats);
  bool two = false;
  for (int k = kRefLogp; k < kStatCount; ++k) two = two || call.plan.slot[k] >= 0;
  STD_TORCH_CHECK(!call.plan.has(kEv), "logits_logps has no 'ev'; use linear_divergence.");
  STD_TORCH_CHECK(!two || ref_logits.has_value(),
                  "these statistics compare two models: pass ref_logits.");
  if (ref_logits.has_value()) {
    check_shape(*ref_logits, "ref_logits", {call.rows, call.vocab});
    check_same_dtype(*ref_logits, "ref_logits", logits);
    call.ref_logits = ref_logits->const_data_ptr();
    call.ref_type = call.type;
  }
  call.pool = torch_pool();
  return call;
}

}  // namespace

std::tuple<Tensor, Tensor> logits_logps_fwd(const Tensor& logits, const Tensor& targets,
                                            const OptTensor& ref_logits, double temperature,
                                            int64_t ignore_index, const std::string& stats) {
  LogitsCall call = make_call(logits, targets, ref_logits, temperature, ignore_index, stats);
  Tensor out = empty_stats(logits, {call.plan.count, call.rows});
  Tensor saved = empty_stats(logits, {kSavedRows, call.rows});
  call.out = out.mutable_data_ptr();
  call.saved = saved.mutable_data_ptr();
  check_done(kernels().logits_forward(call));
  return {out, saved};
}

Tensor logits_logps_bwd(const Tensor& d_out, const Tensor& logits, const Tensor& targets,
                        const OptTensor& ref_logits, const Tensor& out, const Tensor& saved,
                        double temperature, int64_t ignore_index, const std::string& stats) {
  LogitsCall call = make_call(logits, targets, ref_logits, temperature, ignore_index, stats);
  check_shape(d_out, "d_out", {call.plan.count, call.rows});
  check_shape(out, "out", {call.plan.count, call.rows});
  check_shape(saved, "saved", {kSavedRows, call.rows});
  for (const Tensor* t : {&d_out, &out, &saved}) {
    STD_TORCH_CHECK(t->scalar_type() == empty_stats(logits, {0}).scalar_type(),
                    "d_out, out and saved must have the dtype of the statistics.");
  }
  Tensor d_logits = torch::stable::empty_like(logits);
  call.d_out = d_out.const_data_ptr();
  call.out = const_cast<void*>(out.const_data_ptr());
  call.saved = const_cast<void*>(saved.const_data_ptr());
  call.d_logits = d_logits.mutable_data_ptr();
  check_done(kernels().logits_backward(call));
  return d_logits;
}

Tensor bench_epilogue(const Tensor& like, int64_t rows, int64_t cols, int64_t repeats) {
  STD_TORCH_CHECK(rows > 0 && cols > 0 && repeats > 0, "rows, cols and repeats must be > 0.");
  const EpilogueTimes t = kernels().bench_epilogue(rows, cols, repeats);
  Tensor result = torch::stable::new_empty(like, {4}, torch::headeronly::ScalarType::Double);
  double* p = static_cast<double*>(result.mutable_data_ptr());
  p[0] = t.forward, p[1] = t.forward_entropy, p[2] = t.backward, p[3] = t.backward_entropy;
  return result;
}

}  // namespace prefkern
