"""DCKD and ADPA: a small model learns from a DPO-trained teacher on both answers of a pair."""

from __future__ import annotations

import torch
from torch import Tensor

from ...stats import SeqStats
from .. import core
from ..declare import pairwise
from ..record import Supervised


def _dckd_reads(*, top_k: int | None = None, **_: object) -> tuple[str, ...]:
    return ("logp", "fkl" if top_k is None else f"bkl:{top_k}", "length")


@pairwise(
    source="arXiv 2502.17927",
    status="trainer read in a third-party copy",
    reads=_dckd_reads,
    supervised=Supervised("sft_on_chosen", 1.0),
)
def dckd(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    distillation_weight: float = 1.0,
    chosen_distil_weight: float = 1.0,
    rejected_distil_weight: float = 1.0,
    top_k: int | None = None,
    chosen_tokens: float | None = None,
    rejected_tokens: float | None = None,
) -> Tensor:  # [P]
    """DCKD: KL from the teacher to the policy per token of the chosen and of the rejected answers.

    l = w (w_c fkl(chosen) / n_c + w_r fkl(rejected) / n_r),
    n_c, n_r = mean length of the batch's chosen and rejected answers, so that the mean over pairs
    is the mean over tokens; objective: + sft_on_chosen NLL(chosen) per token

    Gao et al. 2025 (arXiv 2502.17927), as in the released trainer; the teacher is given as the
    reference model. The released code caches its top 50 entries and one rest bucket.

    Args:
        chosen, rejected: Statistics of the two answers, each field `[P]`; needs `logp`, `length`,
            and `fkl`, or `bkl` with top_k.
        distillation_weight: w; recipe values are not known.
        chosen_distil_weight, rejected_distil_weight: w_c and w_r.
        top_k: Folds all but the teacher's top_k entries into one bucket (50 in the released code);
            None: the full KL.
        chosen_tokens, rejected_tokens: n_c and n_r over a whole step of several micro-batches;
            None: the batch's own.

    Returns:
        Loss `[P]`; its mean over pairs is the published token mean.
    """
    core.not_negative("distillation_weight", distillation_weight)
    core.same_items(chosen, rejected)
    field = "fkl" if top_k is None else "bkl"
    kl_w = core.per_token(chosen.require(field), chosen.require("length"), chosen_tokens)
    kl_l = core.per_token(rejected.require(field), rejected.require("length"), rejected_tokens)
    return distillation_weight * (chosen_distil_weight * kl_w + rejected_distil_weight * kl_l)


@pairwise(
    source="arXiv 2502.17927",
    status="trainer read in a third-party copy; equation of the paper from memory",
    reads=("logp", "ev", "length"),
    supervised=Supervised("sft_on_chosen", 1.0),
)
def adpa(
    chosen: SeqStats,
    rejected: SeqStats,
    *,
    adpa_weight: float = 1.0,
    rejected_tokens: float | None = None,
) -> Tensor:  # [P]
    """ADPA: raises the expected advantage of the policy's own distribution, token by token.

    l = -adpa_weight ev(rejected) / n_r,  ev = sum over tokens of sum_v p_v A_v,
    A = log teacher after DPO - log teacher before,  n_r = mean length of the rejected answers;
    objective: + sft_on_chosen NLL(chosen) per token

    Gao et al. 2025 (arXiv 2502.17927). The rejected answers are samples of the student. A comes
    from two heads (ref_hidden, aux_hidden) or as sparse rows (values). The released code clamps A
    to [1e-8, 1 - 1e-8] on the teacher's top 50; `advantage_rows` makes such rows.

    Args:
        adpa_weight: Weight of the advantage; recipe values are not known.
        rejected_tokens: n_r over a whole step of several micro-batches; None: the batch's own.

    Returns:
        Loss `[P]`; its mean over pairs is the published token mean.
    """
    core.not_negative("adpa_weight", adpa_weight)
    core.same_items(chosen, rejected)
    expected = core.per_token(rejected.require("ev"), rejected.require("length"), rejected_tokens)
    return -adpa_weight * expected


def advantage_rows(
    aux_logp: Tensor,  # [N, V]
    ref_logp: Tensor,  # [N, V]
    *,
    top_k: int = 50,
    clamp: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor]:  # [N, k], [N, k]
    """The entries of A that a cache keeps: (index, value) for `values=` of the ops.

    Args:
        aux_logp: `[N, V]` log-probabilities of the teacher after DPO, a chunk of tokens at a time.
        ref_logp: `[N, V]` those of the teacher before.
        top_k: Entries per row, the most probable under aux_logp, default 50. Others count as 0.
        clamp: Bounds of the kept values, default None; (1e-8, 1 - 1e-8) is what the released code
            does, which takes every negative advantage away.

    Returns:
        Indices and advantages, both `[N, min(top_k, V)]`.
    """
    if aux_logp.shape != ref_logp.shape or aux_logp.dim() != 2:
        raise ValueError(
            f"aux_logp and ref_logp must both be [N, V], got {list(aux_logp.shape)} and "
            f"{list(ref_logp.shape)}."
        )
    core.positive("top_k", top_k)
    index = torch.topk(aux_logp, min(top_k, aux_logp.shape[1]), dim=1).indices
    value = (aux_logp.gather(1, index) - ref_logp.gather(1, index)).detach()
    return index, value if clamp is None else value.clamp(*clamp)
