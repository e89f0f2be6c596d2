"""Arguments of another kind, misspelt or in another shape: a sentence of ours before any work."""

from __future__ import annotations

import math

import pytest
import torch

import prefkern
from prefkern import Head, SeqStats, TokenStats, loss_from_stats, preference_loss
from prefkern.objective.token_weights import stage_weights as weights_of

B, T, D, V = 4, 3, 4, 9
G = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT = torch.randn(B, T, D, generator=G), torch.randn(V, D, generator=G)
TARGETS = torch.randint(0, V, (B, T), generator=G)
REF = -torch.rand(B, T, generator=G)
WEIGHTS = torch.rand(B, T, generator=G)
FLAT, ROWS = HIDDEN.reshape(-1, D), TARGETS.reshape(-1)
CU = torch.tensor([0, 5, 12])
NO_NUMBERS = ("1", True, None, [1.0], {}, 1j, torch.ones(2), torch.tensor(True))
NO_INTEGERS = ("1", True, None, 1.5, math.nan, 2**63, [1])


def objective(**changes):
    given = {"hidden": HIDDEN, "head": WEIGHT, "targets": TARGETS, "ref_logp": REF, **changes}
    return preference_loss(**given)[0]


def refused(name: str, call) -> None:
    with pytest.raises(ValueError, match=rf"{name}.* (must|may|takes|needs|turns) ") as error:
        call()
    assert "got" in str(error.value)


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    """No product is made before an argument is refused."""
    for name in ("linear_logps", "linear_divergence"):
        monkeypatch.setattr(f"prefkern.objective.models.{name}", None)


# ---- the ops -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_numbers_of_the_logits(value):
    for name in ("scale", "softcap", "temperature"):
        if value is not None or name != "softcap":
            refused(name, lambda name=name: Head(WEIGHT, **{name: value}))
    refused("temperature", lambda: prefkern.logits_logps(FLAT, ROWS % D, temperature=value))
    none = torch.zeros(0, dtype=torch.long)  # also where there is nothing to compute
    refused(
        "temperature",
        lambda: prefkern.selective_log_softmax(torch.zeros(0, 5), none, temperature=value),
    )


def test_a_learned_scale_is_no_constant():
    """Its gradient would be lost in silence."""
    learned = torch.tensor(1.5, requires_grad=True)
    for name in ("scale", "softcap", "temperature"):
        with pytest.raises(ValueError, match=f"{name} must not require grad.*multiply hidden"):
            Head(WEIGHT, **{name: learned})
    assert Head(WEIGHT, scale=learned.detach()).scale == 1.5


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
def test_ignore_index(value):
    refused("ignore_index", lambda: prefkern.linear_logps(FLAT, WEIGHT, ROWS, ignore_index=value))
    refused("ignore_index", lambda: prefkern.logits_logps(FLAT, ROWS % D, ignore_index=value))
    refused("ignore_index", lambda: objective(ignore_index=value))
    tokens = TokenStats(logp=REF, ref_logp=REF)
    refused("ignore_index", lambda: loss_from_stats(tokens, TARGETS, ignore_index=value))


def test_other_arguments_of_the_head_ops():
    def op(**args):
        return lambda: prefkern.linear_logps(FLAT, WEIGHT, ROWS, **args)

    refused("memory_budget", op(memory_budget=True))
    refused("tail_mass", op(tail_mass=True))
    refused("stats", op(stats=torch.tensor(1.0)))
    for value in (None, 3, (None,), ([1.0],), ("logits",)):
        refused("no_grad_stats", op(no_grad_stats=value))
    u, b = torch.ones(B * T, 2), torch.ones(V, 2)
    for value in (None, 3, (u, b), ((u, b, b),), "ub"):
        refused("low_rank", lambda value=value: Head(WEIGHT, low_rank=value))
    refused("shard", lambda: Head(WEIGHT, shard=(0, 9)))
    for tensor in (FLAT.to_sparse(), torch.nested.nested_tensor([FLAT, FLAT])):
        refused("hidden", lambda tensor=tensor: prefkern.linear_logps(tensor, WEIGHT, ROWS))
    refused("weight", lambda: prefkern.linear_logps(FLAT, WEIGHT.to_sparse(), ROWS))
    refused(
        "row_mask", lambda: prefkern.selective_log_softmax(FLAT, ROWS % D, row_mask=[True] * 12)
    )


def test_arguments_of_the_other_ops():
    scores, errors = torch.randn(12, generator=G), HIDDEN
    for family in ([], {}, None):
        refused("family", lambda f=family: prefkern.list_rank(scores, scores, CU, family=f))
    rank = {"family": "softmax", "alpha": True}
    refused("alpha", lambda: prefkern.list_rank(scores, scores, CU, **rank))
    refused("target", lambda: prefkern.error_sum(errors, None))
    for stats in (3, True, torch.ones(()), {"err"}):
        refused("stats", lambda s=stats: prefkern.error_sum(errors, errors, stats=s))
    for axis in (None, "1", True, 1.0):
        cut = {"segments": torch.zeros(T, dtype=torch.long), "num_segments": 1, "segment_dim": axis}
        refused("segment_dim", lambda cut=cut: prefkern.error_sum(errors, errors, **cut))


