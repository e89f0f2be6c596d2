#include "cpu/error_sum.h"

#include <algorithm>

#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "cpu/head_op.h"
#include "number_parse.h"

namespace prefkern {
namespace {

using torch::headeronly::ScalarType;

// The statistics of a call, from their comma-joined names.
void parse_stats(ErrorCall& call, const std::string& stats) {
  size_t at = 0;
  while (at <= stats.size()) {
    const size_t end = std::min(stats.find(',', at), stats.size());
    const std::string item = stats.substr(at, end - at), name = item.substr(0, item.find(':'));
    int* slot = name == "err"       ? &call.err
                : name == "ref_err" ? &call.ref_err
                : name == "dot"     ? &call.dot
                : name == "huber"   ? &call.huber_slot
                                    : nullptr;
    STD_TORCH_CHECK(slot != nullptr && *slot < 0,
                    "stats must be distinct names among err, ref_err, dot and huber:c, got '",
                    stats, "'.");
    *slot = int(call.stats++);
    if (slot == &call.huber_slot) {
      call.huber = item.size() > 6 ? parse_number<double>("the width of huber", item.substr(6)) : 0;
      STD_TORCH_CHECK(call.huber > 0.0, "huber needs a width > 0, as in 'huber:0.001', got '", item,
                      "'.");
    }
    at = end + 1;
  }
}

ErrorCall make_call(const Tensor& pred, const Tensor& target, const OptTensor& ref,
                    const OptTensor& segments, int64_t num_segments, const std::string& stats,
                    bool reads_ref) {
  ErrorCall call;
  check_shape(pred, "pred", {-1, -1, -1, -1});
  call.samples = pred.size(0), call.outer = pred.size(1), call.frames = pred.size(2),
  call.inner = pred.size(3);
  call.pred = pred.const_data_ptr();
  call.pred_type = check_float(pred, "pred");
  const auto shape = {call.samples, call.outer, call.frames, call.inner};
  check_shape(target, "target", shape);
  call.target = target.const_data_ptr();
  call.target_type = check_float(target, "target");
  parse_stats(call, stats);
  if (ref.has_value()) {
    check_shape(*ref, "ref", shape);
    call.ref = ref->const_data_ptr();
    call.ref_type = check_float(*ref, "ref");
  }
  STD_TORCH_CHECK(ref.has_value() || !(call.dot >= 0 || (reads_ref && call.ref_err >= 0)),
                  "ref_err and dot need ref; pass it.");
  STD_TORCH_CHECK(num_segments >= 1, "num_segments must be >= 1, got ", num_segments, ".");
  call.segment_count = num_segments;
  if (segments.has_value()) {
    check_shape(*segments, "segments", {call.frames});
    STD_TORCH_CHECK(segments->scalar_type() == ScalarType::Int, "segments must be int32.");
    call.segments = static_cast<const int32_t*>(segments->const_data_ptr());
    for (int64_t f = 0; f < call.frames; ++f) {
      STD_TORCH_CHECK(call.segments[f] < num_segments,
                      "segments must be below num_segments = ", num_segments, ", got ",
                      call.segments[f], ".");
    }
  }
  call.pool = torch_pool();
  return call;
}

}  // namespace

Tensor error_sum_fwd(const Tensor& pred, const Tensor& target, const OptTensor& ref,
                     const OptTensor& segments, int64_t num_segments, const std::string& stats) {
  ErrorCall call = make_call(pred, target, ref, segments, num_segments, stats, true);
  Tensor out =
      torch::stable::new_empty(pred, {call.stats, call.samples, num_segments}, ScalarType::Double);
  call.out = static_cast<double*>(out.mutable_data_ptr());
  check_done(kernels().error_forward(call));
  return out;
}

Tensor error_sum_bwd(const Tensor& d_out, const Tensor& pred, const Tensor& target,
                     const OptTensor& ref, const OptTensor& segments, const std::string& stats) {
  STD_TORCH_CHECK(d_out.dim() == 3, "d_out must be [n, B, num_segments], got ", shape_text(d_out),
                  ".");
  ErrorCall call = make_call(pred, target, ref, segments, d_out.size(2), stats, false);
  check_shape(d_out, "d_out", {call.stats, call.samples, call.segment_count});
  STD_TORCH_CHECK(d_out.scalar_type() == ScalarType::Double, "d_out must be float64.");
  Tensor d_pred = torch::stable::empty_like(pred);
  call.d_out = static_cast<const double*>(d_out.const_data_ptr());
  call.d_pred = d_pred.mutable_data_ptr();
  check_done(kernels().error_backward(call));
  return d_pred;
}

}  // namespace prefkern
