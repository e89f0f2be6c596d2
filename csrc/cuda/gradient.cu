#include "cuda/gradient.cuh"

#include "cuda/launch.cuh"

namespace prefkern {
namespace {

template <bool TWO>
void gradient(Dtype tile, bool small, const GradientArgs& a, const Stream& stream) {
  const auto shapes = [&] { return tile_shapes(a); };
  const auto start = [&](auto e) {
    using E = decltype(e);
    launch<Gradient<E, TWO, false>>(TWO ? "gradient_two" : "gradient_one", a.m * a.blocks, a,
                                    stream, shapes);
  };
  const auto start_small = [&](auto e) {
    using E = decltype(e);
    launch<Gradient<E, TWO, true>>(TWO ? "gradient_two_small" : "gradient_one_small",
                                   a.m * a.blocks, a, stream, shapes);
  };
  if (small && tile == Dtype::f32) return start_small(float());
  if constexpr (!TWO) {
    if (small && tile == Dtype::bf16) return start_small(Bf16());
  }
  by_element(tile, start);
}

}  // namespace

void gradient_one(Dtype tile, bool small, const GradientArgs& args, const Stream& stream) {
  gradient<false>(tile, small, args, stream);
}
void gradient_two(Dtype tile, bool small, const GradientArgs& args, const Stream& stream) {
  gradient<true>(tile, small, args, stream);
}

}  // namespace prefkern
