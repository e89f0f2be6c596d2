// Arguments of the tile kernels and the functions that launch them: raw pointers and numbers, no
// torch and no CUDA types, so that the emulation on a CPU has the very same interface.
//
// Tile: rows [m] x columns [w] of raw products; column c is vocabulary entry v0 + c. Numbers per
// row and chunk lie as numerics/tables.h names them.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "numerics/stats.h"

namespace prefkern {

struct Model {
  const void* x = nullptr;  // [m, w], null where the model is not there
  int64_t stride = 0;       // elements from row to row
  float factor = 1.0f, top = 0.0f;
  const float* bias = nullptr;  // [V] or null
};

struct TileArgs {
  Model model[3];  // policy, reference, third head
  int64_t m = 0, w = 0, v0 = 0;
  const int64_t* targets = nullptr;  // [m]
  int64_t ignore = -1;               // target of rows that do not count
  const float* adv = nullptr;        // A of ev or xent's teacher, [w] or [m, w]
  int64_t adv_stride = 0;            // 0: one row for all
  int64_t columns = 0, blocks = 0;   // columns of one block; blocks of a tile row
};

struct FoldArgs : TileArgs {
  // A block's columns are `span` chunks. Its sums are the first one's; the others get those of
  // nothing, which the merge of chunks takes as any other.
  int64_t span = 1, chunks = 0;
  float* fields = nullptr;  // [F, chunks, m]
  int64_t field_stride = 0, chunk_stride = 0;
  double* at = nullptr;  // [AT, m]
  int64_t at_stride = 0;
  // Where a backward reads the policy's products rounded to a 16-bit type, that type: the fold then
  // also forms their normaliser. fp32: they are read as they are.
  Dtype working = Dtype::f32;
  void* keep = nullptr;  // [m, w] of `working`: the rounded products
  int64_t keep_stride = 0;
  bool has_alpha = false, has_renyi = false, has_mix = false;
  float alpha = 0.0f, renyi = 0.0f, mix = 0.0f;
};

struct SecondArgs : TileArgs {
  int64_t span = 1, chunks = 0;  // as in FoldArgs
  const float* norms = nullptr;  // [NORMS, m]
  int64_t norm_stride = 0;
  float* fields = nullptr;  // [SECOND, chunks, m]
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
  bool rounds = false;  // fp32 products are first rounded to dx_type
  float slope = 0.0f;   // temperature / softcap, 0 without a cap
  float alpha = 0.0f, renyi = 0.0f, mix = 0.0f, jsd = 0.0f;
};

// One of the terms that multiply head rows in the sums of a frozen head.
struct TermArgs : TileArgs {
  Factor which = Factor::mass;
  void* out = nullptr;  // [m, w] of out_type
  int64_t out_stride = 0;
  Dtype out_type = Dtype::f32;
  float slope = 0.0f;
};
struct FactorArgs : TermArgs {
  const float* maxima = nullptr;  // [2, m]
  int64_t maxima_stride = 0;
};

struct TotalArgs {
  float* totals = nullptr;  // [count, m, depth]; the mass first
  int64_t m = 0, depth = 0, sum_stride = 0, row_stride = 0;
  int at[kFactors] = {0, -1, -1, -1};  // place of each sum in totals, -1 where it is not kept
};
struct RaiseArgs {
  TotalArgs totals;
  const float* shift = nullptr;  // [4, m]: fp, fr, dp, dr
  int64_t shift_stride = 0;
};

struct FrozenArgs {
  FoldArgs fold;  // one block per row
  TermArgs terms;
  TotalArgs totals;
  bool moves = false;       // there are sums already
  float* maxima = nullptr;  // [2, m], finite; raised
  int64_t maxima_stride = 0;
};

// Where and how to launch.
struct Stream {
  void* handle = nullptr;  // cudaStream_t
  bool wait = false;       // PREFKERN_DEBUG_SYNC: wait for the kernel, so that its error is its own
};

// Each throws std::runtime_error with the kernel's name, the launch and the shapes on a CUDA error.
// Small kernels are for fp32 and bf16 tiles of one model, and fp32 tiles of two; fold_frozen is for
// these, and for fp32 tiles of one model and any statistic.
void fold_one(Dtype tile, bool small, const FoldArgs& args, const Stream& stream);
void fold_two(Dtype tile, bool small, const FoldArgs& args, const Stream& stream);
void fold_second(Dtype tile, const SecondArgs& args, const Stream& stream);
void fold_frozen(Dtype tile, bool two, bool small, const FrozenArgs& args, const Stream& stream);
void frozen_factors(Dtype tile, const FactorArgs& args, const Stream& stream);
void raise_rows(const RaiseArgs& args, const Stream& stream);
void gradient_one(Dtype tile, bool small, const GradientArgs& args, const Stream& stream);
void gradient_two(Dtype tile, bool small, const GradientArgs& args, const Stream& stream);

}  // namespace prefkern
