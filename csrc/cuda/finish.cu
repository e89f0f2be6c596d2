#include "cuda/finish.cuh"

#include "cuda/launch.cuh"

namespace prefkern {
namespace {

std::string row_shapes(const FinishArgs& a) {
  return "rows [" + std::to_string(a.rows) + ", " + std::to_string(a.vocab) + "] in " +
         std::to_string(a.chunks) + " chunks";
}

}  // namespace

void finish_logits(const FinishArgs& a, const Stream& stream) {
  const auto start = [&](auto kernel) {
    launch<decltype(kernel)>("finish_logits", a.rows, a, stream, [&] { return row_shapes(a); });
  };
  if (a.two) {
    a.small ? start(Finish<true, true>()) : start(Finish<true, false>());
  } else {
    a.small ? start(Finish<false, true>()) : start(Finish<false, false>());
  }
}

void finish_logits_second(const FinishArgs& a, const Stream& stream) {
  launch<FinishSecond>("finish_logits_second", (a.rows + 127) / 128, a, stream,
                       [&] { return row_shapes(a); });
}

void logits_coefficients(const FinishArgs& a, const Stream& stream) {
  launch<Coefficients>("logits_coefficients", (a.rows + 127) / 128, a, stream,
                       [&] { return row_shapes(a); });
}

}  // namespace prefkern
