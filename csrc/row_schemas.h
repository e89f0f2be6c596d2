// Schemas of the ops on rows, lists and segments, which the CPU and the CUDA library both have.
#pragma once

namespace prefkern {

template <class Library>
void define_row_ops(Library& m) {
  m.def("merge(Tensor fields, Tensor starts, str plan, bool rounded) -> Tensor");
  m.def("norms(Tensor sums, Tensor? top, bool wide) -> Tensor");
  m.def(
      "finish(Tensor sums, Tensor at, Tensor? second, Tensor? top, Tensor targets, Tensor? rows, "
      "Tensor? teacher, int ignore_index, int vocabulary, str plan, bool rounded, bool wide) "
      "-> (Tensor, Tensor)");
  m.def(
      "pull(Tensor d_out, Tensor out, Tensor saved, Tensor targets, Tensor? rows, "
      "int ignore_index, float slope, str plan) -> Tensor");
  m.def(
      "list_rank_fwd(Tensor scores, Tensor labels, Tensor cu_groups, Tensor? topk, str family, "
      "str options) -> (Tensor, Tensor)");
  m.def("segment_sum_fwd(Tensor values, Tensor? weights, Tensor cu_seqlens) -> Tensor");
  m.def(
      "segment_sum_bwd(Tensor d_out, Tensor values, Tensor? weights, Tensor cu_seqlens, "
      "bool need_values, bool need_weights) -> (Tensor, Tensor)");
}

}  // namespace prefkern
