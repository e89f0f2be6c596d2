#include "cuda/error_sum.cuh"

#include "cuda/launch.cuh"

namespace prefkern {
namespace {

std::string error_shapes(const ErrorArgs& a) {
  return "pred [" + std::to_string(a.samples) + ", " + std::to_string(a.outer) + ", " +
         std::to_string(a.frames) + ", " + std::to_string(a.inner) + "], " +
         std::to_string(a.segment_count) + " segment(s)";
}

bool on_quads(const void* p, Dtype type) {
  return reinterpret_cast<uintptr_t>(p) %
             uintptr_t(type == Dtype::f64 ? 16 : 4 * dtype_bytes(type)) ==
         0;
}

void set_quads(ErrorArgs& a) {
  a.quads = a.inner % 4 == 0 && on_quads(a.pred, a.pred_type) &&
            on_quads(a.target, a.target_type) && on_quads(a.ref, a.ref_type) &&
            on_quads(a.d_pred, a.pred_type);
}

}  // namespace

int64_t error_part(const ErrorArgs& a) {
  return a.stats * a.units();
}

void error_forward(ErrorArgs a, const Stream& stream) {
  set_quads(a);
  const auto shapes = [&] { return error_shapes(a); };
  launch<ErrorSums>("error_sums", a.units(), a, stream, shapes);
  launch<ErrorMerge>("error_merge", a.stats * a.samples * a.segment_count, a, stream, shapes);
}

void error_backward(ErrorArgs a, const Stream& stream) {
  set_quads(a);
  const auto shapes = [&] { return error_shapes(a); };
  launch<ErrorSlopes>("error_slopes", a.units(), a, stream, shapes);
}

}  // namespace prefkern
