"""list_rank: ranking losses of ragged groups, with the derivative formed in the forward.

The forward saves u = dL_g/ds for every score, so the backward is one product per item whatever the
family; backends therefore have a forward only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import checks
from ..backends import list_options
from . import shared, transforms


def list_rank(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1] int32
    *,
    family: str,
    topk: int | Tensor | None = None,  # [G]
    backend: str = "auto",
    **options: object,
) -> Tensor:  # [G]
    """Loss of every group of scored items against their relevance y.

    With (i, j) running over the strict pairs of a group (y_i > y_j) and A = log sum exp s:

    pair            sum_ij w_ij softplus(-(s_i - s_j))
    plackett_luce   sum over the order of relevance i of A(items not before i) - s_i
    softmax         sum_i q_i (A - s_i)

    Groups of 0 or 1 items give 0. A score that is not finite makes its group NaN, and so does an
    infinite relevance on a device that cannot be asked without waiting for it.

    Args:
        scores: `[S]` fp32 or fp64, differentiable.
        relevance: `[S]` numbers, higher is better; NaN leaves the item out. Constant.
        cu_groups: Boundaries `[G+1]`, int32, from 0 to S, never decreasing; empty groups give 0.
        family: One of prefkern.backends.list_options.FAMILIES, as above.
        topk: plackett_luce: number of stages, one number or `[G]` integers >= 1, clamped to the
            group's size. Default None, all.
        backend: "auto" or a backend name.
        options: Of the family; names and defaults in prefkern.backends.list_options.ListOptions.

    Returns:
        `[G]` in the dtype of scores.

    Raises:
        ValueError: shapes, dtypes or boundaries that do not fit, an unknown family or option,
            infinite relevance, negative relevance with target="sum".

    >>> scores, relevance = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, 0.0, 5.0])
    >>> list_rank(scores, relevance, torch.tensor([0, 2, 3]), family="pair")
    tensor([0.3133, 0.0000])
    """
    cu_groups = check_lists(scores, relevance, cu_groups)
    text = list_options.pack(family, options)
    transforms.refuse_forward_mode(scores)
    chosen = shared.choose_backend(
        "list_rank", scores.device, scores.dtype, None, "", backend, None
    )
    loss, _ = _FORWARD(
        scores.contiguous(),
        relevance.to(scores.dtype).contiguous(),
        checks.narrow_boundaries(cu_groups, scores.shape[0]),
        _stages(topk, family, cu_groups),
        family,
        text,
        chosen,
    )
    return loss


def check_lists(
    scores: Tensor,  # [S]
    relevance: Tensor,  # [S]
    cu_groups: Tensor,  # [G+1]
) -> Tensor:  # [G+1]
    """The boundaries, after the checks of dtypes and shapes that every ranking loss makes of its
    tensors; `check_values` is the other half.
    """
    checks.check_tensor("scores", scores)
    if scores.dtype not in (torch.float32, torch.float64) or scores.dim() != 1:
        raise ValueError(
            f"scores must be [S] float32 or float64, got {scores.dtype} "
            f"{checks.shape_text(scores)}; sums of log-probabilities lose their meaning in 16 bits."
        )
    checks.check_tensor("relevance", relevance)
    if relevance.shape != scores.shape or relevance.dtype == torch.bool or relevance.is_complex():
        raise ValueError(
            f"relevance must be numbers [S] = [{scores.shape[0]}] to match scores, got "
            f"{relevance.dtype} {checks.shape_text(relevance)}; give each item its rank or reward."
        )
    checks.check_constant("relevance", relevance)
    checks.check_same_device("relevance", relevance, "scores", scores)
    cu_groups = checks.check_cu_seqlens(
        cu_groups, scores.shape[0], name="cu_groups", of="items", read=False
    )
    checks.check_same_device("cu_groups", cu_groups, "scores", scores)
    return cu_groups


def check_values(relevance: Tensor, cu_groups: Tensor) -> None:
    """Refuses boundaries that do not fit and infinite relevance. CPU tensors only."""
    checks.check_boundaries(cu_groups, relevance.shape[0], name="cu_groups", of="items")
    # Their sum is NaN or infinite then, and thirty times cheaper to form than isinf.
    if math.isfinite(relevance.sum().item()) or not bool(relevance.isinf().any()):
        return
    item = int(relevance.isinf().nonzero()[0])
    raise ValueError(
        f"relevance must be finite, or NaN for an item that is left out, got "
        f"{relevance[item].item()} at position {item}; give the item a finite rank or reward."
    )


def _stages(
    topk: int | Tensor | None, family: str, cu_groups: Tensor
) -> Tensor | None:  # [G] int64
    if topk is None:
        return None
    if family != "plackett_luce":
        raise ValueError(f"topk belongs to family 'plackett_luce', got family {family!r}.")
    groups = cu_groups.shape[0] - 1
    if isinstance(topk, Tensor):
        if topk.shape != (groups,) or topk.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"topk must be an int or integers [G] = [{groups}], got {topk.dtype} "
                f"{checks.shape_text(topk)}."
            )
        return topk.to(torch.int64).contiguous()
    if isinstance(topk, bool) or not isinstance(topk, int) or topk < 1:
        raise ValueError(f"topk must be an int >= 1 or integers [G], got {topk!r}.")
    # No list has more items than boundaries can count: a larger number means all as well.
    stages = min(topk, torch.iinfo(torch.int32).max)
    return torch.full((groups,), stages, dtype=torch.int64, device=cu_groups.device)


_GAINED = ("normalize=1", "item_gain=exp2")  # options that divide by gains, or weigh with them


@torch.library.custom_op("prefkern::list_rank_fwd", mutates_args=())
def _fwd(
    scores: Tensor,
    relevance: Tensor,
    cu_groups: Tensor,
    topk: Tensor | None,
    family: str,
    options: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(loss [G], u [S])."""
    if scores.device.type == "cpu":
        check_values(relevance, cu_groups)
        if bool((topk is not None) and (topk < 1).any()):
            raise ValueError(
                "topk must be >= 1 for every group, got a smaller value; use None for all."
            )
        if "target=sum" in options and bool((relevance < 0).any()):
            raise ValueError(
                "relevance must be >= 0 with target='sum' (it becomes shares), got "
                f"{relevance.nan_to_num(0.0).min().item()}; shift it or use target='softmax'."
            )
        gained = [name for name in _GAINED if name in options.split(";")]
        if gained and bool((relevance < 0).any()):
            raise ValueError(
                f"relevance must be >= 0 with {gained[0]} (gains below 0 turn the order around), "
                f"got {relevance.nan_to_num(0.0).min().item()}; shift the numbers, or give ranks."
            )
    return shared.run(backend, "list_rank_fwd", scores, relevance, cu_groups, topk, family, options)


