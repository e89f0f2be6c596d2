// Written by csrc/make_tables.py from prefkern/stats.py and prefkern/backends/tables.py,
// which say what each name is. Do not edit.
// clang-format off
#pragma once

namespace prefkern {

enum class Stat : int {
  logp,
  lse,
  zy,
  ent,
  col,
  top1,
  zmean,
  xent,
  ref_logp,
  ref_lse,
  fkl,
  rkl,
  jsd,
  alpha,
  renyi,
  tv,
  bkl,
  mix,
  ev,
};
constexpr int kStats = 19;
constexpr const char* kStatNames[kStats] = {
  "logp",
  "lse",
  "zy",
  "ent",
  "col",
  "top1",
  "zmean",
  "xent",
  "ref_logp",
  "ref_lse",
  "fkl",
  "rkl",
  "jsd",
  "alpha",
  "renyi",
  "tv",
  "bkl",
  "mix",
  "ev",
};

enum class Field : int {
  max,
  sum,
  round_max,
  round_sum,
  ref_max,
  ref_sum,
  ref_cross,
  pol_cross,
  x,
  sq,
  z_sum,
  z_count,
  top,
  alpha_max,
  alpha_sum,
  renyi_max,
  renyi_sum,
  mix_max,
  mix_sum,
  adv,
  aux_max,
  aux_sum,
};
constexpr int kFields = 22;

enum class At : int {
  zy,
  ref_zy,
  taught,
};
constexpr int kAts = 3;

enum class Second : int {
  kl_ref,
  kl_pol,
  tv,
  tv_mean,
  top_kl,
  rest_ref,
  rest_pol,
};
constexpr int kSeconds = 7;

enum class Norm : int {
  lse,
  lse_low,
  ref_lse,
  ref_lse_low,
  top_value,
  top_index,
};
constexpr int kNorms = 6;

enum class Saved : int {
  lse,
  zy,
  teacher,
  ref_lse,
  aux_lse,
  jsd_kl,
  tv_mean,
  rest_ref,
  rest_pol,
  top_value,
  top_index,
  mix_shift,
};
constexpr int kSaveds = 12;

enum class Coef : int {
  lse,
  lse_low,
  e,
  a0,
  ent,
  ent_value,
  col,
  col_value,
  teach,
  ref_lse,
  ref_lse_low,
  fkl,
  rkl,
  rkl_value,
  ev,
  ev_value,
  aux_lse,
  aux_lse_low,
  alpha,
  renyi,
  renyi_shift,
  mix,
  mix_shift,
  jsd,
  jsd_kl,
  tv,
  tv_mean,
  bkl,
  bkl_ratio,
  top_value,
  top_index,
};
constexpr int kCoefs = 31;

enum class Factor : int {
  mass,
  log,
  gap,
  cross,
};
constexpr int kFactors = 4;
constexpr const char* kFactorNames[kFactors] = {
  "mass",
  "log",
  "gap",
  "cross",
};

enum class Maximum : int {
  policy,
  reference,
};
constexpr int kMaximums = 2;

enum class Move : int {
  fp,
  fr,
  dp,
  dr,
};
constexpr int kMoves = 4;

enum class Input : int {
  hidden,
  weight,
  bias,
  low_in,
  low_out,
  ref_hidden,
  ref_weight,
  ref_bias,
  ref_low_in,
  ref_low_out,
  aux_hidden,
  aux_weight,
  aux_bias,
  aux_low_in,
  aux_low_out,
  logits,
  ref_logits,
  targets,
  rows,
  values,
  values_index,
};
constexpr int kInputs = 21;
constexpr const char* kInputNames[kInputs] = {
  "hidden",
  "weight",
  "bias",
  "low_in",
  "low_out",
  "ref_hidden",
  "ref_weight",
  "ref_bias",
  "ref_low_in",
  "ref_low_out",
  "aux_hidden",
  "aux_weight",
  "aux_bias",
  "aux_low_in",
  "aux_low_out",
  "logits",
  "ref_logits",
  "targets",
  "rows",
  "values",
  "values_index",
};

enum class Number : int {
  scale,
  softcap,
  temperature,
  ref_scale,
  ref_softcap,
  ref_temperature,
  aux_scale,
  aux_softcap,
  aux_temperature,
};
constexpr int kNumbers = 9;

constexpr int kSmallOneModel = 4;
constexpr int kSmallTwoModel = 8;
constexpr int kSavedOneModel = 3;
constexpr int kChunk = 1024;

}  // namespace prefkern
