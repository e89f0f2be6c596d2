"""The head ops of a backend whose kernels are an `Epilogue`: the functions of the backend contract
(prefkern.backends.eager has them documented) with the epilogue as a first argument."""

from __future__ import annotations

from torch import Tensor

from . import backward, forward
from .epilogue import Epilogue, LogitOptions
from .heads import Head


def linear_logps_fwd(
    epilogue: Epilogue,
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
    cache_rows: int,
    frozen: bool,
    num_scored: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out [n, N], saved [1, N], cache [cache_rows, V], rows [n', N, D] or [0])."""
    head = Head(hidden, weight, LogitOptions(scale, softcap, temperature, bias))
    return forward.forward(
        epilogue, [head], targets, ignore_index, num_scored, stats, cache_rows, frozen
    )


def linear_logps_bwd(
    epilogue: Epilogue,
    d_out: Tensor,  # [n, N]
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    out: Tensor,
    saved: Tensor,
    cache: Tensor,
    rows: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    num_scored: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_hidden [N, D], d_weight [V, D], d_bias [V]); [0] where not needed."""
    head = Head(hidden, weight, LogitOptions(scale, softcap, temperature, bias))
    return backward.backward(
        epilogue, [head], d_out, targets, out, saved, cache, rows, ignore_index, num_scored, stats,
        need_hidden, need_weight, need_bias,
    )  # fmt: skip


def make_heads(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    aux_hidden: Tensor | None,
    aux_weight: Tensor | None,
    scale: float,
    ref_scale: float,
    softcap: float | None,
    ref_softcap: float | None,
    temperature: float,
    ref_temperature: float,
) -> list[Head]:
    ref_options = LogitOptions(ref_scale, ref_softcap, ref_temperature, ref_bias)
    heads = [
        Head(hidden, weight, LogitOptions(scale, softcap, temperature, bias)),
        Head(ref_hidden, ref_weight, ref_options),
    ]
    if aux_hidden is not None:
        assert aux_weight is not None
        heads.append(Head(aux_hidden, aux_weight, ref_options._replace(bias=None)))
    return heads


def linear_divergence_fwd(
    epilogue: Epilogue,
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    ref_hidden: Tensor,  # [N, Dr]
    ref_weight: Tensor,  # [V, Dr]
    bias: Tensor | None,  # [V]
    ref_bias: Tensor | None,  # [V]
    aux_hidden: Tensor | None,  # [N, Da]
    aux_weight: Tensor | None,  # [V, Da]
    values: Tensor | None,  # [V], or [N, k] with values_index
    values_index: Tensor | None,  # [N, k]
    scale: float,
    ref_scale: float,
    softcap: float | None,
    ref_softcap: float | None,
    temperature: float,
    ref_temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
    cache_rows: int,
    frozen: bool,
    num_scored: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out [n, N], saved [10, N], cache [2, cache_rows, V], rows [n', N, D] or [0])."""
    heads = make_heads(
        hidden, weight, ref_hidden, ref_weight, bias, ref_bias, aux_hidden, aux_weight, scale,
        ref_scale, softcap, ref_softcap, temperature, ref_temperature,
    )  # fmt: skip
    return forward.forward(
        epilogue, heads, targets, ignore_index, num_scored, stats, cache_rows, frozen, values,
        values_index,
    )  # fmt: skip


def linear_divergence_bwd(
    epilogue: Epilogue,
    d_out: Tensor,  # [n, N]
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    aux_hidden: Tensor | None,
    aux_weight: Tensor | None,
    values: Tensor | None,
    values_index: Tensor | None,
    out: Tensor,
    saved: Tensor,
    cache: Tensor,
    rows: Tensor,
    scale: float,
    ref_scale: float,
    softcap: float | None,
    ref_softcap: float | None,
    temperature: float,
    ref_temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    num_scored: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_hidden, d_weight, d_bias) of the policy; [0] where not needed."""
    heads = make_heads(
        hidden, weight, ref_hidden, ref_weight, bias, ref_bias, aux_hidden, aux_weight, scale,
        ref_scale, softcap, ref_softcap, temperature, ref_temperature,
    )  # fmt: skip
    return backward.backward(
        epilogue, heads, d_out, targets, out, saved, cache, rows, ignore_index, num_scored, stats,
        need_hidden, need_weight, need_bias, values, values_index,
    )  # fmt: skip
