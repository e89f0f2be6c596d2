"""Every diffusion loss, in its method's loop, raises the share of the preferred mode."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from prefkern import losses

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# Not losses of one denoiser on a batch of samples: one trains a generator, one several experts.
ELSEWHERE = {"diff_instruct_star", "tlpo"}
pytestmark = pytest.mark.filterwarnings("ignore:loss .* is provisional:UserWarning")


@pytest.fixture(scope="module")
def files() -> tuple[ModuleType, ModuleType]:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import diffusion_own_samples
        import diffusion_points
    finally:
        sys.path.remove(str(EXAMPLES))
    return diffusion_points, diffusion_own_samples


@pytest.fixture(scope="module")
def base(files):
    torch.manual_seed(0)
    model = files[0].pretrained()
    right, left = (files[0].share(model, user) for user in (0.0, -1.0))
    assert 0.3 < right < 0.6 and right + left > 0.5  # both modes are there before
    return model


def test_no_loss_is_left_out(files):
    diffusion = {n for n, r in losses.LOSSES.items() if r.family == "diffusion"}
    assert set(files[0].METHODS) | set(files[1].OWN) | ELSEWHERE == diffusion


@pytest.mark.parametrize(
    ("loss", "least"),
    [
        ("diff_dpo", 0.3), ("diff_npo", 0.15), ("diffusion_mapo", 0.3), ("inpo", 0.3),
        ("smpo", 0.3), ("dcpo", 0.3), ("ppd", 0.2), ("rank_dpo", 0.3), ("lpo", 0.3),
        ("dense_dpo", 0.3),
    ],
)  # fmt: skip
def test_stored_data(files, base, loss, least):
    torch.manual_seed(1)
    shares = files[0].results(base, loss)
    for before, after in zip(shares[::2], shares[1::2], strict=True):
        assert after > before + least


@pytest.mark.parametrize(
    ("loss", "least"), [("dro", 0.25), ("d3po", 0.12), ("spo_step", 0.25), ("self_npo", 0.05)]
)
def test_own_samples(files, base, loss, least):
    torch.manual_seed(1)
    before, after = files[1].results(base, loss)
    assert after > before + least