@_fwd.register_fake
def _(scores, relevance, cu_groups, topk, family, options, backend):
    return scores.new_empty(cu_groups.shape[0] - 1), torch.empty_like(scores)


@torch.library.custom_op("prefkern::list_rank_bwd", mutates_args=())
def _bwd(d_loss: Tensor, slope: Tensor, cu_groups: Tensor) -> Tensor:
    """d_scores [S]: the incoming number of an item's group times its saved derivative."""
    if slope.device.type != "cpu":
        # Boundaries were not read: items outside them, where u is 0, get groups of their own.
        cu_groups = torch.nn.functional.pad(cu_groups, (1, 1))
        cu_groups[-1] = slope.numel()
        d_loss = torch.nn.functional.pad(d_loss, (1, 1))
    sizes = cu_groups[1:] - cu_groups[:-1]
    return d_loss.repeat_interleave(sizes, output_size=slope.numel()) * slope


@_bwd.register_fake
def _(d_loss, slope, cu_groups):
    return torch.empty_like(slope)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1], inputs[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, d_loss, _):
    if d_loss is None:
        return (None,) * 7
    slope, cu_groups = ctx.saved_tensors
    return (_BACKWARD(d_loss, slope, cu_groups),) + (None,) * 6


_fwd.register_autograd(_backward, setup_context=_setup_context)
transforms.refuse_double_backward("prefkern::list_rank_bwd")
_FORWARD = transforms.Differentiable(
    torch.ops.prefkern.list_rank_fwd, _backward, setup_context=_setup_context
)
_BACKWARD = transforms.Differentiable(torch.ops.prefkern.list_rank_bwd)
