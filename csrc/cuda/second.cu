#include "cuda/second.cuh"

#include "cuda/frozen.cuh"
#include "cuda/launch.cuh"

namespace prefkern {

void fold_second(Dtype tile, const SecondArgs& a, const Stream& stream) {
  by_element(tile, [&](auto e) {
    launch<SecondSweep<decltype(e)>>("fold_second", a.m * a.blocks, a, stream,
                                     [&] { return tile_shapes(a); });
  });
}

void frozen_factors(Dtype tile, const FactorArgs& a, const Stream& stream) {
  by_element(tile, [&](auto e) {
    launch<FrozenFactor<decltype(e)>>("frozen_factors", a.m * a.blocks, a, stream,
                                      [&] { return tile_shapes(a); });
  });
}

void fold_frozen(Dtype tile, bool two, bool small, const FrozenArgs& a, const Stream& stream) {
  const auto start = [&](auto kernel) {
    launch<decltype(kernel)>("fold_frozen", a.fold.m, a, stream,
                             [&] { return tile_shapes(a.fold); });
  };
  if (tile == Dtype::bf16) return start(FrozenFold<Bf16, false, true>());
  if (two) return start(FrozenFold<float, true, true>());
  small ? start(FrozenFold<float, false, true>()) : start(FrozenFold<float, false, false>());
}

void raise_rows(const RaiseArgs& a, const Stream& stream) {
  launch<RaiseRows>("raise_rows", a.totals.m, a, stream, [&] {
    return "sums of [" + std::to_string(a.totals.m) + ", " + std::to_string(a.totals.depth) +
           "] rows";
  });
}

}  // namespace prefkern
