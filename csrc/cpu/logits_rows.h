// Statistics and gradient where logits already exist: the same folds, one row at a time, read once
// forward (twice for jsd, tv and bkl) and read once, written once backward.
#pragma once

#include "cpu/tiles.h"

namespace prefkern {
namespace PK_ISA {

// Logits converted at a time: 4 to 8 KiB, in L1 together with the reference's.
constexpr int64_t kLogitsChunk = 1024;
constexpr int64_t kLogitsUnit = 4;  // rows handed out at a time

template <class T>
struct LogitsRows {
  static constexpr int L = Lanes<T>::L;
  const LogitsCall& call;
  Memory memory;
  T* z = nullptr;     // per thread [kLogitsChunk]
  T* zr = nullptr;    // per thread
  T* line = nullptr;  // per thread
  T* heap_value = nullptr;
  int32_t *heap_index = nullptr, *heap_size = nullptr;
  int32_t top = 0;
  Head shape, ref_shape;

  explicit LogitsRows(const LogitsCall& c) : call(c) {
    shape.temperature = ref_shape.temperature = c.temperature;
    shape.hidden_type = c.type;
    ref_shape.hidden_type = c.ref_type;
    const int64_t k = c.plan.has(kBkl) ? int64_t(c.plan.param[kBkl]) : 0;
    top = int32_t(k < c.vocab ? k : c.vocab);
  }
  bool place() {
    const int64_t t = call.pool.threads;
    return memory.place([&](Arena& a) {
      z = a.take<T>(kLogitsChunk * t);
      zr = a.take<T>(kLogitsChunk * t);
      line = a.take<T>(kLogitsChunk * t);
      heap_value = a.take<T>(top * t);
      heap_index = a.take<int32_t>(top * t);
      heap_size = a.take<int32_t>(t);
    });
  }
  TileRow<T> chunk(int64_t row, int thread, int64_t v0) const {
    const int64_t width = call.vocab - v0 < kLogitsChunk ? call.vocab - v0 : kLogitsChunk;
    const int64_t blocks = (width + L - 1) / L;
    T *a = z + thread * kLogitsChunk, *b = nullptr;
    plain_to_tile(a, L, blocks, call.logits, call.type, row * call.vocab + v0, width);
    shape_row<T>(a, L, blocks, width, nullptr, shape);
    if (call.ref_logits != nullptr) {
      b = zr + thread * kLogitsChunk;
      plain_to_tile(b, L, blocks, call.ref_logits, call.ref_type, row * call.vocab + v0, width);
      shape_row<T>(b, L, blocks, width, nullptr, ref_shape);
    }
    return {a, b, nullptr, nullptr, L, L, blocks, v0};
  }
  template <class Body>
  void each_row(const Body& body) const {
    parallel(call.pool, (call.rows + kLogitsUnit - 1) / kLogitsUnit, [&](int64_t unit, int thread) {
      for (int64_t r = kLogitsUnit * unit; r < kLogitsUnit * (unit + 1) && r < call.rows; ++r)
        body(r, thread);
    });
  }
  T* out_at(int slot, int64_t row) const {
    return static_cast<T*>(call.out) + slot * call.rows + row;
  }
  T* saved_at(int k, int64_t row) const {
    return static_cast<T*>(call.saved) + k * call.rows + row;
  }

