#include "cuda/sweep_ops.h"

#include "stat_parse.h"

namespace prefkern {
namespace {

enum Number : size_t { kFactor, kTop, kRefFactor, kRefTop, kSlope, kA, kR, kM, kJ, kNumbers };

// Most columns of a tile: in-row indices are ints, and a packet may reach 16 elements further.
constexpr int64_t kMostColumns = (int64_t(1) << 31) - 64;
constexpr int64_t kMostChunk = int64_t(1) << 24;  // columns counted in fp32

Model make_model(const Tensor& x, const char* name, int64_t m, int64_t w, const OptTensor& bias,
                 double factor, double top) {
  check(x, name, {m, w});
  Model model;
  model.x = x.const_data_ptr();
  model.stride = x.stride(0);
  model.factor = float(factor);
  model.top = float(top);
  if (bias.has_value()) {
    check(*bias, "bias", {-1});
    model.bias = bias->const_data_ptr();
    model.bias_type = float_type(*bias, "bias");
  }
  return model;
}

// Fills what all tile kernels share; returns the tile's element type.
Dtype set_tile(TileArgs& a, const Tensor* z, const OptTensor& zr, const OptTensor& za,
               const OptTensor& adv, const OptTensor& bias, const OptTensor& ref_bias,
               const Tensor* targets, int64_t v0, const std::vector<double>& n) {
  STD_TORCH_CHECK(n.size() == kNumbers, "numbers must hold ", int(kNumbers), " values, got ",
                  n.size(), ".");
  const Tensor& first = z != nullptr ? *z : *zr;
  STD_TORCH_CHECK(first.dim() == 2, "a tile must be [rows, columns], got ", sizes_text(first), ".");
  a.m = first.size(0), a.w = first.size(1), a.v0 = v0;
  STD_TORCH_CHECK(a.w <= kMostColumns, "a tile has at most ", kMostColumns, " columns, got ", a.w,
                  "; pass narrower tiles.");
  const Dtype type = float_type(first, "z");
  if (z != nullptr) a.model[0] = make_model(*z, "z", a.m, a.w, bias, n[kFactor], n[kTop]);
  if (zr.has_value()) {
    a.model[1] = make_model(*zr, "zr", a.m, a.w, ref_bias, n[kRefFactor], n[kRefTop]);
  }
  if (za.has_value()) {
    a.model[2] = make_model(*za, "za", a.m, a.w, std::nullopt, n[kRefFactor], n[kRefTop]);
  }
  for (const OptTensor* t : {&zr, &za}) {
    STD_TORCH_CHECK(!t->has_value() || float_type(**t, "zr, za") == type,
                    "the tiles of one call must have one dtype.");
  }
  if (adv.has_value()) {
    const bool rows = adv->dim() == 2;
    rows ? check(*adv, "adv", {a.m, a.w}) : check(*adv, "adv", {a.w});
    a.adv = const_floats(*adv, "adv");
    a.adv_stride = rows ? adv->stride(0) : 0;
  }
  if (targets != nullptr) {
    check_dense(*targets, "targets", {a.m});
    a.targets = longs(*targets, "targets");
  }
  return type;
}

// Columns that one block reads: few where rows are few, so that one row still fills a GPU, and at
// most 32768, after which a block's start and end cost nothing. 16384 blocks are a dozen rounds on
// 132 multiprocessors, so that the last, partly filled one costs little. From shapes alone.
int64_t block_columns(int64_t m, int64_t w) {
  constexpr int64_t kUnit = 1024, kMost = 32768, kBlocks = 16384;
  const int64_t even = (m * w / kBlocks + kUnit - 1) / kUnit * kUnit;
  return even < kUnit ? kUnit : even > kMost ? kMost : even;
}
template <class Args>
void set_blocks(Args& a, int64_t columns) {
  a.columns = columns;
  a.blocks = (a.w + columns - 1) / columns;
}
// As many chunks per block as that allows, and at least one.
template <class Args>
void set_chunks(Args& a, int64_t chunk) {
  STD_TORCH_CHECK(chunk > 0 && chunk <= kMostChunk, "chunk must lie in [1, ", kMostChunk, "], got ",
                  chunk, ".");
  const int64_t span = block_columns(a.m, a.w) / chunk;
  a.span = span < 1 ? 1 : span;
  set_blocks(a, chunk * a.span);
  a.chunks = (a.w + chunk - 1) / chunk;
}

template <class Args>
void set_fields(Args& a, const Tensor& fields, int64_t count) {
  check(fields, "fields", {count, a.chunks, a.m});
  a.fields = floats(fields, "fields");
  a.field_stride = fields.stride(0);
  a.chunk_stride = fields.stride(1);
}

int64_t field_count(bool two, bool small) {
  return two ? (small ? 10 : 28) : (small ? 2 : 9);
}

Dtype working_type(int64_t code) {
  STD_TORCH_CHECK(code == int(Dtype::f32) || code == int(Dtype::bf16) || code == int(Dtype::f16),
                  "working must be the code of float32, bfloat16 or float16, got ", code, ".");
  return Dtype(code);
}

void set_blends(FoldArgs& a, const StatPlan& plan) {
  a.has_alpha = plan.has(kAlpha), a.alpha = float(plan.param[kAlpha]);
  a.has_renyi = plan.has(kRenyi), a.renyi = float(plan.param[kRenyi]);
  a.has_mix = plan.has(kMix), a.mix = float(plan.param[kMix]);
}
void set_second(SecondArgs& a, const StatPlan& plan) {
  a.has_jsd = plan.has(kJsd), a.jsd = float(plan.param[kJsd]);
  a.has_tv = plan.has(kTv), a.has_bkl = plan.has(kBkl);
}

}  // namespace

void tile_fold(const Tensor& z, const OptTensor& zr, const OptTensor& za, const OptTensor& adv,
               const OptTensor& bias, const OptTensor& ref_bias, const Tensor& targets,
               const Tensor& fields, const Tensor& at_target, const OptTensor& keep,
               const OptTensor& ref_keep, int64_t v0, int64_t chunk, bool small, bool rounds,
               int64_t working, const std::string& stats, const std::vector<double>& numbers) {
  FoldArgs a;
  const Dtype type = set_tile(a, &z, zr, za, adv, bias, ref_bias, &targets, v0, numbers);
  const bool two = zr.has_value();
  a.working = working_type(working);
  a.rounds = rounds;
  set_chunks(a, chunk);
  set_fields(a, fields, field_count(two, small));
  check(at_target, "at_target", {2, a.m});
  a.at_target = floats(at_target, "at_target");
  a.at_stride = at_target.stride(0);
  for (int k = 0; k < 2; ++k) {
    const OptTensor& t = k == 0 ? keep : ref_keep;
    if (!t.has_value()) continue;
    check(*t, "keep", {a.m, a.w});
    STD_TORCH_CHECK(float_type(*t, "keep") == a.working, "keep must have the working dtype.");
    a.keep[k] = t->mutable_data_ptr();
    a.keep_stride[k] = t->stride(0);
  }
  set_blends(a, parse_plan(stats));
  const OnDevice here(z);
  two ? fold_two(type, small, a, here.stream()) : fold_one(type, small, a, here.stream());
}

void tile_second(const Tensor& z, const Tensor& zr, const OptTensor& bias,
                 const OptTensor& ref_bias, const Tensor& targets, const Tensor& norms,
                 const Tensor& fields, int64_t v0, int64_t chunk, int64_t working,
                 const std::string& stats, const std::vector<double>& numbers) {
  SecondArgs a;
  const Dtype type =
      set_tile(a, &z, zr, std::nullopt, std::nullopt, bias, ref_bias, &targets, v0, numbers);
  a.working = working_type(working);
  set_chunks(a, chunk);
  set_fields(a, fields, 7);
  check(norms, "norms", {6, a.m});
  a.norms = const_floats(norms, "norms");
  a.norm_stride = norms.stride(0);
  set_second(a, parse_plan(stats));
  const OnDevice here(z);
  fold_second(type, a, here.stream());
}

void tile_seen(const Tensor& zr, const OptTensor& ref_bias, const Tensor& out, int64_t v0,
               int64_t working, const std::vector<double>& numbers) {
  SeenArgs a;
  const Dtype type = set_tile(a, nullptr, zr, std::nullopt, std::nullopt, std::nullopt, ref_bias,
                              nullptr, v0, numbers);
  a.working = working_type(working);
  check(out, "out", {a.m, a.w});
  a.out = floats(out, "out");
  a.out_stride = out.stride(0);
  const OnDevice here(zr);
  seen_logits(type, a, here.stream());
}

void tile_factors(const Tensor& z, const OptTensor& zr, const OptTensor& bias,
                  const OptTensor& ref_bias, const Tensor& targets, const Tensor& maxima,
                  const OptTensor& mass, const OptTensor& log, const OptTensor& ref,
                  const OptTensor& cross, int64_t v0, const std::vector<double>& numbers) {
  FactorArgs a;
  const Dtype type =
      set_tile(a, &z, zr, std::nullopt, std::nullopt, bias, ref_bias, &targets, v0, numbers);
  set_blocks(a, block_columns(a.m, a.w));
  check(maxima, "maxima", {2, a.m});
  a.maxima = const_floats(maxima, "maxima");
  a.maxima_stride = maxima.stride(0);
  a.slope = float(numbers[kSlope]);
  const OptTensor* out[kFactors] = {&mass, &log, &ref, &cross};
  bool any = false;
  for (int k = 0; k < kFactors; ++k) {
    if (!out[k]->has_value()) continue;
    const Tensor& t = **out[k];
    check(t, "out", {a.m, a.w});
    const Dtype working = float_type(t, "out");
    STD_TORCH_CHECK(!any || working == a.working, "all outputs must have one dtype.");
    a.working = working;
    any = true;
    a.out[k] = t.mutable_data_ptr();
    a.out_stride[k] = t.stride(0);
  }
  STD_TORCH_CHECK(zr.has_value() || (!ref.has_value() && !cross.has_value()),
                  "ref and cross need the reference's tile.");
  const OnDevice here(z);
  frozen_factors(type, a, here.stream());
}

void tile_raise_rows(const Tensor& totals, const Tensor& shift, bool log, bool ref, bool cross) {
  RaiseArgs a;
  const bool there[kFactors] = {true, log, ref, cross};
  int count = 0;
  for (int k = 0; k < kFactors; ++k) a.at[k] = there[k] ? count++ : -1;
  check(totals, "totals", {count, -1, -1});
  a.m = totals.size(1), a.depth = totals.size(2);
  a.totals = floats(totals, "totals");
  a.sum_stride = totals.stride(0), a.row_stride = totals.stride(1);
  check(shift, "shift", {4, a.m});
  a.shift = const_floats(shift, "shift");
  a.shift_stride = shift.stride(0);
  const OnDevice here(totals);
  raise_rows(a, here.stream());
}

void tile_gradient(const Tensor& z, const OptTensor& zr, const OptTensor& za, const OptTensor& adv,
                   const OptTensor& bias, const OptTensor& ref_bias, const Tensor& targets,
                   const Tensor& coefficients, const Tensor& dx, int64_t v0, bool small,
                   const std::vector<double>& numbers) {
  GradientArgs a;
  const Dtype type = set_tile(a, &z, zr, za, adv, bias, ref_bias, &targets, v0, numbers);
  set_blocks(a, block_columns(a.m, a.w));
  check(coefficients, "coefficients", {30, a.m});
  a.coefficients = const_floats(coefficients, "coefficients");
  a.coefficient_stride = coefficients.stride(0);
  check(dx, "dx", {a.m, a.w});
  a.dx = dx.mutable_data_ptr();
  a.dx_stride = dx.stride(0);
  a.dx_type = a.working = float_type(dx, "dx");
  a.slope = float(numbers[kSlope]);
  a.alpha = float(numbers[kA]), a.renyi = float(numbers[kR]);
  a.mix = float(numbers[kM]), a.jsd = float(numbers[kJ]);
  const OnDevice here(z);
  zr.has_value() ? gradient_two(type, small, a, here.stream())
                 : gradient_one(type, small, a, here.stream());
}

namespace {

bool small_plan(const StatPlan& plan) {
  for (const StatKind k : {kEnt, kCol, kTop1, kZmean, kJsd, kAlpha, kRenyi, kTv, kBkl, kMix, kEv}) {
    if (plan.has(k)) return false;
  }
  return true;
}

// What both directions of logits_logps share. The whole row is one tile.
struct Logits {
  StatPlan plan;
  bool two = false, small = false;
  TileArgs tile;
  Dtype type = Dtype::f32;

