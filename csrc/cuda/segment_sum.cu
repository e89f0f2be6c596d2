#include "cuda/segment_sum.cuh"

#include "cuda/launch.cuh"

namespace prefkern {
namespace {

std::string segment_shapes(const SegmentArgs& a) {
  return "values [" + std::to_string(a.m) + ", " + std::to_string(a.n) + "], cu_seqlens [" +
         std::to_string(a.s + 1) + "]";
}

template <class V>
void forward(const SegmentArgs& a, const Stream& stream) {
  const auto shapes = [&] { return segment_shapes(a); };
  const int64_t row_blocks = (a.m + kSegmentRows - 1) / kSegmentRows;
  launch<SegmentSums<V>>(a.doubles ? "segment_sums_f64" : "segment_sums", row_blocks * a.places(),
                         a, stream, shapes);
  if (segment_part(a) > 0) {
    launch<SegmentMerge>("segment_merge", a.m * a.s, a, stream, shapes);
  }
}

}  // namespace

int64_t segment_part(const SegmentArgs& a) {
  return a.n > kSegmentChunk ? a.m * a.places() : 0;
}

void segment_forward(const SegmentArgs& a, const Stream& stream) {
  if (a.s == 0) return;
  return a.doubles ? forward<double>(a, stream) : forward<float>(a, stream);
}

void segment_backward(const SegmentArgs& a, const Stream& stream) {
  if (a.s == 0) return;
  const auto shapes = [&] { return segment_shapes(a); };
  if (a.doubles) {
    launch<SegmentSlopes<double>>("segment_slopes_f64", a.places(), a, stream, shapes);
  } else {
    launch<SegmentSlopes<float>>("segment_slopes", a.places(), a, stream, shapes);
  }
}

}  // namespace prefkern
