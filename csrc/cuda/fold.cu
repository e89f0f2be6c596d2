#include "cuda/fold.cuh"

#include "cuda/launch.cuh"

namespace prefkern {
namespace {

template <bool TWO>
void fold(Dtype tile, bool small, const FoldArgs& a, const Stream& stream) {
  const auto shapes = [&] { return tile_shapes(a); };
  const auto start = [&](auto e) {
    using E = decltype(e);
    launch<Fold<E, TWO, false>>(TWO ? "fold_two" : "fold_one", a.m * a.blocks, a, stream, shapes);
  };
  const auto start_small = [&](auto e) {
    using E = decltype(e);
    launch<Fold<E, TWO, true>>(TWO ? "fold_two_small" : "fold_one_small", a.m * a.blocks, a, stream,
                               shapes);
  };
  if (small && tile == Dtype::f32) return start_small(float());
  if constexpr (!TWO) {
    if (small && tile == Dtype::bf16) return start_small(Bf16());
  }
  by_element(tile, start);
}

}  // namespace

void fold_one(Dtype tile, bool small, const FoldArgs& args, const Stream& stream) {
  fold<false>(tile, small, args, stream);
}
void fold_two(Dtype tile, bool small, const FoldArgs& args, const Stream& stream) {
  fold<true>(tile, small, args, stream);
}

}  // namespace prefkern
