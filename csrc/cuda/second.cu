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

void raise_rows(const RaiseArgs& a, const Stream& stream) {
  launch<RaiseRows>("raise_rows", a.m, a, stream, [&] {
    return "sums of [" + std::to_string(a.m) + ", " + std::to_string(a.depth) + "] rows";
  });
}

}  // namespace prefkern
