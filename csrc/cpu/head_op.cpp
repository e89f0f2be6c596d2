#include "cpu/head_op.h"

#include <cstring>

#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "cpu/arithmetic.h"
#include "numerics/finish.h"

namespace prefkern {

using torch::headeronly::ScalarType;

Pool torch_pool() {
  Pool pool;
  pool.threads = int(torch::stable::get_num_threads());
  pool.run = [](int threads, void (*fn)(void*, int), void* arg) {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) fn(arg, int(i));
    });
  };
  return pool;
}

void check_done(bool done) {
  STD_TORCH_CHECK(done, "prefkern could not get working memory; free some.");
}

namespace {

ScalarType scalar(Dtype type) {
  switch (type) {
    case Dtype::f32:
      return ScalarType::Float;
    case Dtype::f64:
      return ScalarType::Double;
    case Dtype::bf16:
      return ScalarType::BFloat16;
    case Dtype::f16:
      break;
  }
  return ScalarType::Half;
}

Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  Tensor t = torch::stable::new_empty(like, sizes, type);
  const int64_t bytes = t.numel() * (type == ScalarType::Double ? 8 : 4);
  if (bytes > 0) std::memset(t.mutable_data_ptr(), 0, size_t(bytes));
  return t;
}

double* doubles(Tensor& t) {
  return static_cast<double*>(t.mutable_data_ptr());
}

// Numbers per slot in the fold type.
const void* rows_of(const Record& record, const Tensor& t, const char* name, int64_t rows) {
  check_shape(t, name, {rows, record.call.slots});
  STD_TORCH_CHECK(t.scalar_type() == (record.wide() ? ScalarType::Double : ScalarType::Float), name,
                  " must be in the fold's dtype: float32, or float64 for float64 input.");
  return t.const_data_ptr();
}

void take_cache(Record& record, const Tensor& cache) {
  HeadCall& call = record.call;
  check_shape(cache, "cache", {call.kept_models(), -1, call.vocab});
  STD_TORCH_CHECK(cache.scalar_type() == scalar(call.cache_type()),
                  "cache must have the dtype that the plan keeps products in.");
  call.kept = cache.size(1);
  call.cache = const_cast<void*>(cache.const_data_ptr());
}

void** gradient_of(Gradients& d, Input k) {
  switch (k) {
    case Input::hidden:
      return &d.hidden;
    case Input::weight:
      return &d.weight;
    case Input::bias:
      return &d.bias;
    case Input::low_in:
      return &d.low_in;
    case Input::low_out:
      return &d.low_out;
    default:
      return &d.logits;
  }
}

// Slots that are not computed hold 0 in every field that a fold of such a call writes.
void clear_rows(const HeadCall& call, double* sums, double* at) {
  const FoldPlan plan = call.fold_plan();
  const size_t bytes = size_t(call.slots) * sizeof(double);
  for (int f = 0; f < kFields; ++f) {
    if (plan.writes(Field(f))) std::memset(sums + f * call.slots, 0, bytes);
  }
  std::memset(at, 0, kAts * bytes);
}

int count_factors(const HeadCall& call) {
  const StatPlan& s = call.stats;
  return 1 + s.grows(Stat::ent) + s.grows(Stat::fkl) + s.grows(Stat::rkl);
}

// Gradients of the policy's tensors that `needed` names, yet to be written.
Tensors new_gradients(Record& record, const std::string& needed) {
  HeadCall& call = record.call;
  Tensors found;
  each_word(needed, ',', [&](std::string_view word) {
    const int k = find_name(kInputNames, word);
    const bool own = k <= int(Input::low_out) || k == int(Input::logits);
    STD_TORCH_CHECK(k < kInputs && own && record.has(Input(k)),
                    "needed must name tensors of the policy in the record, got '",
                    std::string(word), "'.");
    found.push_back(torch::stable::empty_like(record[Input(k)]));
    void* to = found.back().mutable_data_ptr();
    void** place = gradient_of(call.d, Input(k));
    STD_TORCH_CHECK(*place == nullptr, "needed names '", std::string(word), "' twice.");
    *place = to;
  });
  return found;
}

