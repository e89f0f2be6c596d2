"""preference_loss inside the policy's own head call, with what it reads of other models.

Shapes: B rows of T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..objective.preference_loss import preference_loss
from ..ops.linear_stats import linear_logps
from . import hf
from .head_view import Compute, Result, View
from .reference import FrozenView, frozen_view

Other = FrozenView | Tensor | None


@torch.no_grad()
def read_other(
    model: Callable[..., Any],
    inputs: dict[str, Any],
    targets: Tensor,  # [B, T]
    *,
    distribution: bool,
    layers: bool = False,
    backend: str = "auto",
) -> FrozenView | Tensor:
    """What losses read of a frozen model, one forward of it without gradient.

    Args:
        model: The reference or a third model, given `at_head`; inside its wrapper if it has one.
        inputs: Its forward's arguments.
        targets: Labels already shifted.
        distribution: Its whole distribution is wanted, in the policy's call: a `FrozenView`.
            Otherwise its log-probabilities `[B, T]`, and nothing else is kept.
        layers: Its hidden states after every block as well.
        backend: As in `linear_logps`.
    """
    if distribution:
        more = {"output_hidden_states": True} if layers else {}
        return model(**inputs, **more, at_head=frozen_view).value

    def logps(view: View) -> Tensor | None:
        at = targets.to(view.hidden.device)
        return linear_logps(view.hidden, view.head, at, backend=backend).logp

    return model(**inputs, at_head=logps).value


def loss_at_head(
    targets: Tensor,  # [B, T]
    *,
    reference: Other = None,
    aux: Other = None,
    masks: Callable[[Tensor, Tensor], dict[str, Any]] | None = None,
    states: Callable[[Tensor], dict[str, Any]] | None = None,
    **arguments: Any,
) -> Compute:
    """For at_head=: `preference_loss` of the view, which returns (loss, metrics).

    Args:
        targets: Labels already shifted.
        reference, aux: What `read_other` gave of the reference and of a third model.
        masks: Learned masks: (hidden states of the reference's blocks [L, B, T, D], scored [B T])
            -> arguments of the loss.
        states: Arguments of the loss that are read off the policy's last hidden states [B, T, D],
            with gradient where it leaves them any.
        arguments: Of `preference_loss`.
    """

    def compute(view: View) -> tuple[Tensor, dict[str, Tensor]]:
        given = dict(arguments)
        if states is not None:
            given |= states(view.hidden)
        at = targets.to(view.hidden.device)
        with ExitStack() as stack:
            if isinstance(reference, FrozenView):
                given["ref_hidden"] = reference.hidden
                given["ref_head"] = stack.enter_context(reference.gathered())
                if masks is not None:
                    assert reference.layers is not None
                    given |= masks(reference.layers, (at != -100).flatten())
            elif reference is not None:
                given["ref_logp"] = reference
            if isinstance(aux, FrozenView):
                given["aux_hidden"] = aux.hidden
                given["aux_head"] = stack.enter_context(aux.gathered())
            elif aux is not None:
                given["aux_logp"] = aux
            return preference_loss(view.hidden, view.head, at, **given)

    return compute


def with_router_loss(
    model: Any, out: Result, *, share: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of a call with `loss_at_head`, with what a mixture's routers add.

    Args:
        model: Whose config names the coefficient.
        out: What the call returned.
        share: Of this call in the loss of a step, where several make one up.
    """
    loss, metrics = out.value
    if out.aux_loss is None:
        return loss, metrics
    coefficient = getattr(hf.text_config(model), "router_aux_loss_coef", 0.0)
    loss = loss + coefficient * share * out.aux_loss
    return loss, {**metrics, "aux_loss": out.aux_loss.detach()}
