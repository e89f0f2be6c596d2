#include "cpu/arithmetic.h"

#include <cstring>

#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "numerics/finish.h"

namespace prefkern {
namespace {

using torch::headeronly::ScalarType;

void check_type(const Tensor& t, const char* name, ScalarType type) {
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has another dtype than the op expects.");
}

// Numbers of a [rows, M] tensor of float or double.
struct Rows {
  const float* f = nullptr;
  const double* d = nullptr;
  int64_t columns = 0;
  Rows(const Tensor& t, const char* name, int64_t rows, int64_t m) : columns(m) {
    check_shape(t, name, {rows, m});
    if (t.scalar_type() == ScalarType::Double) {
      d = static_cast<const double*>(t.const_data_ptr());
    } else {
      check_type(t, name, ScalarType::Float);
      f = static_cast<const float*>(t.const_data_ptr());
    }
  }
  double operator()(int64_t row, int64_t i) const {
    const int64_t at = row * columns + i;
    return d != nullptr ? d[at] : double(f[at]);
  }
};

void store(void* data, bool wide, int64_t at, double value) {
  if (wide) {
    static_cast<double*>(data)[at] = value;
  } else {
    static_cast<float*>(data)[at] = float(value);
  }
}

Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes, bool wide) {
  Tensor t = torch::stable::new_empty(like, sizes, wide ? ScalarType::Double : ScalarType::Float);
  if (t.numel() > 0) std::memset(t.mutable_data_ptr(), 0, size_t(t.numel()) * (wide ? 8 : 4));
  return t;
}

// body(i) for every row, several thousand to a thread.
template <class Body>
void each_row(int64_t m, const Body& body) {
  torch::stable::parallel_for(0, m, 2048, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// Which of the N tokens the rows are.
struct RowIndex {
  const int64_t* targets = nullptr;
  const int64_t* rows = nullptr;
  int64_t n = 0, m = 0, ignore = 0;
  RowIndex(const Tensor& targets_, const OptTensor& rows_, int64_t ignore_index)
      : n(targets_.numel()), m(n), ignore(ignore_index) {
    check_rows(targets_, rows_);
    targets = static_cast<const int64_t*>(targets_.const_data_ptr());
    if (!rows_.has_value()) return;
    m = rows_->numel();
    rows = static_cast<const int64_t*>(rows_->const_data_ptr());
  }
  int64_t token(int64_t i) const { return rows == nullptr ? i : rows[i]; }
  int64_t target(int64_t i) const { return targets[token(i)]; }
  bool live(int64_t i) const { return target(i) != ignore; }
};

RowSums load_sums(const Rows& sums, const FoldPlan& plan, int64_t i) {
  RowSums s;
  each_field(s, [&](Field f, double& x) {
    if (plan.writes(f)) x = sums(int64_t(f), i);
  });
  if (plan.writes(Field::top)) s.top = int64_t(sums(int64_t(Field::top), i));
  return s;
}

}  // namespace

Tensor merge(const Tensor& fields, const Tensor& starts, const std::string& plan_text,
             bool rounded) {
  const FoldPlan plan = fold_plan(plan_text, rounded);
  STD_TORCH_CHECK(fields.dim() == 3 && fields.size(0) == kFields, "fields must be [FIELDS, C, M].");
  const int64_t ranges = fields.size(1), m = fields.size(2);
  check_shape(starts, "starts", {ranges});
  check_long(starts, "starts");
  const int64_t* first = static_cast<const int64_t*>(starts.const_data_ptr());
  const bool wide = fields.scalar_type() == ScalarType::Double;
  if (!wide) check_type(fields, "fields", ScalarType::Float);
  const void* data = fields.const_data_ptr();
  const int64_t by_field = fields.stride(0), by_range = fields.stride(1), by_row = fields.stride(2);
  Tensor out = zeros(fields, {kFields, m}, true);
  double* to = static_cast<double*>(out.mutable_data_ptr());
  each_row(m, [&](int64_t i) {
    RowSums s = merge_row(
        plan, ranges,
        [&](Field f, int64_t c) {
          const int64_t at = int64_t(f) * by_field + c * by_range + i * by_row;
          return wide ? static_cast<const double*>(data)[at]
                      : double(static_cast<const float*>(data)[at]);
        },
        [&](int64_t c) { return first[c]; });
    each_field(s, [&](Field f, double& x) {
      if (plan.writes(f)) to[int64_t(f) * m + i] = x;
    });
    if (plan.writes(Field::top)) to[int64_t(Field::top) * m + i] = double(s.top);
  });
  return out;
}

Tensor norms(const Tensor& sums, const OptTensor& top, bool wide) {
  const int64_t m = sums.size(1);
  const Rows s(sums, "sums", kFields, m);
  Tensor out = zeros(sums, {kNorms, m}, wide);
  void* to = out.mutable_data_ptr();
  const Rows cut = top.has_value() ? Rows(*top, "top", 2, m) : s;
  each_row(m, [&](int64_t i) {
    const auto put = [&](Norm k, double x) { store(to, wide, int64_t(k) * m + i, x); };
    const auto lse = [&](Norm high, Norm low, Field max, Field sum) {
      const double x = safe_max(s(int64_t(max), i)) + pk_log(s(int64_t(sum), i));
      const double rounded = wide ? x : double(float(x)), rest = x - rounded;
      put(high, rounded);
      put(low, rest == rest ? rest : 0.0);
    };
    lse(Norm::lse, Norm::lse_low, Field::max, Field::sum);
    lse(Norm::ref_lse, Norm::ref_lse_low, Field::ref_max, Field::ref_sum);
    if (!top.has_value()) return;
    put(Norm::top_value, cut(0, i));
    put(Norm::top_index, cut(1, i));
  });
  return out;
}

std::tuple<Tensor, Tensor> finish(const Tensor& sums_, const Tensor& at_, const OptTensor& second_,
                                  const OptTensor& top_, const Tensor& targets,
                                  const OptTensor& rows, const OptTensor& teacher,
                                  int64_t ignore_index, int64_t vocabulary,
                                  const std::string& plan_text, bool rounded, bool wide) {
  const FoldPlan plan = fold_plan(plan_text, rounded);
  const RowIndex index(targets, rows, ignore_index);
  const int64_t m = index.m;
  const Rows sums(sums_, "sums", kFields, m), at(at_, "at", kAts, m);
  const Rows second = second_.has_value() ? Rows(*second_, "second", kSeconds, m) : sums;
  const Rows top = top_.has_value() ? Rows(*top_, "top", 2, m) : sums;
  const double* mass = nullptr;
  if (teacher.has_value()) {
    check_shape(*teacher, "teacher", {index.n});
    check_type(*teacher, "teacher", ScalarType::Double);
    mass = static_cast<const double*>(teacher->const_data_ptr());
  }
  const int kept = plan.two ? kSaveds : kSavedOneModel;
  Tensor out = zeros(sums_, {plan.stats.count, m}, wide), saved = zeros(sums_, {kept, m}, true);
  void* to = out.mutable_data_ptr();
  double* keep = static_cast<double*>(saved.mutable_data_ptr());
  each_row(m, [&](int64_t i) {
    if (!index.live(i)) return;
    const RowSums s = load_sums(sums, plan, i);
    RowContext c;
    c.target = index.target(i);
    c.vocab = vocabulary;
    for (int j = 0; j < kAts; ++j) c.at[j] = at(j, i);
    for (int j = 0; j < kSeconds && second_.has_value(); ++j) c.second[j] = second(j, i);
    if (top_.has_value()) c.top_value = top(0, i), c.top_index = top(1, i);
    if (mass != nullptr) c.teacher = mass[index.token(i)];
    finish_row(s, c, plan, [&](Stat stat, double x) {
      store(to, wide, plan.stats.slot[int(stat)] * m + i, x);
    });
    save_row(s, c, plan, [&](Saved row, double x) { keep[int64_t(row) * m + i] = x; });
  });
  return {out, saved};
}

namespace {

// Writes the coefficients of every live row: coefficient k of row i at data[i * by_row + at[k]],
// nowhere for a negative at.
struct CoefficientTable {
  void* data = nullptr;
  bool wide = false;
  int64_t by_row = 0, at[kCoefs];
};
void pull_rows(const Tensor& d_out, const Tensor& out, const Tensor& saved, const RowIndex& index,
               double slope, const FoldPlan& plan, const CoefficientTable& to) {
  const int64_t m = index.m, kept = plan.two ? kSaveds : kSavedOneModel;
  const Rows up(d_out, "d_out", plan.stats.count, m), value(out, "out", plan.stats.count, m);
  const Rows keep(saved, "saved", kept, m);
  each_row(m, [&](int64_t i) {
    if (!index.live(i)) return;
    const RowCoefficients g = pull_row(
        plan.stats, slope, [&](Stat k) { return up(plan.stats.slot[int(k)], i); },
        [&](Stat k) { return value(plan.stats.slot[int(k)], i); },
        [&](Saved k) { return int64_t(k) < kept ? keep(int64_t(k), i) : 0.0; });
    const auto put = [&](Coef k, double x) {
      if (to.at[int(k)] >= 0) store(to.data, to.wide, to.at[int(k)] + i * to.by_row, x);
    };
    if (to.wide) {
      store_coefficients<double>(g, put);
    } else {
      store_coefficients<float>(g, put);
    }
  });
}

}  // namespace

Tensor pull(const Tensor& d_out, const Tensor& out, const Tensor& saved, const Tensor& targets,
            const OptTensor& rows, int64_t ignore_index, double slope,
            const std::string& plan_text) {
  const FoldPlan plan = fold_plan(plan_text, false);
  const RowIndex index(targets, rows, ignore_index);
  CoefficientTable to;
  to.wide = out.scalar_type() == ScalarType::Double;
  Tensor found = zeros(out, {kCoefs, index.m}, to.wide);
  to.data = found.mutable_data_ptr(), to.by_row = 1;
  for (int k = 0; k < kCoefs; ++k) to.at[k] = pulls(plan.stats, Coef(k)) ? k * index.m : -1;
  pull_rows(d_out, out, saved, index, slope, plan, to);
  return found;
}

std::tuple<Tensor, Coefficients> pull_close(const Record& record, int64_t ignore_index,
                                            const Tensor& d_out, const Tensor& out,
                                            const Tensor& saved) {
  const HeadCall& call = record.call;
  const OptTensor rows = record.has(Input::rows) ? OptTensor(record[Input::rows]) : std::nullopt;
  const RowIndex index(record.like(), rows, ignore_index);
  Coefficients found;
  CoefficientTable to;
  for (int k = 0; k < kCoefs; ++k) {
    const bool wanted = pulls(call.stats, Coef(k));
    to.at[k] = wanted ? found.count : -1;
    if (!wanted) continue;
    found.at[found.count] = found.count;
    found.kind[found.count++] = Coef(k);
  }
  to.wide = record.wide();
  to.by_row = found.by_slot = found.count;
  Tensor data = torch::stable::new_empty(out, {call.slots * found.count},
                                         to.wide ? ScalarType::Double : ScalarType::Float);
  found.data = to.data = data.mutable_data_ptr();
  pull_rows(d_out, out, saved, index, call.model[0].scale / call.model[0].temperature,
            call.fold_plan(), to);
  return {data, found};
}

}  // namespace prefkern
