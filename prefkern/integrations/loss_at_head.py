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
from .head import Compute, View
from .reference import Reference, constant

Other = Reference | Tensor | None


@torch.no_grad()
def read_other(
    model: Callable[..., Any],
    inputs: dict[str, Any],
    targets: Tensor,  # [B, T]
    *,
    distribution: bool,
    layers: bool = False,
    backend: str = "auto",
) -> Reference | Tensor:
    """What losses read of a frozen model, one forward of it without gradient.

    Args:
        model: The reference or a third model, given `at_head`; inside its wrapper if it has one.
        inputs: Its forward's arguments.
        targets: Labels already shifted.
        distribution: Its whole distribution is wanted, in the policy's call: a `Reference`.
            Otherwise its log-probabilities `[B, T]`, and nothing else is kept.
        layers: Its hidden states after every block as well.
        backend: As in `linear_logps`.
    """
    if distribution:
        more = {"output_hidden_states": True} if layers else {}
        return model(**inputs, **more, at_head=constant).value

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
    **arguments: Any,
) -> Compute:
    """For at_head=: `preference_loss` of the view, which returns (loss, metrics).

    Args:
        targets: Labels already shifted.
        reference, aux: What `read_other` gave of the reference and of a third model.
        masks: Learned masks: (hidden states of the reference's blocks [L, B, T, D], scored [B T])
            -> arguments of the loss.
        arguments: Of `preference_loss`.
    """

    def compute(view: View) -> tuple[Tensor, dict[str, Tensor]]:
        given = dict(arguments)
        at = targets.to(view.hidden.device)
        with ExitStack() as stack:
            if isinstance(reference, Reference):
                given["ref_hidden"] = reference.hidden
                given["ref_head"] = stack.enter_context(reference.gathered())
                if masks is not None:
                    assert reference.layers is not None
                    given |= masks(reference.layers, (at != -100).flatten())
            elif reference is not None:
                given["ref_logp"] = reference
            if isinstance(aux, Reference):
                given["aux_hidden"] = aux.hidden
                given["aux_head"] = stack.enter_context(aux.gathered())
            elif aux is not None:
                given["aux_logp"] = aux
            return preference_loss(view.hidden, view.head, at, **given)

    return compute
