#include "cpu/record.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "checks.h"

namespace prefkern {
namespace {

constexpr const char* kPrefix[3] = {"", "ref_", "aux_"};
constexpr Input kFirst[3] = {Input::hidden, Input::ref_hidden, Input::aux_hidden};

const void* data(const Tensor* t) {
  return t == nullptr ? nullptr : t->const_data_ptr();
}

}  // namespace

void check_rows(const Tensor& targets, const OptTensor& rows) {
  const int64_t n = targets.numel();
  check_shape(targets, "targets", {n});
  check_long(targets, "targets");
  if (!rows.has_value()) return;
  check_shape(*rows, "rows", {rows->numel()});
  check_long(*rows, "rows");
  const int64_t* r = static_cast<const int64_t*>(rows->const_data_ptr());
  for (int64_t i = 0, before = -1; i < rows->numel(); before = r[i++]) {
    // twice the same row would be two threads' to write
    STD_TORCH_CHECK(r[i] > before && r[i] < n, "rows must rise and lie in [0, ", n, "), got ", r[i],
                    " at position ", i, ".");
  }
}

Record::Record(const std::vector<Tensor>& tensors, const std::vector<double>& numbers,
               const std::string& text, int64_t ignore_index)
    : plan(parse_plan(text)) {
  STD_TORCH_CHECK(numbers.size() == kNumbers, "numbers must be ", kNumbers, ", got ",
                  numbers.size(), ".");
  take(tensors);
  call.exact = plan.exact, call.frozen = plan.frozen, call.stats = plan.stats;
  call.tail = plan.tail > 0.0;
  const bool* moves = plan.stats.moves;
  call.moves = std::any_of(moves, moves + kStats, std::identity());
  STD_TORCH_CHECK(has(Input::targets), "a record needs targets.");
  const OptTensor rows = has(Input::rows) ? OptTensor((*this)[Input::rows]) : std::nullopt;
  check_rows((*this)[Input::targets], rows);
  call.tokens = (*this)[Input::targets].numel();
  call.targets = static_cast<const int64_t*>((*this)[Input::targets].const_data_ptr());
  call.slots = rows.has_value() ? rows->numel() : call.tokens;
  call.rows = static_cast<const int64_t*>(data(tensor[int(Input::rows)]));
  read_model(0, numbers);
  if (has(Input::ref_hidden) || has(Input::ref_logits)) read_model(call.models++, numbers);
  if (has(Input::aux_hidden)) {
    STD_TORCH_CHECK(call.two(), "a third head needs a reference.");
    read_model(call.models++, numbers);
  }
  STD_TORCH_CHECK(!(call.frozen && call.given()),
                  "given logits have no head that could be frozen.");
  STD_TORCH_CHECK(!(call.tail && call.given()),
                  "given logits have no units that could be skipped.");
  read_values();
  check_stats();
  find_live(ignore_index);
}

void Record::take(const std::vector<Tensor>& tensors) {
  STD_TORCH_CHECK(tensors.size() == plan.tensors.size(), "the plan names ", plan.tensors.size(),
                  " tensors, got ", tensors.size(), ".");
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor*& place = tensor[int(plan.tensors[i])];
    STD_TORCH_CHECK(place == nullptr, "the plan names '", kInputNames[int(plan.tensors[i])],
                    "' twice.");
    place = &tensors[i];
  }
}

void Record::read_model(int i, const std::vector<double>& numbers) {
  Model& m = call.model[i];
  const std::string prefix = kPrefix[i];
  const auto input = [&](Input first) {  // of the policy -> of this model
    return tensor[int(first) + int(kFirst[i]) - int(Input::hidden)];
  };
  const auto check = [&](const Tensor& t, const char* name, std::initializer_list<int64_t> sizes) {
    const std::string full = prefix + name;
    check_shape(t, full.c_str(), sizes);
    return check_float(t, full.c_str());
  };
  const auto check_working = [&](Dtype type, const char* name) {
    STD_TORCH_CHECK(type == call.working, prefix, name, " must have the dtype of the policy's.");
  };
  m.scale = numbers[3 * i], m.softcap = numbers[3 * i + 1], m.temperature = numbers[3 * i + 2];
  STD_TORCH_CHECK(std::isfinite(m.scale) && std::isfinite(m.softcap) && m.softcap >= 0.0 &&
                      std::isfinite(m.temperature) && m.temperature > 0.0,
                  prefix, "scale must be finite, softcap >= 0 (0: none), temperature > 0.");
  const Tensor* logits = i < 2 ? tensor[int(i == 0 ? Input::logits : Input::ref_logits)] : nullptr;
  if (logits != nullptr) {
    STD_TORCH_CHECK(input(Input::hidden) == nullptr && (i == 0 || call.given()), prefix,
                    "logits stand instead of hidden states, in every model of a call.");
    if (i == 0) call.vocab = logits->dim() == 2 ? logits->size(1) : 0;
    const Dtype type = check(*logits, "logits", {call.tokens, call.vocab});
    if (i == 0) call.working = type;
    check_working(type, "logits");
    m.logits = logits->const_data_ptr();
    STD_TORCH_CHECK(call.vocab > 0, "the vocabulary must not be empty.");
    return;
  }
  const Tensor *hidden = input(Input::hidden), *weight = input(Input::weight);
  STD_TORCH_CHECK(hidden != nullptr && weight != nullptr && (i == 0 || !call.given()), prefix,
                  "hidden and ", prefix, "weight must come together, in every model of a call.");
  if (i == 0) call.vocab = weight->dim() == 2 ? weight->size(0) : 0;
  m.depth = hidden->dim() == 2 ? hidden->size(1) : 0;
  const Dtype type = check(*hidden, "hidden", {call.tokens, m.depth});
  if (i == 0) call.working = type;
  check_working(type, "hidden");
  m.weight_type = check(*weight, "weight", {call.vocab, m.depth});
  STD_TORCH_CHECK(call.vocab > 0 && m.depth > 0, prefix, "weight must not be empty.");
  m.hidden = hidden->const_data_ptr(), m.weight = weight->const_data_ptr();
  if (const Tensor* bias = input(Input::bias); bias != nullptr) {
    m.bias_type = check(*bias, "bias", {call.vocab});
    m.bias = bias->const_data_ptr();
  }
  const Tensor *low_in = input(Input::low_in), *low_out = input(Input::low_out);
  STD_TORCH_CHECK((low_in == nullptr) == (low_out == nullptr), prefix,
                  "low_in and low_out must come together.");
  if (low_in == nullptr) return;
  m.rank = low_in->dim() == 2 ? low_in->size(1) : 0;
  check_working(check(*low_in, "low_in", {call.tokens, m.rank}), "low_in");
  m.low_type = check(*low_out, "low_out", {call.vocab, m.rank});
  m.low_in = low_in->const_data_ptr(), m.low_out = low_out->const_data_ptr();
}

