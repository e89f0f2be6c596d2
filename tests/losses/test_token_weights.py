"""Weight stages on packed tokens: positions, empty sequences, masked rows, gradients, bad input."""

from __future__ import annotations

import pytest
import torch

from prefkern.losses import weights

NAN = float("nan")
CU = torch.tensor([0, 5, 5, 9], dtype=torch.int32)  # the second sequence is empty
SCORED = torch.tensor([0, 1, 0, 1, 1, 0, 1, 1, 1]).bool()


def test_ld_dpo_counts_scored_tokens_only():
    stage = weights.ld_dpo(CU, SCORED, torch.tensor([2, 0, 1]), alpha=0.25)
    assert stage.weights.tolist() == [0, 1, 0, 1, 0.25, 0, 1, 0.25, 0.25]
    assert stage.penalty is None
    cut = weights.ld_dpo(CU, SCORED, torch.tensor([0, 0, 3]), alpha=0.0)
    assert cut.weights.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
        weights.ld_dpo(CU, SCORED, torch.tensor([2, 0, 1]), alpha=1.5)


def test_tgdpo_weights():
    sign = torch.tensor([1.0] * 5 + [-1.0] * 4)
    aux = torch.full((9,), -1.0)
    ref = torch.full((9,), -3.0)
    aux[0] = NAN  # a prompt token nobody scored
    stage = weights.tgdpo(aux, ref, sign, SCORED, beta=0.1, alpha=0.5)
    want = torch.where(SCORED, 1.0 + sign * 0.1, torch.zeros(9))
    torch.testing.assert_close(stage.weights, want)
    clamped = weights.tgdpo(aux[1:], ref[1:], sign[1:], beta=10.0, alpha=0.5, clamp=(0.0, 2.0))
    assert clamped.weights.min() == 0 and clamped.weights.max() == 2
    with pytest.raises(ValueError, match="aux_logp must be"):
        weights.tgdpo(aux[:3], ref, sign)
    with pytest.raises(ValueError, match="sign must be"):
        weights.tgdpo(aux, ref, sign[:3])


def test_sparsepo_gradient_and_penalty():
    masks = [torch.rand(9, dtype=torch.float64).requires_grad_() for _ in range(2)]
    with torch.no_grad():
        masks[0][1] = 0.0
        masks[1][0] = NAN  # not scored: must not be seen
    stage = weights.sparsepo(CU, SCORED, *masks, l1_norm_param_u=0.5, l1_norm_param_d=0.25)
    assert set(stage.weights) == {"logp", "fkl"}
    assert (
        stage.penalty.dtype == torch.float64
        and stage.penalty.shape == (3,)
        and stage.penalty[1] == 0
    )
    grads = torch.autograd.grad(stage.penalty.sum(), masks)
    want = SCORED.double()
    want[1] = 0.0  # sign(0) = 0
    torch.testing.assert_close(grads[0], 0.5 * want)
    torch.testing.assert_close(grads[1], 0.25 * SCORED.double())
    assert (stage.weights["fkl"][~SCORED] == 0).all()


def test_sparsepo_common_mask_is_penalised_once():
    mask = torch.ones(9, dtype=torch.float64)
    stage = weights.sparsepo(
        CU, SCORED, mask, None, rw_kl_independent=False, l1_norm_param_u=0.5, l1_norm_param_d=0.1,
        kl_direction="pol_ref",
    )  # fmt: skip
    assert set(stage.weights) == {"logp", "rkl"}
    assert stage.penalty.tolist() == pytest.approx([0.9, 0.0, 0.9])


def test_sparsepo_one_mask_leaves_the_other_term_alone():
    mask = torch.ones(9)
    assert set(weights.sparsepo(CU, SCORED, None, mask).weights) == {"fkl"}
    assert set(weights.sparsepo(CU, SCORED, mask, None).weights) == {"logp"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(reward_mask=None, kl_mask=None), "needs reward_mask or kl_mask"),
        (
            dict(reward_mask=torch.ones(9), kl_mask=torch.ones(9), rw_kl_independent=False),
            "shares one mask",
        ),
        (dict(reward_mask=torch.ones(8), kl_mask=None), "reward_mask must be"),
        (dict(reward_mask=torch.ones(9), kl_mask=None, l1_norm_param_u=-1.0), "must be >= 0"),
        (dict(reward_mask=torch.ones(9), kl_mask=None, kl_direction="fkl"), "kl_direction"),
    ],
)
def test_sparsepo_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        weights.sparsepo(CU, SCORED, **arguments)


