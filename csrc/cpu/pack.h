// Packing: from plain rows to the layouts of gemm.h, converting the element type on the way.
#pragma once

#include "cpu/gemm.h"

namespace prefkern {
namespace PK_ISA {

constexpr int64_t kPackChunk = 256;  // words of a row converted at a time

// A matrix of operands: stored as `type`, multiplied as numbers of type `working`.
struct Operand {
  const void* data;
  Dtype type, working;
};

// dst[0 .. round_up(words(n), L)) = the words of elements [start, start + n), zero beyond.
template <class C>
PK_INLINE void read_words(typename C::W* dst, const Operand& src, int64_t start, int64_t n) {
  const int64_t padded = round_up(words<C>(n), C::L);
  if constexpr (C::pair == 2) {
    uint16_t* d = reinterpret_cast<uint16_t*>(dst);
    read_bf16(d, src.data, src.type, start, n);
    std::memset(d + n, 0, size_t(2 * padded - n) * 2);
  } else {
    read_row(dst, src.data, src.type, start, n);
    for (int64_t i = n; i < padded; ++i) dst[i] = 0;
    if (dtype_bytes(src.working) == 2 && src.type != src.working) {
      for (int64_t i = 0; i < padded; i += C::L)
        store(dst + i, round_to(load(dst + i), src.working));
    }
  }
}

// Whether words lie in memory as they are multiplied.
template <class C>
PK_INLINE bool lies_in_words(const Operand& src) {
  using T = typename C::T;
  if (C::pair == 2) return src.type == Dtype::bf16;
  return src.type == (sizeof(T) == 8 ? Dtype::f64 : Dtype::f32) && dtype_bytes(src.working) != 2;
}

// One row as the left factor: columns become the summed axis of h w^T.
template <class C>
void pack_left(typename C::W* dst, int64_t stride, int64_t slot, const Operand& src, int64_t start,
               int64_t n) {
  constexpr int L = C::L;
  typename C::W line[kPackChunk];
  int64_t at = 0;
  if (lies_in_words<C>(src)) {  // whole vectors go straight to their place
    constexpr int64_t step = L * C::pair, bytes = L * int64_t(sizeof(typename C::W));
    const char* from = static_cast<const char*>(src.data) + start * (bytes / step);
    typename C::W* d = dst + slot * L;
    for (; at + step <= n; at += step, from += bytes, d += stride) {
      Vec<typename C::W> v;
      std::memcpy(&v, from, sizeof v);
      store(d, v);
    }
  }
  for (; at < n; at += kPackChunk * C::pair) {
    const int64_t m = n - at < kPackChunk * C::pair ? n - at : kPackChunk * C::pair;
    read_words<C>(line, src, start + at, m);
    typename C::W* d = dst + at / C::pair / L * stride + slot * L;
    for (int64_t k = 0; k < words<C>(m); k += L, d += stride) store(d, load(line + k));
  }
}

template <class C>
void zero_left(typename C::W* dst, int64_t stride, int64_t slot, int64_t n) {
  for (int64_t k = 0; k < words<C>(n); k += C::L, dst += stride) {
    store(dst + slot * C::L, Vec<typename C::W>{});
  }
}

// `count` (at most C::pair) rows of `width` elements with the rows as the summed axis; missing ones
// are zeros.
template <class C>
void pack_right(typename C::W* dst, int64_t stride, int64_t slot, const Operand& src,
                const int64_t* row, int count, int64_t width) {
  constexpr int L = C::L;
  if constexpr (C::pair == 1) {
    pack_left<C>(dst, stride, slot, src, row[0] * width, width);
  } else {
    uint16_t line[2][kPackChunk];
    int64_t at = 0;
#if defined(__AVX512BF16__)
    if (lies_in_words<C>(src)) {
      const uint16_t* low = static_cast<const uint16_t*>(src.data) + row[0] * width;
      const uint16_t* high = static_cast<const uint16_t*>(src.data) + row[count - 1] * width;
      const auto wide = [](const uint16_t* p) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
      };
      for (typename C::W* d = dst + slot * L; at + L <= width; at += L, d += stride) {
        __m512i v = wide(low + at);
        if (count == 2) v = _mm512_or_si512(v, _mm512_slli_epi32(wide(high + at), 16));
        std::memcpy(d, &v, sizeof v);
      }
    }
#endif
    for (; at < width; at += kPackChunk) {
      const int64_t m = width - at < kPackChunk ? width - at : kPackChunk;
      std::memset(line, 0, sizeof line);
      for (int i = 0; i < count; ++i) {
        read_bf16(line[i], src.data, src.type, row[i] * width + at, m);
      }
      uint32_t pairs[kPackChunk];
      for (int64_t k = 0; k < kPackChunk; ++k) pairs[k] = uint32_t(line[1][k]) << 16 | line[0][k];
      typename C::W* d = dst + at / L * stride + slot * L;
      for (int64_t k = 0; k < m; k += L, d += stride) std::memcpy(d, pairs + k, L * sizeof(*d));
    }
  }
}

// Two vectors -> L bf16 pairs of neighbours: (low[0], low[1]), ..., (high[0], high[1]), ...
PK_INLINE void pair_words(float* dst, vf low, vf high) {
#if defined(__AVX512BF16__)
  const __m512bh v = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  std::memcpy(dst, &v, sizeof v);
#else
  uint16_t* d = reinterpret_cast<uint16_t*>(dst);
  for (int i = 0; i < Lanes<float>::L; ++i)
    d[i] = to_bf16(low[i]), d[Lanes<float>::L + i] = to_bf16(high[i]);
#endif
}
// Two vectors -> L bf16 pairs across them: (a[0], b[0]), (a[1], b[1]), ...
PK_INLINE void zip_words(float* dst, vf a, vf b) {
#if defined(__AVX512BF16__)
  const __m512i x = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)a));
  const __m512i y = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)b));
  const __m512i v = _mm512_or_si512(x, _mm512_slli_epi32(y, 16));
  std::memcpy(dst, &v, sizeof v);
