"""The examples run in seconds, and what each promises is there."""

from __future__ import annotations

import re
import time

import pytest
from example_files import FOLDER, example_files

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from doc_blocks import ROOT

SECONDS = 60.0  # of CPU, each


@pytest.fixture(scope="module")
def example():
    """example(name): the module, its starting model shared with the other examples."""
    with example_files(one_start=True) as load:
        yield load


@pytest.fixture(autouse=True)
def in_time(capsys, one_thread):
    start = time.process_time()
    yield
    capsys.readouterr()
    assert time.process_time() - start < SECONDS


def test_every_example_is_short_and_tested():
    here = (ROOT / "tests").rglob("test_*.py")
    tests = "".join(path.read_text(encoding="utf-8") for path in here)
    for path in FOLDER.glob("*.py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines < 150, path.name
        # tail_mass is an experiment of minutes; other tests load a file by its name or import it
        elsewhere = path.stem in ("tiny", "tail_mass") or f'"{path.name}"' in tests
        imported = re.search(rf"^ *import {path.stem}$", tests, re.M)
        assert f'example("{path.stem}")' in tests or elsewhere or imported, path.name


def test_every_example_is_on_the_page():
    text = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    named = re.findall(r"`(\w+\.py)`", text)
    assert set(named) == {path.name for path in FOLDER.glob("*.py")}


def test_dpo_to_tdpo2(example):
    found = example("dpo_to_tdpo2").main(160)
    full, dpo, tdpo2 = found.values()
    assert full["losses"] == pytest.approx(dpo["losses"], rel=1e-3, abs=1e-4)
    assert dpo["losses"][0] == pytest.approx(0.6931, abs=1e-3)
    for row in found.values():
        assert row["before"] < 0.2 and row["after"] > 0.9
    assert tdpo2["kl"] < 0.2 * dpo["kl"]


def test_lora_with_head(example):
    pytest.importorskip("peft")
    found = example("lora_with_head").main(192)
    assert found["before"] < 0.2 and found["after"] > 0.9
    assert found["without_adapter"] == pytest.approx(found["before"])
    assert found["head_moved"] == 0.0 and found["head_adapter"] > 0.01
    assert found["trained_share"] < 0.1


def test_sparsepo_finds_the_words_that_decide(example, tmp_path):
    found = example("sparsepo_masks").main(folder=str(tmp_path))
    assert found["before"] < 0.2 and found["after"] > 0.9
    assert found["mask_deciding"] > 5 * found["mask_other"] > -1e-9
    assert (tmp_path / "sparsepo.png").stat().st_size > 10_000
    assert "weight of KL" in (tmp_path / "sparsepo.html").read_text()


def test_tgdpo_is_guided(example, tmp_path):
    found = example("tgdpo_guided").main(192, str(tmp_path))
    assert found["before"] < 0.2 and found["after"] > 0.9
    assert found["first_loss"] == pytest.approx(0.6931, abs=1e-3) and found["last_loss"] < 0.3
    assert found["weight_off_1_deciding"] > found["weight_off_1_other"] > 0


def test_ranked_lists(example):
    found = example("ranked_lists").main(160)
    for row in found.values():
        assert row["loss_after"] < 0.3 * row["loss_before"]
        assert row["ndcg_after"] > 0.95 and row["kendall_tau_after"] > 0.8


def test_kto(example):
    found = example("kto_thumbs").main(512)
    assert found["before"] < 0.2 and found["after"] > 0.8
    assert found["last_loss"] < 0.7 * found["first_loss"]


def test_distillation(example):
    found = example("distillation").main(256)
    for name, row in found.items():
        # the four likeliest tokens say nothing of the rest
        assert row["after"] < (0.5 if "four" in name else 0.2) * row["before"], name
