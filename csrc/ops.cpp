// Registers the CPU kernels under prefkern_native:: (LibTorch stable ABI), nothing else.
#include <torch/csrc/stable/library.h>

#include "cpu/error_sum.h"
#include "cpu/linear_divergence.h"
#include "cpu/linear_logps.h"
#include "cpu/list_rank.h"
#include "cpu/logits_logps.h"
#include "cpu/segment_sum.h"

namespace prefkern {

std::string cpu_isa() {
  return kernels().name;
}

}  // namespace prefkern

STABLE_TORCH_LIBRARY(prefkern_native, m) {
  m.def("cpu_isa() -> str");
  m.def("bench_epilogue(Tensor like, int rows, int cols, int repeats) -> Tensor");
  m.def(
      "linear_logps_fwd(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float scale, "
      "float? softcap, "
      "float temperature, int ignore_index, str stats, int cache_rows, bool frozen) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_logps_bwd(Tensor d_out, Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, "
      "Tensor out, "
      "Tensor saved, Tensor cache, Tensor rows, float scale, float? softcap, float temperature, "
      "int ignore_index, "
      "str stats, bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
  m.def(
      "linear_divergence_fwd(Tensor hidden, Tensor weight, Tensor targets, Tensor ref_hidden, "
      "Tensor ref_weight, "
      "Tensor? bias, Tensor? ref_bias, Tensor? aux_hidden, Tensor? aux_weight, Tensor? values, "
      "Tensor? values_index, float scale, float ref_scale, float? softcap, float? ref_softcap, "
      "float temperature, "
      "float ref_temperature, int ignore_index, str stats, int cache_rows, bool frozen) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_divergence_bwd(Tensor d_out, Tensor hidden, Tensor weight, Tensor targets, Tensor "
      "ref_hidden, "
      "Tensor ref_weight, Tensor? bias, Tensor? ref_bias, Tensor? aux_hidden, Tensor? aux_weight, "
      "Tensor? values, "
      "Tensor? values_index, Tensor out, Tensor saved, Tensor cache, Tensor rows, float scale, "
      "float ref_scale, "
      "float? softcap, float? ref_softcap, float temperature, float ref_temperature, int "
      "ignore_index, str stats, "
      "bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");
  m.def(
      "logits_logps_fwd(Tensor logits, Tensor targets, Tensor? ref_logits, float temperature, int "
      "ignore_index, "
      "str stats) -> (Tensor, Tensor)");
  m.def(
      "logits_logps_bwd(Tensor d_out, Tensor logits, Tensor targets, Tensor? ref_logits, Tensor "
      "out, Tensor saved, "
      "float temperature, int ignore_index, str stats) -> Tensor");
  m.def(
      "error_sum_fwd(Tensor pred, Tensor target, Tensor? ref, Tensor? segments, int num_segments, "
      "str stats) "
      "-> Tensor");
  m.def(
      "error_sum_bwd(Tensor d_out, Tensor pred, Tensor target, Tensor? ref, Tensor? segments, str "
      "stats) "
      "-> Tensor");
  m.def(
      "list_rank_fwd(Tensor scores, Tensor labels, Tensor cu_groups, Tensor? topk, str family, str "
      "options) "
      "-> (Tensor, Tensor)");
  m.def("segment_sum_fwd(Tensor values, Tensor? weights, Tensor cu_seqlens) -> Tensor");
  m.def(
      "segment_sum_bwd(Tensor d_out, Tensor values, Tensor? weights, Tensor cu_seqlens, bool "
      "need_values, "
      "bool need_weights) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(prefkern_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&prefkern::cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(prefkern_native, CPU, m) {
  m.impl("bench_epilogue", TORCH_BOX(&prefkern::bench_epilogue));
  m.impl("linear_logps_fwd", TORCH_BOX(&prefkern::linear_logps_fwd));
  m.impl("linear_logps_bwd", TORCH_BOX(&prefkern::linear_logps_bwd));
  m.impl("linear_divergence_fwd", TORCH_BOX(&prefkern::linear_divergence_fwd));
  m.impl("linear_divergence_bwd", TORCH_BOX(&prefkern::linear_divergence_bwd));
  m.impl("logits_logps_fwd", TORCH_BOX(&prefkern::logits_logps_fwd));
  m.impl("logits_logps_bwd", TORCH_BOX(&prefkern::logits_logps_bwd));
  m.impl("error_sum_fwd", TORCH_BOX(&prefkern::error_sum_fwd));
  m.impl("error_sum_bwd", TORCH_BOX(&prefkern::error_sum_bwd));
  m.impl("list_rank_fwd", TORCH_BOX(&prefkern::list_rank_fwd));
  m.impl("segment_sum_fwd", TORCH_BOX(&prefkern::segment_sum_fwd));
  m.impl("segment_sum_bwd", TORCH_BOX(&prefkern::segment_sum_bwd));
}
