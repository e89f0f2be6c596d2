// The element types the kernels read and write.
#pragma once

#include <cstdint>

namespace prefkern {

enum class Dtype : int { f32, f64, bf16, f16 };

constexpr int64_t dtype_bytes(Dtype t) {
  return t == Dtype::f32 ? 4 : t == Dtype::f64 ? 8 : 2;
}

}  // namespace prefkern