#else
  uint16_t* d = reinterpret_cast<uint16_t*>(dst);
  for (int i = 0; i < Lanes<float>::L; ++i) d[2 * i] = to_bf16(a[i]), d[2 * i + 1] = to_bf16(b[i]);
#endif
}

// Turns L rows of L words into columns, by exchanging halves of ever larger squares.
template <class W>
PK_INLINE void transpose(const W* src, int64_t src_stride, W* dst) {
  constexpr int L = Lanes<W>::L;
#if defined(__clang__)
  for (int k = 0; k < L; ++k) {
    for (int i = 0; i < L; ++i) dst[k * L + i] = src[i * src_stride + k];
  }
#else
  using I = typename Lanes<W>::I;
  Vec<W> v[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) v[i] = load(src + i * src_stride);
#pragma GCC unroll 4
  for (int s = 1; s < L; s *= 2) {
    I low, high;
#pragma GCC unroll 16
    for (int j = 0; j < L; ++j) {
      low[j] = j & s ? L + j - s : j;
      high[j] = j & s ? L + j : j + s;
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (i & s) continue;
      const Vec<W> a = v[i], b = v[i + s];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + s] = __builtin_shuffle(a, b, high);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) store(dst + i * L, v[i]);
#endif
}

// Vocabulary block [v, v + L) of a weight tile as the right factor of h w^T: [words of depth][L].
// Entries at and beyond `vocab` are zeros.
template <class C>
void pack_weight_block(typename C::W* dst, const Operand& weight, int64_t v, int64_t vocab,
                       int64_t depth) {
  constexpr int L = C::L;
  constexpr int64_t chunk = kPackChunk;
  typename C::W lines[L * chunk];
  const int64_t size = dtype_bytes(weight.type);
  for (int64_t at = 0; at < depth; at += chunk * C::pair) {
    const int64_t m = depth - at < chunk * C::pair ? depth - at : chunk * C::pair;
    const int64_t w = words<C>(m);
    // The next block's pieces of rows, too short each for the hardware to see them coming.
    const auto ask_next = [&](int64_t row) {
      if (row >= vocab) return;
      const char* p = static_cast<const char*>(weight.data) + (row * depth + at) * size;
      for (int64_t b = 0; b < m * size; b += 64) __builtin_prefetch(p + b);
    };
    for (int i = 0; i < L; ++i) {
      if (v + i < vocab) {
        ask_next(v + L + i);
        read_words<C>(lines + i * chunk, weight, (v + i) * depth + at, m);
      } else {
        std::memset(lines + i * chunk, 0, size_t(round_up(w, L)) * sizeof(*lines));
      }
    }
    typename C::W* d = dst + at / C::pair * L;
    int64_t k = 0;
    for (; k + L <= w; k += L) transpose(lines + k, chunk, d + k * L);
    for (; k < w; ++k) {
      for (int i = 0; i < L; ++i) d[k * L + i] = lines[i * chunk + k];
    }
  }
}

}  // namespace PK_ISA
}  // namespace prefkern