  bool forward() {
    if (!place()) return false;
    each_row([&](int64_t row, int thread) {
      for (int i = 0; i < call.plan.count; ++i) *out_at(i, row) = T(0);
      for (int k = 0; k < kSavedRows; ++k) *saved_at(k, row) = T(0);
      const int64_t y = call.targets[row];
      if (y == call.ignore) return;
      RowSums s;
      TopHeap<T> heap{heap_value + thread * top, heap_index + thread * top, heap_size + thread,
                      top};
      heap_size[thread] = 0;
      for (int64_t v0 = 0; v0 < call.vocab; v0 += kLogitsChunk) {
        const TileRow<T> t = chunk(row, thread, v0);
        fold_first(s, call.plan, t, row_tops(t));
        if (call.plan.has(kMix)) fold_plain_blend(s.mix_plain, t, call.plan.param[kMix]);
        if (top > 0) heap.scan(t, call.vocab - v0);
        if (y < v0 || y >= v0 + kLogitsChunk) continue;
        s.zy = double(t.z[y - v0]);
        if (t.zr != nullptr) s.ref_zy = double(t.zr[y - v0]);
      }
      const auto put = [&](StatKind k, double v) {
        if (call.plan.slot[k] >= 0) *out_at(call.plan.slot[k], row) = T(v);
      };
      finish_first(s, call.plan, false, y, put);
      const double lse = lse_value(s.pol), ref_lse = lse_value(s.ref);
      *saved_at(kSavedLse, row) = T(lse);
      *saved_at(kLowLse, row) = T(lse - double(T(lse)));
      if (call.ref_logits != nullptr) *saved_at(kSavedRefLse, row) = T(ref_lse);
      if (call.plan.has(kMix)) *saved_at(kSavedMixLse, row) = T(lse_value(s.mix_plain));
      if (!needs_second_sweep(call.plan)) return;
      if (top > 0) {
        s.top_value = double(heap.value[0]);
        s.top_index = heap.index[0];
        *saved_at(kSavedTopValue, row) = T(s.top_value);
        *saved_at(kSavedTopIndex, row) = T(s.top_index);
      }
      for (int64_t v0 = 0; v0 < call.vocab; v0 += kLogitsChunk) {
        fold_second(s, call.plan, chunk(row, thread, v0), lse, ref_lse,
                    static_cast<const T*>(nullptr));
      }
      finish_second(s, call.plan, put);
      *saved_at(kSavedKlMix, row) = T(s.kl_pol);
      *saved_at(kSavedTvMean, row) = T(s.tv_mean);
      *saved_at(kSavedRestRef, row) = T(s.rest_ref);
      *saved_at(kSavedRestPol, row) = T(s.rest_pol);
    });
    return true;
  }

  bool backward() {
    if (!place()) return false;
    const int64_t bytes = dtype_bytes(call.type);
    each_row([&](int64_t row, int thread) {
      char* d = static_cast<char*>(call.d_logits) + row * call.vocab * bytes;
      const int64_t y = call.targets[row];
      if (y == call.ignore) {
        std::memset(d, 0, size_t(call.vocab * bytes));
        return;
      }
      const auto up = [&](StatKind k) {
        return double(static_cast<const T*>(call.d_out)[call.plan.slot[k] * call.rows + row]);
      };
      const auto out = [&](StatKind k) { return double(*out_at(call.plan.slot[k], row)); };
      const auto saved = [&](SavedRow k) { return double(*saved_at(k, row)); };
      GradRow<T> g{grad_coefficients(call.plan, up, out, saved),
                   Split<T>(saved(kSavedLse) + saved(kLowLse)), Split<T>(saved(kSavedRefLse)),
                   Split<T>(0.0)};
      scale_coefficients(g.c, 1.0 / call.temperature);
      for (int64_t v0 = 0; v0 < call.vocab; v0 += kLogitsChunk) {
        const int64_t width = call.vocab - v0 < kLogitsChunk ? call.vocab - v0 : kLogitsChunk;
        const TileRow<T> t = chunk(row, thread, v0);
        T* dst = z + thread * kLogitsChunk;
        grad_row(g, t, dst, line + thread * kLogitsChunk, y >= v0 && y < v0 + width ? y - v0 : -1,
                 0.0, 1.0);
        tile_to_plain(d, call.type, v0, dst, L, width);
      }
    });
    return true;
  }
  // Low part of lse, in the row that only a third head uses: logits of any size keep exact
  // gradients.
  static constexpr SavedRow kLowLse = kSavedAuxLse;
};

}  // namespace PK_ISA
}  // namespace prefkern