# ---- preference_loss and loss_from_stats ---------------------------------------------------------


@pytest.mark.parametrize("loss", ["dpo", "ld_dpo"])  # without and with weights of its own
def test_token_weights(loss):
    wrong = {
        "transposed": WEIGHTS.T, "one": WEIGHTS[:1, :1].reshape(1), "a number": torch.tensor(0.5),
        "a column": WEIGHTS.reshape(-1, 1), "integers": WEIGHTS.long(), "flags": WEIGHTS > 0.5,
        "misspelt": {"lopg": WEIGHTS}, "unread": {"fkl": WEIGHTS}, "None": {"logp": None},
        "of the reference": {"ref_logp": WEIGHTS}, "one of two": {"logp": WEIGHTS, "rkl": WEIGHTS},
    }  # fmt: skip
    tokens = TokenStats(logp=REF, ref_logp=REF)
    for value in wrong.values():
        refused("token_weights", lambda v=value: objective(loss=loss, token_weights=v))
        refused(
            "token_weights",
            lambda v=value: loss_from_stats(tokens, TARGETS, loss=loss, token_weights=v),
        )
        refused(
            "token_weights",
            lambda v=value: weights_of(tokens, TARGETS, loss=loss, token_weights=v),
        )


def test_the_second_half_has_a_backend_too():
    tokens = TokenStats(logp=-torch.ones_like(TARGETS, dtype=torch.float32))
    with pytest.raises(ValueError, match="backend must be one of"):
        loss_from_stats(tokens, TARGETS, loss="simpo", backend="fast")


def test_loss_weights():
    both = ["dpo", "ipo"]
    for value in ("12", ["1", "2"], [True, False], {"dpo": 1.0, "ipo": 2.0}, 0.5, [1.0],
                  [1.0, None], torch.ones(2, 1)):  # fmt: skip
        refused("loss_weights", lambda v=value: objective(loss=both, loss_weights=v))
    learned = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"loss_weights.* must not require grad"):
        objective(loss=both, loss_weights=learned)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, True, 1j])
def test_denominators_that_are_tensors(value):
    refused("num_items", lambda: objective(num_items={"pairs": torch.tensor(value)}))


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_reference_log_probabilities_are_floats(kind):
    refused("ref_logp", lambda: objective(ref_logp=REF.to(kind)))
    refused("ref_seq_logp", lambda: objective(ref_logp=None, ref_seq_logp=REF.sum(1).to(kind)))


def test_a_reference_head_without_hidden_states():
    """It would not be read."""
    for change in ({}, {"ref_logp": None}, {"ref_logp": None, "loss": "simpo"}):
        refused("ref_head", lambda c=change: objective(ref_head=WEIGHT, **c))


def test_labels_that_no_loss_reads():
    long, flags = torch.arange(B), torch.arange(B) > 1
    for name, values in {
        "relevance": ("1", [1.0] * B, torch.rand(3), torch.rand(B, 1), flags, torch.ones(B) * 1j),
        "desirable": ("1", [True] * B, flags[:2], flags[:, None], long, torch.rand(B)),
        "cu_groups": ("1", [0, 4], torch.tensor([0, 9]), torch.tensor([0.0, 4.0]), torch.tensor(4)),
    }.items():  # fmt: skip
        for value in values:
            refused(name, lambda name=name, value=value: objective(**{name: value}))


def test_options():
    for value in ("halfs", None, True, 3):
        refused("layout", lambda v=value: objective(loss="simpo", ref_logp=None, layout=v))
    for value in ("false", None, 1, []):
        refused("metrics", lambda v=value: objective(metrics=v))
    refused("state_arguments", lambda: objective(state_arguments={"delta": 1.0}))
    refused("item_weights", lambda: objective_of_stats(item_weights=torch.ones(2) * 1j))


def objective_of_stats(tokens=None, **args):
    tokens = TokenStats(logp=REF - 1, ref_logp=REF) if tokens is None else tokens
    return loss_from_stats(tokens, TARGETS, **args)


def test_statistics():
    for value in (None, (REF,), {"logp": REF}, REF, SeqStats(logp=REF)):
        refused("tokens", lambda v=value: loss_from_stats(v, TARGETS))
    refused("the reference", lambda: objective_of_stats(ref_seq_logp=REF.sum(1)))
    bad = REF.clone()
    bad[1, 2] = math.nan
    for ref in (bad, REF.clone().requires_grad_(), REF.long()):
        tokens = TokenStats(logp=REF - 1, ref_logp=ref)
        with pytest.raises(ValueError, match="ref_logp must"):
            objective_of_stats(tokens)
        alone = TokenStats(logp=REF - 1)
        with pytest.raises(ValueError, match="ref_seq_logp must"):
            objective_of_stats(alone, ref_seq_logp=ref.sum(1))
