// The kernels' headers without torch, built with sanitizers by test_headers.py. Every check
// compares with plain double arithmetic written here; the first failure prints its line and ends
// the program.
#define PK_ISA checked
#define PK_NAME "checked"
#include <cmath>
#include <cstdio>
#include <cstdlib>
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

static void check_functions() {
  for (int i = 0; i < 200000; ++i) {
    const float x = float(-104.0 + 192.0 * uniform());
    const double want = std::exp(double(x)), got = lane(checked::exp(splat(x)));
    const double bound =
        want * (1.6e-7 + 1.4e-8 * std::fabs(x)) + (want < 0x1p-126 ? 0x1p-149 : 0.0);
    REQUIRE(std::fabs(got - want) <= bound, "exp(%a): %g, want %g", x, got, want);
    const float y = float(std::expm1(-30.0 + 60.0 * uniform()));
    if (y > -1.0f) {
      const double l = std::log1p(double(y)), e = lane(checked::log1p(splat(y)));
      REQUIRE(std::fabs(e - l) <= 3e-7 * std::fabs(l) + 1e-37, "log1p(%a): %g, want %g", y, e, l);
    }
    const float t = float(12.0 * normal());
    const double th = std::tanh(double(t)), tg = lane(checked::tanh(splat(t)));
    REQUIRE(std::fabs(tg - th) <= 3e-7 * std::fabs(th), "tanh(%a): %g, want %g", t, tg, th);
  }
  const float inf = __builtin_huge_valf();
  REQUIRE(lane(checked::exp(splat(-inf))) == 0.0f && lane(checked::exp(splat(-1e30f))) == 0.0f,
          "exp(-inf)");
  REQUIRE(lane(checked::exp(splat(0.0f))) == 1.0f, "exp(0)");
  REQUIRE(lane(exp_full(splat(inf))) == inf && lane(exp_full(splat(1e30f))) == inf, "exp(inf)");
  REQUIRE(std::isnan(lane(checked::exp(splat(__builtin_nanf(""))))), "exp(nan)");
  REQUIRE(std::isnan(lane(checked::exp(splat(-__builtin_nanf(""))))), "exp(-nan)");
  for (uint32_t i = 0; i < 65536; ++i) {
    const uint16_t h = uint16_t(i);
    const float b = from_bf16(h), f = from_fp16(h);
    if (b == b) REQUIRE(to_bf16(b) == h, "bf16 %x", i);
    if (f == f) REQUIRE(to_fp16(f) == h, "fp16 %x became %x", i, to_fp16(f));
  }
  for (int i = 0; i < 100000; ++i) {
    const float x = float(normal() * std::exp(20.0 * normal()));
    REQUIRE(from_bf16(to_bf16(x)) == lane(round_to(splat(x), Dtype::bf16)), "bf16 of %a", x);
    REQUIRE(from_fp16(to_fp16(x)) == lane(round_to(splat(x), Dtype::f16)), "fp16 of %a", x);
  }
}

static void check_online() {
  for (int trial = 0; trial < 200; ++trial) {
    OnlineLse parts[5];
    double direct = 0.0;
    for (int i = 0; i < 60; ++i) {
      const double z = 40.0 * normal();
      direct += std::exp(z - 100.0);
      lse_merge(parts[i % 5], {z, 1.0});
    }
    OnlineLse all;
    for (const OnlineLse& p : parts) lse_merge(all, p);
    lse_merge(all, OnlineLse());
    REQUIRE(std::fabs(lse_value(all) - 100.0 - std::log(direct)) < 1e-12 * 100, "merge");
  }
  REQUIRE(lse_value(OnlineLse()) == -pk_inf(), "empty sum");
}

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

static StatPlan two_model_plan() {
  StatPlan plan;
  for (StatKind k : {kLogp, kEnt, kCol, kFkl, kRkl, kJsd, kAlpha, kRenyi, kTv, kBkl, kMix, kEv}) {
    plan.slot[k] = plan.count++;
  }
  plan.param[kJsd] = 0.3, plan.param[kAlpha] = 0.4, plan.param[kRenyi] = 0.7;
  plan.param[kBkl] = 3, plan.param[kMix] = 0.25;
  return plan;
}

