// What every op of the CUDA library does with its tensors: check them, take their device and
// stream. Compiled by the C++ compiler, not by nvcc. The emulated build runs the same ops on CPU
// tensors.
#pragma once

#include <cstdlib>
#include <initializer_list>
#include <optional>
#include <string>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "checks.h"
#include "cuda/sweep.h"

namespace prefkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

inline bool on_this_device(const Tensor& t) {
#if defined(PREFKERN_EMULATED)
  return t.is_cpu();
#else
  return t.is_cuda();
#endif
}

inline Dtype float_type(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      break;
  }
  STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16; cast it first.");
}

// A tensor of these sizes (negative: any) on the op's device whose last dimension is contiguous.
inline const Tensor& check(const Tensor& t, const char* name,
                           std::initializer_list<int64_t> sizes) {
  check_sizes(t, name, sizes);
  STD_TORCH_CHECK(on_this_device(t), name, " must be a CUDA tensor; move it with .cuda().");
  STD_TORCH_CHECK(t.dim() == 0 || t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1, name,
                  " must have a contiguous last dimension; call .contiguous() first.");
  return t;
}
inline const Tensor& check_dense(const Tensor& t, const char* name,
                                 std::initializer_list<int64_t> sizes) {
  check(t, name, sizes);
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous; call .contiguous() first.");
  return t;
}
inline void check_type(const Tensor& t, const char* name, ScalarType type, const char* words) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, " must be ", words, "; cast it first.");
}
inline float* floats(const Tensor& t, const char* name) {
  check_type(t, name, ScalarType::Float, "float32");
  return static_cast<float*>(t.mutable_data_ptr());
}
inline const float* const_floats(const Tensor& t, const char* name) {
  check_type(t, name, ScalarType::Float, "float32");
  return static_cast<const float*>(t.const_data_ptr());
}
inline const int64_t* longs(const Tensor& t, const char* name) {
  check_type(t, name, ScalarType::Long, "int64");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

// torch's current stream of the tensor's device, made the current device while this lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t)
#if !defined(PREFKERN_EMULATED)
      : guard_(t.get_device())
#endif
  {
#if !defined(PREFKERN_EMULATED)
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device(), &stream_.handle));
#else
    (void)t;
#endif
    const char* wait = std::getenv("PREFKERN_DEBUG_SYNC");
    stream_.wait = wait != nullptr && *wait != '\0' && std::string(wait) != "0";
  }
  const Stream& stream() const { return stream_; }

 private:
#if !defined(PREFKERN_EMULATED)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  Stream stream_;
};

}  // namespace prefkern
