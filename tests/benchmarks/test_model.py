"""The account on paper and the mixed rows."""

from __future__ import annotations

import pytest
import torch
from prefkern.kernels import tiles

from benchmarks import inside, mixture, model
from benchmarks.cases import GPU_FIRST


def test_predicted_csv_is_what_the_counts_give(tmp_path):
    """After a change of results/counts.csv or of the model:
    python -m benchmarks --cases predicted --out benchmarks/results"""
    made, kept = model.write(tmp_path), model.RESULTS / "predicted.csv"
    assert made.read_text() == kept.read_text()


@pytest.mark.parametrize("name", ("cuda", "triton"))
def test_counts_hold_the_tiles_of_the_kernels(name, monkeypatch):
    """Of the first cases on sm_90; these lines of counts.csv are not counted but chosen."""
    monkeypatch.setattr(tiles, "arch_of", lambda device: "sm_90")
    for case in GPU_FIRST:
        step = "frozen" if case.frozen else case.step
        assert model.KernelCounts(name).tile_units(step) == inside.tile_units(case, name)


def test_the_table_of_the_text_is_what_is_predicted():
    lines = (model.ROOT / "benchmarks/README.md").read_text().splitlines()
    cells = {x[1].strip(): x[2:4] for x in (line.split("|") for line in lines) if len(x) == 5}
    logp, tdpo, frozen, small, ent = GPU_FIRST
    h100, gib = model.MACHINES["H100"], model.GIB
    said = (
        ("logp, forward", "forward", None, (logp, small)),
        ("logp, step, default budget (4 GiB: all kept)", "step", None, (logp, small)),
        ("logp, step, budget 0", "step", 0, (logp, small)),
        ("logp and entropy, step, default (fp32 logits, 81 % kept)", "step", None, (ent,)),
        ("logp and entropy, step, 8 GiB (all kept)", "step", 8 * gib, (ent,)),
        ("logp, ref_logp and KL, step, default (fp32 logits, 40 % kept)", "step", None, (tdpo,)),
        ("logp, ref_logp and KL, step, 8 GiB (81 % kept)", "step", 8 * gib, (tdpo,)),
        ("frozen head, step", "step", None, (frozen,)),
    )

    def ratios(case, part, budget, machine):
        found = (model.predict(case, b, machine, budget)[part]["ratio"] for b in ("cuda", "triton"))
        return " / ".join(f"{ratio:.2f}" for ratio in found)

    for row, part, budget, cases in said:
        for case, cell in zip(cases, cells[row], strict=False):
            assert cell.strip() == ratios(case, part, budget, h100), row
    small_gpu = ratios(logp, "step", None, h100._replace(memory=40 * gib))
    assert any(line.endswith(f"a logp step would take {small_gpu}.") for line in lines)


def test_a_default_call_at_the_target_shape_keeps_everything():
    """On GPUs of 80 and 140 GB; on a smaller one three products become 3.6."""
    case = GPU_FIRST[0]
    for backend in ("cuda", "triton"):
        units = model.KernelCounts(backend).tile_units("logp")
        for speed in model.MACHINES.values():
            assert inside.schedule(case, speed.memory, None, *units) == (3, 1.0)
            assert model.predict(case, backend, speed, None)["step"]["ratio"] < 1.1
        few = inside.schedule(case, 40 * model.GIB, None, *units)
        assert few.tiles == 10 and few.kept == pytest.approx(0.43, abs=0.005)


@pytest.mark.parametrize("machine", model.MACHINES)
@pytest.mark.parametrize("name", ("cuda", "triton"))
def test_a_prediction_follows_its_parts(machine, name):
    speed = model.MACHINES[machine]
    for case in GPU_FIRST:
        kept, none = (model.predict(case, name, speed, b) for b in (1 << 40, 0))
        for part in kept:
            assert kept[part]["ratio"] > 1 and none[part]["ratio"] > 1
        # what is not kept is a product more for each head the backward reads
        again = case.backward_heads * case.flops_per_product / speed.flops
        gap = (none["step"]["ms"] - kept["step"]["ms"]) / 1e3
        assert gap == 0 if case.frozen else gap > again * 0.99
        # products alone: everything else costs nothing on a machine without limits
        free = speed._replace(copy=1e30, lanes=1e30)
        launches = model.predict(case, name, free, 1 << 40)["step"]["ratio"]
        assert 1 < launches < kept["step"]["ratio"]


def test_measured_stands_beside_predicted():
    row = {"what": "step", "case": GPU_FIRST[0].name, "variant": "prefkern cuda", "ratio": 1.3}
    (found,) = model.beside([row], "NVIDIA H100 80GB HBM3")
    assert found["predicted_ratio"] == pytest.approx(1.07, abs=0.01) and found["ratio"] == 1.3
    (other,) = model.beside([row], "NVIDIA L4")
    assert other["predicted_ratio"] is None


def share_needed(
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D]
    targets: torch.Tensor,  # [N], none ignored
    chunk: int,
    mass: float = mixture.MASS,
) -> float:
    """Share of the units that are needed, from the exact masses of every chunk."""
    v, needed = weight.shape[0], 0
    count = mixture.chunks_of(v, chunk)
    for h, y in zip(hidden.detach().split(256), targets.split(256), strict=True):
        z = h.float() @ weight.detach().float().T
        padded = z.new_full((len(h), count * chunk), -torch.inf)
        padded[:, :v] = z
        p = padded.view(len(h), count, chunk).logsumexp(2).double().softmax(1)
        order = p.argsort(1)
        small = p.gather(1, order).cumsum(1) <= mass
        skipped = torch.zeros_like(small).scatter(1, order, small)
        skipped[torch.arange(len(h)), y // chunk] = False
        needed += int((~skipped).sum())
    return needed / (hidden.shape[0] * count)


@pytest.mark.parametrize("share", mixture.SHARES)
def test_the_share_of_units_is_as_stated(share):
    """Counted from exact masses, at a small vocabulary in small chunks (129 of them)."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(4100, 512, generator=g) * 2 * 512**-0.5
    hidden, targets = mixture.rows(weight, 3000, share, g, chunk=32)
    found = share_needed(hidden, weight, targets, chunk=32)
    # a flat row of 32-column chunks leaves out its lightest ones: 0.9 of its units are needed
    assert found == pytest.approx(share, rel=0.15)


def test_units_needed_against_plain_loops():
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(9, 16, generator=g), 2 * torch.randn(70, 16, generator=g)
    targets = torch.randint(0, 70, (9,), generator=g)
    needed = 0
    for h, y in zip(hidden, targets, strict=True):
        p = (weight @ h).double().softmax(0)
        masses = [(float(part.sum()), i) for i, part in enumerate(p.split(8))]
        left = mixture.MASS
        for mass, i in sorted(masses):
            left -= mass
            needed += left < 0 or i == int(y) // 8
    assert share_needed(hidden, weight, targets, chunk=8) == needed / (9 * 9)
