// Registers the CUDA kernels under prefkern_cuda:: (LibTorch stable ABI), nothing else.
#include <torch/csrc/stable/library.h>

#if defined(PREFKERN_EMULATED)
#include "cuda/block.h"
#endif
#include "cuda/list_ops.h"
#include "cuda/sweep_ops.h"

STABLE_TORCH_LIBRARY(prefkern_cuda, m) {
  m.def(
      "fold(Tensor z, Tensor? zr, Tensor? za, Tensor? adv, Tensor? bias, Tensor? ref_bias, "
      "Tensor targets, Tensor(a!) fields, Tensor(b!) at_target, Tensor(c!)? keep, "
      "Tensor(d!)? ref_keep, int v0, int chunk, bool small, bool rounds, int working, str stats, "
      "float[] numbers) -> ()");
  m.def(
      "fold_second(Tensor z, Tensor zr, Tensor? bias, Tensor? ref_bias, Tensor targets, "
      "Tensor norms, Tensor(a!) fields, int v0, int chunk, int working, str stats, "
      "float[] numbers) -> ()");
  m.def(
      "seen(Tensor zr, Tensor? ref_bias, Tensor(a!) out, int v0, int working, float[] numbers) "
      "-> ()");
  m.def(
      "factors(Tensor z, Tensor? zr, Tensor? bias, Tensor? ref_bias, Tensor targets, "
      "Tensor maxima, Tensor(a!)? mass, Tensor(b!)? log, Tensor(c!)? ref, Tensor(d!)? cross, "
      "int v0, float[] numbers) -> ()");
  m.def("raise_rows(Tensor(a!) totals, Tensor shift, bool log, bool ref, bool cross) -> ()");
  m.def(
      "gradient(Tensor z, Tensor? zr, Tensor? za, Tensor? adv, Tensor? bias, Tensor? ref_bias, "
      "Tensor targets, Tensor coefficients, Tensor(a!) dx, int v0, bool small, "
      "float[] numbers) -> ()");
  m.def(
      "logits_fwd(Tensor logits, Tensor targets, Tensor? ref_logits, Tensor? top, "
      "float temperature, int ignore_index, str stats) -> (Tensor, Tensor)");
  m.def(
      "logits_bwd(Tensor d_out, Tensor logits, Tensor targets, Tensor? ref_logits, Tensor out, "
      "Tensor saved, float temperature, int ignore_index, str stats) -> Tensor");
  m.def(
      "list_rank_fwd(Tensor scores, Tensor labels, Tensor cu_groups, Tensor? topk, str family, "
      "str options) -> (Tensor, Tensor)");
  m.def("segment_sum_fwd(Tensor values, Tensor? weights, Tensor cu_seqlens) -> Tensor");
  m.def(
      "segment_sum_bwd(Tensor d_out, Tensor values, Tensor? weights, Tensor cu_seqlens, "
      "bool need_values, bool need_weights) -> (Tensor, Tensor)");
#if defined(PREFKERN_EMULATED)
  m.def("reverse_threads(bool on) -> ()");
#endif
}

#if defined(PREFKERN_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(prefkern_cuda, CompositeExplicitAutograd, m) {
  m.impl("reverse_threads", TORCH_BOX(&prefkern::reverse_threads));
}
STABLE_TORCH_LIBRARY_IMPL(prefkern_cuda, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(prefkern_cuda, CUDA, m) {
#endif
  m.impl("fold", TORCH_BOX(&prefkern::tile_fold));
  m.impl("fold_second", TORCH_BOX(&prefkern::tile_second));
  m.impl("seen", TORCH_BOX(&prefkern::tile_seen));
  m.impl("factors", TORCH_BOX(&prefkern::tile_factors));
  m.impl("raise_rows", TORCH_BOX(&prefkern::tile_raise_rows));
  m.impl("gradient", TORCH_BOX(&prefkern::tile_gradient));
  m.impl("logits_fwd", TORCH_BOX(&prefkern::logits_fwd));
  m.impl("logits_bwd", TORCH_BOX(&prefkern::logits_bwd));
  m.impl("list_rank_fwd", TORCH_BOX(&prefkern::cuda_list_rank));
  m.impl("segment_sum_fwd", TORCH_BOX(&prefkern::cuda_segment_sum));
  m.impl("segment_sum_bwd", TORCH_BOX(&prefkern::cuda_segment_slopes));
}
