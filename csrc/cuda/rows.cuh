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

// What is known of a packet when its code is compiled. Straight: it lies inside the row's part, and
// its logits are products times a factor (neither bias nor cap).
struct Straight {
  PK_HD constexpr operator bool() const { return true; }
};
struct Any {
  PK_HD constexpr operator bool() const { return false; }
};
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
  bool straight;  // every packet that lies inside the row's part is a straight one

  PK_DEVICE RowReader(const Model (&models)[3], int64_t r, int b, int e)
      : begin(b), end(e), alike(true), straight(true) {
    const auto offset = [](const E* p) {
      return int((reinterpret_cast<uintptr_t>(p) & 15) / sizeof(E));
    };
    PK_UNROLL
    for (int i = 0; i < MODELS; ++i) {
      row[i] = models[i].x == nullptr ? nullptr
                                      : static_cast<const E*>(models[i].x) + r * models[i].stride;
      if (row[i] != nullptr) {
        alike = alike && offset(row[i] + b) == offset(row[0] + b);
        straight = straight && models[i].bias == nullptr && models[i].top == 0.0f;
      }
    }
    first = begin - offset(row[0] + b);
    packets = (end - first + kN - 1) / kN;
    straight = straight && alike;
  }
  // Packets [inner, outer) are straight; at most one lies before them and one behind.
  PK_DEVICE int inner() const { return straight ? int(first < begin) : 0; }
  PK_DEVICE int outer() const { return straight ? packets - int(first + packets * kN > end) : 0; }
  PK_DEVICE int column(int i) const { return first + i * kN; }
  PK_DEVICE bool inside(int c) const { return c >= begin && c < end; }
  // Whether packet i lies inside the row's part, so that none of its elements needs a check.
  PK_DEVICE bool whole(int i) const { return column(i) >= begin && column(i) + kN <= end; }
  template <class Load>
  PK_DEVICE Packet<E> load(int model, int i, Load load) const {
    if (alike && whole(i)) return load_packet(row[model] + column(i), load);
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

// use(packets, i, Straight() or Any()) once for every packet of the row, by the threads in turns:
// first the straight ones, then the others; with the loads of the next AHEAD packets of a thread
// already on their way.
template <int AHEAD, int THREADS, class E, int MODELS, class Use, class Load = Once>
PK_DEVICE void stream(const RowReader<E, MODELS>& row, int t, const Use& use, Load how = {}) {
  Packets<E, MODELS> queue[AHEAD];
  const int inner = row.inner(), outer = row.outer();
  const auto load = [&](auto straight, int i) {
    Packets<E, MODELS> v = {};
    PK_UNROLL
    for (int k = 0; k < MODELS; ++k) {
      if (row.row[k] == nullptr) continue;
      v.of[k] = straight ? load_packet(row.row[k] + row.column(i), how) : row.load(k, i, how);
    }
    return v;
  };
  const auto next = [&](const Packets<E, MODELS>& fresh) {
    PK_UNROLL
    for (int k = 0; k + 1 < AHEAD; ++k) queue[k] = queue[k + 1];
    queue[AHEAD - 1] = fresh;
  };
  int i = inner + t;
  PK_UNROLL
  for (int k = 0; k < AHEAD; ++k) {
    if (i + k * THREADS < outer) queue[k] = load(Straight(), i + k * THREADS);
  }
  for (; i < outer; i += THREADS) {
    Packets<E, MODELS> fresh = {};
    if (i + AHEAD * THREADS < outer) fresh = load(Straight(), i + AHEAD * THREADS);
    use(queue[0], i, Straight());
    next(fresh);
  }
  // Of a row with straight packets thread 0 takes what is left of it: the first, the last.
  const int before = inner, left = row.packets - (outer > inner ? outer - inner : 0);
  const int n = !row.straight ? (row.packets - t + THREADS - 1) / THREADS : t == 0 ? left : 0;
  const auto at = [&](int k) {
    return !row.straight ? t + k * THREADS : k < before ? 0 : row.packets - 1;
  };
  for (int k = -AHEAD; k < n; ++k) {
    Packets<E, MODELS> fresh = {};
    if (k + AHEAD < n) fresh = load(Any(), at(k + AHEAD));
    if (k >= 0) use(queue[0], at(k), Any());
    next(fresh);
  }
}

// u of one packet; `type`: products are first rounded to this dtype (fp32: as they are).
template <class E, int MODELS, class S>
PK_DEVICE void read_before_cap(const RowReader<E, MODELS>& row, const Packet<E>& v, int i,
                               const Model& m, int64_t v0, Dtype type, S straight,
                               float (&u)[Packet<E>::kN]) {
  constexpr int N = Packet<E>::kN;
  PK_UNROLL
  for (int j = 0; j < N; ++j) u[j] = v.at(j);
  if constexpr (sizeof(E) == 4) round_all(u, type);
  if (!straight && m.bias != nullptr) {
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
template <class E, int MODELS, class S>
PK_DEVICE void cap_logits(const RowReader<E, MODELS>& row, int i, const Model& m, S straight,
                          float (&z)[Packet<E>::kN]) {
  constexpr int N = Packet<E>::kN;
  if (straight) return;
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

template <class E, int MODELS, class S>
PK_DEVICE void read_logits(const RowReader<E, MODELS>& row, const Packet<E>& v, int i,
                           const Model& m, int64_t v0, Dtype type, S straight,
                           float (&z)[Packet<E>::kN]) {
  read_before_cap(row, v, i, m, v0, type, straight, z);
  cap_logits(row, i, m, straight, z);
}

// A given value, 0 outside the row's part.
template <class E, int MODELS, class S>
PK_DEVICE float value_at(const RowReader<E, MODELS>& row, const float* values, int c, S straight) {
  return straight || row.inside(c) ? values[c] : 0.0f;
}

// A row of a tile that is written, one number per column of a packet that was read. Numbers of a
// 16-bit tile go into one of its type; into any other they are written one by one.
template <class E, int MODELS>
struct RowWriter {
  static constexpr int kN = Packet<E>::kN;
  void* row;
  Dtype type;
  bool aligned;  // a packet is one store or two

  PK_DEVICE RowWriter(const RowReader<E, MODELS>& from, void* out, int64_t stride, int64_t r,
                      Dtype t)
      : row(static_cast<char*>(out) + r * stride * bytes_of(t)), type(t) {
    const uintptr_t size = uintptr_t(bytes_of(t)), bytes = kN * size < 16 ? 8 : 16;
    const auto at = reinterpret_cast<uintptr_t>(row) + uintptr_t(int64_t(from.first)) * size;
    aligned = at % bytes == 0 && (sizeof(E) == 4 || type == type_of<E>());
  }
  template <class S>
  PK_DEVICE void put(const RowReader<E, MODELS>& from, int i, S straight,
                     const float (&x)[kN]) const {
    const int c = from.column(i);
    if (aligned && (straight || from.whole(i))) {
      store_whole(row, sizeof(E) == 4 ? type : type_of<E>(), c, x);
    } else {
      store_some(row, type, c, x, [&](int j) { return straight || from.inside(c + j); });
    }
  }
};

template <class E>
PK_DEVICE float largest(const float (&z)[Packet<E>::kN]) {
  float top = z[0];
  PK_UNROLL
  for (int j = 1; j < Packet<E>::kN; ++j) top = larger(top, z[j]);
  return top;
}

}  // namespace prefkern
