// What the forward and the backward over a head share: working memory, tile sizes, threads, rows,
// and the logits of one row group.
#pragma once

#include <cstdlib>

#include "cpu/grad.h"
#include "cpu/kernels.h"
#include "cpu/pack.h"

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

// Rows of a unit of work. Two register groups on AVX-512: the weight tile is streamed once for
// both.
constexpr int64_t kUnitRows = 16;
// Packed weight tile. 96 columns are a multiple of every register width and of a bf16 pair block.
// The products do not care between 96 and 768 columns (114-116 of 118 GFLOP/s at D = 512, streaming
// from L2 or L3 alike); the epilogue likes long rows, whose fixed cost is about 15 ns.
constexpr int64_t kTileUnit = 96, kTileMax = 768, kTileBytes = 1536 << 10;
// Everything but rows, gradients and the cache stays below 16 MiB.
constexpr int64_t kWorkBytes = 15 << 20;

template <class C>
int64_t tile_columns(int64_t depth, int64_t vocab, int64_t tiles, int64_t bytes) {
  const int64_t per_column = round_up(words<C>(depth), C::L) * int64_t(sizeof(typename C::W));
  int64_t v = bytes / per_column / kTileUnit * kTileUnit;
  v = v < kTileUnit ? kTileUnit : v > kTileMax ? kTileMax : v;
  while (v > 32 && tiles * v * per_column > kWorkBytes * 3 / 4) v /= 2;
  const int64_t all = round_up(vocab, 32);
  v = v < all ? v : all;
  return round_up(v, 2 * C::L < 32 ? 32 : 2 * C::L);
}

// The next scored rows from `at` on; returns how many were found and moves `at` past them.
inline int64_t next_rows(const int64_t* targets, int64_t n, int64_t ignore, int64_t& at,
                         int64_t* rows, int64_t most) {
  int64_t count = 0;
  for (; at < n && count < most; ++at) {
    if (targets[at] != ignore) rows[count++] = at;
  }
  return count;
}

// z = softcap tanh(scale (x + bias) / softcap) / temperature over one tile row; -inf beyond
// `width`.
template <class T>
inline void shape_row(T* z, int64_t stride, int64_t blocks, int64_t width, const T* bias,
                      const Head& head) {
  constexpr int L = Lanes<T>::L;
  const bool cap = head.softcap != 0.0;
  const T factor = T(cap ? head.scale / head.softcap : head.scale / head.temperature);
  if (bias != nullptr || cap || factor != T(1)) {
    const Vec<T> f = splat(factor), top = splat(T(head.softcap / head.temperature));
    for (int64_t k = 0; k < blocks; ++k) {
      Vec<T> x = load(z + k * stride);
      if (bias != nullptr) x += load(bias + k * L);
      x = x * f;
      if (cap) x = top * tanh(x);
      store(z + k * stride, x);
    }
  }
  for (int64_t v = width; v < blocks * L; ++v) z[v / L * stride + v % L] = T(-pk_inf());
}

// What a backward reads is the product rounded to hidden's dtype, kept or recomputed, then shaped:
// a cap applied to rounded logits keeps its slope, a rounded cap would lose it.
template <class T>
inline void round_row(T* dst, int64_t dst_stride, const T* x, int64_t stride, int64_t blocks,
                      Dtype type) {
  for (int64_t k = 0; k < blocks; ++k)
    store(dst + k * dst_stride, round_to(load(x + k * stride), type));
}
PK_INLINE bool is_short(Dtype type) {
  return type == Dtype::bf16 || type == Dtype::f16;
}