void Record::read_values() {
  STD_TORCH_CHECK(has(Input::values) || !has(Input::values_index), "values_index needs values.");
  if (!has(Input::values)) return;
  const Tensor& values = (*this)[Input::values];
  call.values_type = check_float(values, "values");
  call.values = values.const_data_ptr();
  call.sparse = has(Input::values_index);
  if (!call.sparse) return check_shape(values, "values", {call.vocab});
  const Tensor& index = (*this)[Input::values_index];
  call.values_k = values.dim() == 2 ? values.size(1) : 0;
  check_shape(values, "values", {call.tokens, call.values_k});
  check_shape(index, "values_index", {call.tokens, call.values_k});
  check_long(index, "values_index");
  call.values_index = static_cast<const int64_t*>(index.const_data_ptr());
}

void Record::find_live(int64_t ignore_index) {
  live.reserve(size_t(call.slots));
  for (int64_t i = 0; i < call.slots; ++i) {
    if (call.targets[call.token(i)] != ignore_index) live.push_back(i);
  }
  call.live = live.data();
  call.count = int64_t(live.size());
  for (int64_t i = 0; i < call.count && call.sparse; ++i) {
    const int64_t first = call.token(live[size_t(i)]) * call.values_k;
    for (int64_t j = first; j < first + call.values_k; ++j) {
      const int64_t v = call.values_index[j];
      STD_TORCH_CHECK(v >= 0 && v < call.vocab, "values_index must lie in [0, ", call.vocab,
                      "), got ", v, ".");
    }
  }
}

void Record::pick(const Tensor& active, const OptTensor& spread) {
  const int64_t chunks = call.chunk_count();
  check_shape(active, "active", {chunks, call.slots});
  STD_TORCH_CHECK(active.scalar_type() == torch::headeronly::ScalarType::Bool,
                  "active must be of bools.");
  const bool* on = static_cast<const bool*>(active.const_data_ptr());
  picked.reserve(size_t(chunks * call.count));
  picked_at.assign(1, 0);
  for (int64_t c = 0; c < chunks; ++c) {
    for (int64_t i = 0; i < call.count; ++i) {
      if (on[c * call.slots + live[size_t(i)]]) picked.push_back(i);
    }
    picked_at.push_back(int64_t(picked.size()));
  }
  call.picked = picked.data(), call.picked_at = picked_at.data();
  if (!spread.has_value()) return;
  check_shape(*spread, "spread", {chunks, depth() + 1});
  STD_TORCH_CHECK(spread->scalar_type() == (wide() ? torch::headeronly::ScalarType::Double
                                                   : torch::headeronly::ScalarType::Float),
                  "spread must be in the fold's dtype.");
  call.spread = spread->const_data_ptr();
}

void Record::check_stats() const {
  const StatPlan& s = call.stats;
  for (int k = 0; k < kStats; ++k) {
    const bool two = Stat(k) >= Stat::ref_logp && Stat(k) != Stat::ev;
    STD_TORCH_CHECK(!s.has(Stat(k)) || !two || call.two(), "the statistic '", kStatNames[k],
                    "' compares two models, and the record has one.");
    const bool frozen = Stat(k) == Stat::logp || Stat(k) == Stat::lse || Stat(k) == Stat::zy ||
                        Stat(k) == Stat::ent || Stat(k) == Stat::fkl || Stat(k) == Stat::rkl;
    STD_TORCH_CHECK(!call.frozen || !s.grows(Stat(k)) || frozen, "the gradient of '", kStatNames[k],
                    "' is not made of sums of head rows.");
  }
  STD_TORCH_CHECK(!s.has(Stat::xent) || call.sparse,
                  "xent needs a teacher: values and values_index.");
  STD_TORCH_CHECK(!s.has(Stat::ev) || call.models > 2 || (has(Input::values) && !s.has(Stat::xent)),
                  "ev needs values of its own or a third head.");
  STD_TORCH_CHECK(!s.has(Stat::bkl) || call.vocab <= int64_t(1) << 24,
                  "bkl supports vocabularies up to 2^24 entries.");
}

}  // namespace prefkern
