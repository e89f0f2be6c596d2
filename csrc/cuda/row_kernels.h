// Arguments of the kernels on numbers per row (numerics/finish.h), as in sweep.h. A table is
// [names, m] of float or double, names as numerics/tables.h has them.
#pragma once

#include "cuda/sweep.h"
#include "numerics/finish.h"

namespace prefkern {

struct Table {
  const void* data = nullptr;
  bool wide = false;  // double
  int64_t stride = 0;
  PK_HD double operator()(int name, int64_t row) const {
    const int64_t at = name * stride + row;
    return wide ? static_cast<const double*>(data)[at]
                : double(static_cast<const float*>(data)[at]);
  }
};
struct OutTable {
  void* data = nullptr;
  bool wide = false;
  int64_t stride = 0;
  PK_HD void put(int name, int64_t row, double value) const {
    const int64_t at = name * stride + row;
    if (wide) {
      static_cast<double*>(data)[at] = value;
    } else {
      static_cast<float*>(data)[at] = float(value);
    }
  }
};

struct MergeArgs {
  FoldPlan plan;
  Table fields;  // [F, ranges, m]
  int64_t range_stride = 0, ranges = 0, m = 0;
  const int64_t* starts = nullptr;  // [ranges]: first columns
  OutTable sums;                    // [FIELDS, m] double
};

struct NormArgs {
  int64_t m = 0;
  Table sums, top;  // [FIELDS, m]; [2, m] or nothing
  OutTable norms;   // [NORMS, m]
};

// Which of the N tokens the rows are.
struct RowArgs {
  FoldPlan plan;
  int64_t m = 0, ignore = 0;
  const int64_t* targets = nullptr;  // [N]
  const int64_t* rows = nullptr;     // [m], or null: all
  PK_HD int64_t token(int64_t i) const { return rows == nullptr ? i : rows[i]; }
};

struct FinishArgs : RowArgs {
  int64_t vocabulary = 0;
  Table sums, at, second, top;      // second, top: or nothing
  const double* teacher = nullptr;  // [N] or null
  OutTable out, saved;              // [n, m]; [SAVED, m] double
};

struct PullArgs : RowArgs {
  double slope = 1.0;
  Table d_out, out, saved;
  OutTable coefficients;  // [COEFFICIENTS, m]
};

void merge_rows(const MergeArgs& args, const Stream& stream);
void norm_rows(const NormArgs& args, const Stream& stream);
void finish_rows(const FinishArgs& args, const Stream& stream);
void pull_rows(const PullArgs& args, const Stream& stream);

}  // namespace prefkern
