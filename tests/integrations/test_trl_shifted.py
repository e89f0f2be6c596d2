"""Labels that were shifted before: what context parallelism hands to TRL's fused head."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("trl")

import torch
import trl_runs as runs
from trl.trainer.utils import add_fused_lm_head as stock

from prefkern.integrations.trl.fused_head import OUR_STATISTICS, add_fused_lm_head


def test_halves_of_a_sequence_score_as_trl_scores_them():
    """Each half is a call with its own positions and shift_labels; labels lie beside them, as the
    Trainer leaves them there. All T positions count: the first half's last label is in the second.
    """
    policy, outputs = runs.model(), ("log_probs", "entropy", "mean_logits", "is_top1")
    other = copy.deepcopy(policy)
    add_fused_lm_head(policy, outputs=outputs)
    stock(other, outputs=outputs)
    ids = torch.arange(24).reshape(2, 12) * 7 % 250
    labels = ids.masked_fill(torch.arange(12) < 3, -100)
    shift = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    for half in (slice(0, 6), slice(6, 12)):
        inputs = {
            "input_ids": ids[:, half], "position_ids": torch.arange(12)[half].expand(2, -1),
            "labels": labels[:, half], "shift_labels": shift[:, half],
        }  # fmt: skip
        found = [m(**inputs, fused_lm_head=True, num_items_in_batch=18) for m in (policy, other)]
        for name in OUR_STATISTICS:
            if (value := getattr(found[1], name)) is not None:
                assert value.shape == (2, 6)
                assert torch.allclose(getattr(found[0], name).float(), value.float(), atol=1e-5)
        assert torch.equal(found[0].label_mask, found[1].label_mask)
        assert torch.allclose(found[0].loss, found[1].loss)
        for out in found:
            out.loss.backward()
    for p, q in zip(policy.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6)
