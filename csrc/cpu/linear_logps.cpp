#include "cpu/linear_logps.h"

namespace prefkern {
namespace {

HeadCall make_call(const Tensor& hidden, const Tensor& weight, const OptTensor& bias, double scale,
                   std::optional<double> softcap, double temperature, int64_t ignore_index) {
  HeadCall call;
  call.vocab = weight.size(0);
  call.ignore = ignore_index;
  call.policy = make_head(hidden, weight, bias, call.vocab, scale, softcap, temperature, "");
  return call;
}

}  // namespace

Four linear_logps_fwd(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                      const OptTensor& bias, double scale, std::optional<double> softcap,
                      double temperature, int64_t ignore_index, const std::string& stats,
                      int64_t cache_rows, bool frozen) {
  HeadCall call = make_call(hidden, weight, bias, scale, softcap, temperature, ignore_index);
  return run_forward(call, hidden, targets, stats, cache_rows, frozen, 1);
}

Three linear_logps_bwd(const Tensor& d_out, const Tensor& hidden, const Tensor& weight,
                       const Tensor& targets, const OptTensor& bias, const Tensor& out,
                       const Tensor& saved, const Tensor& cache, const Tensor& rows, double scale,
                       std::optional<double> softcap, double temperature, int64_t ignore_index,
                       const std::string& stats, bool need_hidden, bool need_weight,
                       bool need_bias) {
  HeadCall call = make_call(hidden, weight, bias, scale, softcap, temperature, ignore_index);
  return run_backward(call, {d_out, out, saved, cache, rows}, hidden, weight, bias, targets, stats,
                      need_hidden, need_weight, need_bias, 1);
}

}  // namespace prefkern
