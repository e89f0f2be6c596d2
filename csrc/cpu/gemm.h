// Matrix products on packed tiles.
//
// Measured on one thread of a Zen 4 EPYC at 3.7 GHz (peak 118 GFLOP/s fp32, 237 bf16), D = 512,
// GFLOP/s of logits / dH / dW: torch's mm (MKL) 98 / 102 / 99 in fp32 and 220 / 216 / 210 in bf16,
// oneDNN 92 / 110 / 84 and 218 / 217 / 185; the kernels below 116 / 114 / 115 and 232 / 228 / 228.
// They also leave the tile in L1 for the fold and allocate nothing, hence the product is ours.
//
// A word is one number, or a pair of bf16 numbers that are neighbours along the summed axis. A
// packed matrix is stored as [columns / L][rows][L] words (L words fill a vector): a row's next L
// columns are one vector, `stride` words after the last. The same layout serves as the left factor
// (rows broadcast word by word) and as the right one (a column block streamed row by row).
#pragma once

#include "cpu/dtype.h"

namespace prefkern {
namespace PK_ISA {

// MR x NR vectors of accumulators plus NR of the right factor and a broadcast fit the registers.
#if PK_VECTOR_BYTES == 64
constexpr int kMR = 8, kNR = 3;
#elif PK_VECTOR_BYTES == 32
constexpr int kMR = 4, kNR = 3;
#else
constexpr int kMR = 4, kNR = 2;
#endif
constexpr int kMR64 = Lanes<double>::L < kMR ? Lanes<double>::L : kMR;

template <class N>
struct Plain {  // fp32 and fp64; fp16 is converted to fp32 as it is packed
  using T = N;
  using W = N;
  static constexpr int pair = 1;
  static constexpr int MR = sizeof(N) == 8 ? kMR64 : kMR;
  static constexpr int L = Lanes<N>::L;
  static PK_INLINE Vec<T> mul_add(W a, Vec<W> b, Vec<T> c) { return fma(splat(a), b, c); }
};

#if defined(__AVX512BF16__)
struct Bf16 {
  using T = float;
  using W = float;  // only ever moved and broadcast as 32 bits
  static constexpr int pair = 2;
  static constexpr int MR = kMR;
  static constexpr int L = Lanes<float>::L;
  static PK_INLINE vf mul_add(W a, vf b, vf c) {
    return _mm512_dpbf16_ps(c, (__m512bh)(__m512)splat(a), (__m512bh)(__m512)b);
  }
};
#endif

template <int N>
struct Count {
  static constexpr int value = N;
};

template <class C>
constexpr int64_t words(int64_t n) {
  return (n + C::pair - 1) / C::pair;
}
PK_INLINE int64_t round_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

// Distance between column blocks of a packed matrix with `rows` rows: MR rows are added so that the
// blocks of one row do not fall on the same cache sets.
template <class C>
PK_INLINE int64_t block_stride(int64_t rows) {
  return (round_up(rows, C::MR) + C::MR) * C::L;
}

// acc[i][j] = sum_k a(i, k) b(k, j). a(i, k) is a[(k / L) * a_stride + i * L + k % L], or with
// transposed = true a[k * L + i]; b(k, j) is the vector b[j * b_stride + k * L].
template <class C, int NR, bool transposed>
PK_INLINE void multiply(const typename C::W* a, int64_t a_stride, const typename C::W* b,
                        int64_t b_stride, int64_t depth, Vec<typename C::T> (&acc)[C::MR][NR]) {
  constexpr int L = C::L, MR = C::MR;
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < NR; ++j) acc[i][j] = Vec<typename C::T>{};
  }
  if constexpr (transposed) {
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k) {
      Vec<typename C::W> bv[NR];
#pragma GCC unroll 3
      for (int j = 0; j < NR; ++j) bv[j] = load(b + j * b_stride + k * L);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 3
        for (int j = 0; j < NR; ++j) acc[i][j] = C::mul_add(a[k * L + i], bv[j], acc[i][j]);
      }
    }
  } else {
    for (; depth >= L; depth -= L, a += a_stride) {
#pragma GCC unroll 4
      for (int k = 0; k < L; ++k, b += L) {
        Vec<typename C::W> bv[NR];
#pragma GCC unroll 3
        for (int j = 0; j < NR; ++j) bv[j] = load(b + j * b_stride);
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 3
          for (int j = 0; j < NR; ++j) acc[i][j] = C::mul_add(a[i * L + k], bv[j], acc[i][j]);
        }
      }
    }
    for (int k = 0; k < depth; ++k, b += L) {
      Vec<typename C::W> bv[NR];
      for (int j = 0; j < NR; ++j) bv[j] = load(b + j * b_stride);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 3
        for (int j = 0; j < NR; ++j) acc[i][j] = C::mul_add(a[i * L + k], bv[j], acc[i][j]);
      }
    }
  }
}

