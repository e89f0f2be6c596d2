// Sizes of work, tile rows in and out of plain memory, and the packed tiles of one model.
#pragma once

#include "cpu/pack.h"
#include "cpu/work.h"

namespace prefkern {
namespace PK_ISA {

// Rows of a unit of work. Two register groups on AVX-512: the weight tile is streamed once for
// both.
constexpr int64_t kUnitRows = 16;
// Packed weight tile: a power of two of columns, so that no tile straddles two chunks. The products
// do not care between 96 and 768 columns (114-116 of 118 GFLOP/s at D = 512, streaming from L2 or
// L3 alike); the epilogue likes long rows, whose fixed cost is about 15 ns.
constexpr int64_t kTileMin = 64, kTileMax = 1024, kTileBytes = 2 << 20;
static_assert(kChunk % kTileMax == 0);
// Everything but rows, gradients and the cache stays below 16 MiB.
constexpr int64_t kWorkBytes = 15 << 20;

// Vocabulary entries of a tile whose columns are `words` deep; `tiles` of them are packed at a
// time.
template <class C>
int64_t tile_columns(int64_t words, int64_t vocab, int64_t tiles) {
  const int64_t per_column = round_up(words, C::L) * int64_t(sizeof(typename C::W));
  int64_t v = kTileMax;
  while (v > kTileMin && v * per_column > kTileBytes) v /= 2;
  while (v > 32 && tiles * v * per_column > kWorkBytes * 3 / 4) v /= 2;
  const int64_t all = round_up(vocab, 32);
  v = v < all ? v : all;
  return round_up(v, 2 * C::L < 32 ? 32 : 2 * C::L);
}

// One tile of the vocabulary: entries [v0, v0 + width), in blocks of L.
struct Span {
  int64_t v0, width, blocks;
};
template <int L>
Span span_at(int64_t v0, int64_t columns, int64_t vocab) {
  const int64_t width = vocab - v0 < columns ? vocab - v0 : columns;
  return {v0, width, (width + L - 1) / L};
}

// z = softcap tanh(scale (x + bias) / softcap) / temperature over one tile row; -inf beyond
// `width`.
template <class T>
inline void shape_row(T* z, int64_t stride, int64_t blocks, int64_t width, const T* bias,
                      const Model& head) {
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

// Products are rounded before they are shaped: a cap applied to rounded logits keeps its slope, a
// rounded cap would lose it.
template <class T>
inline void round_row(T* dst, int64_t dst_stride, const T* x, int64_t stride, int64_t blocks,
                      Dtype type) {
  for (int64_t k = 0; k < blocks; ++k)
    store(dst + k * dst_stride, round_to(load(x + k * stride), type));
}

// Tile row <-> plain memory of any dtype. Whole blocks of fp32 and bf16 move as vectors, and kept
// logits go past the caches: they come back only after the whole forward.
template <class T, bool pairs = false>  // pairs: z are products of bf16 pairs
inline void tile_to_plain(void* dst, Dtype type, int64_t at, const T* z, int64_t stride,
                          int64_t width) {
  constexpr int L = Lanes<T>::L;
  int64_t v = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    if (type == Dtype::bf16) {
      uint16_t* d = static_cast<uint16_t*>(dst) + at;
      const auto bits = [&](const T* p) {
#if defined(__AVX512BF16__)
        if constexpr (pairs) return bf16_of_product(load(p));
#endif
        return _mm512_cvtepi32_epi16((__m512i)((vi)round_to(load(p), type) >> 16));
      };
      const bool whole_lines = (reinterpret_cast<uintptr_t>(d) & 63) == 0;
      for (; v + 2 * L <= width; v += 2 * L, z += 2 * stride) {
        const __m512i both =
            _mm512_inserti64x4(_mm512_castsi256_si512(bits(z)), bits(z + stride), 1);
        if (whole_lines) {
          _mm512_stream_si512(reinterpret_cast<__m512i*>(d + v), both);
        } else {
          _mm512_storeu_si512(d + v, both);
        }
      }
      if (whole_lines) _mm_sfence();
      for (; v + L <= width; v += L, z += stride) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(d + v), bits(z));
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
                          int64_t at, int64_t width) {
  constexpr int L = Lanes<T>::L;
  int64_t v = 0;
  if constexpr (sizeof(T) == 4) {
    if (type == Dtype::bf16) {
      const uint16_t* s = static_cast<const uint16_t*>(src) + at;
      for (; v + L <= width; v += L) {
        T* d = z + v / L * stride;
#if defined(__AVX512F__)
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s + v));
        store(d, (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#else
        for (int i = 0; i < L; ++i) d[i] = from_bf16(s[v + i]);
#endif
      }
    } else if (type == Dtype::f32) {
      const float* s = static_cast<const float*>(src) + at;
      for (; v + L <= width; v += L) store(z + v / L * stride, load(s + v));
    }
  }
  for (; v < width; v += L)
    read_row(z + v / L * stride, src, type, at + v, width - v < L ? width - v : L);
  for (v = width; v < blocks * L; ++v) z[v / L * stride + v % L] = T(-pk_inf());
}

// Rows [2 L u, 2 L u + 2 L) of a tile of the head as the right factor of products along the
// vocabulary.
template <class C>
void pack_head(typename C::W* to, int64_t stride, const Operand& head, int64_t depth, int64_t u,
               const Span& s) {
  const int64_t last = 2 * C::L * (u + 1), end = last < s.width ? last : s.width;
  for (int64_t v = 2 * C::L * u; v < end; v += C::pair) {
    const int64_t row[2] = {s.v0 + v, s.v0 + v + 1};
    pack_right<C>(to, stride, v / C::pair, head, row, end - v < C::pair ? 1 : C::pair, depth);
  }
}

// Words of one packed row of a model: the hidden state and, from the next whole vector on, its
// low-rank terms.
template <class C>
int64_t low_word(const Model& m) {
  return round_up(words<C>(m.depth), C::L);
}
template <class C>
int64_t row_words(const Model& m) {
  return m.rank == 0 ? words<C>(m.depth) : low_word<C>(m) + words<C>(m.rank);
}

// One model's tiles of weight (low-rank factors below it, as extra depth) and bias.
template <class C>
struct ModelTile {
  using T = typename C::T;
  using W = typename C::W;
  const Model* model = nullptr;
  Dtype working = Dtype::f32;
  W* weight = nullptr;  // [v blocks][words of a row][L]
  T* bias = nullptr;    // [columns]
  int64_t weight_stride = 0;
  bool own_weight = true;  // false: reads the policy's packed tile

  // Whether the policy's tile, or its first words, is this model's too.
  void share(const Model& p) {
    const Model& m = *model;
    const bool same_low = m.low_out == p.low_out && m.low_type == p.low_type && m.rank == p.rank;
    own_weight = m.weight != p.weight || m.weight_type != p.weight_type || m.depth != p.depth ||
                 !(m.rank == 0 || same_low);
  }
  void layout(Arena& a, int64_t columns, const ModelTile* policy) {
    if (policy != nullptr && !own_weight) {
      weight = policy->weight, weight_stride = policy->weight_stride;
    } else {
      weight_stride = row_words<C>(*model) * C::L;
      if (own_weight) weight = a.take<W>(columns / C::L * weight_stride);
    }
    bias = a.take<T>(columns);
  }
  void pack_block(int64_t block, int64_t v0, int64_t vocab, bool with_weight) const {
    constexpr int L = C::L;
    const int64_t v = v0 + block * L;
    if (own_weight && with_weight) {
      W* to = weight + block * weight_stride;
      pack_weight_block<C>(to, {model->weight, model->weight_type, working}, v, vocab,
                           model->depth);
      if (model->rank > 0) {
        const int64_t end = words<C>(model->depth), low = low_word<C>(*model);
        std::memset(to + end * L, 0, size_t((low - end) * L) * sizeof(W));
        pack_weight_block<C>(to + low * L, {model->low_out, model->low_type, working}, v, vocab,
                             model->rank);
      }
    }
    for (int64_t i = v; model->bias != nullptr && i < v + L; ++i) {
      bias[i - v0] = i < vocab ? element<T>(model->bias, model->bias_type, i) : T(0);
    }
  }
  // One computed row as the left factor.
  void pack_row(W* to, int64_t stride, int64_t slot, int64_t token) const {
    const Model& m = *model;
    pack_left<C>(to, stride, slot, {m.hidden, working, working}, token * m.depth, m.depth);
    if (m.rank > 0) {
      pack_left<C>(to + low_word<C>(m) / C::L * stride, stride, slot, {m.low_in, working, working},
                   token * m.rank, m.rank);
    }
  }
  void zero_row(W* to, int64_t stride, int64_t slot) const {
    zero_left<C>(to, stride, slot, row_words<C>(*model) * C::pair);
  }
  // Products of packed rows. Only the blocks that exist are computed.
  void multiply(const W* rows, int64_t stride, int64_t groups, int64_t blocks, T* z,
                int64_t z_stride) const {
    logits_tile<C>(rows, stride, weight, weight_stride, row_words<C>(*model), groups, blocks, z,
                   z_stride);
  }
  // Logits are the products themselves.
  bool plain() const {
    const Model& m = *model;
    return m.bias == nullptr && m.softcap == 0.0 && T(m.scale / m.temperature) == T(1);
  }
  void shape(T* z, int64_t stride, const Span& s) const {
    shape_row(z, stride, s.blocks, s.width, model->bias != nullptr ? bias : nullptr, *model);
  }
};

}  // namespace PK_ISA
}  // namespace prefkern