// Tile row <-> plain memory of any dtype. Whole blocks of fp32 and bf16 move as vectors: kept
// logits go past the caches (they come back only after the whole forward), and `ahead` elements
// further, where the next row's part of the tile lies, is asked for while this one is read.
template <class T>
inline void tile_to_plain(void* dst, Dtype type, int64_t at, const T* z, int64_t stride,
                          int64_t width) {
  constexpr int L = Lanes<T>::L;
  int64_t v = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    if (type == Dtype::bf16) {
      uint16_t* d = static_cast<uint16_t*>(dst) + at;
      for (; v + L <= width; v += L, z += stride) {
        const vi bits = (vi)round_to(load(z), type) >> 16;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(d + v),
                            _mm512_cvtepi32_epi16((__m512i)bits));
      }
    } else if (type == Dtype::f32 &&
               (reinterpret_cast<uintptr_t>(static_cast<float*>(dst) + at) & 63) == 0) {
      float* d = static_cast<float*>(dst) + at;
      for (; v + L <= width; v += L, z += stride) _mm512_stream_ps(d + v, load(z));
      _mm_sfence();
    }
  }
#endif
  for (; v < width; v += L, z += stride)
    write_row(dst, type, at + v, z, width - v < L ? width - v : L);
}
template <class T>
inline void plain_to_tile(T* z, int64_t stride, int64_t blocks, const void* src, Dtype type,
                          int64_t at, int64_t width, int64_t ahead = 0) {
  constexpr int L = Lanes<T>::L;
  int64_t v = 0;
  if constexpr (sizeof(T) == 4) {
    if (type == Dtype::bf16) {
      const uint16_t* s = static_cast<const uint16_t*>(src) + at;
      for (; v + L <= width; v += L) {
        __builtin_prefetch(s + v + ahead);
        T* d = z + v / L * stride;
        for (int i = 0; i < L; ++i) d[i] = from_bf16(s[v + i]);
      }
    } else if (type == Dtype::f32) {
      const float* s = static_cast<const float*>(src) + at;
      for (; v + L <= width; v += L) {
        __builtin_prefetch(s + v + ahead);
        store(z + v / L * stride, load(s + v));
      }
    }
  }
  for (; v < width; v += L)
    read_row(z + v / L * stride, src, type, at + v, width - v < L ? width - v : L);
  for (v = width; v < blocks * L; ++v) z[v / L * stride + v % L] = T(-pk_inf());
}

// One model's weight tile and bias tile, and per-thread hidden rows and logits.
template <class C>
struct ModelTile {
  const Head* head = nullptr;
  typename C::W* weight = nullptr;  // [v blocks][words of depth][L]
  typename C::T* bias = nullptr;    // [columns]
  int64_t weight_stride = 0;
  bool own_weight = true;  // false: shares the policy's packed tile

  void layout(Arena& a, int64_t columns, bool with_weight) {
    weight_stride = words<C>(head->depth) * C::L;
    if (with_weight) weight = a.take<typename C::W>(columns / C::L * weight_stride);
    bias = a.take<typename C::T>(columns);
  }
  void pack_block(int64_t block, int64_t v0, int64_t vocab, bool with_weight) const {
    constexpr int L = C::L;
    const int64_t v = v0 + block * L;
    if (own_weight && with_weight) {
      pack_weight_block<C>(weight + block * weight_stride, head->weight, head->weight_type, v,
                           vocab, head->depth);
    }
    for (int64_t i = v; head->bias != nullptr && i < v + L; ++i) {
      bias[i - v0] =
          i < vocab ? element<typename C::T>(head->bias, head->bias_type, i) : typename C::T(0);
    }
  }
  // Logits of packed rows, unshaped. Only the blocks that exist are computed.
  void logits(const typename C::W* hidden, int64_t hidden_stride, int64_t groups, int64_t blocks,
              typename C::T* z, int64_t z_stride) const {
    logits_tile<C>(hidden, hidden_stride, weight, weight_stride, words<C>(head->depth), groups,
                   blocks, z, z_stride);
  }
  void shape(typename C::T* z, int64_t stride, int64_t blocks, int64_t width) const {
    shape_row(z, stride, blocks, width, head->bias != nullptr ? bias : nullptr, *head);
  }
};

}  // namespace PK_ISA
}  // namespace prefkern
