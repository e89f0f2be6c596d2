"""Schedules, steps and inversion against algebra and Monte Carlo."""

from __future__ import annotations

import pytest
import torch

from prefkern import diffusion as d

T = 50
KINDS = {
    "eps": d.Schedule.linear(T, 1e-3, 0.2),
    "x0": d.Schedule.linear(T, 1e-3, 0.2, prediction="x0"),
    "v": d.Schedule.scaled_linear(T, 1e-3, 0.2, prediction="v"),
    "flow": d.Schedule.flow(T, shift=3.0),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def draw(count: int = 6, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    clean, noise = (torch.randn(count, 2, 3, generator=g, dtype=dtype) for _ in range(2))
    return clean, noise, torch.randint(0, T - 1, (count,), generator=g)


@kinds
def test_a_prediction_that_is_the_target_says_the_sample_and_its_noise(kind):
    schedule, (clean, noise, level) = KINDS[kind], draw()
    x = schedule.add_noise(clean, noise, level)
    target = schedule.target(clean, noise, level)
    torch.testing.assert_close(schedule.clean(target, x, level), clean)
    torch.testing.assert_close(schedule.noise_of(target, x, level), noise)
    # a deterministic step then goes to the same noise at the lower level
    to = level // 2
    mean, sigma = schedule.step(target, x, level, to)
    torch.testing.assert_close(mean, schedule.add_noise(clean, noise, to))
    assert not sigma.any()
    end = torch.full_like(level, d.CLEAN)
    torch.testing.assert_close(schedule.step(target, x, level, end, eta=1.0).mean, clean)


@kinds
def test_the_ancestral_step_is_the_posterior(kind):
    """q(x_s | x_t, x_0) by Gaussian conditioning of x_t = k x_s + sqrt(c) e."""
    schedule, (clean, noise, level) = KINDS[kind], draw()
    level, to = level.clamp(min=4), level.clamp(min=4) - 3
    x, target = schedule.add_noise(clean, noise, level), schedule.target(clean, noise, level)
    shape = (-1, 1, 1)
    (a, s), (a_to, s_to) = (
        [c.reshape(shape) for c in schedule.coefficients(at)] for at in (level, to)
    )
    k = a / a_to
    c = s**2 - k**2 * s_to**2
    gain = k * s_to**2 / (k**2 * s_to**2 + c)
    mean, sigma = schedule.step(target, x, level, to, eta=1.0)
    torch.testing.assert_close(mean, a_to * clean + gain * (x - a * clean))
    torch.testing.assert_close(sigma.reshape(shape) ** 2, (1 - gain * k) * s_to**2)
    half = schedule.step(target, x, level, to, eta=0.5).sigma
    torch.testing.assert_close(half, 0.5 * sigma)
    torch.testing.assert_close(schedule.step_mean(target, x, level, to, sigma), mean)


@kinds
def test_renoising_keeps_the_marginal(kind):
    schedule = KINDS[kind]
    clean = torch.full((20000, 1), 1.5, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    one, two = (torch.randn(clean.shape, generator=g, dtype=torch.float64) for _ in range(2))
    level, to = (torch.full((20000,), value) for value in (9, 30))
    x = schedule.renoise(schedule.add_noise(clean, one, level), level, to, two)
    signal, noise = schedule.coefficients(to[:1])
    assert x.mean().item() == pytest.approx(1.5 * signal.item(), abs=4 * noise.item() / 141)
    assert x.std().item() == pytest.approx(noise.item(), rel=0.02)
    assert torch.equal(schedule.renoise(x, to, to, one), x)


def test_the_last_level_may_have_no_signal_for_v_but_not_for_eps():
    kept = torch.linspace(0.99, 0.0, T)
    with pytest.raises(ValueError, match=r"zero terminal SNR.*use prediction 'v'"):
        d.Schedule.variance_preserving(kept)
    schedule = d.Schedule.variance_preserving(kept, prediction="v")
    clean, noise, _ = draw()
    last, lower = (torch.full((6,), value) for value in (T - 1, T - 9))
    x, target = schedule.add_noise(clean, noise, last), schedule.target(clean, noise, last)
    assert torch.equal(x, noise)
    mean, sigma = schedule.step(target, x, last, lower, eta=1.0)
    assert mean.isfinite().all() and sigma.isfinite().all()
    torch.testing.assert_close(schedule.clean(target, x, last), clean)
    torch.testing.assert_close(schedule.renoise(x, last, last, clean), x)


@kinds
def test_low_precision_samples_are_computed_wider(kind):
    schedule, (clean, noise, level) = KINDS[kind], draw()
    x = schedule.add_noise(clean.bfloat16(), noise.bfloat16(), level)
    target = schedule.target(clean.bfloat16(), noise.bfloat16(), level)
    assert x.dtype == target.dtype == torch.bfloat16
    mean, _ = schedule.step(target, x, level, level // 2)
    exact, _ = schedule.step(target.double(), x.double(), level, level // 2)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean.double(), exact, rtol=1e-4, atol=1e-4)


def wavy(x, time, cond):
    """A smooth denoiser of every kind."""
    return torch.sin(1.7 * x) * 0.4 + 0.1 * x + 0.02 * time.reshape(-1, 1, 1) / T


@kinds
def test_inversion_is_undone_by_sampling(kind):
    """With corrections until nothing moves each step is the exact inverse of DDIM's; without them,
    the error falls with the number of steps."""
    schedule, (clean, _, level) = KINDS[kind], draw()
    if kind == "x0":  # a wavy clean sample would be contracted too strongly to invert
        clean = 0.2 * clean
    steps = 5
    rungs = torch.stack([(level + 1) * k // steps - 1 for k in range(steps, -1, -1)])

    def back(x):
        keep = rungs[:-1] != rungs[1:]
        assert keep.all()
        return d.sample(wavy, x, None, schedule, rungs)

    exact = d.invert(wavy, clean, None, schedule, level, steps=steps, corrections=60, average=False)
    off = [
        (back(d.invert(wavy, clean, None, schedule, level, steps=steps, corrections=c)) - clean)
        .abs().max().item()
        for c in (0, 1)
    ]  # fmt: skip
    left = (back(exact) - clean).abs().max().item()
    assert left < 1e-6 and off[1] < 0.8 * off[0]


def test_inversion_stands_still_where_there_is_no_level():
    schedule, (clean, _, _) = KINDS["eps"], draw()
    level = torch.zeros(6, dtype=torch.long)
    one = d.invert(wavy, clean, None, schedule, level, steps=1)
    assert torch.equal(d.invert(wavy, clean, None, schedule, level, steps=10), one)
    g = torch.Generator().manual_seed(0)
    noisy = d.invert(wavy, clean, None, schedule, level + 20, steps=4, eta=0.5, generator=g)
    assert not torch.equal(noisy, d.invert(wavy, clean, None, schedule, level + 20, steps=4))


def test_a_walk_of_the_exact_denoiser_draws_the_data():
    """Data N(2, 0.5^2): the posterior mean is known, so the walk must end in that distribution."""
    schedule = d.Schedule.flow(T)

    def exact(x, time, cond):
        s = (time / T).reshape(-1, 1).double()
        clean = 2.0 + (1 - s) * 0.25 / ((1 - s) ** 2 * 0.25 + s**2) * (x - (1 - s) * 2.0)
        return (x - clean) / s

    g = torch.Generator().manual_seed(0)
    start = torch.randn(4000, 1, generator=g, dtype=torch.float64)
    for eta in (0.0, 1.0):
        end = d.sample(exact, start, None, schedule, d.ladder(schedule, T), eta=eta, generator=g)
        assert end.mean().item() == pytest.approx(2.0, abs=0.04)
        assert end.std().item() == pytest.approx(0.5, abs=0.04)


def test_ladders():
    schedule = KINDS["eps"]
    assert d.ladder(schedule, 5).tolist() == [49, 39, 29, 19, 9, -1]
    assert d.ladder(schedule, 4, top=3).tolist() == [3, 2, 1, 0, -1]
    for steps, top in ((0, None), (51, None), (5, 3)):
        with pytest.raises(ValueError, match=r"steps must be in \[1, "):
            d.ladder(schedule, steps, top=top)
    with pytest.raises(ValueError, match="top must be a level"):
        d.ladder(schedule, 1, top=50)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: d.Schedule([0.9, 0.5], [0.1]), r"signal and noise must be \[T\]"),
        (lambda: d.Schedule([0.5, 0.9], [0.9, 0.5]), "levels must go from little noise to much"),
        (lambda: d.Schedule([0.9, float("nan")], [0.1, 0.5]), "must be finite"),
        (lambda: d.Schedule([1.0, 0.5], [0.0, 0.5]), "noise finite and > 0"),
        (lambda: d.Schedule([0.9, 0.5], [0.1, 0.6], prediction="flow"), r"signal \+ noise = 1"),
        (lambda: d.Schedule([0.9, 0.5], [0.1, 0.6], prediction="v"), r"signal\^2 \+ noise\^2"),
        (lambda: d.Schedule([0.9], [0.1], prediction="epsilon"), "prediction must be one of"),
        (lambda: d.Schedule([0.9], [0.1], times=[1, 2]), "times must be"),
        (lambda: d.Schedule.flow(shift=0.0), "shift must be a finite number > 0"),
        (lambda: d.Schedule.of(object()), "must have a config"),
    ],
)
def test_schedules_that_are_none(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_levels_out_of_range():
    schedule, (clean, noise, level) = KINDS["eps"], draw()
    for wrong in (T, -2):
        with pytest.raises(ValueError, match=rf"level must be in \[-1, {T}\), got"):
            schedule.add_noise(clean, noise, torch.full((6,), wrong))
    with pytest.raises(ValueError, match=r"level must be in \[0, 50\).*not the times"):
        schedule.time(torch.full((6,), -1))
    with pytest.raises(ValueError, match=r"must be \[B\] integers, one level per sample"):
        schedule.time(level.double())
    with pytest.raises(ValueError, match="one level each"):
        schedule.add_noise(clean, noise, level[:3])
    with pytest.raises(ValueError, match="noise must have the shape of the samples"):
        schedule.add_noise(clean, noise[:, :1], level)
    with pytest.raises(ValueError, match="to must not be noisier than level"):
        schedule.step(noise, clean, level, level + 1)
    with pytest.raises(ValueError, match="level must not be noisier than to"):
        schedule.renoise(clean, level + 1, level, noise)
    with pytest.raises(ValueError, match=r"eta must be in \[0, 1\]"):
        schedule.step(noise, clean, level, level, eta=1.5)
    for bad in ({"steps": 0}, {"corrections": -1}, {"steps": 1.5}):
        with pytest.raises(ValueError, match="must be an integer"):
            d.invert(wavy, clean, None, schedule, level, **bad)
    with pytest.raises(ValueError, match=r"levels must be \[n\+1\]"):
        d.sample(wavy, clean, None, schedule, torch.tensor([3]))
