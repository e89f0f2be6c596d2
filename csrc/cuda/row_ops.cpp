#include "cuda/row_ops.h"

#include "cuda/row_kernels.h"
#include "stat_parse.h"

namespace prefkern {
namespace {

Table table(const Tensor& t, const char* name, int64_t rows, int64_t m) {
  check(t, name, {rows, m});
  const bool wide = t.scalar_type() == ScalarType::Double;
  if (!wide) check_type(t, name, ScalarType::Float, "float32 or float64");
  return {t.const_data_ptr(), wide, t.stride(0)};
}
Table table(const OptTensor& t, const char* name, int64_t rows, int64_t m) {
  return t.has_value() ? table(*t, name, rows, m) : Table();
}
// A new table; every number of it is written.
OutTable make_table(Tensor& t) {
  return {t.mutable_data_ptr(), t.scalar_type() == ScalarType::Double, t.stride(0)};
}
Tensor new_table(const Tensor& like, int64_t rows, int64_t m, bool wide) {
  return torch::stable::new_empty(like, {rows, m}, wide ? ScalarType::Double : ScalarType::Float);
}

void set_rows(RowArgs& a, const Tensor& targets, const OptTensor& rows, int64_t ignore_index) {
  check_dense(targets, "targets", {-1});
  a.targets = longs(targets, "targets");
  a.m = targets.numel();
  a.ignore = ignore_index;
  if (!rows.has_value()) return;
  check_dense(*rows, "rows", {-1});
  a.rows = longs(*rows, "rows");
  a.m = rows->numel();
}

}  // namespace

Tensor cuda_merge(const Tensor& fields, const Tensor& starts, const std::string& plan,
                  bool rounded) {
  MergeArgs a;
  a.plan = fold_plan(plan, rounded);
  STD_TORCH_CHECK(fields.dim() == 3, "fields must be [F, C, M], got ", shape_text(fields), ".");
  a.ranges = fields.size(1), a.m = fields.size(2);
  for (int k = 0; k < kFields; ++k) {
    STD_TORCH_CHECK(!a.plan.writes(Field(k)) || k < fields.size(0), "fields must hold those of ",
                    plan, ", got ", fields.size(0), " of them.");
  }
  check(fields, "fields", {-1, a.ranges, a.m});
  const bool wide = fields.scalar_type() == ScalarType::Double;
  if (!wide) check_type(fields, "fields", ScalarType::Float, "float32 or float64");
  a.fields = {fields.const_data_ptr(), wide, fields.stride(0)};
  a.range_stride = fields.stride(1);
  check_dense(starts, "starts", {a.ranges});
  a.starts = longs(starts, "starts");
  Tensor sums = new_table(fields, kFields, a.m, true);
  a.sums = make_table(sums);
  const OnDevice here(fields);
  merge_rows(a, here.stream());
  return sums;
}

Tensor cuda_norms(const Tensor& sums, const OptTensor& top, bool wide) {
  NormArgs a;
  STD_TORCH_CHECK(sums.dim() == 2, "sums must be [FIELDS, M], got ", shape_text(sums), ".");
  a.m = sums.size(1);
  a.sums = table(sums, "sums", kFields, a.m);
  a.top = table(top, "top", 2, a.m);
  Tensor norms = new_table(sums, kNorms, a.m, wide);
  a.norms = make_table(norms);
  const OnDevice here(sums);
  norm_rows(a, here.stream());
  return norms;
}

std::tuple<Tensor, Tensor> cuda_finish(const Tensor& sums, const Tensor& at,
                                       const OptTensor& second, const OptTensor& top,
                                       const Tensor& targets, const OptTensor& rows,
                                       const OptTensor& teacher, int64_t ignore_index,
                                       int64_t vocabulary, const std::string& plan, bool rounded,
                                       bool wide) {
  FinishArgs a;
  a.plan = fold_plan(plan, rounded);
  set_rows(a, targets, rows, ignore_index);
  a.vocabulary = vocabulary;
  a.sums = table(sums, "sums", kFields, a.m);
  a.at = table(at, "at", kAts, a.m);
  a.second = table(second, "second", kSeconds, a.m);
  a.top = table(top, "top", 2, a.m);
  if (teacher.has_value()) {
    check_dense(*teacher, "teacher", {targets.numel()});
    check_type(*teacher, "teacher", ScalarType::Double, "float64");
    a.teacher = static_cast<const double*>(teacher->const_data_ptr());
  }
  Tensor out = new_table(sums, a.plan.stats.count, a.m, wide);
  Tensor saved = new_table(sums, a.plan.two ? kSaveds : kSavedOneModel, a.m, true);
  a.out = make_table(out);
  a.saved = make_table(saved);
  const OnDevice here(sums);
  finish_rows(a, here.stream());
  return {out, saved};
}

Tensor cuda_pull(const Tensor& d_out, const Tensor& out, const Tensor& saved, const Tensor& targets,
                 const OptTensor& rows, int64_t ignore_index, double slope,
                 const std::string& plan) {
  PullArgs a;
  a.plan = fold_plan(plan, false);
  set_rows(a, targets, rows, ignore_index);
  a.slope = slope;
  a.d_out = table(d_out, "d_out", a.plan.stats.count, a.m);
  a.out = table(out, "out", a.plan.stats.count, a.m);
  a.saved = table(saved, "saved", a.plan.two ? kSaveds : kSavedOneModel, a.m);
  Tensor coefficients = new_table(out, kCoefs, a.m, a.out.wide);
  a.coefficients = make_table(coefficients);
  const OnDevice here(out);
  pull_rows(a, here.stream());
  return coefficients;
}

}  // namespace prefkern
