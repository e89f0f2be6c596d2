"""logits_logps: the same statistics where logits already exist; selective_log_softmax on top."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks
from ..backends.contract import HeadCall, Model
from ..backends.plan import NO_PLAN, read_plan, write_plan
from ..stats import ONE_MODEL_STATS, TWO_MODEL_STATS, TokenStats, parse_stats
from . import shared
from .head_op import head_op


def logits_logps(
    logits: Tensor,  # [N, V] or [B, T, V]
    targets: Tensor,  # [N] or [B, T] int64
    *,
    ref_logits: Tensor | None = None,  # like logits
    temperature: float = 1.0,
    ignore_index: int = -100,
    stats: str | Sequence[str] = ("logp",),
    backend: str = "auto",
) -> TokenStats:
    """Per-token statistics of softmax(logits / temperature): one read forward, one read and one
    write backward, no log-softmax in memory.

    Args:
        logits: `[N, V]` or `[B, T, V]`, fp32, bf16, fp16 or fp64; sums are fp32 (fp64 for fp64).
        targets: Labels `[N]` or `[B, T]`, in [0, V) or `ignore_index`; ignored rows give exactly 0.
        ref_logits: The reference's logits, same shape; needed by two-model statistics. Constant.
        temperature: Divisor of both logits, > 0. Default 1.
        ignore_index: Label of rows to leave out. Default -100.
        stats: Names as in `linear_logps`, with `ref_logits` also those of `linear_divergence`
            except ev and xent. Default ("logp",).
        backend: "auto" or a backend name.

    Returns:
        TokenStats; each requested field has the shape of `targets`, nats.

    Raises:
        ValueError: arguments that cannot be; two-model statistics without `ref_logits`.
    """
    checks.check_integer_targets("targets", targets)
    checks.check_float("logits", logits)
    if logits.dim() not in (2, 3) or tuple(logits.shape[:-1]) != tuple(targets.shape):
        raise ValueError(
            f"logits must be {list(targets.shape)} + [V] to match targets, got "
            f"{checks.shape_text(logits)}; "
            "shift logits and labels first so that row i scores targets[i]."
        )
    if logits.shape[-1] == 0:
        raise ValueError(f"logits must have at least one column, got {checks.shape_text(logits)}.")
    checks.check_same_device("targets", targets, "logits", logits)
    checks.check_logit_options(1.0, None, temperature)
    checks.check_ignore_index(ignore_index)
    allowed = tuple(s for s in ONE_MODEL_STATS if s != "xent")
    if ref_logits is not None:
        allowed += tuple(s for s in TWO_MODEL_STATS if s != "ev")
        checks.check_float("ref_logits", ref_logits)
        checks.check_constant("ref_logits", ref_logits)
        checks.check_same_device("ref_logits", ref_logits, "logits", logits)
        if ref_logits.shape != logits.shape:
            raise ValueError(
                f"ref_logits must have the shape of logits {checks.shape_text(logits)}, got "
                f"{checks.shape_text(ref_logits)}."
            )
    parsed = parse_stats(stats, allowed=allowed)
    n, v = targets.numel(), logits.shape[-1]
    names = ",".join(str(s) for s in parsed)
    chosen = shared.choose_backend(
        "logits_logps", logits.device, logits.dtype, None, names, backend,
        shared.shape_for_message(n, v, 0),
    )  # fmt: skip
    # All three are said: of a default a compiler makes one symbol, which two calls cannot share.
    policy = Model(
        logits=logits.reshape(n, v).contiguous(), scale=1.0, softcap=0.0,
        temperature=float(temperature),
    )  # fmt: skip
    ref = None
    if ref_logits is not None:
        data = ref_logits.reshape(n, v).to(logits.dtype).contiguous()
        ref = policy._replace(logits=data)
    flat = targets.reshape(-1).long().contiguous()
    # rows are not gathered: that would copy the logits
    call = HeadCall(policy, ref, None, flat, None, None, None, ignore_index, NO_PLAN)
    plan = write_plan(parsed, frozenset(), call.present(), short=False)
    out = head_op(call._replace(plan=read_plan(plan)), plan, 0, None, chosen)
    return shared.to_token_stats(out, parsed, frozenset(), targets.shape)


def selective_log_softmax(
    logits: Tensor,  # [..., V]
    index: Tensor,  # [...] or [..., K] int64
    temperature: float = 1.0,
    row_mask: Tensor | None = None,  # [...] bool
) -> Tensor:  # like index, logits.dtype
    """log_softmax(logits / temperature) gathered at `index`, without the log-softmax in memory.

    TRL's function of this name, same arguments and result.

    Args:
        logits: `[..., V]` float.
        index: `[...]` one entry per row, or `[..., K]` several.
        temperature: Divisor of the logits, > 0. Default 1.
        row_mask: `[...]` bool; rows that are False are not computed and give 0. Default None (all).

    Returns:
        Log-probabilities in the shape of `index` and the dtype of `logits`, nats.

    Raises:
        ValueError: shapes or labels that do not fit.
    """
    checks.check_float("logits", logits)
    checks.check_integer_targets("index", index)
    lead = tuple(logits.shape[:-1])
    several = index.dim() == logits.dim()
    if tuple(index.shape[: len(lead)]) != lead or index.dim() > logits.dim():
        raise ValueError(
            f"index must be {list(lead)} or {list(lead)} + [K] to match logits "
            f"{checks.shape_text(logits)}, got {checks.shape_text(index)}."
        )
    checks.check_logit_options(1.0, None, temperature)
    if row_mask is not None:
        checks.check_tensor("row_mask", row_mask)
        checks.check_same_device("row_mask", row_mask, "logits", logits)
    if row_mask is not None and (tuple(row_mask.shape) != lead or row_mask.dtype != torch.bool):
        raise ValueError(
            f"row_mask must be {list(lead)} bool, got {row_mask.dtype} "
            f"{checks.shape_text(row_mask)}; write row_mask.bool()."
        )
    if logits.shape[-1] == 0:
        raise ValueError(f"logits must have at least one column, got {checks.shape_text(logits)}.")
    if index.numel() == 0:
        return logits.new_zeros(index.shape)
    # Masked rows get a label that no caller can mean, so that any other bad label is refused.
    ignore = torch.iinfo(torch.int64).min
    flat = logits.reshape(-1, logits.shape[-1])
    labels = index.reshape(flat.shape[0], -1).long()  # [rows, K]
    if row_mask is not None:
        labels = labels.masked_fill(~row_mask.reshape(-1, 1), ignore)
    if not several:
        logp = logits_logps(flat, labels[:, 0], temperature=temperature, ignore_index=ignore).logp
        assert logp is not None
        return logp.reshape(index.shape).to(logits.dtype)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        checks.check_target_range(labels, flat.shape[1], ignore)
    # K entries share one normaliser: gather the K logits, subtract the row's lse once.
    lse = logits_logps(
        flat, labels[:, 0], temperature=temperature, ignore_index=ignore, stats=("lse",)
    ).lse
    assert lse is not None
    chosen = flat.gather(-1, labels.clamp(min=0)).to(lse.dtype) / temperature
    result = (chosen - lse[:, None]).reshape(index.shape)
    if row_mask is not None:
        result = torch.where(row_mask[..., None], result, torch.zeros_like(result))
    return result.to(logits.dtype)