// A whole frozen head's: from normalised factors, without a product.
Tensors frozen_gradient(Record& record, const Coefficients& coefficients, const Tensor& factors,
                        const Tensor& saved, const std::string& needed) {
  HeadCall& call = record.call;
  check_shape(factors, "factors", {count_factors(call), call.slots, record.depth()});
  STD_TORCH_CHECK(factors.scalar_type() == (record.wide() ? ScalarType::Double : ScalarType::Float),
                  "factors must be in the fold's dtype.");
  call.factors = const_cast<void*>(factors.const_data_ptr());
  call.saved_zy =
      static_cast<const double*>(saved.const_data_ptr()) + int64_t(Saved::zy) * call.slots;
  call.coefficients = coefficients;
  const Tensors found = new_gradients(record, needed);
  STD_TORCH_CHECK(call.d.weight == nullptr && call.d.bias == nullptr && call.d.low_out == nullptr,
                  "a frozen head has no gradient, got needed = '", needed, "'.");
  call.pool = torch_pool();
  if (!found.empty()) check_done(kernels().frozen_gradient(call));
  return found;
}

}  // namespace

Folded run_fold(Record& record, int64_t kept) {
  HeadCall& call = record.call;
  STD_TORCH_CHECK(kept >= 0, "kept must be >= 0, got ", kept, ".");
  const Tensor& like = record.like();
  const int64_t m = call.slots;
  Tensor sums = torch::stable::new_empty(like, {kFields, m}, ScalarType::Double);
  Tensor at = torch::stable::new_empty(like, {kAts, m}, ScalarType::Double);
  if (call.count < m) clear_rows(call, doubles(sums), doubles(at));
  Tensor cache = torch::stable::new_empty(like, {call.kept_models(), kept, call.vocab},
                                          scalar(call.cache_type()));
  const ScalarType wide = record.wide() ? ScalarType::Double : ScalarType::Float;
  Tensor factors = call.frozen ? zeros(like, {count_factors(call), m, record.depth()}, wide)
                               : torch::stable::new_empty(like, {0}, wide);
  const bool set = call.stats.has(Stat::bkl);
  // A rank's top set merges with others'; of a whole vocabulary's, the last member says it all.
  call.top_kept = record.plan.sharded ? call.top_size() : 1;  // forward() relies on it
  Tensor top = set ? zeros(like, {2, call.top_kept, m}, ScalarType::Double)
                   : torch::stable::new_empty(like, {0}, ScalarType::Double);
  call.sums = doubles(sums), call.at = doubles(at), call.top = doubles(top);
  Tensor chunks = call.tail ? zeros(like, {call.tail_models(), call.chunk_count(), m}, wide)
                            : torch::stable::new_empty(like, {0}, wide);
  call.chunks = chunks.mutable_data_ptr();
  call.factors = factors.mutable_data_ptr();
  call.cache = cache.mutable_data_ptr(), call.kept = kept;
  call.pool = torch_pool();
  if (call.count > 0) check_done(kernels().head_fold(call));
  return {sums, at, cache, factors, top, chunks};
}

Tensor run_fold_again(Record& record, const Tensor& norms, const Tensor& cache) {
  HeadCall& call = record.call;
  STD_TORCH_CHECK(call.two(), "the second sweep compares two models, and the record has one.");
  call.norms = rows_of(record, norms, "norms", kNorms);
  take_cache(record, cache);
  Tensor second = zeros(record.like(), {kSeconds, call.slots}, ScalarType::Double);
  call.second = doubles(second);
  call.pool = torch_pool();
  if (call.count > 0) check_done(kernels().head_fold_again(call));
  return second;
}

Tensors run_unfold(Record& record, const Coefficients& coefficients, const Tensor& cache,
                   const std::string& needed) {
  HeadCall& call = record.call;
  STD_TORCH_CHECK(!call.frozen, "a frozen head's gradient is made of what its fold kept.");
  call.coefficients = coefficients;
  take_cache(record, cache);
  const Tensors found = new_gradients(record, needed);
  call.pool = torch_pool();
  if (!found.empty()) check_done(kernels().head_unfold(call));
  return found;
}

