"""error_sum and the diffusion losses against tests/golden/list.json: values and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import vectors

from prefkern import error_sum, losses
from prefkern.losses.diffusion.diffusion_mapo import link

pytestmark = [
    pytest.mark.usefixtures("on_backend"),
    pytest.mark.filterwarnings("ignore:loss .* is provisional:UserWarning"),
]
OP = "error_sum"
GOLDEN = vectors.load("list")["diffusion"]
CASES = GOLDEN["cases"]


class Inputs:
    """Tensors of a case by name; predictions are leaves."""

    def __init__(self, case: dict, dtype: torch.dtype) -> None:
        data = GOLDEN["inputs"][case["input"]]
        self.shape = tuple(data["shape"])
        self.tensors = {
            k: vectors.tensor(v, dtype).reshape(self.shape) for k, v in data.items() if k != "shape"
        }
        for name, value in self.tensors.items():
            value.requires_grad_(name.startswith("pred"))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def errors(self, sides=("w", "l"), **options) -> list[torch.Tensor]:
        """(chosen_err, rejected_err, ref_chosen_err, ref_rejected_err)."""
        sums = [
            error_sum(self[f"pred_{s}"], self[f"target_{s}"], self[f"ref_{s}"], **options)
            for s in sides
        ]
        return [x.err for x in sums] + [x.ref_err for x in sums]


def diff_dpo(x: Inputs, p: dict) -> torch.Tensor:
    return losses.diff_dpo(*x.errors(reduction=p["reduction"]), kappa=p["kappa"], kind=p["kind"])


def smpo(x: Inputs, p: dict) -> torch.Tensor:
    rest = {k: p[k] for k in ("beta", "gamma")}
    return losses.smpo(*x.errors(), p_win=vectors.tensor(p["p_win"]), **rest)


def mapo(x: Inputs, p: dict) -> torch.Tensor:
    return losses.diffusion_mapo(*x.errors()[:2], **p)


def d3po(x: Inputs, p: dict) -> torch.Tensor:
    return losses.d3po(*x.errors(), **{**p, "h": torch.tensor(p["h"])})


def spo(x: Inputs, p: dict) -> torch.Tensor:
    assert set(p["h"]) == {1.0}
    return losses.spo_step(*x.errors(), **{k: v for k, v in p.items() if k != "h"})


def dense_dpo(x: Inputs, p: dict) -> torch.Tensor:
    segments = torch.tensor(p["frame_to_segment"])
    count = len(p["labels"][0])
    errors = x.errors(
        ("0", "1"),
        segments=segments,
        num_segments=count,
        segment_dim=2,
        reduction=p["reduction"],
    )
    return losses.dense_dpo(*errors, labels=torch.tensor(p["labels"]), beta=p["beta"])


def rank_dpo(x: Inputs, p: dict) -> torch.Tensor:
    r = error_sum(x["pred"], x["target"], x["ref"], reduction=p["reduction"])
    rest = {k: p[k] for k in ("beta", "log_base")}
    cu = torch.tensor(p["offsets"], dtype=torch.int32)
    return losses.rank_dpo(r.err, r.ref_err, phi=vectors.tensor(p["phi"]), cu_groups=cu, **rest)


def lpo(x: Inputs, p: dict) -> torch.Tensor:
    r = error_sum(x["pred"], x["target"], x["ref"], reduction=p["reduction"])
    rest = {k: p[k] for k in ("beta", "topk") if k in p}
    cu = torch.tensor(p["offsets"], dtype=torch.int32)
    relevance = vectors.tensor(p["relevance"])
    return losses.lpo(r.err, r.ref_err, relevance=relevance, cu_groups=cu, **rest)


def pseudo_huber(x: Inputs, p: dict) -> torch.Tensor:
    r = error_sum(x["pred_w"], x["target_w"], stats=(f"huber:{p['c']}",))
    return losses.self_npo(r.huber)


def di_star(x: Inputs, p: dict) -> torch.Tensor:
    # the vectors let pred_w play v, pred_l the fake score and ref_w the reference score
    fake, ref = x["pred_l"].detach(), x["ref_w"]
    r = error_sum(x["pred_w"], fake, ref, stats=("dot", "ref_err"), reduction="sum")
    return losses.diff_instruct_star(r.dot, r.ref_err, c=p["c"])


CALLS = {
    "diff_dpo": diff_dpo,
    "smpo": smpo,
    "mapo": mapo,
    "d3po": d3po,
    "spo": spo,
    "dro": lambda x, p: losses.dro(*x.errors(), **p),
    "dense_dpo": dense_dpo,
    "rank_dpo": rank_dpo,
    "lpo": lpo,
    "pseudo_huber_elementwise": pseudo_huber,
    "di_star_surrogate": di_star,
}
# Vectors of other forms of a loss: the same numbers must come out.
SAME = [c for c in CASES if c["method"] == "diff_dpo" and c["params"]["kind"] == "logistic"]


def _id(case):
    if not isinstance(case, dict):
        return str(case).removeprefix("torch.")
    params = "-".join(f"{k}={v}" for k, v in case["params"].items() if not isinstance(v, list))
    return f"{case['method']}-{case['input']}-{params}"


def test_every_vector_is_used():
    assert {c["method"] for c in CASES} == set(CALLS) and len(CASES) == 30


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=_id)
@pytest.mark.parametrize("case", CASES, ids=_id)
def test_vectors(case, dtype):
    x = Inputs(case, dtype)
    loss = CALLS[case["method"]](x, case["params"])
    # fp32 rounds the inputs: an error changes by 1e-7, which the scale of the method multiplies
    relative = 1e-12 if dtype == torch.float64 else 2e-5
    want = case["loss_per_item"]
    vectors.assert_close("loss", loss, want, relative=relative, scale=max(1e-300, *map(abs, want)))
    assert loss.sum().item() == pytest.approx(case["loss_sum"], rel=relative)
    names = [k.removeprefix("grad_sum_") for k in case if k.startswith("grad_sum_")]
    grads = torch.autograd.grad(loss.sum(), [x[n] for n in names])
    for name, grad in zip(names, grads, strict=True):
        # per sample: a gradient of 1e-284 stands beside one of 1
        right = vectors.tensor(case[f"grad_sum_{name}"]).reshape(x.shape)
        for b in range(x.shape[0]):
            size = right[b].abs().max().item()
            small = dtype == torch.float32 and 0 < size < 1e-30
            if small:
                assert grad[b].abs().max() < 1e-30
                continue
            vectors.assert_close(
                f"d {name} of sample {b}",
                grad[b],
                right[b].tolist(),
                relative=relative if size > 1e-30 else 1e-9,
                scale=size,
            )
        if size == 0.0:
            assert not grad[b].any()


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_reduced_errors_of_the_vectors(case):
    if "delta_w" in case:
        w, lose, rw, rl = Inputs(case, torch.float64).errors(reduction=case["params"]["reduction"])
        vectors.assert_close("delta_w", w - rw, case["delta_w"], relative=1e-12,
                             scale=w.max().item())  # fmt: skip
        vectors.assert_close("delta_l", lose - rl, case["delta_l"], relative=1e-12,
                             scale=lose.max().item())  # fmt: skip
    if "segment_scores" in case:
        x, p = Inputs(case, torch.float64), case["params"]
        e = x.errors(("0", "1"), segments=torch.tensor(p["frame_to_segment"]), num_segments=3,
                     segment_dim=2, reduction=p["reduction"])  # fmt: skip
        got = torch.stack([(e[0] - e[2]).T, (e[1] - e[3]).T], 1)  # [F, 2, P]
        vectors.assert_close("scores", got, case["segment_scores"], relative=1e-13)


@pytest.mark.parametrize("case", SAME, ids=_id)
def test_the_forms_of_diffusion_dpo_agree(case):
    """npo with exchanged images, inpo, dcpo and ppd at beta = 2 kappa, one-dimensional tlpo, one
    segment of dense_dpo and smpo at p = 1 are Diffusion-DPO."""
    x, p = Inputs(case, torch.float64), case["params"]
    errors = x.errors(reduction=p["reduction"])
    kappa, want = p["kappa"], case["loss_per_item"]
    column = [e[:, None] for e in errors]
    ones = torch.ones(len(want), 1)
    found = {
        "diff_npo": losses.diff_npo(*[errors[i] for i in (1, 0, 3, 2)], kappa=kappa),
        "inpo": losses.inpo(*errors, beta=2 * kappa),
        "dcpo": losses.dcpo(*errors, beta=2 * kappa),
        "ppd": losses.ppd(*errors, beta=2 * kappa),
        "tlpo": losses.tlpo(*column, beta=kappa),
        "dense_dpo": losses.dense_dpo(*column, labels=ones, beta=kappa),
        "smpo": losses.smpo(*errors, p_win=ones[:, 0], beta=2 * kappa, gamma=1.0),
    }
    for name, loss in found.items():
        vectors.assert_close(name, loss, want, relative=1e-12)


def test_rank_dpo_of_a_pair_is_weighted_diffusion_dpo():
    err = torch.tensor([0.31, 0.27], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.30, 0.28], dtype=torch.float64)
    phi, cu = torch.tensor([0.2, 0.8]), torch.tensor([0, 2], dtype=torch.int32)
    got = losses.rank_dpo(err, ref, phi=phi, cu_groups=cu, beta=50.0)
    plain = losses.diff_dpo(err[1:], err[:1], ref[1:], ref[:1], kappa=50.0)
    log2, log3 = torch.log(torch.tensor([2.0, 3.0], dtype=torch.float64))
    gain = 2 ** phi[1].double() - 2 ** phi[0].double()
    torch.testing.assert_close(got, gain * (1 / log2 - 1 / log3) * plain)


def test_lpo_of_a_pair_is_diffusion_dpo():
    err = torch.tensor([0.31, 0.27], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.30, 0.28], dtype=torch.float64)
    label, cu = torch.tensor([0.2, 0.8]), torch.tensor([0, 2], dtype=torch.int32)
    got = losses.lpo(err, ref, relevance=label, cu_groups=cu, beta=50.0)
    want = losses.diff_dpo(err[1:], err[:1], ref[1:], ref[:1], kappa=50.0)
    torch.testing.assert_close(got, want)


def test_the_table_of_the_mapo_link():
    table = vectors.tensor(GOLDEN["mapo_link_x_f_dfdx"])  # [n, 3]
    x = table[:, 0].clone().requires_grad_()
    value = link(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    # next to the end of the series, x / (e^x - 1) itself loses 1e-14 of its slope
    torch.testing.assert_close(value.detach(), table[:, 1], rtol=1e-13, atol=0)
    torch.testing.assert_close(slope, table[:, 2], rtol=5e-12, atol=0)


def test_the_mapo_link_is_smooth_where_series_and_formula_meet():
    for dtype, near in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        x = torch.tensor([9.999e-3, 1.0001e-2], dtype=dtype, requires_grad=True)
        value = link(x)
        (slope,) = torch.autograd.grad(value.sum(), x)
        exact = x.detach().double()
        torch.testing.assert_close(
            value.detach().double(), exact / torch.expm1(exact), rtol=near, atol=0
        )
        assert (slope + 0.5 - x.detach() / 6).abs().max() < 100 * near + 1e-8


def test_names_say_which_are_not_the_method():
    unsure = {n for n, r in losses.LOSSES.items() if r.family == "diffusion"
              and r.status.startswith("provisional")}  # fmt: skip
    assert unsure == {"tlpo", "diff_instruct_star"}


def test_order_of_samples_does_not_matter():
    g = torch.Generator().manual_seed(0)
    errors = [torch.rand(6, generator=g, dtype=torch.float64) for _ in range(4)]
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 97):
        moved = [e[list(order)] for e in errors]
        assert torch.equal(losses.diff_dpo(*moved), losses.diff_dpo(*errors)[list(order)])
