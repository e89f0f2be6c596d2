// One kernel body for two machines: a CUDA block, and a loop over its threads on the CPU.
//
// A kernel is a struct whose `run` is written as phases over the threads of a block:
//
//   struct Scale {
//     struct Args { const float* x; float* y; int64_t n; };  // raw pointers and numbers, by value
//     using Threads = Block<256>;
//     static constexpr int kMinBlocks = 4;                   // to aim for, per multiprocessor
//     PK_DEVICE static void run(Threads& b, const Args& a) {
//       PK_SHARED(float, total, 8);                          // shared memory: get, put, edit
//       typename Threads::template Local<float> v;           // one value per thread: v[t]
//       b.each([&](int t) { v[t] = a.x[b.index() * 256 + t]; });
//       b.warp_all([&](int t) -> float& { return v[t]; }, Add());
//       b.each([&](int t) { if (t % 32 == 0) total.put(t / 32, v[t]); });
//       b.sync();                                            // phases that exchange data meet here
//       ...
//
// Rules that make both machines agree:
//  * Code outside `each` is uniform: every thread computes the same from arguments, index() and
//    shared memory. Only uniform conditions may surround each, sync and the warp operations.
//  * What one thread knows and another does not lives in a Local or in the body of one `each`.
//  * `sync` separates a shared-memory access from any access by another thread that conflicts.
//
// On the device `each` is the body itself with t = threadIdx.x, a Local is a register, `sync` is
// __syncthreads. On the CPU `each` is a loop over t, forwards or backwards (reverse_threads()), a
// Local is an array, and shared memory starts as NaN bytes and remembers who touched it since the
// last barrier: a conflict that the device would be free to order either way is an assertion. So a
// CPU run checks indices, arithmetic, merge order and missing barriers. It is no claim that the
// kernel ran on a GPU.
//
// Block<32, G> packs G independent one-warp groups into a CUDA block (launched as 32 x G threads):
// index() counts groups, sync is __syncwarp, each group has its own shared memory.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cmath>
#define PK_DEVICE __device__ __forceinline__
#define PK_UNROLL _Pragma("unroll")
// Storage without a constructor, which __shared__ variables cannot have.
#define PK_SHARED(T, name, n)                                                              \
  __shared__ __align__(16) unsigned char name##_bytes[sizeof(T) * (n) * Threads::kGroups]; \
  const ::prefkern::Shared<T> name {                                                       \
    reinterpret_cast<T*>(name##_bytes) + (n) * b.group()                                   \
  }
#else
#define PK_DEVICE inline
#define PK_UNROLL
#define PK_SHARED(T, name, n) const ::prefkern::Shared<T> name(n)
#endif

namespace prefkern {

constexpr int kWarp = 32;

struct Add {
  template <class T>
  PK_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};
// The larger number; a NaN only where both are.
struct Larger {
  PK_DEVICE float operator()(float a, float b) const {
#if defined(__CUDACC__)
    return ::fmaxf(a, b);
#else
    return __builtin_fmaxf(a, b);
#endif
  }
  template <class T>
  PK_DEVICE T operator()(T a, T b) const {
    return a > b || b != b ? a : b;
  }
};

}  // namespace prefkern

#if defined(__CUDACC__)

namespace prefkern {

template <class T>
struct Shared {
  T* p;
  PK_DEVICE const T& get(int i) const { return p[i]; }
  PK_DEVICE void put(int i, const T& v) const { p[i] = v; }
  PK_DEVICE T& edit(int i) const { return p[i]; }  // read and write
};

template <int THREADS, int GROUPS = 1>
struct Block {
  static_assert(THREADS % kWarp == 0 && (GROUPS == 1 || THREADS == kWarp));
  static constexpr int kThreads = THREADS, kGroups = GROUPS, kWarps = THREADS / kWarp;

  template <class T>
  struct Local {
    T value;
    PK_DEVICE T& operator[](int) { return value; }
    PK_DEVICE const T& operator[](int) const { return value; }
  };

  PK_DEVICE int group() const { return GROUPS == 1 ? 0 : int(threadIdx.y); }
  PK_DEVICE int64_t index() const { return int64_t(blockIdx.x) * GROUPS + group(); }
  template <class Body>
  PK_DEVICE void each(const Body& body) const {
    body(int(threadIdx.x));
  }
  PK_DEVICE void sync() const {
    if constexpr (GROUPS == 1) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }
  PK_DEVICE void sync_warp() const { __syncwarp(); }

  // at(t) becomes op over the warp's 32 values, the same bits in every lane: a butterfly, so `op`
  // must not care about the order of its two arguments.
  template <class At, class Op>
  PK_DEVICE void warp_all(const At& at, const Op& op) const {
    auto& v = at(int(threadIdx.x));
    PK_UNROLL
    for (int step = kWarp / 2; step > 0; step /= 2) {
      v = op(v, __shfl_xor_sync(0xffffffffu, v, step));
    }
  }
  // Whether at(t) holds for any thread of the warp.
  template <class At>
  PK_DEVICE bool warp_any(const At& at) const {
    return __any_sync(0xffffffffu, at(int(threadIdx.x)));
  }
  // to(t) = at(thread `by` further in a circle of width(t) threads: 8, 16 or 32 neighbours).
  template <class At, class Width, class To>
  PK_DEVICE void rotate(const At& at, int by, const Width& width, const To& to) const {
    const int t = int(threadIdx.x);
    to(t) = __shfl_sync(0xffffffffu, at(t), t + by, width(t));
  }
  // to(t) = at(lane from(t) of the same warp).
  template <class At, class From, class To>
  PK_DEVICE void exchange(const At& at, const From& from, const To& to) const {
    const int t = int(threadIdx.x);
    to(t) = __shfl_sync(0xffffffffu, at(t), from(t));
  }
};

template <class K>
__global__ void __launch_bounds__(K::Threads::kThreads* K::Threads::kGroups, K::kMinBlocks)
    run_kernel(const __grid_constant__ typename K::Args args) {
  typename K::Threads block;
  K::run(block, args);
}

}  // namespace prefkern

#else  // the CPU

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

namespace prefkern {

// What the emulated block is doing. Threads of one process emulate blocks of their own.
struct Emulation {
  int thread = -1;    // -1: uniform code
  int64_t epoch = 0;  // barriers passed
  int64_t warp_epoch = 0;
  bool reverse = false;  // threads in descending order
};
inline Emulation& emulation() {
  static thread_local Emulation state;
  return state;
}
inline void reverse_threads(bool on) {
  emulation().reverse = on;
}

[[noreturn]] inline void emulation_failed(const char* what, int64_t i, int thread, int other) {
  std::fprintf(stderr, "emulated block: %s element %lld: thread %d and thread %d, no barrier\n",
               what, static_cast<long long>(i), thread, other);
  std::abort();
}

template <class T>
struct Shared {
  struct Touch {
    int thread = -1;
    int64_t epoch = -1, warp_epoch = -1;
    // Whether `now` is free to run before or after this access.
    bool conflicts(const Emulation& now) const {
      if (epoch != now.epoch || thread == now.thread) return false;
      const bool one_warp = thread >= 0 && now.thread >= 0 && thread / 32 == now.thread / 32;
      return !(one_warp && warp_epoch != now.warp_epoch);
    }
  };
  static constexpr int kMany = 1 << 30;  // several readers
  mutable std::vector<unsigned char> bytes;
  mutable std::vector<Touch> wrote, read;
  int size;

  explicit Shared(int n) : bytes(sizeof(T) * n, 0xff), wrote(n), read(n), size(n) {}
  T* at(int i) const {
    if (i < 0 || i >= size) {
      std::fprintf(stderr, "emulated block: shared memory [%d], element %d\n", size, i);
      std::abort();
    }
    return reinterpret_cast<T*>(bytes.data()) + i;
  }
  const T& get(int i) const {
    T* p = at(i);
    const Emulation& now = emulation();
    if (wrote[i].conflicts(now)) emulation_failed("read of", i, now.thread, wrote[i].thread);
    const bool other = read[i].epoch == now.epoch && read[i].thread != now.thread;
    read[i] = {other ? kMany : now.thread, now.epoch, other ? -1 : now.warp_epoch};
    return *p;
  }
  T& edit(int i) const {
    T* p = at(i);
    const Emulation& now = emulation();
    if (wrote[i].conflicts(now)) emulation_failed("write to", i, now.thread, wrote[i].thread);
    if (read[i].conflicts(now)) emulation_failed("write to", i, now.thread, read[i].thread);
    wrote[i] = {now.thread, now.epoch, now.warp_epoch};
    return *p;
  }
  void put(int i, const T& v) const { edit(i) = v; }
};

template <int THREADS, int GROUPS = 1>
struct Block {
  static_assert(THREADS % kWarp == 0 && (GROUPS == 1 || THREADS == kWarp));
  static constexpr int kThreads = THREADS, kGroups = GROUPS, kWarps = THREADS / kWarp;

  template <class T>
  struct Local {
    std::vector<T> value = std::vector<T>(THREADS);
    T& operator[](int t) { return value[t]; }
    const T& operator[](int t) const { return value[t]; }
  };

  int64_t block = 0;

  int group() const { return 0; }
  int64_t index() const { return block; }
  template <class Body>
  void each(const Body& body) const {
    Emulation& now = emulation();
    for (int i = 0; i < THREADS; ++i) {
      now.thread = now.reverse ? THREADS - 1 - i : i;
      body(now.thread);
    }
    now.thread = -1;
  }
  void sync() const { ++emulation().epoch; }
  void sync_warp() const { ++emulation().warp_epoch; }

  template <class At, class Op>
  void warp_all(const At& at, const Op& op) const {
    for (int warp = 0; warp < THREADS; warp += kWarp) {
      for (int step = kWarp / 2; step > 0; step /= 2) {
        std::remove_reference_t<decltype(at(0))> old[kWarp];
        for (int i = 0; i < kWarp; ++i) old[i] = at(warp + i);
        for (int i = 0; i < kWarp; ++i) at(warp + i) = op(old[i], old[i ^ step]);
      }
    }
  }
  // For conditions that are the same in every warp: uniform code cannot hold one per warp.
  template <class At>
  bool warp_any(const At& at) const {
    int found = 0;
    for (int warp = 0; warp < THREADS; warp += kWarp) {
      int any = 0;
      for (int i = 0; i < kWarp; ++i) any |= int(at(warp + i));
      found += any;
    }
    if (found % kWarps != 0) emulation_failed("warp_any, threads", THREADS, 0, found);
    return found != 0;
  }
  template <class At, class Width, class To>
  void rotate(const At& at, int by, const Width& width, const To& to) const {
    exchange(at, [&](int t) { return (t & -width(t)) | ((t + by) & (width(t) - 1)); }, to);
  }
  template <class At, class From, class To>
  void exchange(const At& at, const From& from, const To& to) const {
    for (int warp = 0; warp < THREADS; warp += kWarp) {
      std::remove_cv_t<std::remove_reference_t<decltype(at(0))>> old[kWarp];
      for (int i = 0; i < kWarp; ++i) old[i] = at(warp + i);
      for (int i = 0; i < kWarp; ++i) to(warp + i) = old[from(warp + i) & (kWarp - 1)];
    }
  }
};

// Every block of a launch, last to first where threads run backwards: results must not depend on
// it.
template <class K>
void emulate(int64_t blocks, const typename K::Args& args) {
  for (int64_t i = 0; i < blocks; ++i) {
    typename K::Threads block;
    block.block = emulation().reverse ? blocks - 1 - i : i;
    ++emulation().epoch;
    K::run(block, args);
  }
}

}  // namespace prefkern

#endif