def test_mapo_mask():
    activations = torch.tensor([[9.0, 0.0, NAN, 1.0, 4.0, 9.0, 2.0, 2.0, 2.0]])
    stage = weights.mapo(CU, SCORED, activations, torch.tensor([0]))
    # constant activations (the last sequence) give 1; masked tokens, whatever they hold, give 0
    assert stage.weights.tolist() == [0, 0, 0, 0.25, 1, 0, 1, 1, 1]
    many = weights.mapo(CU, SCORED, activations.repeat(3, 1), torch.tensor([0, 2, 2]))
    torch.testing.assert_close(many.weights, stage.weights)  # type 1 has no hook and no vote
    alone = weights.mapo(
        torch.tensor([0, 1], dtype=torch.int32),
        torch.ones(1).bool(),
        torch.ones(1, 1),
        torch.tensor([0]),
    )
    assert alone.weights.tolist() == [1.0]
    with pytest.raises(ValueError, match="activations must be"):
        weights.mapo(CU, SCORED, activations[0], torch.tensor([0]))
    with pytest.raises(ValueError, match="hook_type must be"):
        weights.mapo(CU, SCORED, activations, torch.tensor([0, 1]))


def test_masks_module():
    states = torch.randn(3, 9, 4, requires_grad=True)
    both = weights.SparseMasks(3, 4)
    common = weights.SparseMasks(3, 4, rw_kl_independent=False)
    for module in (both, common):
        assert all("_mask" in name for name, _ in module.named_parameters())
        out = module(states)
        stage = weights.sparsepo(CU, SCORED, l1_norm_param_u=0.1, l1_norm_param_d=0.1, **out)
        (stage.penalty.sum() + sum(w.sum() for w in stage.weights.values())).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters())
    assert states.grad is None  # the reference is a constant
    assert both(states)["kl_mask"] is not None and common(states)["kl_mask"] is None
    assert (both(states)["reward_mask"] >= 0).all()
    only = weights.SparseMasks(3, 4, mask_on_kl=False)
    assert only(states)["kl_mask"] is None and len(list(only.parameters())) == 5
    with pytest.raises(ValueError, match="nothing would be masked"):
        weights.SparseMasks(3, 4, mask_on_kl=False, mask_on_reward=False)
    with pytest.raises(ValueError, match="one mask for both"):
        weights.SparseMasks(3, 4, mask_on_kl=False, rw_kl_independent=False)
    with pytest.raises(ValueError, match=r"states must be \[L, N, D\] = \[3, N, 4\]"):
        both(states[:2])
    with pytest.raises(ValueError, match="num_layers and hidden_size"):
        weights.SparseMask(0, 4)


def test_masks_survive_a_checkpoint():
    first, second = (weights.SparseMasks(2, 3) for _ in range(2))
    second.load_state_dict(first.state_dict())
    states = torch.randn(2, 7, 3)
    assert torch.equal(first(states)["reward_mask"], second(states)["reward_mask"])


def test_stages_trace_whole():
    activations, types = torch.rand(3, 9), torch.tensor([0, 2, 2])
    mask, sign = torch.rand(9), torch.ones(9)
    stages = [
        lambda: weights.ld_dpo(CU, SCORED, torch.tensor([2, 0, 1])),
        lambda: weights.tgdpo(mask, mask, sign, SCORED),
        lambda: weights.sparsepo(CU, SCORED, mask, mask, l1_norm_param_u=0.1),
        lambda: weights.mapo(CU, SCORED, activations, types),
    ]
    for stage in stages:
        torch.compiler.reset()
        got = torch.compile(stage, fullgraph=True, backend="eager")()
        want = stage()
        torch.testing.assert_close(got.weights, want.weights, rtol=0, atol=0)
