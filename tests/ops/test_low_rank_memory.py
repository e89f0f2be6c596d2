"""Low-rank terms cost no copy of the head: peak resident memory of forward and backward."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from cases import device_of

from prefkern import Head, linear_logps

N, V, D, R = 8, 60_000, 512, 4
COPY = V * D * 4  # bytes of a head, 123 MB
CLEAR = Path("/proc/self/clear_refs")

pytestmark = pytest.mark.skipif(
    not CLEAR.exists(), reason="the high-water mark of memory is reset through Linux's /proc"
)


def status() -> dict[str, int]:
    """Bytes by field of /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return {k: int(v) * 1024 for k, v in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.M)}


def growth(step) -> int:
    """Peak of anonymous memory above the level before, in bytes; pages of libraries aside."""
    before = status()
    CLEAR.write_text("5")
    step()
    after = status()
    return after["VmHWM"] - before["VmRSS"] - max(after["RssFile"] - before["RssFile"], 0)


def leaves(v: int, d: int, *, trained: bool):
    g = torch.Generator().manual_seed(0)
    hidden, weight, u, low = (
        torch.randn(*shape, generator=g) for shape in ((N, d), (v, d), (N, R), (v, R))
    )
    for x in (hidden, u, low, *([weight] if trained else [])):
        x.requires_grad_()
    return hidden, weight, u, low, torch.arange(N)


def logps(hidden, weight, u, low, targets, *, backend):
    head = Head(weight, low_rank=[(u, low)])
    return linear_logps(hidden, head, targets, memory_budget=0, backend=backend).logp.sum()


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_low_rank_terms_copy_no_head(backend, trained):
    if device_of(backend) != "cpu":
        pytest.skip("memory of the host is what is measured")
    logps(*leaves(64, 16, trained=trained), backend=backend).backward()  # loads what it needs once
    given = leaves(V, D, trained=trained)
    made = []
    forward = growth(lambda: made.append(logps(*given, backend=backend)))
    wanted = [x for x in given if x.requires_grad]
    # apart from the forward, whose copy the room of the gradients would hide
    backward = growth(lambda: made[0].backward()) - sum(x.numel() * 4 for x in wanted)
    assert all(x.grad is not None for x in wanted)
    assert max(forward, backward) < COPY / 2, f"{forward >> 20} and {backward >> 20} MiB"


def test_a_copy_is_seen():
    _, weight, _, low, _ = leaves(V, D, trained=False)
    extra = growth(lambda: torch.cat([weight, low.detach()], 1).sum())
    assert extra > 0.9 * COPY
