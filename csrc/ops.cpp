// Registers the CPU kernels under prefkern_native:: (LibTorch stable ABI), nothing else.
#include <torch/csrc/stable/library.h>

#include "cpu/arithmetic.h"
#include "cpu/error_sum.h"
#include "cpu/head_op.h"
#include "cpu/list_rank.h"
#include "cpu/segment_sum.h"
#include "row_schemas.h"

namespace prefkern {

std::string cpu_isa() {
  return kernels().name;
}

}  // namespace prefkern

STABLE_TORCH_LIBRARY(prefkern_native, m) {
  m.def("cpu_isa() -> str");
  m.def("bench_epilogue(Tensor like, int rows, int cols, int repeats) -> Tensor");
#define PK_RECORD "Tensor[] tensors, float[] numbers, str plan, int ignore_index"
  m.def("fold(" PK_RECORD ", int kept) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("fold_again(" PK_RECORD ", Tensor norms, Tensor cache) -> Tensor");
  m.def("unfold(" PK_RECORD
        ", Tensor coefficients, Tensor cache, str needed, Tensor? active, Tensor? spread) "
        "-> Tensor[]");
  m.def("forward(" PK_RECORD ", int kept) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("backward(" PK_RECORD
        ", Tensor d_out, Tensor out, Tensor saved, Tensor cache, Tensor factors, str needed) "
        "-> Tensor[]");
#undef PK_RECORD
  prefkern::define_row_ops(m);
  m.def(
      "error_sum_fwd(Tensor pred, Tensor target, Tensor? ref, Tensor? segments, int num_segments, "
      "str stats) "
      "-> Tensor");
  m.def(
      "error_sum_bwd(Tensor d_out, Tensor pred, Tensor target, Tensor? ref, Tensor? segments, str "
      "stats) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(prefkern_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&prefkern::cpu_isa));
}

STABLE_TORCH_LIBRARY_IMPL(prefkern_native, CPU, m) {
  m.impl("bench_epilogue", TORCH_BOX(&prefkern::bench_epilogue));
  m.impl("fold", TORCH_BOX(&prefkern::fold));
  m.impl("fold_again", TORCH_BOX(&prefkern::fold_again));
  m.impl("unfold", TORCH_BOX(&prefkern::unfold));
  m.impl("forward", TORCH_BOX(&prefkern::forward));
  m.impl("backward", TORCH_BOX(&prefkern::backward));
  m.impl("merge", TORCH_BOX(&prefkern::merge));
  m.impl("norms", TORCH_BOX(&prefkern::norms));
  m.impl("finish", TORCH_BOX(&prefkern::finish));
  m.impl("pull", TORCH_BOX(&prefkern::pull));
  m.impl("error_sum_fwd", TORCH_BOX(&prefkern::error_sum_fwd));
  m.impl("error_sum_bwd", TORCH_BOX(&prefkern::error_sum_bwd));
  m.impl("list_rank_fwd", TORCH_BOX(&prefkern::list_rank_fwd));
  m.impl("segment_sum_fwd", TORCH_BOX(&prefkern::segment_sum_fwd));
  m.impl("segment_sum_bwd", TORCH_BOX(&prefkern::segment_sum_bwd));
}
