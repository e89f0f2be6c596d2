#include "cpu/linear_divergence.h"

#include "checks.h"

namespace prefkern {
namespace {

struct Options {
  double scale, ref_scale;
  std::optional<double> softcap, ref_softcap;
  double temperature, ref_temperature;
  int64_t ignore_index;
};

HeadCall make_call(const Tensor& hidden, const Tensor& weight, const Tensor& ref_hidden,
                   const Tensor& ref_weight, const OptTensor& bias, const OptTensor& ref_bias,
                   const OptTensor& aux_hidden, const OptTensor& aux_weight,
                   const OptTensor& values, const OptTensor& values_index, const std::string& stats,
                   const Options& o) {
  HeadCall call;
  call.vocab = weight.size(0);
  call.ignore = o.ignore_index;
  call.policy = make_head(hidden, weight, bias, call.vocab, o.scale, o.softcap, o.temperature, "");
  call.ref = make_head(ref_hidden, ref_weight, ref_bias, call.vocab, o.ref_scale, o.ref_softcap,
                       o.ref_temperature, "ref_");
  call.has_ref = true;
  const int64_t n = hidden.size(0);
  check_shape(ref_hidden, "ref_hidden", {n, -1});
  check_same_dtype(ref_hidden, "ref_hidden", hidden);
  call.has_aux = aux_hidden.has_value();
  if (call.has_aux) {
    STD_TORCH_CHECK(aux_weight.has_value(), "aux_hidden needs aux_weight.");
    call.aux = make_head(*aux_hidden, *aux_weight, std::nullopt, call.vocab, o.ref_scale,
                         o.ref_softcap, o.ref_temperature, "aux_");
    check_shape(*aux_hidden, "aux_hidden", {n, -1});
    check_same_dtype(*aux_hidden, "aux_hidden", hidden);
  }
  if (values.has_value()) {
    call.values_type = check_float(*values, "values");
    call.values = values->const_data_ptr();
    if (values_index.has_value()) {
      call.values_k = values->dim() == 2 ? values->size(1) : -1;
      check_shape(*values, "values", {n, call.values_k});
      check_shape(*values_index, "values_index", {n, call.values_k});
      check_long(*values_index, "values_index");
      call.values_index = static_cast<const int64_t*>(values_index->const_data_ptr());
    } else {
      check_shape(*values, "values", {call.vocab});
    }
  }
  STD_TORCH_CHECK(!parse_plan(stats).has(kEv) || call.has_aux != values.has_value(),
                  "ev needs exactly one source: values, or aux_hidden and aux_weight.");
  STD_TORCH_CHECK(call.vocab <= int64_t(1) << 24 || !parse_plan(stats).has(kBkl),
                  "bkl supports vocabularies up to 2^24 entries.");
  return call;
}

}  // namespace

Four linear_divergence_fwd(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                           const Tensor& ref_hidden, const Tensor& ref_weight,
                           const OptTensor& bias, const OptTensor& ref_bias,
                           const OptTensor& aux_hidden, const OptTensor& aux_weight,
                           const OptTensor& values, const OptTensor& values_index, double scale,
                           double ref_scale, std::optional<double> softcap,
                           std::optional<double> ref_softcap, double temperature,
                           double ref_temperature, int64_t ignore_index, const std::string& stats,
                           int64_t cache_rows, bool frozen) {
  HeadCall call = make_call(
      hidden, weight, ref_hidden, ref_weight, bias, ref_bias, aux_hidden, aux_weight, values,
      values_index, stats,
      {scale, ref_scale, softcap, ref_softcap, temperature, ref_temperature, ignore_index});
  return run_forward(call, hidden, targets, stats, cache_rows, frozen, 2);
}

Three linear_divergence_bwd(const Tensor& d_out, const Tensor& hidden, const Tensor& weight,
                            const Tensor& targets, const Tensor& ref_hidden,
                            const Tensor& ref_weight, const OptTensor& bias,
                            const OptTensor& ref_bias, const OptTensor& aux_hidden,
                            const OptTensor& aux_weight, const OptTensor& values,
                            const OptTensor& values_index, const Tensor& out, const Tensor& saved,
                            const Tensor& cache, const Tensor& rows, double scale, double ref_scale,
                            std::optional<double> softcap, std::optional<double> ref_softcap,
                            double temperature, double ref_temperature, int64_t ignore_index,
                            const std::string& stats, bool need_hidden, bool need_weight,
                            bool need_bias) {
  HeadCall call = make_call(
      hidden, weight, ref_hidden, ref_weight, bias, ref_bias, aux_hidden, aux_weight, values,
      values_index, stats,
      {scale, ref_scale, softcap, ref_softcap, temperature, ref_temperature, ignore_index});
  return run_backward(call, {d_out, out, saved, cache, rows}, hidden, weight, bias, targets, stats,
                      need_hidden, need_weight, need_bias, 2);
}

}  // namespace prefkern