// Forward statistics against plain sums, and the weight gradient against the scalar logit_gradient.
static void check_head(int64_t n, int64_t v, int64_t d, int64_t kept, int threads) {
  Problem p(n, v, d);
  HeadCall call;
  call.rows = n, call.vocab = v, call.targets = p.targets.data();
  call.policy.hidden = p.hidden.data(), call.policy.weight = p.weight.data(),
  call.policy.bias = p.bias.data();
  call.ref = call.policy;
  call.ref.hidden = p.ref_hidden.data(), call.ref.weight = p.ref_weight.data();
  call.policy.depth = call.ref.depth = d;
  for (Head* h : {&call.policy, &call.ref}) h->scale = 1.3, h->temperature = 0.9;
  call.has_ref = true;
  call.values = p.values.data();
  call.plan = two_model_plan();
  const size_t cells = size_t(call.plan.count) * size_t(n);
  std::vector<float> out(cells), saved(size_t(kSavedRows * n)), cache(size_t(2 * kept * v)),
      up(cells);
  for (float& c : up) c = float(normal());
  call.out = out.data(), call.saved = saved.data(), call.saved_rows = kSavedRows;
  call.cache = cache.data(), call.cache_rows = kept;
  call.pool.threads = threads;
  call.pool.run = [](int count, void (*fn)(void*, int), void* arg) {
    for (int i = count; i-- > 0;) fn(arg, i);
  };
  REQUIRE(checked::head_forward(call), "forward");
  std::vector<float> dh(size_t(n * d)), dw(size_t(v * d)), db(static_cast<size_t>(v));
  call.d_out = up.data(), call.d_hidden = dh.data(), call.d_weight = dw.data(),
  call.d_bias = db.data();
  REQUIRE(checked::head_backward(call), "backward");

  std::vector<double> want_dh(dh.size()), want_dw(dw.size());
  for (int64_t r = 0; r < n; ++r) {
    const auto got = [&](StatKind k) { return double(out[size_t(call.plan.slot[k] * n + r)]); };
    const int64_t y = p.targets[size_t(r)];
    if (y < 0) {
      for (int s = 0; s < call.plan.count; ++s)
        REQUIRE(out[size_t(s * n + r)] == 0.0f, "ignored row");
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
    const auto near = [&](StatKind k, double want) {
      if (want != want || std::isinf(want)) return;  // a target with p = 0
      const double tolerance = 3e-5 * (1.0 + std::fabs(want));
      REQUIRE(std::fabs(got(k) - want) <= tolerance, "stat %d: %g, want %g (n %ld v %ld d %ld)",
              int(k), got(k), want, long(n), long(v), long(d));
    };
    near(kLogp, lp[size_t(y)]), near(kEnt, ent), near(kCol, std::log(sq)), near(kFkl, fkl),
        near(kRkl, rkl);
    near(kJsd, 0.3 * jr + 0.7 * jp), near(kAlpha, (1 - overlap_a) / 0.24),
        near(kRenyi, std::log(overlap_r) / -0.3);
    near(kTv, tv), near(kEv, ev);
    near(kMix, 0.75 * z[size_t(y)] + 0.25 * zr[size_t(y)] - std::log(mix));

    const GradCoef g = grad_coefficients(
        call.plan, [&](StatKind k) { return double(up[size_t(call.plan.slot[k] * n + r)]); }, got,
        [&](SavedRow k) { return double(saved[size_t(k * n + r)]); });
    for (int64_t i = 0; i < v; ++i) {
      const double zi = z[size_t(i)], ri = zr[size_t(i)];
      const bool in_top = ri > g.top_value + 1e-5 || std::fabs(ri - g.top_value) <= 1e-5;
      double dx = logit_gradient<double, double>(g, zi, ri, lp[size_t(i)], lr[size_t(i)],
                                                 p.values[size_t(i)], i == y, in_top);
      dx *= 1.3 / 0.9;
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

// Every element type through both directions and the frozen rows: memory errors, and equal bits for
// any budget.
static void check_types(Dtype type, int64_t n, int64_t v, int64_t d) {
  const bool wide = type == Dtype::f64;
  const size_t bytes = size_t(dtype_bytes(type)), stat = wide ? 8 : 4;
  const auto tensor = [&](int64_t size) {
    std::vector<char> x(size_t(size) * bytes);
    for (int64_t i = 0; i < size; ++i) {
      const double e = normal();
      write_row(x.data(), type, i, &e, 1);
    }
    return x;
  };
  const std::vector<char> h = tensor(n * d), w = tensor(v * d);
  std::vector<int64_t> y;
  for (int64_t i = 0; i < n; ++i) y.push_back(i % 5 == 1 ? -100 : i % v);
  std::vector<char> grads[2];
  for (int run = 0; run < 3; ++run) {
    HeadCall call;
    call.rows = n, call.vocab = v, call.targets = y.data();
    call.policy.hidden = h.data(), call.policy.weight = w.data(), call.policy.depth = d,
    call.policy.softcap = 5.0;
    call.policy.hidden_type = call.policy.weight_type = type;
    call.plan.slot[kLogp] = 0, call.plan.slot[kEnt] = 1, call.plan.count = 2;
    const bool frozen = run == 2;
    const int64_t kept = run == 1 ? n / 2 : 0;
    std::vector<char> out(2 * size_t(n) * stat), saved(size_t(n) * stat),
        cache(size_t(kept * v) * bytes);
    std::vector<char> rows(frozen ? 2 * size_t(n * d) * stat : 0), dh(h.size()), dw(w.size());
    call.out = out.data(), call.saved = saved.data(), call.cache = cache.data(),
    call.cache_rows = kept;
    call.frozen = frozen ? rows.data() : nullptr;
    call.frozen_count = 2, call.frozen_kind[0] = kLogp, call.frozen_kind[1] = kEnt;
    REQUIRE(checked::head_forward(call), "forward");
    call.d_out = out.data(), call.d_hidden = dh.data(),
    call.d_weight = frozen ? nullptr : dw.data();
    REQUIRE(checked::head_backward(call), "backward");
    dh.insert(dh.end(), dw.begin(), dw.end());
    if (run < 2)
      grads[run] = dh;
    else {
      for (int64_t i = 0; i < n * d; ++i) {
        const double a = element<double>(dh.data(), type, i),
                     b = element<double>(grads[0].data(), type, i);
        REQUIRE(std::fabs(a - b) <= (bytes == 2 ? 0.15 : 1e-4) * (1.0 + std::fabs(b)),
                "frozen %g, recomputed %g", a, b);
      }
    }
  }
  REQUIRE(grads[0] == grads[1], "a budget changed bits");
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
    check_types(t, 21, 50, 13);
    check_types(t, 3, 1, 1);
    check_types(t, 33, 97, 64);
  }
  std::puts("ok");
}