  Logits(const Tensor& logits, const Tensor& targets, const OptTensor& ref_logits,
         double temperature, int64_t ignore_index, const std::string& stats)
      : plan(parse_plan(stats)), two(ref_logits.has_value()), small(small_plan(plan)) {
    STD_TORCH_CHECK(temperature > 0.0, "temperature must be > 0, got ", temperature, ".");
    STD_TORCH_CHECK(!plan.has(kEv), "logits_logps has no 'ev'; use linear_divergence.");
    for (int k = kRefLogp; k < kStatCount; ++k) {
      STD_TORCH_CHECK(two || plan.slot[k] < 0,
                      "these statistics compare two models: pass ref_logits.");
    }
    const double f = 1.0 / temperature;
    type = set_tile(tile, &logits, ref_logits, std::nullopt, std::nullopt, std::nullopt,
                    std::nullopt, &targets, 0, {f, 0.0, f, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0});
    tile.ignore = ignore_index;
  }
  FinishArgs finish(double temperature, int64_t chunk, int64_t chunks) const {
    FinishArgs a;
    a.plan = plan, a.two = two, a.small = small;
    a.rows = tile.m, a.vocab = tile.w, a.chunk = chunk, a.chunks = chunks;
    a.targets = tile.targets, a.ignore = tile.ignore;
    a.temperature = temperature;
    return a;
  }
};

}  // namespace

std::tuple<Tensor, Tensor> logits_fwd(const Tensor& logits, const Tensor& targets,
                                      const OptTensor& ref_logits, const OptTensor& top,
                                      double temperature, int64_t ignore_index,
                                      const std::string& stats) {
  const Logits call(logits, targets, ref_logits, temperature, ignore_index, stats);
  const int64_t m = call.tile.m;
  FoldArgs fold;
  static_cast<TileArgs&>(fold) = call.tile;
  const int64_t chunk = block_columns(m, fold.w);
  set_chunks(fold, chunk);
  set_blends(fold, call.plan);
  Tensor out = empty_floats(logits, {call.plan.count, m});
  Tensor saved = empty_floats(logits, {kSavedRows, m});
  Tensor fields = empty_floats(logits, {field_count(call.two, call.small), fold.chunks, m});
  Tensor at_target = empty_floats(logits, {2, m});
  set_fields(fold, fields, fields.size(0));
  fold.at_target = floats(at_target, "at_target");
  fold.at_stride = m;
  const bool second = needs_second_sweep(call.plan);
  Tensor norms = empty_floats(logits, {6, second ? m : 0});
  Tensor sums = empty_floats(logits, {7, second ? fold.chunks : 0, m});
  FinishArgs end = call.finish(temperature, chunk, fold.chunks);
  end.fields = fold.fields, end.at_target = fold.at_target;
  end.out = floats(out, "out"), end.saved = floats(saved, "saved");
  STD_TORCH_CHECK(top.has_value() == call.plan.has(kBkl),
                  "bkl needs top [2, N], and nothing else does.");
  if (top.has_value()) {
    check_dense(*top, "top", {2, m});
    end.top = const_floats(*top, "top");
  }
  if (second) {
    end.norms = floats(norms, "norms");
    end.second = floats(sums, "sums");
  }
  const OnDevice here(logits);
  call.two ? fold_two(call.type, call.small, fold, here.stream())
           : fold_one(call.type, call.small, fold, here.stream());
  finish_logits(end, here.stream());
  if (second) {
    SecondArgs b;
    static_cast<TileArgs&>(b) = call.tile;
    set_chunks(b, chunk);
    set_fields(b, sums, 7);
    set_second(b, call.plan);
    b.norms = end.norms, b.norm_stride = m;
    fold_second(call.type, b, here.stream());
    finish_logits_second(end, here.stream());
  }
  return {out, saved};
}

Tensor logits_bwd(const Tensor& d_out, const Tensor& logits, const Tensor& targets,
                  const OptTensor& ref_logits, const Tensor& out, const Tensor& saved,
                  double temperature, int64_t ignore_index, const std::string& stats) {
  const Logits call(logits, targets, ref_logits, temperature, ignore_index, stats);
  const int64_t m = call.tile.m;
  GradientArgs a;
  static_cast<TileArgs&>(a) = call.tile;
  set_blocks(a, block_columns(a.m, a.w));
  Tensor dx = torch::stable::empty_like(logits);
  Tensor coefficients = empty_floats(logits, {30, m});
  FinishArgs start = call.finish(temperature, a.columns, a.blocks);
  start.d_out = const_floats(check_dense(d_out, "d_out", {call.plan.count, m}), "d_out");
  start.out =
      const_cast<float*>(const_floats(check_dense(out, "out", {call.plan.count, m}), "out"));
  start.saved =
      const_cast<float*>(const_floats(check_dense(saved, "saved", {kSavedRows, m}), "saved"));
  start.coefficients = floats(coefficients, "coefficients");
  a.coefficients = start.coefficients, a.coefficient_stride = m;
  a.dx = dx.mutable_data_ptr(), a.dx_stride = dx.stride(0), a.dx_type = call.type;
  a.alpha = float(call.plan.param[kAlpha]), a.renyi = float(call.plan.param[kRenyi]);
  a.mix = float(call.plan.param[kMix]), a.jsd = float(call.plan.param[kJsd]);
  const OnDevice here(logits);
  logits_coefficients(start, here.stream());
  call.two ? gradient_two(call.type, call.small, a, here.stream())
           : gradient_one(call.type, call.small, a, here.stream());
  return dx;
}

}  // namespace prefkern
