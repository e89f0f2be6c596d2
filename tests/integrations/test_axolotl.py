"""Axolotl's trainer with prefkern's losses, on a stand-in with its class's shape over real TRL."""

from __future__ import annotations

import dataclasses

import pytest

trl = pytest.importorskip("trl")

import trl_runs as runs  # noqa: E402

from prefkern.integrations import axolotl  # noqa: E402


class Mixin:
    """Stands for Axolotl's mixins, which must stay in place."""

    steps = 0

    def training_step(self, *args, **kwargs):
        type(self).steps += 1
        return super().training_step(*args, **kwargs)


class AxolotlDPOTrainer(Mixin, trl.DPOTrainer):
    def __init__(self, *args, dataset_tags=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.dataset_tags = dataset_tags
        self.optimizer = None
        self.model_accepts_loss_kwargs = False


@dataclasses.dataclass
class AxolotlDPOConfig(trl.DPOConfig):
    pass


def test_trains_with_keys_of_the_configuration(tmp_path, monkeypatch):
    class BasePlugin:
        pass

    monkeypatch.setattr(axolotl, "_given", {})
    plugin = axolotl.plugin_class(BasePlugin)()
    plugin.pre_model_load({"prefkern_args": {"beta": 0.2}, "prefkern_columns": None})
    policy = runs.model()
    cls = axolotl.trainer_class(AxolotlDPOTrainer)
    # the builder's call: model and reference by position, the rest by name
    made = cls(
        policy, runs.perturbed(policy),
        args=AxolotlDPOConfig(
            **runs.settings(tmp_path, loss_type=["tdpo2:alpha=0.3"], max_steps=3)
        ),
        train_dataset=runs.pairs(), processing_class=runs.tokenizer(), dataset_tags=["x"],
    )  # fmt: skip
    made.train()
    assert cls.steps == 3 and made.dataset_tags == ["x"]
    assert runs.history(made)[0]["beta"] == 0.2
    assert made.plan.names == ["tdpo2:alpha=0.3"]


def test_keys_are_validated():
    with pytest.raises(ValueError, match=r"unknown keys.*prefkern_arg'.*prefkern_args"):
        axolotl.read({"prefkern_arg": {}})
    with pytest.raises(ValueError, match="must be a mapping"):
        axolotl.read({"prefkern_args": [1]})
    assert axolotl.read({"prefkern_args": {"beta": 1}}) == {
        "loss_args": {"beta": 1}, "loss_columns": {},
    }  # fmt: skip


def test_the_plugins_arguments_are_a_model():
    pytest.importorskip("pydantic")
    made = axolotl.Arguments(prefkern_args={"alpha": 0.5})
    assert made.prefkern_args == {"alpha": 0.5} and made.prefkern_columns is None
