"""The pictures of the example: losses in the whole and per half raise the share of the liked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def file():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import diffusion_pictures
    finally:
        sys.path.remove(str(EXAMPLES))
    return diffusion_pictures


@pytest.fixture(scope="module")
def base(file):
    torch.manual_seed(0)
    return file.pretrained()


@pytest.mark.parametrize("loss", ["diff_dpo", "dense_dpo", "lpo"])
def test_the_share_of_the_liked_pictures_rises(file, base, loss):
    torch.manual_seed(1)
    before = file.share(base)
    assert 0.1 < before < 0.4  # four kinds, equally likely
    assert file.share(file.tuned(base, loss)) > before + 0.2


def test_pictures_are_seen_as_drawn(file):
    sides = file.random_sides(50)
    assert torch.equal(file.seen(file.pictures(sides)), sides)
    assert (file.seen(torch.zeros(3, 1, 8, 8)) == -1).all()
