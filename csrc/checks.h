// Argument checks of the native ops. Users meet the checks in prefkern/checks.py first; these guard
// memory when an op is called directly. Messages say what must hold, what came and what to do.
#pragma once

#include <cstdint>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "dispatch.h"

namespace prefkern {

inline std::string shape_text(const torch::stable::Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline void check_dense(const torch::stable::Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU; move it with .cpu().");
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous; call .contiguous() first.");
}

// size < 0 accepts any length in that place.
inline void check_sizes(const torch::stable::Tensor& t, const char* name,
                        std::initializer_list<int64_t> sizes) {
  bool good = t.dim() == int64_t(sizes.size());
  int64_t i = 0;
  std::string want = "[";
  for (const int64_t s : sizes) {
    if (good && s >= 0) good = t.size(i) == s;
    want += (i++ ? ", " : "") + (s < 0 ? std::string("any") : std::to_string(s));
  }
  STD_TORCH_CHECK(good, name, " must have shape ", want, "], got ", shape_text(t), ".");
}

inline void check_shape(const torch::stable::Tensor& t, const char* name,
                        std::initializer_list<int64_t> sizes) {
  check_dense(t, name);
  check_sizes(t, name, sizes);
}

inline Dtype check_float(const torch::stable::Tensor& t, const char* name) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      break;
  }
  STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16; cast it first.");
}

inline void check_long(const torch::stable::Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == torch::headeronly::ScalarType::Long, name,
                  " must be int64; cast it with .long().");
}

}  // namespace prefkern
