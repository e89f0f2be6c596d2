// How a block reads its part of a tile row: 16-byte packets, each read once, loads ahead of use.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/sweep.h"

namespace prefkern {

// u = factor (x + bias), in this order and without contraction: the top set of bkl compares it for
// equality. z = top tanh(u), or u without a cap.
PK_DEVICE float before_cap(float x, float bias, const Model& m) {
  return mul_exact(m.factor, add_exact(x, bias));
}
PK_DEVICE float capped(float u, const Model& m) {
  return m.top == 0.0f ? u : mul_exact(m.top, tanh_full(u));
}

// Columns [begin, end) of one row of up to three models, cut at 16-byte boundaries of memory: the
// first and the last packet may reach over the ends. Where the models' rows do not lie alike, every
// packet is gathered element by element.
template <class E, int MODELS>
struct RowReader {
  static constexpr int kN = Packet<E>::kN;
  const E* row[MODELS];
  int begin, end, first;  // first: column of the first packet, at most kN - 1 before `begin`
  int packets;
  bool alike;

  PK_DEVICE RowReader(const Model (&models)[3], int64_t r, int b, int e)
      : begin(b), end(e), alike(true) {
    const auto offset = [](const E* p) {
      return int((reinterpret_cast<uintptr_t>(p) & 15) / sizeof(E));
    };
    PK_UNROLL
    for (int i = 0; i < MODELS; ++i) {
      row[i] = models[i].x == nullptr ? nullptr
                                      : static_cast<const E*>(models[i].x) + r * models[i].stride;
      if (row[i] != nullptr) alike = alike && offset(row[i] + b) == offset(row[0] + b);
    }
    first = begin - offset(row[0] + b);
    packets = (end - first + kN - 1) / kN;
  }
  PK_DEVICE int column(int i) const { return first + i * kN; }
  PK_DEVICE bool inside(int c) const { return c >= begin && c < end; }
  // Whether packet i lies inside the row's part, so that none of its elements needs a check.
  PK_DEVICE bool whole(int i) const { return column(i) >= begin && column(i) + kN <= end; }
  PK_DEVICE Packet<E> load(int model, int i) const {
    if (alike && whole(i)) return load_packet(row[model] + column(i));
    Packet<E> v = {};
    PK_UNROLL
    for (int j = 0; j < kN; ++j) {
      if (inside(column(i) + j)) v.set(j, row[model][column(i) + j]);
    }
    return v;
  }
};

template <class E, int MODELS>
struct Packets {
  Packet<E> of[MODELS];
};

// use(packets, i) for every i = t, t + THREADS, ... below n, with the loads of the next AHEAD
// packets already on their way.
template <int AHEAD, int THREADS, class E, int MODELS, class Use>
PK_DEVICE void stream(const RowReader<E, MODELS>& row, int t, const Use& use) {
  Packets<E, MODELS> queue[AHEAD];
  for (int i = t - AHEAD * THREADS; i < row.packets; i += THREADS) {
    Packets<E, MODELS> fresh = {};
    if (i + AHEAD * THREADS < row.packets) {
      PK_UNROLL
      for (int k = 0; k < MODELS; ++k) {
        if (row.row[k] != nullptr) fresh.of[k] = row.load(k, i + AHEAD * THREADS);
      }
    }
    if (i >= 0) use(queue[0], i);
    PK_UNROLL
    for (int k = 0; k + 1 < AHEAD; ++k) queue[k] = queue[k + 1];
    queue[AHEAD - 1] = fresh;
  }
}

// u of one packet; `type`: products are first rounded to this dtype (fp32: as they are).
template <class E, int MODELS>
PK_DEVICE void read_before_cap(const RowReader<E, MODELS>& row, const Packet<E>& v, int i,
                               const Model& m, int64_t v0, Dtype type, float (&u)[Packet<E>::kN]) {
  constexpr int N = Packet<E>::kN;
  PK_UNROLL
  for (int j = 0; j < N; ++j) u[j] = v.at(j);
  if constexpr (sizeof(E) == 4) {
    if (type != Dtype::f32) {
      PK_UNROLL
      for (int j = 0; j < N; ++j) u[j] = round_to(u[j], type);
    }
  }
  if (m.bias != nullptr) {
    const int c = row.column(i);
    PK_UNROLL
    for (int j = 0; j < N; ++j) {
      u[j] = add_exact(u[j], row.inside(c + j) ? m.bias[v0 + c + j] : 0.0f);
    }
  }
  PK_UNROLL
  for (int j = 0; j < N; ++j) u[j] = mul_exact(m.factor, u[j]);
}

// The logits of u; entries outside the row's part become -inf.
template <class E, int MODELS>
PK_DEVICE void cap_logits(const RowReader<E, MODELS>& row, int i, const Model& m,
                          float (&z)[Packet<E>::kN]) {
  constexpr int N = Packet<E>::kN;
  if (m.top != 0.0f) {
    PK_UNROLL
    for (int j = 0; j < N; ++j) z[j] = mul_exact(m.top, tanh_full(z[j]));
  }
  if (!row.whole(i)) {
    PK_UNROLL
    for (int j = 0; j < N; ++j) {
      if (!row.inside(row.column(i) + j)) z[j] = -float(pk_inf());
    }
  }
}

template <class E, int MODELS>
PK_DEVICE void read_logits(const RowReader<E, MODELS>& row, const Packet<E>& v, int i,
                           const Model& m, int64_t v0, Dtype type, float (&z)[Packet<E>::kN]) {
  read_before_cap(row, v, i, m, v0, type, z);
  cap_logits(row, i, m, z);
}

// A given value, 0 outside the row's part.
template <class E, int MODELS>
PK_DEVICE float value_at(const RowReader<E, MODELS>& row, const float* values, int c) {
  return row.inside(c) ? values[c] : 0.0f;
}

// Writes one number per column of packet i into `dst`, a row of `type`.
template <class E, int MODELS>
PK_DEVICE void write_columns(const RowReader<E, MODELS>& row, int i, void* dst, Dtype type,
                             const float (&x)[Packet<E>::kN]) {
  const int c = row.column(i), size = int(bytes_of(type));
  const uintptr_t at = reinterpret_cast<uintptr_t>(dst) + uintptr_t(int64_t(c) * size);
  const uintptr_t bytes = Packet<E>::kN * uintptr_t(size) < 16 ? 8 : 16;
  store_values(dst, type, c, x, row.whole(i) && at % bytes == 0,
               [&](int j) { return row.inside(c + j); });
}

template <class E>
PK_DEVICE float largest(const float (&z)[Packet<E>::kN]) {
  float top = z[0];
  PK_UNROLL
  for (int j = 1; j < Packet<E>::kN; ++j) top = larger(top, z[j]);
  return top;
}

}  // namespace prefkern
