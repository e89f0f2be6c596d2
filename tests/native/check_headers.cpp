// The kernels' headers without torch, built with sanitizers by test_headers.py. Every check
// compares with plain double arithmetic written here; the first failure prints its line and ends
// the program.
#define PK_ISA checked
#define PK_NAME "checked"
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <vector>

#include "cpu/kernels_impl.h"

using namespace prefkern;
using namespace prefkern::checked;

#define REQUIRE(cond, ...)                           \
  do {                                               \
    if (!(cond)) {                                   \
      std::printf("line %d: %s: ", __LINE__, #cond); \
      std::printf(__VA_ARGS__);                      \
      std::printf("\n");                             \
      std::exit(1);                                  \
    }                                                \
  } while (0)

static uint64_t state = 88172645463325252ull;
static double uniform() {  // [0, 1)
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return double(state >> 11) * 0x1p-53;
}
static double normal() {
  return std::sqrt(-2.0 * std::log(1.0 - uniform())) * std::cos(6.283185307179586 * uniform());
}
static float lane(vf v) {
  return v[0];
}

#include "check_lists.h"
#include "check_numbers.h"

struct Problem {
  int64_t n, v, d;
  std::vector<float> hidden, weight, ref_hidden, ref_weight, bias, values;
  std::vector<int64_t> targets;
  explicit Problem(int64_t n_, int64_t v_, int64_t d_) : n(n_), v(v_), d(d_) {
    const auto fill = [](std::vector<float>& x, int64_t size, double scale) {
      x.resize(size_t(size));
      for (float& e : x) e = float(normal() * scale);
    };
    fill(hidden, n * d, 1.0), fill(weight, v * d, 1.0 / std::sqrt(double(d)));
    fill(ref_hidden, n * d, 1.0), fill(ref_weight, v * d, 1.0 / std::sqrt(double(d)));
    fill(bias, v, 1.0), fill(values, v, 1.0);
    if (v > 3) bias[size_t(v / 2)] = -__builtin_huge_valf();
    for (int64_t i = 0; i < n; ++i)
      targets.push_back(i % 4 == 2 ? -100 : int64_t(uniform() * double(v)));
    for (int64_t i = 0; i < n; ++i) {
      if (targets[size_t(i)] < 0)
        hidden[size_t(i * d)] = ref_hidden[size_t(i * d)] = __builtin_nanf("");
    }
  }
  std::vector<double> logits(int64_t row, bool ref) const {
    const std::vector<float>&h = ref ? ref_hidden : hidden, &w = ref ? ref_weight : weight;
    std::vector<double> z;
    for (int64_t i = 0; i < v; ++i) {
      double x = bias[size_t(i)];
      for (int64_t k = 0; k < d; ++k) x += double(h[size_t(row * d + k)]) * w[size_t(i * d + k)];
      z.push_back(1.3 * x / 0.9);
    }
    return z;
  }
};

static std::vector<double> log_softmax(std::vector<double> z) {
  OnlineLse s;
  for (double x : z) lse_merge(s, {x, x == -pk_inf() ? 0.0 : 1.0});
  for (double& x : z) x -= lse_value(s);
  return z;
}

static StatPlan make_plan(std::initializer_list<Stat> stats) {
  StatPlan plan;
  for (const Stat k : stats) {
    plan.slot[int(k)] = plan.count++;
    plan.moves[int(k)] = has_gradient(k);
  }
  plan.param[int(Stat::jsd)] = 0.3, plan.param[int(Stat::alpha)] = 0.4;
  plan.param[int(Stat::renyi)] = 0.7, plan.param[int(Stat::bkl)] = 3;
  plan.param[int(Stat::mix)] = 0.25;
  return plan;
}

// What an op does around the kernels, on plain vectors: T is the fold type.
template <class T>
struct Passes {
  HeadCall& call;
  std::vector<int64_t> live;
  std::vector<double> sums, at, top, second;
  std::vector<T> norms, out, coefficients;
  std::vector<double> saved;
  explicit Passes(HeadCall& c) : call(c) {
    for (int64_t i = 0; i < c.tokens; ++i) {
      if (c.targets[i] >= 0) live.push_back(i);
    }
    const auto rows = [&](auto& x, int64_t n) { x.assign(size_t(n * c.slots), 0); };
    c.slots = c.tokens, c.live = live.data(), c.count = int64_t(live.size());
    rows(sums, kFields), rows(at, kAts), rows(top, 2), rows(second, kSeconds);
    rows(norms, kNorms), rows(out, c.stats.count), rows(coefficients, kCoefs);
    rows(saved, kSaveds);
    c.sums = sums.data(), c.at = at.data(), c.top = top.data(), c.top_kept = 1;
    c.norms = norms.data(), c.second = second.data();
  }
  RowSums row_sums(int64_t i) {
    const FoldPlan plan = call.fold_plan();
    RowSums s;
    each_field(s, [&](Field f, double& x) {
      if (plan.writes(f)) x = sums[size_t(int64_t(f) * call.slots + i)];
    });
    return s;
  }
  void forward() {
    REQUIRE(checked::run_head<HeadFold>(call), "fold");
    const auto put = [&](auto& x, int64_t row, int64_t i, double v) {
      x[size_t(row * call.slots + i)] = T(v);
      return v - double(T(v));
    };
    for (const int64_t i : live) {
      const RowSums s = row_sums(i);
      const auto norm = [&](Norm k, double v) {
        put(norms, int64_t(k) + 1, i, put(norms, int64_t(k), i, v));
      };
      norm(Norm::lse, lse_value(s.pol));
      if (call.two()) norm(Norm::ref_lse, lse_value(s.ref));
      for (int j = 0; j < 2; ++j)
        put(norms, int64_t(Norm::top_value) + j, i, top[size_t(j * call.slots + i)]);
    }
    if (needs_second_sweep(call.stats)) {
      REQUIRE(checked::run_head<HeadFoldAgain>(call), "second sweep");
    }
    for (const int64_t i : live) {
      RowContext c;
      c.target = call.targets[i], c.vocab = call.vocab;
      for (int j = 0; j < kAts; ++j) c.at[j] = at[size_t(j * call.slots + i)];
      for (int j = 0; j < kSeconds; ++j) c.second[j] = second[size_t(j * call.slots + i)];
      c.top_value = top[size_t(i)], c.top_index = top[size_t(call.slots + i)];
      finish_row(row_sums(i), c, call.fold_plan(), [&](Stat k, double v) {
        put(out, call.stats.slot[int(k)], i, v);
      });
      save_row(row_sums(i), c, call.fold_plan(), [&](Saved k, double v) {
        saved[size_t(int64_t(k) * call.slots + i)] = v;
      });
    }
  }
  double out_of(Stat k, int64_t i) {
    return double(out[size_t(call.stats.slot[int(k)] * call.slots + i)]);
  }
  void pull(const std::vector<T>& up) {
    const double slope = call.model[0].scale / call.model[0].temperature;
    for (const int64_t i : live) {
      const RowCoefficients g = pull_row(
          call.stats, slope,
          [&](Stat k) { return double(up[size_t(call.stats.slot[int(k)] * call.slots + i)]); },
          [&](Stat k) { return out_of(k, i); },
          [&](Saved k) { return saved[size_t(int64_t(k) * call.slots + i)]; });
      store_coefficients<T>(g, [&](Coef k, double v) {
        coefficients[size_t(int64_t(k) * call.slots + i)] = T(v);
      });
    }
    Coefficients& to = call.coefficients;
    to = Coefficients();
    to.data = coefficients.data(), to.by_slot = 1;
    for (int k = 0; k < kCoefs; ++k) {
      if (!pulls(call.stats, Coef(k))) continue;
      to.at[to.count] = k * call.slots, to.kind[to.count++] = Coef(k);
    }
  }
  void backward(const std::vector<T>& up) {
    pull(up);
    REQUIRE(checked::run_head<HeadUnfold>(call), "unfold");
  }
  void frozen_backward(const std::vector<T>& up) {
    REQUIRE(checked::run_head<FrozenNormalise>(call), "sums of head rows");
    pull(up);
    call.saved_zy = saved.data() + int64_t(Saved::zy) * call.slots;
    REQUIRE(checked::run_head<FrozenGradient>(call), "frozen gradient");
  }
};

static void one_by_one(int count, void (*fn)(void*, int), void* arg) {
  for (int i = count; i-- > 0;) fn(arg, i);
}

// Forward statistics against plain sums, and the gradients against the scalar logit_gradient.
static void check_head(int64_t n, int64_t v, int64_t d, int64_t kept, int threads) {
  Problem p(n, v, d);
  HeadCall call;
  call.tokens = n, call.vocab = v, call.targets = p.targets.data();
  Model& policy = call.model[0];
  policy.hidden = p.hidden.data(), policy.weight = p.weight.data(), policy.bias = p.bias.data();
  policy.depth = d, policy.scale = 1.3, policy.temperature = 0.9;
  call.model[1] = policy, call.models = 2;
  call.model[1].hidden = p.ref_hidden.data(), call.model[1].weight = p.ref_weight.data();
  call.values = p.values.data();
  call.stats = make_plan({Stat::logp, Stat::ent, Stat::col, Stat::fkl, Stat::rkl, Stat::jsd,
                          Stat::alpha, Stat::renyi, Stat::tv, Stat::bkl, Stat::mix, Stat::ev});
  call.pool.threads = threads, call.pool.run = one_by_one;
  Passes<float> pass(call);
  std::vector<float> cache(size_t(2 * kept * v)), up(pass.out.size());
  for (float& c : up) c = float(normal());
  call.cache = cache.data(), call.kept = kept;
  pass.forward();
  std::vector<float> dh(size_t(n * d)), dw(size_t(v * d)), db(static_cast<size_t>(v));
  call.d.hidden = dh.data(), call.d.weight = dw.data(), call.d.bias = db.data();
  pass.backward(up);

  std::vector<double> want_dh(dh.size()), want_dw(dw.size());
  for (int64_t r = 0; r < n; ++r) {
    const int64_t y = p.targets[size_t(r)];
    if (y < 0) {
      for (int s = 0; s < call.stats.count; ++s)
        REQUIRE(pass.out[size_t(s * n + r)] == 0.0f, "ignored row");
      continue;
    }
    const std::vector<double> z = p.logits(r, false), zr = p.logits(r, true);
    const std::vector<double> lp = log_softmax(z), lr = log_softmax(zr);
    double ent = 0, sq = 0, fkl = 0, rkl = 0, jr = 0, jp = 0, overlap_a = 0, overlap_r = 0, tv = 0,
           ev = 0, mix = 0;
    for (int64_t i = 0; i < v; ++i) {
      const double a = lp[size_t(i)], b = lr[size_t(i)], pp = std::exp(a), rr = std::exp(b);
      if (pp == 0.0 || rr == 0.0) continue;
      const double lm = std::log(0.3 * rr + 0.7 * pp);
      ent -= pp * a, sq += pp * pp, fkl += rr * (b - a), rkl += pp * (a - b);
      jr += rr * (b - lm), jp += pp * (a - lm), tv += 0.5 * std::fabs(pp - rr),
          ev += pp * p.values[size_t(i)];
      overlap_a += std::exp(0.4 * b + 0.6 * a), overlap_r += std::exp(0.7 * b + 0.3 * a);
      mix += std::exp(0.75 * z[size_t(i)] + 0.25 * zr[size_t(i)]);
    }
    const auto near = [&](Stat k, double want) {
      if (want != want || std::isinf(want)) return;  // a target with p = 0
      const double tolerance = 3e-5 * (1.0 + std::fabs(want));
      const double got = pass.out_of(k, r);
      REQUIRE(std::fabs(got - want) <= tolerance, "%s: %g, want %g (n %ld v %ld d %ld)",
              kStatNames[int(k)], got, want, long(n), long(v), long(d));
    };
    near(Stat::logp, lp[size_t(y)]), near(Stat::ent, ent), near(Stat::col, std::log(sq)),
        near(Stat::fkl, fkl), near(Stat::rkl, rkl);
    near(Stat::jsd, 0.3 * jr + 0.7 * jp), near(Stat::alpha, (1 - overlap_a) / 0.24),
        near(Stat::renyi, std::log(overlap_r) / -0.3);
    near(Stat::tv, tv), near(Stat::ev, ev);
    near(Stat::mix, 0.75 * z[size_t(y)] + 0.25 * zr[size_t(y)] - std::log(mix));

    const auto g = [&](Coef k) { return double(pass.coefficients[size_t(int64_t(k) * n + r)]); };
    for (int64_t i = 0; i < v; ++i) {
      const bool in_top = zr[size_t(i)] > g(Coef::top_value) - 1e-5;
      const double dx = logit_gradient<double>(call.stats, g, lp[size_t(i)], lr[size_t(i)],
                                               p.values[size_t(i)], i == y, in_top);
      for (int64_t k = 0; k < d; ++k) {
        want_dw[size_t(i * d + k)] += dx * p.hidden[size_t(r * d + k)];
        want_dh[size_t(r * d + k)] += dx * p.weight[size_t(i * d + k)];
      }
    }
  }
  for (size_t i = 0; i < dw.size(); ++i)
    REQUIRE(std::fabs(dw[i] - want_dw[i]) < 2e-3, "dW[%zu]: %g, want %g", i, dw[i], want_dw[i]);
  for (size_t i = 0; i < dh.size(); ++i)
    REQUIRE(std::fabs(dh[i] - want_dh[i]) < 2e-3, "dH[%zu]: %g, want %g", i, dh[i], want_dh[i]);
}

// The units of every chunk whose rows `on` wants.
template <class F>
static void pick_units(HeadCall& call, std::vector<int64_t>& rows, std::vector<int64_t>& starts,
                       const F& on) {
  starts.assign(1, 0);
  for (int64_t c = 0; c < call.chunk_count(); ++c) {
    for (int64_t i = 0; i < call.count; ++i) {
      if (on(c, i)) rows.push_back(i);
    }
    starts.push_back(int64_t(rows.size()));
  }
  call.picked = rows.data(), call.picked_at = starts.data();
}

// The gradient made of sums of head rows is that of products, up to their operands' rounding.
template <class T>
static void check_frozen(HeadCall& call, Passes<T>& pass) {
  const Model& m = call.model[0];
  const int64_t sizes[] = {call.tokens * m.depth, call.tokens * m.rank};
  const int64_t bytes = dtype_bytes(call.working);
  std::vector<char> found[2], want[2];
  for (int i = 0; i < 2; ++i) want[i] = found[i] = std::vector<char>(size_t(sizes[i] * bytes), 0x7f);
  const auto to = [&](std::vector<char>* d) {
    call.d.hidden = d[0].data(), call.d.low_in = d[1].data();
  };
  to(found);
  pass.frozen_backward(pass.out);
  to(want), call.frozen = false, call.exact = true;
  pass.backward(pass.out);
  const double bound = bytes == 8 ? 1e-11 : bytes == 4 ? 1e-4 : 5e-2;
  for (int i = 0; i < 2; ++i) {
    double off = 0.0, size = 1e-30;
    for (int64_t j = 0; j < sizes[i]; ++j) {
      const double a = element<double>(found[i].data(), call.working, j);
      const double b = element<double>(want[i].data(), call.working, j);
      off += (a - b) * (a - b), size += b * b;
    }
    REQUIRE(off <= bound * bound * size + 1e-30, "frozen gradient %d: %g of %g", i, off, size);
  }
}

// Every element type through all sweeps, with low-rank terms, a teacher, given logits, the sums of a
// frozen head and a tail: memory errors, and equal bits for any budget and where no unit is skipped.
template <class T>
static void check_types(Dtype type, int64_t n, int64_t v, int64_t d, int64_t rank) {
  const size_t bytes = size_t(dtype_bytes(type));
  const auto tensor = [&](int64_t size) {
    std::vector<char> x(size_t(size) * bytes);
    for (int64_t i = 0; i < size; ++i) {
      const double e = normal();
      write_row(x.data(), type, i, &e, 1);
    }
    return x;
  };
  const std::vector<char> h = tensor(n * d), w = tensor(v * d), u = tensor(n * rank),
                          b = tensor(v * rank), q = tensor(2 * n), given = tensor(n * v);
  std::vector<int64_t> y, index;
  for (int64_t i = 0; i < n; ++i) {
    y.push_back(i % 5 == 1 ? -100 : i % v);
    index.push_back(i % v), index.push_back(v - 1);
  }
  for (const bool divergence : {false, true}) {
    std::vector<char> grads[6];
    for (int run = 0; run < 6; ++run) {
      HeadCall call;
      call.working = type;
      call.tokens = n, call.vocab = v, call.targets = y.data();
      Model& m = call.model[0];
      m.hidden = h.data(), m.weight = w.data(), m.depth = d, m.softcap = 5.0;
      m.low_in = u.data(), m.low_out = b.data(), m.rank = rank;
      m.weight_type = m.low_type = type;
      call.stats = make_plan({Stat::logp, Stat::xent});
      if (divergence) {
        call.model[1] = m, call.models = 2;
        call.model[1].rank = 0;
        call.stats = make_plan({Stat::logp, Stat::fkl, Stat::tv, Stat::bkl, Stat::mix});
        call.exact = bytes == 2;
      }
      call.values = q.data(), call.values_type = type, call.sparse = true;
      call.values_index = index.data(), call.values_k = 2;
      const bool frozen = run == 2;
      if (frozen) {
        call.frozen = true;
        call.stats = divergence ? make_plan({Stat::logp, Stat::fkl, Stat::rkl})
                                : make_plan({Stat::logp, Stat::ent});
      }
      if (run == 3) {
        call.model[0] = call.model[1] = Model();
        call.model[0].logits = call.model[1].logits = given.data();
        call.exact = false;
      }
      call.kept = run == 1 || run == 5 ? n / 2 : 0;
      call.tail = run > 3;
      std::vector<T> chunks(size_t(2 * call.chunk_count() * n));
      call.chunks = chunks.data();
      std::vector<T> factors(size_t(4 * n * (d + rank)));
      call.factors = factors.data();
      Passes<T> pass(call);
      std::vector<char> cache(size_t(2 * call.kept * v) * sizeof(T));
      call.cache = cache.data();
      pass.forward();
      if (frozen) {
        check_frozen<T>(call, pass);
        continue;
      }
      for (const int64_t i : pass.live) {
        OnlineLse all;
        for (int64_t c = 0; call.tail && c < call.chunk_count(); ++c)
          lse_merge(all, {double(chunks[size_t(c * n + i)]), 1.0});
        const double want = lse_value(pass.row_sums(i).pol);
        REQUIRE(!call.tail || std::fabs(lse_value(all) - want) < 1e-4, "chunk sums: %g, want %g",
                lse_value(all), want);
      }
      std::vector<int64_t> rows, starts;
      if (run == 4) pick_units(call, rows, starts, [](int64_t, int64_t) { return true; });
      // the second chunk has none
      if (run == 5) pick_units(call, rows, starts, [](int64_t c, int64_t i) { return c != 1 && i % 3; });
      std::vector<T> spread(size_t(call.chunk_count() * (d + rank + 1)), T(0.5));
      if (run == 5) call.spread = spread.data();
      std::vector<char> dh(h.size()), dw(w.size()), du(u.size()), db(b.size()), dz(given.size());
      if (run == 3) {
        call.d.logits = dz.data();
      } else {
        call.d.hidden = dh.data(), call.d.weight = dw.data();
        call.d.low_in = du.data(), call.d.low_out = db.data();
      }
      pass.backward(pass.out);
      for (const auto* x : {&dw, &du, &db}) dh.insert(dh.end(), x->begin(), x->end());
      grads[run] = dh;
    }
    REQUIRE(grads[0] == grads[4], "a tail of nothing changed bits");
    REQUIRE(grads[0] == grads[1], "a budget changed bits");
  }
}

int main() {
  check_functions();
  check_online();
  check_lists();
  check_head(5, 7, 3, 0, 1);
  check_head(1, 1, 1, 1, 2);
  check_head(37, 131, 29, 11, 3);
  check_head(19, 801, 16, 0, 2);
  for (Dtype t : {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16}) {
    const auto check = t == Dtype::f64 ? &check_types<double> : &check_types<float>;
    check(t, 21, 50, 13, 3);
    check(t, 3, 1, 1, 1);
    check(t, 33, 97, 64, 17);
    check(t, 5, 2100, 6, 2);
  }
  std::puts("ok");
}
