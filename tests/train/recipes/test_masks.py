"""SparsePO's masks in a run: alive at the start, spread over all rows, with a rate of their own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import config, save_model, write_data

from prefkern.losses.weights import SparseMasks
from prefkern.train import train
from prefkern.train.optimizer import make_optimizer
from prefkern.train.recipes import masks
from prefkern.train.recipes.masks import Masks
from prefkern.train.run import prepare


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    return save_model(folder / "model"), write_data(folder / "pairs.jsonl")


def run_of(folder, materials, **options):
    return prepare(config(folder, *materials, loss=("sparsepo",), **options))


def provider(run) -> Masks:
    return next(p for p in run.providers if isinstance(p, Masks))


def test_dead_masks_are_drawn_again():
    module = SparseMasks(2, 8)
    layers = torch.randn(2, 50, 8)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(-1.0)
    assert (module.reward_mask(layers) > 0).double().mean() < 0.1
    assert masks.redraw_dead(module, layers) >= 2
    for mask in (module.reward_mask, module.kl_mask):
        assert (mask(layers) > 0).double().mean() >= 0.1


def test_masks_that_stay_dead_are_told():
    class Dead:
        draws = 0

        def reset_parameters(self) -> None:
            self.draws += 1

        def __call__(self, layers):
            return layers.new_zeros(layers.shape[1])

    dead = Dead()
    with pytest.raises(ValueError, match="in 100 draws"):
        masks.redraw_dead(SimpleNamespace(reward_mask=dead, kl_mask=None), torch.ones(2, 5, 8))
    assert dead.draws == 100


def test_masks_of_scored_rows_stand_at_those_rows():
    scored = torch.tensor([False, True, False, True])
    values = torch.tensor([0.25, 0.5], requires_grad=True)
    found = masks.at_scored(values, scored)
    assert found.tolist() == [0.0, 0.25, 0.0, 0.5]
    found[3].backward()
    assert values.grad.tolist() == [0.0, 1.0]
    assert masks.at_scored(True, scored) is True and masks.at_scored(None, scored) is None


def test_they_have_a_rate_and_a_decay_of_their_own(tmp_path, materials):
    for rate, want in ((0.25, 0.25), (None, 1e-3)):
        run = run_of(tmp_path, materials, mask_learning_rate=rate, mask_weight_decay=0.5)
        optimizer = make_optimizer(run.step, run.config)
        names = {id(p): n for n, p in run.step.named_parameters()}
        for group in optimizer.param_groups:
            inside = {names[id(p)].startswith("masks.") for p in group["params"]}
            assert len(inside) == 1
            if inside == {True}:
                assert group["lr"] == want and group["weight_decay"] == 0.5
            else:
                assert group["lr"] == 1e-3 and group["weight_decay"] == 0.0


def test_what_a_step_logs_of_them(tmp_path, materials):
    run = run_of(tmp_path, materials, loss_args={"mask_on_kl": False})
    micro = run.micro_batch(run.examples[:3])
    run.constants(micro)
    own = provider(run)
    scored = micro.batch.targets.flatten() != -100
    given = own.learned(micro.batch)
    assert given.keys() == {"reward_mask", "kl_mask", "rw_kl_independent"}
    assert given["kl_mask"] is None and (given["reward_mask"][~scored] == 0).all()
    rows = given["reward_mask"][scored]
    found = own.metrics()
    assert found.keys() == {"masks/reward_mean", "masks/reward_zeros"}
    assert found["masks/reward_mean"] == pytest.approx(rows.double().mean().item())
    assert found["masks/reward_zeros"] == (rows == 0).double().mean()
    # options of the module are none of the loss's
    assert "mask_on_kl" not in run.step.loss_args


def test_a_trained_models_masks_come_with_it(tmp_path, materials):
    model, data = materials
    train(config(tmp_path / "first", model, data, loss=("sparsepo",)))
    stored = load_file(tmp_path / "first" / masks.FILE)
    again = run_of(tmp_path / "second", (str(tmp_path / "first"), data), ref_model=model)
    own = provider(again).masks.state_dict()
    assert all(torch.equal(own[name], value) for name, value in stored.items())
    fresh = provider(run_of(tmp_path / "third", materials)).masks.state_dict()
    assert any(not torch.equal(fresh[name], value) for name, value in stored.items())


def test_they_read_the_scored_rows_of_the_reference(tmp_path, materials):
    run = run_of(tmp_path, materials)
    micro = run.micro_batch(run.examples[:2])
    layers = run.reference.rows(micro.batch).states.layers
    reference, given = run.constants(micro)
    assert reference.states.layers is None and not {"reward_mask", "kl_mask"} & given.keys()
    assert torch.equal(provider(run).layers, layers[:, micro.batch.targets != -100])
