"""The Triton kernels as prefkern.backends.tiled sees them (prefkern/backends/tiled/epilogue.py).

Launches name every pointer and number of the kernel, absent ones included: the kernels then exist
in few variants (head_rows.py), and `flags` says at run time what is there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefkern.backends import cuda, eager, tables
from prefkern.backends.contract import Arithmetic, Folded, HeadCall
from prefkern.backends.tiled.epilogue import FLAGS, FrozenSums, ProductTile, Sweep, fold_in_steps

from . import tiles
from .launches import launch

_GROUP = {torch.float64: "b64", torch.float32: "b32"}
BIASES = ("bias", "ref_bias", "aux_bias")


def _grid(m: int, w: int) -> Any:
    return lambda meta: (-(-m // meta["BLOCK_M"]), -(-w // meta["BLOCK_V"]))


def _biases(sweep: Sweep, v0: int, count: int) -> list[Tensor]:
    """Biases from column v0 on; the scalars, which are not read, where there is none."""
    found = [sweep.params] * count
    for i, option in enumerate(sweep.options[:count]):
        if option.bias is not None:
            found[i] = option.bias[v0:]
    return found


def _flags(sweep: Sweep, tile: ProductTile, *, keep: bool = False) -> int:
    call = sweep.call
    there = {name: call.plan.has(name) for name in FLAGS}
    there |= {
        name: option.bias is not None for name, option in zip(BIASES, sweep.options, strict=False)
    }
    given = tile.adv is not None
    there |= {"values": given and call.plan.ev == "values", "keep": keep,
              "teacher": given and call.plan.has("xent"), "third": len(tile.x) > 2}  # fmt: skip
    return sum(1 << i for i, name in enumerate(FLAGS) if there[name])


def _values(sweep: Sweep, tile: ProductTile) -> tuple[Tensor, int]:
    """Given values and the stride of their rows, 0 where one row serves all."""
    if tile.adv is None:
        return sweep.params, 0
    return tile.adv, tile.adv.stride(0) if tile.adv.dim() == 2 else 0


class DeviceArithmetic:
    """The CUDA library's where it serves the device of a call, else eager PyTorch's: small kernels,
    but neither a synchronisation nor anything that a graph cannot hold."""

    def of(self, call: HeadCall) -> Any:
        device = call.targets.device
        return cuda.arithmetic if cuda.usable_on(device) else eager.arithmetic

    def merge(self, call: HeadCall, fields: Tensor, starts: Tensor, rounded: bool) -> Tensor:
        return self.of(call).merge(call, fields, starts, rounded)

    def norms(self, call: HeadCall, folded: Folded) -> Tensor:
        return self.of(call).norms(call, folded)

    def finish(
        self, call: HeadCall, folded: Folded, second: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self.of(call).finish(call, folded, second)

    def pull(self, call: HeadCall, d_out: Tensor, out: Tensor, saved: Tensor) -> Tensor:
        return self.of(call).pull(call, d_out, out, saved)


class Kernels:
    """prefkern.backends.tiled.epilogue.Epilogue in Triton."""

    arithmetic: Arithmetic = DeviceArithmetic()

    def chunk_columns(self, sweep: Sweep) -> int:
        entry = "fold_one" if len(sweep.options) == 1 else "fold_two"
        entry += "_small" if sweep.small_fold else ""
        arch = tiles.arch_of(sweep.targets.device)
        found = [
            t
            for t in tiles.candidates(entry, _GROUP.get(sweep.tile_dtype, "b16"), arch)
            if t.blocks["BLOCK_V"] <= sweep.widest_chunk
        ]
        if arch == "interpreter":
            grid = _grid(sweep.targets.shape[0], sweep.call.V)
            found = sorted(found, key=lambda t: tiles.interpreted_cost(t, grid(t.blocks)))
        return found[0].blocks["BLOCK_V"]

    def fold(
        self, sweep: Sweep, tile: ProductTile, fields: Tensor, at: Tensor, keep: Tensor | None
    ) -> None:
        x, (m, w) = tile.x[0], tile.x[0].shape
        lent = keep
        if lent is None:  # of the dtype to round to, or not read at all
            lent = x.new_empty(1, dtype=sweep.call.working) if sweep.rounded else x
        values, values_stride = _values(sweep, tile)
        constants = {"FULL": not sweep.small_fold, "ROUND": sweep.rounded}
        must = {"BLOCK_V": self.chunk_columns(sweep)}
        numbers = (_flags(sweep, tile, keep=keep is not None), m, w, tile.v0,
                   sweep.call.ignore_index)  # fmt: skip
        if len(tile.x) == 1:
            launch(
                "fold_one", _grid(m, w), x, values, lent, *_biases(sweep, tile.v0, 1),
                sweep.targets[tile.rows], sweep.params, fields, at, *numbers, x.stride(0),
                values_stride, lent.stride(0), fields.stride(0), fields.stride(1), must=must,
                **constants,
            )  # fmt: skip
            return
        xr, xa = tile.x[1], tile.x[-1]
        launch(
            "fold_two", _grid(m, w), x, xr, xa, values, lent, *_biases(sweep, tile.v0, 3),
            sweep.targets[tile.rows], sweep.params, fields, at, *numbers, x.stride(0),
            xr.stride(0), xa.stride(0), values_stride, lent.stride(0), fields.stride(0),
            fields.stride(1), at.stride(0), must=must, **constants,
        )  # fmt: skip

    def fold_again(self, sweep: Sweep, tile: ProductTile, norms: Tensor, fields: Tensor) -> None:
        (x, xr), (m, w) = tile.x, tile.x[0].shape
        launch(
            "fold_second", _grid(m, w), x, xr, *_biases(sweep, tile.v0, 2),
            sweep.targets[tile.rows], sweep.params, norms, fields, _flags(sweep, tile), m, w,
            tile.v0, sweep.call.ignore_index, x.stride(0), xr.stride(0), norms.stride(0),
            fields.stride(0), fields.stride(1), must={"BLOCK_V": self.chunk_columns(sweep)},
        )  # fmt: skip

    def fold_frozen(
        self,
        sweep: Sweep,
        tile: ProductTile,
        fields: Tensor,
        at: Tensor,
        sums: FrozenSums,
        out: Tensor,
    ) -> None:
        fold_in_steps(self, sweep, tile, fields, at, sums, out)

    def factor(
        self, sweep: Sweep, tile: ProductTile, maxima: Tensor, name: str, out: Tensor
    ) -> None:
        x, xr, (m, w) = tile.x[0], tile.x[min(1, len(tile.x) - 1)], tile.x[0].shape
        launch(
            "factor", _grid(m, w), x, xr, out, *_biases(sweep, tile.v0, 2),
            sweep.targets[tile.rows], sweep.params, maxima, _flags(sweep, tile),
            tables.FACTORS.index(name), m, w, sweep.call.ignore_index, x.stride(0), xr.stride(0),
            out.stride(0), maxima.stride(0),
        )  # fmt: skip

    def raise_rows(self, names: tuple[str, ...], totals: Tensor, shift: Tensor) -> None:
        _, m, depth = totals.shape
        present = sum(1 << tables.FACTORS.index(name) for name in names)
        launch(
            "raise_rows", lambda meta: (-(-m // meta["BLOCK_M"]), -(-depth // meta["BLOCK_D"])),
            totals, shift, present, m, depth, totals.stride(0), totals.stride(1), shift.stride(0),
        )  # fmt: skip

    def gradient(self, sweep: Sweep, tile: ProductTile, coefficients: Tensor, dx: Tensor) -> None:
        x, (m, w) = tile.x[0], tile.x[0].shape
        values, values_stride = _values(sweep, tile)
        full = not sweep.small_gradient
        numbers = (_flags(sweep, tile), m, w, tile.v0, sweep.call.ignore_index, x.stride(0))
        if len(tile.x) == 1:
            launch(
                "gradient_one", _grid(m, w), x, values, dx, *_biases(sweep, tile.v0, 1),
                sweep.targets[tile.rows], sweep.params, coefficients, *numbers, values_stride,
                dx.stride(0), coefficients.stride(0), FULL=full,
                ROUND=sweep.rounded and x.dtype != dx.dtype,
            )  # fmt: skip
            return
        xr, xa = tile.x[1], tile.x[-1]
        launch(
            "gradient_two", _grid(m, w), x, xr, xa, values, dx, *_biases(sweep, tile.v0, 3),
            sweep.targets[tile.rows], sweep.params, coefficients, *numbers, xr.stride(0),
            xa.stride(0), values_stride, dx.stride(0), coefficients.stride(0), FULL=full,
        )  # fmt: skip


KERNELS = Kernels()
