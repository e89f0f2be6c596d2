"""Properties that every diffusion loss of LOSSES must have. Nothing here names a formula."""

from __future__ import annotations

import inspect

import pytest
import torch

from prefkern import error_sum, losses, preference_loss

pytestmark = pytest.mark.filterwarnings("ignore:loss .* is provisional:UserWarning")
DIFFUSION = sorted(n for n, r in losses.LOSSES.items() if r.family == "diffusion")
names = pytest.mark.parametrize("name", DIFFUSION)
# Losses that read several errors per sample, and those whose result is per group.
COLUMNS = {"dense_dpo", "tlpo"}
GROUPED = {"lpo", "rank_dpo"}
# A product with a direction, not an error: any sign, and nothing to compare.
REGRESSIONS = {"self_npo", "diff_instruct_star"}
PAIRED = [n for n in DIFFUSION if n not in REGRESSIONS | GROUPED]
N = 6


def positional(name: str) -> list[str]:
    parameters = inspect.signature(losses.LOSSES[name].fn).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def constant(name: str) -> bool:
    return name.startswith("ref_") or name == "score_gap"


def example(name: str, change: float = 0.0, dtype=torch.float64, n: int = N):
    """(errors, keywords): references in (0, 1), policies `change` times N(0, 1) away."""
    g = torch.Generator().manual_seed(11)
    shape = (n, 3) if name in COLUMNS else (n,)
    base = {side: 0.2 + torch.rand(*shape, generator=g, dtype=torch.float64) for side in ("c", "r")}
    errors = []
    for argument in positional(name):
        value = base["r" if "rejected" in argument else "c"].clone()
        if not constant(argument):
            value += change * torch.randn(*shape, generator=g, dtype=torch.float64).abs()
        errors.append(value.to(dtype).requires_grad_(not constant(argument)))
    make = {
        "p_win": lambda: 0.5 + 0.5 * torch.rand(n, generator=g),
        "sigma": lambda: 0.1 + torch.rand(n, generator=g),
        "labels": lambda: torch.randint(-1, 2, shape, generator=g).float(),
        "phi": lambda: torch.arange(n).roll(1) / max(n, 1),
        "relevance": lambda: torch.arange(n).roll(1) / max(n, 1),
        "cu_groups": lambda: torch.tensor([0, n // 2, n], dtype=torch.int32),
    }
    extra = {k: make[k]() for k in losses.LOSSES[name].extra}
    return errors, extra


def leaves(errors):
    return [e for e in errors if e.requires_grad]


def part(name, errors, extra, rows):
    cut = {k: v[rows] if v.dim() and v.shape[0] == N else v for k, v in extra.items()}
    return losses.LOSSES[name](*[e[rows] for e in errors], **cut)


@names
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("change", [0.0, 1.0, 1e4])
def test_value_and_gradient_are_finite(name, change, dtype):
    errors, extra = example(name, change, dtype)
    loss = losses.LOSSES[name](*errors, **extra)
    assert loss.dtype == dtype and loss.shape == ((2,) if name in GROUPED else (N,))
    assert torch.isfinite(loss).all()
    for grad in torch.autograd.grad(loss.sum(), leaves(errors)):
        assert torch.isfinite(grad).all()


@names
@pytest.mark.parametrize("change", [0.0, 1e-4, 0.3])
def test_gradcheck(name, change):
    errors, extra = example(name, change)
    inputs = leaves(errors)

    def call(*values):
        values = iter(values)
        return losses.LOSSES[name](
            *[next(values) if e.requires_grad else e for e in errors], **extra
        )

    # steps of 1e-7: kappa is 2500, and a logistic bends over 1 / kappa
    assert torch.autograd.gradcheck(call, inputs, eps=1e-7, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [n for n in DIFFUSION if n not in GROUPED])
def test_batch_is_the_sum_of_its_parts(name):
    errors, extra = example(name, 1e-4)
    whole = losses.LOSSES[name](*errors, **extra)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(part(name, errors, extra, order), whole[order])
    alone = torch.cat([part(name, errors, extra, slice(i, i + 1)) for i in range(N)])
    torch.testing.assert_close(alone, whole, rtol=1e-15, atol=0)


@names
def test_empty_batch(name):
    errors, extra = example(name, n=0)
    loss = losses.LOSSES[name](*errors, **extra)
    assert loss.numel() == (2 if name in GROUPED else 0) and loss.sum() == 0


@pytest.mark.parametrize("name", PAIRED)
def test_swapping_the_samples_matters(name):
    errors, extra = example(name, 1e-4)
    order = [1, 0, 3, 2] if len(errors) == 4 else [1, 0]
    loss = losses.LOSSES[name](*errors, **extra)
    assert not torch.allclose(loss, losses.LOSSES[name](*[errors[i] for i in order], **extra))


@pytest.mark.parametrize("name", PAIRED)
def test_a_smaller_error_of_the_chosen_sample_is_never_worse(name):
    if name in ("diff_npo", "dense_dpo"):
        pytest.skip("its labels or its aim say otherwise")
    errors, extra = example(name, 1e-4)
    loss = losses.LOSSES[name](*errors, **extra)
    chosen, rejected = torch.autograd.grad(loss.sum(), errors[:2])
    assert (chosen >= 0).all() and chosen.any()
    assert (rejected <= 0).all()


@names
def test_shapes_must_match(name):
    errors, extra = example(name)
    for i in range(len(errors)):
        cut = [e[:1] if i == k else e for k, e in enumerate(errors)]
        if len(errors) == 1:
            continue
        with pytest.raises(ValueError, match=r"\["):
            losses.LOSSES[name](*cut, **extra)
    with pytest.raises(ValueError, match=r"0-d|\[P|\[S\]"):
        losses.LOSSES[name](*[e.sum() for e in errors], **extra)


@pytest.mark.parametrize("name", [n for n in DIFFUSION if any(map(constant, positional(n)))])
def test_a_reference_with_gradient_is_refused(name):
    errors, extra = example(name)
    for i, argument in enumerate(positional(name)):
        if constant(argument):
            bad = [e.detach().requires_grad_() if i == k else e for k, e in enumerate(errors)]
            with pytest.raises(ValueError, match="must not require grad"):
                losses.LOSSES[name](*bad, **extra)


@names
def test_bad_numbers_are_refused(name):
    record = losses.LOSSES[name]
    errors, extra = example(name)
    tried = 0
    for argument in ("beta", "kappa", "gamma", "sigma", "snr", "T", "c", "alpha", "weight",
                     "margin", "beta_mapo", "eps"):  # fmt: skip
        if argument in inspect.signature(record.fn).parameters:
            tried += 1
            for bad in (-1.0, float("nan"), float("inf")):
                with pytest.raises(ValueError, match=f"{argument} must be"):
                    record(*errors, **{**extra, argument: bad})
    assert tried


@names
def test_an_error_that_is_no_number_stays_in_its_item(name):
    errors, extra = example(name, 1e-4)
    want = losses.LOSSES[name](*errors, **extra)
    clean = torch.autograd.grad(want.sum(), leaves(errors))
    broken = [e.detach().clone() for e in errors]
    broken[0][1] = torch.nan
    broken = [b.requires_grad_(e.requires_grad) for b, e in zip(broken, errors, strict=True)]
    got = losses.LOSSES[name](*broken, **extra)
    slopes = torch.autograd.grad(got.sum(), leaves(broken))
    rows = torch.tensor([3, 4, 5]) if name in GROUPED else torch.tensor([0, 2, 3, 4, 5])
    assert got[0 if name in GROUPED else 1].isnan()  # never hidden
    kept = got[1:] if name in GROUPED else got[rows]
    assert torch.equal(kept, want[1:] if name in GROUPED else want[rows])
    assert all(torch.equal(a[rows], b[rows]) for a, b in zip(slopes, clean, strict=True))


@names
def test_traces_whole(name):
    errors, extra = example(name, 1e-4)
    torch.compiler.reset()

    def step(*values):
        return losses.LOSSES[name](*values, **extra)

    got = torch.compile(step, fullgraph=True, backend="eager")(*errors)
    assert torch.equal(got, step(*errors))


@names
def test_rewards(name):
    record = losses.LOSSES[name]
    a, b = torch.rand(4), torch.rand(4)
    hyper = losses.bind(record, {}, supplied=losses.required(record)).hyper
    got = record.rewards(a, b, **hyper)
    assert got.shape == (4,) and not got.requires_grad


@pytest.mark.parametrize(
    # labels and cu_groups are arguments of preference_loss itself and do not reach these losses
    "name",
    [
        n
        for n in DIFFUSION
        if not {"labels", "cu_groups", "relevance"} & set(losses.LOSSES[n].extra)
    ],
)
def test_preference_loss_says_where_it_belongs(name):
    extra = {k: torch.zeros(2) for k in losses.required(losses.LOSSES[name])}
    args = (torch.randn(6, 4), torch.randn(9, 4), torch.zeros(6, dtype=torch.long))
    cu = torch.tensor([0, 3, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"diffusion(.|\n)*prefkern\.losses\.{name}"):
        preference_loss(*args, cu, loss=name, ref_logp=torch.zeros(6), **extra)


@pytest.mark.parametrize("steps", [60])
def test_a_short_training_run_learns_the_preference(steps):
    """A linear denoiser: accuracy of the implicit preference goes from chance to all pairs."""
    g = torch.Generator().manual_seed(2)
    # two kinds of samples, the chosen ones along +w and the rejected along -w
    w = torch.randn(12, generator=g)
    chosen = 0.3 * torch.randn(32, 12, generator=g) + 0.5 * w
    rejected = 0.3 * torch.randn(32, 12, generator=g) - 0.5 * w
    noise = torch.randn(32, 12, generator=g)
    model = torch.nn.Linear(12, 12)
    frozen = torch.nn.Linear(12, 12)
    frozen.load_state_dict(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    seen = []
    for _ in range(steps):
        sums = []
        for image in (chosen, rejected):
            x = 0.8 * image + 0.6 * noise
            with torch.no_grad():
                ref = frozen(x)
            sums.append(error_sum(model(x), noise, ref))
        errors = [s.err for s in sums] + [s.ref_err for s in sums]
        loss = losses.diff_dpo(*errors, kappa=20.0).mean()
        delta = errors[0] - errors[2] - errors[1] + errors[3]
        seen.append((loss.item(), (delta < 0).float().mean().item()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen[0][0] == pytest.approx(0.693147, abs=1e-6) and seen[0][1] == 0.0
    assert seen[-1][0] < 0.2 and seen[-1][1] == 1.0
    assert all(b[0] == b[0] for b in seen)