Folded fold(const Tensors& tensors, const Numbers& numbers, const std::string& plan,
            int64_t ignore_index, int64_t kept) {
  Record record(tensors, numbers, plan, ignore_index);
  return run_fold(record, kept);
}
Tensor fold_again(const Tensors& tensors, const Numbers& numbers, const std::string& plan,
                  int64_t ignore_index, const Tensor& norms, const Tensor& cache) {
  Record record(tensors, numbers, plan, ignore_index);
  return run_fold_again(record, norms, cache);
}
Tensors unfold(const Tensors& tensors, const Numbers& numbers, const std::string& plan,
               int64_t ignore_index, const Tensor& coefficients, const Tensor& cache,
               const std::string& needed, const OptTensor& active, const OptTensor& spread) {
  Record record(tensors, numbers, plan, ignore_index);
  if (active.has_value()) record.pick(*active, spread);
  Coefficients table;
  table.data = rows_of(record, coefficients, "coefficients", kCoefs);
  table.by_slot = 1;
  for (int k = 0; k < kCoefs; ++k) {
    if (!pulls(record.call.stats, Coef(k))) continue;
    table.at[table.count] = k * record.call.slots;
    table.kind[table.count++] = Coef(k);
  }
  return run_unfold(record, table, cache, needed);
}

Results forward(const Tensors& tensors, const Numbers& numbers, const std::string& text,
                int64_t ignore_index, int64_t kept) {
  Record record(tensors, numbers, text, ignore_index);
  HeadCall& call = record.call;
  for (int64_t i = 0; i < call.count; ++i) {
    const int64_t y = call.targets[call.token(call.live[i])];
    STD_TORCH_CHECK(y >= 0 && y < call.vocab, "targets must lie in [0, ", call.vocab,
                    ") or be the ignore_index ", ignore_index, ", got ", y, ".");
  }
  OptTensor top, second, rows, teacher;
  if (call.stats.has(Stat::xent)) {
    teacher = torch::stable::new_empty(record.like(), {call.tokens}, ScalarType::Double);
    call.teacher = doubles(*teacher);
  }
  const auto [sums, at, cache, factors, all, chunks] = run_fold(record, kept);
  if (call.stats.has(Stat::bkl)) top = torch::stable::view(all, {2, call.slots});
  if (record.has(Input::rows)) rows = record[Input::rows];
  if (needs_second_sweep(call.stats)) {
    second = run_fold_again(record, norms(sums, top, record.wide()), cache);
  }
  const auto [out, saved] = finish(sums, at, second, top, record.like(), rows, teacher,
                                   ignore_index, call.vocab, text, call.rounds(), record.wide());
  if (call.frozen && call.count > 0) check_done(kernels().frozen_normalise(call));
  return {out, saved, cache, factors, chunks};
}

Tensors backward(const Tensors& tensors, const Numbers& numbers, const std::string& plan,
                 int64_t ignore_index, const Tensor& d_out, const Tensor& out, const Tensor& saved,
                 const Tensor& cache, const Tensor& factors, const std::string& needed) {
  Record record(tensors, numbers, plan, ignore_index);
  const auto [data, coefficients] = pull_close(record, ignore_index, d_out, out, saved);
  if (record.call.frozen) return frozen_gradient(record, coefficients, factors, saved, needed);
  return run_unfold(record, coefficients, cache, needed);
}

Tensor bench_epilogue(const Tensor& like, int64_t rows, int64_t cols, int64_t repeats) {
  STD_TORCH_CHECK(rows > 0 && cols > 0 && repeats > 0, "rows, cols and repeats must be > 0.");
  const EpilogueTimes t = kernels().bench_epilogue(rows, cols, repeats);
  Tensor result = torch::stable::new_empty(like, {4}, ScalarType::Double);
  double* p = doubles(result);
  p[0] = t.forward, p[1] = t.forward_entropy, p[2] = t.backward, p[3] = t.backward_entropy;
  return result;
}

}  // namespace prefkern
