// Arguments of the tile kernels and the functions that launch them: raw pointers and numbers, no
// torch and no CUDA types, so that the emulation on a CPU has the very same interface.
//
// Tile: rows [m] x columns [w] of raw products; column c is vocabulary entry v0 + c. The fields and
// coefficients are those of prefkern/backends/tiled/epilogue.py, in its order.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "numerics/stats.h"

namespace prefkern {

struct Model {
  const void* x = nullptr;  // [m, w], null where the model is not there
  int64_t stride = 0;       // elements from row to row
  float factor = 1.0f, top = 0.0f;
  const void* bias = nullptr;  // [V] or null
  Dtype bias_type = Dtype::f32;
};

struct TileArgs {
  Model model[3];  // policy, reference, third head
  int64_t m = 0, w = 0, v0 = 0;
  const int64_t* targets = nullptr;  // [m]
  int64_t ignore = -1;               // target of rows that do not count
  const float* adv = nullptr;        // A of `ev`, [w] or [m, w]
  int64_t adv_stride = 0;            // 0: one row for all
  // Dtype that products are rounded to where a backward reads them; fp32: they are not.
  Dtype working = Dtype::f32;
};

struct FoldArgs : TileArgs {
  int64_t columns = 0, blocks = 0;  // columns of one block; blocks of a tile row
  // A block's columns are `span` chunks. Its sums are the first one's; the others get those of
  // nothing, which the merge of chunks takes as any other.
  int64_t span = 1, chunks = 0;
  float* fields = nullptr;  // [F, chunks, m]
  int64_t field_stride = 0, chunk_stride = 0;
  float* at_target = nullptr;  // [2, m]: z_y, zr_y
  int64_t at_stride = 0;
  void* keep[2] = {nullptr, nullptr};  // [m, w] of `working`: products as a backward reads them
  int64_t keep_stride[2] = {0, 0};
  bool rounds = false;  // also the normalisers of rounded products
  bool has_mix = false, has_alpha = false, has_renyi = false;
  float alpha = 0.0f, renyi = 0.0f, mix = 0.0f;
};

struct SecondArgs : TileArgs {
  int64_t columns = 0, blocks = 0;
  int64_t span = 1, chunks = 0;  // as in FoldArgs
  const float* norms = nullptr;  // [NORMS, m]
  int64_t norm_stride = 0;
  float* fields = nullptr;  // [SECOND_FIELDS, chunks, m]
  int64_t field_stride = 0, chunk_stride = 0;
  bool has_jsd = false, has_tv = false, has_bkl = false;
  float jsd = 0.0f;
};

struct GradientArgs : TileArgs {
  const float* coefficients = nullptr;  // [COEFFICIENTS, m]
  int64_t coefficient_stride = 0;
  void* dx = nullptr;  // [m, w] of dx_type
  int64_t dx_stride = 0;
  Dtype dx_type = Dtype::f32;
  int64_t columns = 0, blocks = 0;  // any number of blocks gives the same bits
  float slope = 0.0f;               // temperature / softcap, 0 without a cap
  float alpha = 0.0f, renyi = 0.0f, mix = 0.0f, jsd = 0.0f;
};

struct SeenArgs : TileArgs {  // of model[1] alone
  float* out = nullptr;       // [m, w]
  int64_t out_stride = 0;
};

// Terms that multiply head rows in the sums of a frozen head; null where not asked for.
enum Factor : int { kMass, kLog, kRef, kCross, kFactors };
struct FactorArgs : TileArgs {
  const float* maxima = nullptr;  // [2, m]
  int64_t maxima_stride = 0;
  void* out[kFactors] = {};  // [m, w] of `working`
  int64_t out_stride[kFactors] = {};
  float slope = 0.0f;
  int64_t columns = 0, blocks = 0;
};

struct RaiseArgs {
  float* totals = nullptr;  // [count, m, depth]; the mass first
  int64_t m = 0, depth = 0, sum_stride = 0, row_stride = 0;
  int at[kFactors] = {0, -1, -1, -1};  // place of each sum in totals, -1 where it is not kept
  const float* shift = nullptr;        // [4, m]: fp, fr, dp, dr
  int64_t shift_stride = 0;
};

// logits_logps: from the sums of a row's chunks to its statistics, and from those to what the
// gradient multiplies. out, saved and d_out have one row of numbers per statistic.
struct FinishArgs {
  StatPlan plan;
  bool two = false, small = false;
  int64_t rows = 0, vocab = 0, chunk = 0, chunks = 0;
  const int64_t* targets = nullptr;
  int64_t ignore = -1;
  const float* fields = nullptr;     // [F, chunks, rows] of the fold, contiguous
  const float* at_target = nullptr;  // [2, rows]
  const float* second = nullptr;     // [7, chunks, rows] of the second sweep, contiguous
  const float* top = nullptr;        // [2, rows]: bkl's threshold and its index
  float* norms = nullptr;            // [NORMS, rows], written where a second sweep follows
  float* out = nullptr;              // [n, rows]
  float* saved = nullptr;            // [kSavedRows, rows]
  double temperature = 1.0;
  const float* d_out = nullptr;   // [n, rows]
  float* coefficients = nullptr;  // [COEFFICIENTS, rows]
};

// Where and how to launch.
struct Stream {
  void* handle = nullptr;  // cudaStream_t
  bool wait = false;       // PREFKERN_DEBUG_SYNC: wait for the kernel, so that its error is its own
};

// Each throws std::runtime_error with the kernel's name, the launch and the shapes on a CUDA error.
void fold_one(Dtype tile, bool small, const FoldArgs& args, const Stream& stream);
void fold_two(Dtype tile, bool small, const FoldArgs& args, const Stream& stream);
void fold_second(Dtype tile, const SecondArgs& args, const Stream& stream);
void seen_logits(Dtype tile, const SeenArgs& args, const Stream& stream);
void frozen_factors(Dtype tile, const FactorArgs& args, const Stream& stream);
void raise_rows(const RaiseArgs& args, const Stream& stream);
void finish_logits(const FinishArgs& args, const Stream& stream);
void finish_logits_second(const FinishArgs& args, const Stream& stream);
void logits_coefficients(const FinishArgs& args, const Stream& stream);
void gradient_one(Dtype tile, bool small, const GradientArgs& args, const Stream& stream);
void gradient_two(Dtype tile, bool small, const GradientArgs& args, const Stream& stream);

}  // namespace prefkern
