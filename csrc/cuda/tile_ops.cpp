#include "cuda/tile_ops.h"

#include "stat_parse.h"

namespace prefkern {
namespace {

// Places in `numbers`.
enum class Param : size_t {
  factor,
  top,
  ref_factor,
  ref_top,
  aux_factor,
  aux_top,
  slope,
  alpha,
  renyi,
  mix,
  jsd,
  count,
};

struct Numbers {
  const std::vector<double>& of;
  explicit Numbers(const std::vector<double>& numbers) : of(numbers) {
    STD_TORCH_CHECK(of.size() == size_t(Param::count), "numbers must hold ", int(Param::count),
                    " values, got ", of.size(), ".");
  }
  float operator[](Param p) const { return float(of[size_t(p)]); }
};

// Most columns of a tile: in-row indices are ints, and a packet may reach 16 elements further.
constexpr int64_t kMostColumns = (int64_t(1) << 31) - 64;
constexpr int64_t kMostChunk = int64_t(1) << 24;  // columns counted in fp32

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
// As many chunks per block as that allows, and at least one; one where every chunk's sums are to be
// `apart`.
template <class Args>
void set_chunks(Args& a, int64_t chunk, bool apart) {
  STD_TORCH_CHECK(chunk > 0 && chunk <= kMostChunk, "chunk must lie in [1, ", kMostChunk, "], got ",
                  chunk, ".");
  const int64_t span = apart ? 1 : block_columns(a.m, a.w) / chunk;
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

// Fills what all tile kernels share; returns the tile's element type.
Dtype set_tile(TileArgs& a, const Tensor& x, const Tensor& targets, int64_t v0, int64_t ignore) {
  STD_TORCH_CHECK(x.dim() == 2, "a tile must be [rows, columns], got ", shape_text(x), ".");
  a.m = x.size(0), a.w = x.size(1), a.v0 = v0, a.ignore = ignore;
  STD_TORCH_CHECK(a.w <= kMostColumns, "a tile has at most ", kMostColumns, " columns, got ", a.w,
                  "; pass narrower tiles.");
  check_dense(targets, "targets", {a.m});
  a.targets = longs(targets, "targets");
  return float_type(x, "x");
}

// Model `i` of a tile, where it is there.
void set_model(TileArgs& a, int i, const OptTensor& x, const OptTensor& bias, Dtype type,
               float factor, float top) {
  if (!x.has_value()) return;
  constexpr const char* kNames[3] = {"x", "xr", "xa"};
  check(*x, kNames[i], {a.m, a.w});
  STD_TORCH_CHECK(float_type(*x, kNames[i]) == type, "the tiles of one call must have one dtype.");
  Model& model = a.model[i];
  model.x = x->const_data_ptr();
  model.stride = x->stride(0);
  model.factor = factor, model.top = top;
  if (!bias.has_value()) return;
  check_dense(*bias, "bias", {-1});
  STD_TORCH_CHECK(bias->size(0) >= a.v0 + a.w, "bias must have an entry for every column up to ",
                  a.v0 + a.w, ", got ", bias->size(0), ".");
  model.bias = const_floats(*bias, "bias");
}
void set_models(TileArgs& a, const Tensor& x, const OptTensor& xr, const OptTensor& bias,
                const OptTensor& ref_bias, Dtype type, const Numbers& n) {
  set_model(a, 0, x, bias, type, n[Param::factor], n[Param::top]);
  set_model(a, 1, xr, ref_bias, type, n[Param::ref_factor], n[Param::ref_top]);
}

void set_values(TileArgs& a, const OptTensor& adv) {
  if (!adv.has_value()) return;
  const bool rows = adv->dim() == 2;
  rows ? check(*adv, "adv", {a.m, a.w}) : check(*adv, "adv", {a.w});
  a.adv = const_floats(*adv, "adv");
  a.adv_stride = rows ? adv->stride(0) : 0;
}

// Which kernels there are.
void check_kernel(const TileArgs& a, bool small, bool values, Dtype type) {
  const bool two = a.model[1].x != nullptr;
  STD_TORCH_CHECK(!small || type == Dtype::f32 || (type == Dtype::bf16 && !two),
                  "small kernels read float32 tiles, or bfloat16 ones of one model.");
  STD_TORCH_CHECK(values || (a.adv == nullptr && a.model[2].x == nullptr),
                  "given values and a third head need float32 tiles and no small kernel.");
}

int64_t field_count(bool two, bool small) {
  return !small ? kFields : two ? kSmallTwoModel : kSmallOneModel;
}

void set_at(FoldArgs& a, const Tensor& at) {
  check(at, "at", {kAts, a.m});
  check_type(at, "at", ScalarType::Double, "float64");
  a.at = static_cast<double*>(at.mutable_data_ptr());
  a.at_stride = at.stride(0);
}

// A frozen head's terms and sums.
void set_terms(TermArgs& a, const Tensor& out, float slope) {
  check(out, "out", {a.m, a.w});
  a.out = out.mutable_data_ptr();
  a.out_stride = out.stride(0);
  a.out_type = float_type(out, "out");
  a.slope = slope;
}
void set_totals(TotalArgs& a, const Tensor& totals, const bool (&there)[kFactors]) {
  int count = 0;
  for (int k = 0; k < kFactors; ++k) a.at[k] = there[k] ? count++ : -1;
  check(totals, "totals", {count, -1, -1});
  a.m = totals.size(1), a.depth = totals.size(2);
  a.totals = floats(totals, "totals");
  a.sum_stride = totals.stride(0), a.row_stride = totals.stride(1);
}

}  // namespace

void tile_fold(const Tensor& x, const OptTensor& xr, const OptTensor& xa, const OptTensor& adv,
               const OptTensor& bias, const OptTensor& ref_bias, const OptTensor& aux_bias,
               const Tensor& targets, const Tensor& fields, const Tensor& at, const OptTensor& keep,
               int64_t v0, int64_t chunk, int64_t ignore, bool small, int64_t rounds_to,
               const std::string& plan, const std::vector<double>& numbers) {
  FoldArgs a;
  const Numbers n(numbers);
  const Dtype type = set_tile(a, x, targets, v0, ignore);
  const bool two = xr.has_value();
  set_models(a, x, xr, bias, ref_bias, type, n);
  set_model(a, 2, xa, aux_bias, type, n[Param::aux_factor], n[Param::aux_top]);
  set_values(a, adv);
  check_kernel(a, small, !small && type == Dtype::f32, type);
  const PlanText read = parse_plan(plan);
  set_chunks(a, chunk, read.tail > 0.0);
  set_fields(a, fields, field_count(two, small));
  set_at(a, at);
  STD_TORCH_CHECK(rounds_to == int(Dtype::f32) ||
                      (type == Dtype::f32 && !(small && !two) &&
                       (rounds_to == int(Dtype::bf16) || rounds_to == int(Dtype::f16))),
                  "rounds_to must be the code of float32, or for a float32 tile of bfloat16 or "
                  "float16, got ",
                  rounds_to, ".");
  a.working = Dtype(rounds_to);
  if (keep.has_value()) {
    check(*keep, "keep", {a.m, a.w});
    STD_TORCH_CHECK(a.working != Dtype::f32 && float_type(*keep, "keep") == a.working,
                    "keep must have the dtype that products are rounded to.");
    a.keep = keep->mutable_data_ptr();
    a.keep_stride = keep->stride(0);
  }
  const StatPlan& stats = read.stats;
  a.has_alpha = stats.has(Stat::alpha), a.alpha = n[Param::alpha];
  a.has_renyi = stats.has(Stat::renyi), a.renyi = n[Param::renyi];
  a.has_mix = stats.has(Stat::mix), a.mix = n[Param::mix];
  const OnDevice here(x);
  two ? fold_two(type, small, a, here.stream()) : fold_one(type, small, a, here.stream());
}

void tile_fold_again(const Tensor& x, const Tensor& xr, const OptTensor& bias,
                     const OptTensor& ref_bias, const Tensor& targets, const Tensor& norms,
                     const Tensor& fields, int64_t v0, int64_t chunk, int64_t ignore,
                     const std::string& plan, const std::vector<double>& numbers) {
  SecondArgs a;
  const Dtype type = set_tile(a, x, targets, v0, ignore);
  set_models(a, x, xr, bias, ref_bias, type, Numbers(numbers));
  set_chunks(a, chunk, false);
  set_fields(a, fields, kSeconds);
  check(norms, "norms", {kNorms, a.m});
  a.norms = const_floats(norms, "norms");
  a.norm_stride = norms.stride(0);
  const StatPlan stats = parse_plan(plan).stats;
  a.has_jsd = stats.has(Stat::jsd), a.jsd = Numbers(numbers)[Param::jsd];
  a.has_tv = stats.has(Stat::tv), a.has_bkl = stats.has(Stat::bkl);
  const OnDevice here(x);
  fold_second(type, a, here.stream());
}

void tile_factor(const Tensor& x, const OptTensor& xr, const OptTensor& bias,
                 const OptTensor& ref_bias, const Tensor& targets, const Tensor& maxima,
                 const Tensor& out, int64_t v0, int64_t ignore, int64_t which,
                 const std::vector<double>& numbers) {
  FactorArgs a;
  const Numbers n(numbers);
  const Dtype type = set_tile(a, x, targets, v0, ignore);
  set_models(a, x, xr, bias, ref_bias, type, n);
  set_blocks(a, block_columns(a.m, a.w));
  check(maxima, "maxima", {2, a.m});
  a.maxima = const_floats(maxima, "maxima");
  a.maxima_stride = maxima.stride(0);
  STD_TORCH_CHECK(which >= 0 && which < kFactors, "which must be a place in FACTORS, got ", which,
                  ".");
  a.which = Factor(which);
  set_terms(a, out, n[Param::slope]);
  STD_TORCH_CHECK(xr.has_value() || (a.which != Factor::gap && a.which != Factor::cross),
                  "gap and cross need the reference's tile.");
  const OnDevice here(x);
  frozen_factors(type, a, here.stream());
}

void tile_fold_frozen(const Tensor& x, const OptTensor& xr, const OptTensor& bias,
                      const OptTensor& ref_bias, const Tensor& targets, const Tensor& fields,
                      const Tensor& at, const Tensor& maxima, const Tensor& totals,
                      const Tensor& out, int64_t v0, int64_t chunk, int64_t ignore, bool small,
                      bool moves, bool log, bool gap, bool cross,
                      const std::vector<double>& numbers) {
  FrozenArgs a;
  const Numbers n(numbers);
  const Dtype type = set_tile(a.fold, x, targets, v0, ignore);
  const bool two = xr.has_value();
  set_models(a.fold, x, xr, bias, ref_bias, type, n);
  STD_TORCH_CHECK(
      small ? type == Dtype::f32 || (type == Dtype::bf16 && !two) : type == Dtype::f32 && !two,
      "fold_frozen reads float32 tiles of one model, or with small also of two, or "
      "bfloat16 ones of one.");
  STD_TORCH_CHECK(chunk > 0 && chunk <= kMostChunk, "chunk must lie in [1, ", kMostChunk, "], got ",
                  chunk, ".");
  a.fold.chunks = (a.fold.w + chunk - 1) / chunk;
  a.fold.span = a.fold.chunks;
  set_blocks(a.fold, a.fold.w);
  set_fields(a.fold, fields, field_count(two, small));
  set_at(a.fold, at);
  static_cast<TileArgs&>(a.terms) = a.fold;
  set_terms(a.terms, out, n[Param::slope]);
  set_totals(a.totals, totals, {true, log, gap, cross});
  STD_TORCH_CHECK(a.totals.m == a.fold.m, "totals must have a row for each of the tile's, got ",
                  shape_text(totals), ".");
  a.moves = moves;
  check(maxima, "maxima", {2, a.fold.m});
  a.maxima = floats(maxima, "maxima");
  a.maxima_stride = maxima.stride(0);
  const OnDevice here(x);
  fold_frozen(type, two, small, a, here.stream());
}

void tile_raise_rows(const Tensor& totals, const Tensor& shift, bool log, bool gap, bool cross) {
  RaiseArgs a;
  set_totals(a.totals, totals, {true, log, gap, cross});
  check(shift, "shift", {4, a.totals.m});
  a.shift = const_floats(shift, "shift");
  a.shift_stride = shift.stride(0);
  const OnDevice here(totals);
  raise_rows(a, here.stream());
}

void tile_gradient(const Tensor& x, const OptTensor& xr, const OptTensor& xa, const OptTensor& adv,
                   const OptTensor& bias, const OptTensor& ref_bias, const OptTensor& aux_bias,
                   const Tensor& targets, const Tensor& coefficients, const Tensor& dx, int64_t v0,
                   int64_t ignore, bool small, bool rounds, const std::vector<double>& numbers) {
  GradientArgs a;
  const Numbers n(numbers);
  const Dtype type = set_tile(a, x, targets, v0, ignore);
  const bool two = xr.has_value();
  set_models(a, x, xr, bias, ref_bias, type, n);
  set_model(a, 2, xa, aux_bias, type, n[Param::aux_factor], n[Param::aux_top]);
  set_values(a, adv);
  check_kernel(a, small, !small && (!two || type == Dtype::f32), type);
  STD_TORCH_CHECK(!(rounds && two),
                  "a gradient that compares two models reads products as they "
                  "are.");
  set_blocks(a, block_columns(a.m, a.w));
  check(coefficients, "coefficients", {kCoefs, a.m});
  a.coefficients = const_floats(coefficients, "coefficients");
  a.coefficient_stride = coefficients.stride(0);
  check(dx, "dx", {a.m, a.w});
  a.dx = dx.mutable_data_ptr();
  a.dx_stride = dx.stride(0);
  a.dx_type = float_type(dx, "dx");
  a.rounds = rounds && type == Dtype::f32;
  a.slope = n[Param::slope];
  a.alpha = n[Param::alpha], a.renyi = n[Param::renyi];
  a.mix = n[Param::mix], a.jsd = n[Param::jsd];
  const OnDevice here(x);
  two ? gradient_two(type, small, a, here.stream()) : gradient_one(type, small, a, here.stream());
}

}  // namespace prefkern
