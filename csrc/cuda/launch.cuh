// Starts a kernel: on the device with nvcc, block by block on the CPU with any other compiler.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/elements.cuh"
#include "cuda/launched.h"
#include "cuda/sweep.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace prefkern {

// One group of threads per index below `groups`. A kernel whose CUDA block holds several groups
// also sees the indices that fill up the last block and must leave them alone. `shapes()` words the
// inputs' shapes for an error message.
template <class K, class Shapes>
void launch(const char* name, int64_t groups, const typename K::Args& args, const Stream& stream,
            const Shapes& shapes) {
  constexpr int kGroups = K::Threads::kGroups, kThreads = K::Threads::kThreads;
  if (groups == 0) return;
  const int64_t blocks = (groups + kGroups - 1) / kGroups;
  const auto fail = [&](const std::string& what) {
    throw std::runtime_error("prefkern: the CUDA kernel " + std::string(name) + " (" +
                             std::to_string(blocks) + " blocks of " + std::to_string(kThreads) +
                             " x " + std::to_string(kGroups) + " threads, " + shapes() +
                             ") failed: " + what);
  };
  if (blocks > 0x7fffffff) fail("more blocks than a launch may have; pass fewer rows");
#if defined(__CUDACC__)
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  run_kernel<K><<<dim3(unsigned(blocks)), dim3(kThreads, kGroups), 0, handle>>>(args);
  cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess && stream.wait) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    error = cudaStreamIsCapturing(handle, &capture);
    if (error == cudaSuccess && capture == cudaStreamCaptureStatusNone) {
      error = cudaStreamSynchronize(handle);
    }
  }
  if (error != cudaSuccess) {
    fail(std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")" +
         (stream.wait ? ""
                      : "; an earlier kernel may be the cause, PREFKERN_DEBUG_SYNC=1 names it"));
  }
#else
  (void)stream;
  emulate<K>(blocks * kGroups, args);
#endif
  Launched::get().add(name);
}

inline std::string tile_shapes(const TileArgs& a) {
  const int models = 1 + (a.model[1].x != nullptr) + (a.model[2].x != nullptr);
  return std::to_string(models) + " tile(s) [" + std::to_string(a.m) + ", " + std::to_string(a.w) +
         "] from column " + std::to_string(a.v0);
}

// f(E()) for the element type of a tile.
template <class F>
void by_element(Dtype type, const F& f) {
  switch (type) {
    case Dtype::f32:
      return f(float());
    case Dtype::bf16:
      return f(Bf16());
    case Dtype::f16:
      return f(F16());
    case Dtype::f64:
      break;
  }
  throw std::runtime_error("prefkern: the CUDA kernels read float32, bfloat16 and float16 tiles.");
}

}  // namespace prefkern
