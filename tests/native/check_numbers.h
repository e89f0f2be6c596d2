// Functions on vectors and running sums against the standard library's.
#pragma once

#include <cmath>
#include <vector>

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
    const float u = float((i % 2 ? 80.0 : 1e-3) * (2.0 * uniform() - 1.0));
    const double ew = std::expm1(double(u)), eg = lane(checked::expm1(splat(u)));
    REQUIRE(std::fabs(eg - ew) <= (3e-7 + 1.4e-8 * std::fabs(u)) * std::fabs(ew),
            "expm1(%a): %g, want %g", u, eg, ew);
  }
  const float inf = __builtin_huge_valf();
  REQUIRE(lane(checked::exp(splat(-inf))) == 0.0f && lane(checked::exp(splat(-1e30f))) == 0.0f,
          "exp(-inf)");
  REQUIRE(lane(checked::exp(splat(0.0f))) == 1.0f, "exp(0)");
  REQUIRE(lane(checked::expm1(splat(0.0f))) == 0.0f, "expm1(0)");
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
