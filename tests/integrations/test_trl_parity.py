"""Ten steps of DPO equal TRL's: loss, gradient norm, every logged number, the final weights."""

from __future__ import annotations

import copy

import pytest

trl = pytest.importorskip("trl")

import trl_runs as runs  # noqa: E402
from trl_variants import VARIANTS  # noqa: E402

from prefkern.integrations import trl as ours  # noqa: E402

FAST = ("sigmoid", "mixed", "sft first", "weighting", "precomputed copy", "peft saved head")
SAMPLED = [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS]
_stock: dict[str, object] = {}


def train(trainer, config, name, folder, **more):
    variant = VARIANTS[name]
    options = dict(variant.model)
    side = options.pop("side", "right")
    policy = runs.model(**options)
    reference = None
    if variant.peft is None:
        reference = copy.deepcopy(policy) if variant.same_reference else runs.perturbed(policy)
    arguments = {}
    if variant.peft is not None:
        import peft

        arguments["peft_config"] = peft.LoraConfig(task_type="CAUSAL_LM", **variant.peft)
    made = trainer(
        model=policy,
        ref_model=reference,
        args=config(**runs.settings(folder, **variant.config | more)),
        train_dataset=runs.pairs(),
        eval_dataset=runs.pairs(6) if "eval_strategy" in variant.config else None,
        processing_class=runs.tokenizer(side),
        **arguments,
    )
    made.train()
    return made


def stock(name, folder):
    """TRL's run of a variant, trained once."""
    if name not in _stock:
        _stock[name] = train(trl.DPOTrainer, trl.DPOConfig, name, folder)
    return _stock[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_trl_formulas(tmp_path, name):
    got = train(ours.DPOTrainer, ours.DPOConfig, name, tmp_path)
    runs.assert_same_runs(got, stock(name, tmp_path))


@pytest.mark.parametrize("name", SAMPLED)
def test_packed(tmp_path, name):
    got = train(ours.DPOTrainer, ours.DPOConfig, name, tmp_path, padding_free=True)
    assert got.args.padding_free and got.padding_free
    runs.assert_same_runs(got, stock(name, tmp_path))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", SAMPLED)
def test_formulas_of_prefkern(tmp_path, name, packed):
    own = VARIANTS[name].own
    if own is None:
        pytest.skip("prefkern has no formula that logs the same without another loss")
    got = train(ours.DPOTrainer, ours.DPOConfig, name, tmp_path, **own, padding_free=packed)
    assert got.plan is not None
    runs.assert_same_runs(got, stock(name, tmp_path))