// z[:, NR blocks] = a b, both packed.
template <class C, int NR>
PK_HOT void product_store(const typename C::W* a, int64_t a_stride, const typename C::W* b,
                          int64_t b_stride, int64_t depth, typename C::T* z, int64_t z_stride) {
  Vec<typename C::T> acc[C::MR][NR];
  multiply<C, NR, false>(a, a_stride, b, b_stride, depth, acc);
#pragma GCC unroll 8
  for (int i = 0; i < C::MR; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < NR; ++j) store(z + j * z_stride + i * C::L, acc[i][j]);
  }
}

// Adds the product to plain rows, row i at rows[i] + column; with `fresh` writes it, with `start`
// plus that row. Columns at and beyond `width` do not exist.
template <class C, int NR, bool transposed>
PK_HOT void product_add(const typename C::W* a, int64_t a_stride, const typename C::W* b,
                        int64_t b_stride, int64_t depth, typename C::T* const* rows, int count,
                        int64_t column, int64_t width, bool fresh,
                        const typename C::T* start = nullptr) {
  using T = typename C::T;
  constexpr int L = C::L;
  if (!fresh) {  // the rows come from L3 or memory: ask for them before the product needs them
    for (int i = 0; i < count; ++i) {
      for (int j = 0; j < NR; ++j) __builtin_prefetch(rows[i] + column + j * L, 1, 3);
    }
  }
  Vec<T> acc[C::MR][NR];
  multiply<C, NR, transposed>(a, a_stride, b, b_stride, depth, acc);
  if (count == C::MR && column + NR * L <= width) {
#pragma GCC unroll 8
    for (int i = 0; i < C::MR; ++i) {
#pragma GCC unroll 3
      for (int j = 0; j < NR; ++j) {
        T* p = rows[i] + column + j * L;
        const T* before = fresh ? start == nullptr ? nullptr : start + column + j * L : p;
        store(p, before == nullptr ? acc[i][j] : load(before) + acc[i][j]);
      }
    }
    return;
  }
  T spill[C::MR][NR * L];
#pragma GCC unroll 8
  for (int i = 0; i < C::MR; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < NR; ++j) store(&spill[i][j * L], acc[i][j]);
  }
  for (int i = 0; i < count; ++i) {
    T* p = rows[i] + column;
    const int64_t n = width - column < NR * L ? width - column : NR * L;
    const T* before = fresh ? start == nullptr ? nullptr : start + column : p;
    for (int64_t j = 0; j < n; ++j)
      p[j] = before == nullptr ? spill[i][j] : before[j] + spill[i][j];
  }
}

// Calls body(first block, constant number of blocks) for blocks [0, count) in groups of kNR, the
// remainder in one smaller group.
template <class Body>
PK_INLINE void for_blocks(int64_t count, const Body& body) {
  int64_t j = 0;
  for (; j + kNR <= count; j += kNR) body(j, Count<kNR>{});
  if constexpr (kNR > 2) {
    if (count - j == 2) return body(j, Count<2>{});
  }
  if (count - j == 1) body(j, Count<1>{});
}

// z [blocks of v][rows][L] = h w^T for row groups [0, groups * MR).
template <class C>
void logits_tile(const typename C::W* h, int64_t h_stride, const typename C::W* w, int64_t w_stride,
                 int64_t depth, int64_t groups, int64_t v_blocks, typename C::T* z,
                 int64_t z_stride) {
  for_blocks(v_blocks, [&](int64_t vb, auto nr) {
    for (int64_t g = 0; g < groups; ++g) {
      product_store<C, nr.value>(h + g * C::MR * C::L, h_stride, w + vb * w_stride, w_stride, depth,
                                 z + vb * z_stride + g * C::MR * C::L, z_stride);
    }
  });
}

// rows[i] += dz w for one group of up to MR rows: dz [blocks of v words][rows][L], w [blocks of
// d][v words][L]. `between` is called before every product of some microseconds.
template <class C, class Between>
void add_rows(const typename C::W* dz, int64_t dz_stride, const typename C::W* w, int64_t w_stride,
              int64_t depth, typename C::T* const* rows, int count, int64_t width,
              Between&& between) {
  for_blocks((width + C::L - 1) / C::L, [&](int64_t db, auto nr) {
    between();
    product_add<C, nr.value, false>(dz, dz_stride, w + db * w_stride, w_stride, depth, rows, count,
                                    db * C::L, width, false);
  });
}

}  // namespace PK_ISA
}  // namespace prefkern
