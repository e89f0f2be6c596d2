#include "cuda/fold.cuh"

#include "cuda/launch.cuh"

namespace prefkern {
namespace {

template <bool TWO>
void fold(Dtype tile, bool small, const FoldArgs& a, const Stream& stream) {
  const auto shapes = [&] { return tile_shapes(a); };
  by_element(tile, [&](auto e) {
    using E = decltype(e);
    if (small) {
      launch<Fold<E, TWO, true>>(TWO ? "fold_two_small" : "fold_one_small", a.m * a.blocks, a,
                                 stream, shapes);
    } else {
      launch<Fold<E, TWO, false>>(TWO ? "fold_two" : "fold_one", a.m * a.blocks, a, stream, shapes);
    }
  });
}

}  // namespace

void fold_one(Dtype tile, bool small, const FoldArgs& args, const Stream& stream) {
  fold<false>(tile, small, args, stream);
}
void fold_two(Dtype tile, bool small, const FoldArgs& args, const Stream& stream) {
  fold<true>(tile, small, args, stream);
}

}  // namespace prefkern
