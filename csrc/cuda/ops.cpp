// Registers the CUDA kernels under prefkern_cuda:: (LibTorch stable ABI), nothing else.
#include <torch/csrc/stable/library.h>

#if defined(PREFKERN_EMULATED)
#include "cuda/block.h"
#endif
#include "cuda/launched.h"
#include "cuda/list_ops.h"
#include "cuda/row_ops.h"
#include "cuda/tile_ops.h"
#include "row_schemas.h"

STABLE_TORCH_LIBRARY(prefkern_cuda, m) {
  m.def(
      "fold(Tensor x, Tensor? xr, Tensor? xa, Tensor? adv, Tensor? bias, Tensor? ref_bias, "
      "Tensor? aux_bias, Tensor targets, Tensor(a!) fields, Tensor(b!) at, Tensor(c!)? keep, "
      "int v0, int chunk, int ignore, bool small, int rounds_to, str plan, float[] numbers) -> ()");
  m.def(
      "fold_again(Tensor x, Tensor xr, Tensor? bias, Tensor? ref_bias, Tensor targets, "
      "Tensor norms, Tensor(a!) fields, int v0, int chunk, int ignore, str plan, "
      "float[] numbers) -> ()");
  m.def(
      "factor(Tensor x, Tensor? xr, Tensor? bias, Tensor? ref_bias, Tensor targets, "
      "Tensor maxima, Tensor(a!) out, int v0, int ignore, int which, float[] numbers) -> ()");
  m.def(
      "fold_frozen(Tensor x, Tensor? xr, Tensor? bias, Tensor? ref_bias, Tensor targets, "
      "Tensor(a!) fields, Tensor(b!) at, Tensor(c!) maxima, Tensor(d!) totals, Tensor(e!) out, "
      "int v0, int chunk, int ignore, bool small, bool moves, bool log, bool gap, bool cross, "
      "float[] numbers) -> ()");
  m.def("raise_rows(Tensor(a!) totals, Tensor shift, bool log, bool gap, bool cross) -> ()");
  m.def(
      "gradient(Tensor x, Tensor? xr, Tensor? xa, Tensor? adv, Tensor? bias, Tensor? ref_bias, "
      "Tensor? aux_bias, Tensor targets, Tensor coefficients, Tensor(a!) dx, int v0, int ignore, "
      "bool small, bool rounds, float[] numbers) -> ()");
  prefkern::define_row_ops(m);
  m.def("launches(str kernel) -> int");
#if defined(PREFKERN_EMULATED)
  m.def("reverse_threads(bool on) -> ()");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(prefkern_cuda, CompositeExplicitAutograd, m) {
  m.impl("launches", TORCH_BOX(&prefkern::launches_of));
#if defined(PREFKERN_EMULATED)
  m.impl("reverse_threads", TORCH_BOX(&prefkern::reverse_threads));
#endif
}

#if defined(PREFKERN_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(prefkern_cuda, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(prefkern_cuda, CUDA, m) {
#endif
  m.impl("fold", TORCH_BOX(&prefkern::tile_fold));
  m.impl("fold_again", TORCH_BOX(&prefkern::tile_fold_again));
  m.impl("factor", TORCH_BOX(&prefkern::tile_factor));
  m.impl("fold_frozen", TORCH_BOX(&prefkern::tile_fold_frozen));
  m.impl("raise_rows", TORCH_BOX(&prefkern::tile_raise_rows));
  m.impl("gradient", TORCH_BOX(&prefkern::tile_gradient));
  m.impl("merge", TORCH_BOX(&prefkern::cuda_merge));
  m.impl("norms", TORCH_BOX(&prefkern::cuda_norms));
  m.impl("finish", TORCH_BOX(&prefkern::cuda_finish));
  m.impl("pull", TORCH_BOX(&prefkern::cuda_pull));
  m.impl("list_rank_fwd", TORCH_BOX(&prefkern::cuda_list_rank));
  m.impl("segment_sum_fwd", TORCH_BOX(&prefkern::cuda_segment_sum));
  m.impl("segment_sum_bwd", TORCH_BOX(&prefkern::cuda_segment_slopes));
}
