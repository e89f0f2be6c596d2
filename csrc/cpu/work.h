// Working memory of a call, and threads.
#pragma once

#include <cstdlib>

#include "cpu/kernels.h"

namespace prefkern {
namespace PK_ISA {

// One allocation per call, laid out by running the same function twice: first to count, then to
// place.
struct Arena {
  char* base = nullptr;
  size_t used = 0;
  template <class N>
  N* take(int64_t n) {
    used = (used + 63) / 64 * 64;
    N* p = base == nullptr ? nullptr : reinterpret_cast<N*>(base + used);
    used += size_t(n) * sizeof(N);
    return p;
  }
};
struct Memory {
  void* p = nullptr;
  template <class Layout>
  bool place(const Layout& layout) {
    Arena count;
    layout(count);
    if (posix_memalign(&p, 64, count.used + 64) != 0) {
      p = nullptr;
      return false;
    }
    Arena arena{static_cast<char*>(p)};
    layout(arena);
    return true;
  }
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(p); }
};

// body(unit, thread) for every unit, handed out one by one. A unit's result must not depend on the
// thread that runs it, which makes results independent of the number of threads.
template <class Body>
void parallel(const Pool& pool, int64_t units, const Body& body) {
  struct Job {
    const Body* body;
    int64_t units;
    int64_t next;
  } job{&body, units, 0};
  const int threads = int(units < pool.threads ? units : pool.threads);
  if (threads <= 1) {
    for (int64_t i = 0; i < units; ++i) body(i, 0);
    return;
  }
  pool.run(
      threads,
      [](void* arg, int thread) {
        Job& j = *static_cast<Job*>(arg);
        for (;;) {
          const int64_t i = __atomic_fetch_add(&j.next, 1, __ATOMIC_RELAXED);
          if (i >= j.units) return;
          (*j.body)(i, thread);
        }
      },
      &job);
}

}  // namespace PK_ISA
}  // namespace prefkern
