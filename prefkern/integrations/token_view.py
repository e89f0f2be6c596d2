"""What a loss sees of one pair, token by token: log-ratio, KL, weights. `token_pictures` draws it.

Shapes: S sequences in rows of T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..losses.binding import LossLike
from ..objective.token_weights import stage_weights
from ..ops.linear_stats import linear_divergence, linear_logps
from ..stats import TokenStats
from .collate import PairCollator
from .head import at_head
from .head_view import Compute, View, shifted
from .loss_at_head import read_other
from .reference import FrozenView

WORDS = {
    "logratio": "log-ratio", "logp": "log-probability", "fkl": "KL(ref to policy)",
    "rkl": "KL(policy to ref)",
}  # fmt: skip


class Measure(NamedTuple):
    """One number per scored token."""

    name: str  # "log-ratio", "KL(ref to policy)", "weight of log-ratio" ...
    kind: str  # "signed", "positive" or "weight": how it is coloured
    values: list[float]  # nats; weights have no unit


class AnswerTokens(NamedTuple):
    name: str  # "chosen", "rejected" ...
    tokens: list[str]
    measures: list[Measure]


class TokenView(NamedTuple):
    """One group of answers as a loss sees it."""

    title: str
    prompt: str
    answers: list[AnswerTokens]


def view_pair(
    policy: Any,
    reference: Any,
    tokenizer: Any,
    pair: Mapping[str, str],
    *,
    loss: LossLike | Sequence[LossLike] = "dpo",
    title: str | None = None,
    **loss_args: Any,
) -> TokenView:
    """The view of one pair under a policy and a reference.

    Args:
        policy, reference: Transformers models; `at_head` is given to them. The reference is a
            second model.
        tokenizer: Of transformers.
        pair: prompt, chosen, rejected: texts.
        loss: Whose token weights are shown; the first of several.
        title: Default the name of the loss.
        **loss_args: What the loss requires beside the two models. Tensors per token are `[2, T]` or
            flat, of `PairCollator`'s rows for this pair, at the position before each token.

    Raises:
        ValueError: as `preference_loss`.
    """
    batch = PairCollator(tokenizer)([pair])
    device = next(policy.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    targets = shifted(batch.pop("labels"))
    for model in (policy, reference):
        at_head(model)
    inputs: dict[str, Any] = dict(batch)
    training = policy.training
    policy.eval()
    states = read_other(reference, inputs, targets, distribution=True)
    with torch.no_grad():
        tokens = policy(**inputs, at_head=statistics(targets, states)).value
    policy.train(training)
    weights = stage_weights(tokens, targets, loss=loss, **loss_args)
    name = loss if isinstance(loss, str) else "weights"
    return TokenView(
        title or name,
        pair["prompt"],
        answers(tokens, targets, weights, tokenizer, ["chosen", "rejected"]),
    )


def statistics(targets: Tensor, reference: FrozenView | Tensor | None) -> Compute:
    """For at_head=: the statistics that a view shows, of what is known of the reference."""

    def compute(view: View) -> TokenStats:
        at = targets.to(view.hidden.device)
        if isinstance(reference, FrozenView):
            with reference.gathered() as head:
                return linear_divergence(
                    view.hidden, view.head, at, reference.hidden, head,
                    stats=("logp", "ref_logp", "fkl", "rkl"),
                )  # fmt: skip
        found = linear_logps(view.hidden, view.head, at)
        return found if reference is None else found._replace(ref_logp=reference)

    return compute


def answers(
    tokens: TokenStats,  # each [B, T]
    targets: Tensor,  # [B, T]
    weights: Mapping[str, Tensor],  # each [B T]
    tokenizer: Any,
    names: Sequence[str],
    bounds: Sequence[int] | None = None,  # [S+1]
) -> list[AnswerTokens]:
    """One `AnswerTokens` per sequence: the scored tokens with their numbers.

    Args:
        tokens, targets, weights: Of the same rows; targets are the tokens themselves.
        tokenizer: Of transformers.
        names: Of the sequences.
        bounds: Of the sequences on the flattened axis; default one per row.
    """
    flat = targets.reshape(-1)
    width = targets.shape[-1]
    ends = list(bounds) if bounds is not None else [i * width for i in range(len(targets) + 1)]
    found = []
    for name, start, end in zip(names, ends, ends[1:], strict=False):
        scored = [i for i in range(start, end) if int(flat[i]) >= 0]
        rows = torch.tensor(scored, dtype=torch.long, device=flat.device)
        measures = list(_measures(tokens, weights, rows))
        found.append(AnswerTokens(name, [_text(tokenizer, int(flat[i])) for i in scored], measures))
    return found


def _measures(tokens: TokenStats, weights: Mapping[str, Tensor], rows: Tensor) -> list[Measure]:
    def take(value: Tensor) -> list[float]:
        return value.reshape(-1).index_select(0, rows.to(value.device)).double().tolist()

    assert tokens.logp is not None
    known = tokens.ref_logp is not None
    first = tokens.logp if tokens.ref_logp is None else tokens.logp - tokens.ref_logp
    found = [Measure(WORDS["logratio" if known else "logp"], "signed", take(first))]
    shown = [name for name in ("fkl", "rkl") if getattr(tokens, name) is not None]
    # the direction that the loss weighs; where it weighs none, the first
    chosen = [name for name in shown if name in weights] or shown
    for name in chosen[:1]:
        found.append(Measure(WORDS[name], "positive", take(getattr(tokens, name))))
    one = len({id(weight) for weight in weights.values()}) == 1
    for name, weight in weights.items():
        if name not in ("logp", *chosen[:1]):
            continue
        what = WORDS["logratio" if name == "logp" and known else name]
        found.append(Measure("weight" if one else f"weight of {what}", "weight", take(weight)))
        if one:
            break
    return found


def _text(tokenizer: Any, token: int) -> str:
    """A token as a reader can tell it from its neighbours; its leading space is left out."""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    shown = "".join({"\n": "\u23ce", "\t": "\u21e5"}.get(c, c) for c in text)
    if not shown:
        return str(tokenizer.convert_ids_to_tokens(token))
    return shown.strip(" ") or "\u2423"
