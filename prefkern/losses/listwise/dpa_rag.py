"""DPA-RAG's contrastive term of a re-ranker; its pairs and points are losses of their own.

Pairs: bradley_terry on the logit of the "relevant" class. Points: the two-class cross-entropy is
point_sigmoid(beta=1) on the difference of the two logits. The authors add the three with the
weights of prefkern.losses.listwise.more.min_norm_weights over the encoder's gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import ragged
from .. import core


def sup_con(
    embeddings: Tensor,  # [S, D]
    labels: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
    *,
    temperature: float = 0.07,
) -> Tensor:  # [G]
    """Supervised contrast inside each group: passages of one label are drawn together.

    l = mean over anchors i of -1 / |P_i| sum_{p in P_i} log(exp(z_i.z_p / t) / sum_{a != i}
        exp(z_i.z_a / t)),  z = x / |x|,  P_i = the others of i's label

    Khosla et al. 2020 (arXiv 2004.11362), as in DPA-RAG's code (arXiv 2406.18676): two relevant and
    two irrelevant passages per query. Forms an `[S, S]` table.

    Args:
        embeddings: `[S, D]` embedding of each passage, with gradient.
        labels: `[S]` class of each passage; NaN removes it.
        cu_groups: `[G+1]` boundaries of the passages of one query.
        temperature: t > 0, default 0.07.

    Returns:
        Unreduced loss `[G]`; an anchor that is alone with its label adds 0 and still counts, as in
        that code. (Its factor temperature / 0.07 is left out.)

    Raises:
        ValueError: temperature <= 0, shapes that do not fit.
    """
    core.positive("temperature", temperature)
    if embeddings.dim() != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"embeddings must be [S, D] and labels [S], got {list(embeddings.shape)} and "
            f"{list(labels.shape)}."
        )
    valid = ~labels.isnan()
    kept = torch.where(valid[:, None], embeddings, 0.0)
    z = torch.nn.functional.normalize(kept, dim=-1)
    group = ragged.owner(cu_groups, len(labels))
    other = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    rival = (group[:, None] == group[None, :]) & valid[:, None] & valid[None, :] & other  # [S, S]
    alike = rival & (labels[:, None] == labels[None, :])
    logits = z @ z.T / temperature
    counting = alike.any(1)
    # An anchor without another of its label counts nothing; its row keeps all logits, since the
    # gradient of a log-sum-exp of nothing is NaN.
    masked = torch.where(rival | ~counting[:, None], logits, -torch.inf)
    log_share = logits - torch.logsumexp(masked, 1, keepdim=True)
    mean = torch.where(alike, log_share, 0.0).sum(1) / alike.sum(1).clamp(min=1)
    groups = cu_groups.numel() - 1
    total = mean.new_zeros(groups).index_add(0, group, torch.where(counting, -mean, 0.0))
    anchors = mean.new_zeros(groups).index_add(0, group, valid.to(mean.dtype))
    return total / anchors.clamp(min=1.0)
