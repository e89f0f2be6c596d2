"""The Triton kernels as prefkern.backends.tiled sees them (prefkern/backends/tiled/epilogue.py).

Launches name every pointer and number of the kernel, absent ones included: the kernels then exist
in few variants (head_rows.py), and `flags` says at run time what is there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefkern.backends.tiled.epilogue import FACTORS, Call, Tile

from . import tiles
from .launches import launch

# Bits of `flags` as fold.py has them, which cannot be imported without triton.
BIAS, REF_BIAS, KEEP, VALUES, THIRD = 1, 2, 4, 8, 16
_GROUP = {torch.float64: "b64", torch.float32: "b32"}


def _grid(m: int, w: int) -> Any:
    return lambda meta: (-(-m // meta["BLOCK_M"]), -(-w // meta["BLOCK_V"]))


def _bias(call: Call, which: int, v0: int) -> Tensor:
    """The bias from column v0 on; the scalars, which are not read, where there is none."""
    options = call.policy if which == 0 else call.ref
    if options is None or options.bias is None:
        return call.params
    return options.bias[v0:]


def _flags(call: Call, tile: Tile | None) -> int:
    flags = BIAS if call.policy.bias is not None else 0
    if call.ref is not None and call.ref.bias is not None:
        flags |= REF_BIAS
    if tile is None:
        return flags
    if tile.keep[0] is not None:
        flags |= KEEP
    if call.ev == "values" and tile.adv is not None:
        flags |= VALUES
    if call.ev == "aux" and tile.za is not None:
        flags |= THIRD
    return flags


def _lent(call: Call, like: Tensor) -> Tensor:
    """A tensor of the working dtype for a kernel that asks for the dtype alone."""
    return like if like.dtype == call.working else like.new_empty(1, dtype=call.working)


def _adv(call: Call, tile: Tile) -> tuple[Tensor, int]:
    """A of ev and the stride of its rows, 0 where one row serves all."""
    if tile.adv is None:
        return call.params, 0
    return tile.adv, tile.adv.stride(0) if tile.adv.dim() == 2 else 0


class Kernels:
    """prefkern.backends.tiled.epilogue.Epilogue in Triton."""

    def chunk_columns(self, call: Call) -> int:
        dtype = torch.float32 if call.wide else call.working
        entry = "fold_one" if call.ref is None else "fold_two"
        arch = tiles.arch_of(call.params.device)
        found = tiles.candidates(entry, _GROUP.get(dtype, "b16"), arch)
        if arch == "interpreter":
            grid = _grid(call.targets.shape[0], call.V)
            return min(found, key=lambda t: tiles.interpreted_cost(t, grid(t.blocks))).blocks[
                "BLOCK_V"
            ]
        return found[0].blocks["BLOCK_V"]

    def fold(self, call: Call, tile: Tile, fields: Tensor, at_target: Tensor) -> None:
        (m, w), z, zr = tile.z.shape, tile.z, tile.zr
        work = _lent(call, z)
        keep, ref_keep = (work if k is None else k for k in tile.keep)
        round_ = z.dtype != call.working and call.rounds
        must = {"BLOCK_V": self.chunk_columns(call)}
        targets = call.targets[tile.rows]
        constants = {"FULL": not call.small, "ROUND": z.dtype != call.working}
        if not round_:
            # nothing reads the rounded normalisers of a frozen head, and nothing is kept
            constants["ROUND"], work = False, z
            keep = ref_keep = z
        if zr is None:
            launch(
                "fold_one", _grid(m, w), z, keep, _bias(call, 0, tile.v0), targets, call.params,
                fields, at_target, _flags(call, tile), m, w, tile.v0, z.stride(0), keep.stride(0),
                fields.stride(0), fields.stride(1), must=must, **constants,
            )  # fmt: skip
            return
        za = z if tile.za is None else tile.za
        adv, adv_stride = _adv(call, tile)
        launch(
            "fold_two", _grid(m, w), z, zr, za, adv, keep, ref_keep, _bias(call, 0, tile.v0),
            _bias(call, 1, tile.v0), targets, call.params, fields, at_target, _flags(call, tile),
            m, w, tile.v0, z.stride(0), zr.stride(0), za.stride(0), adv_stride, keep.stride(0),
            fields.stride(0), fields.stride(1), at_target.stride(0), must=must, **constants,
        )  # fmt: skip

    def fold_second(self, call: Call, tile: Tile, norms: Tensor, fields: Tensor) -> None:
        (m, w), z, zr = tile.z.shape, tile.z, tile.zr
        assert zr is not None
        launch(
            "fold_second", _grid(m, w), z, zr, _lent(call, z), _bias(call, 0, tile.v0),
            _bias(call, 1, tile.v0), call.targets[tile.rows], call.params, norms, fields,
            _flags(call, tile), m, w, tile.v0, z.stride(0), zr.stride(0), norms.stride(0),
            fields.stride(0), fields.stride(1), must={"BLOCK_V": self.chunk_columns(call)},
            ROUND=z.dtype != call.working,
        )  # fmt: skip

    def seen(self, call: Call, zr: Tensor, v0: int, out: Tensor) -> None:
        m, w = zr.shape
        launch(
            "seen_logits", _grid(m, w), zr, _lent(call, zr), _bias(call, 1, v0), call.params, out,
            _flags(call, None), m, w, zr.stride(0), out.stride(0), ROUND=zr.dtype != call.working,
        )  # fmt: skip

    def factor(self, call: Call, tile: Tile, maxima: Tensor, name: str, out: Tensor) -> None:
        (m, w), z = tile.z.shape, tile.z
        zr = z if tile.zr is None else tile.zr
        launch(
            "factor", _grid(m, w), z, zr, out, _bias(call, 0, tile.v0), _bias(call, 1, tile.v0),
            call.targets[tile.rows], call.params, maxima, _flags(call, tile), FACTORS.index(name),
            m, w, z.stride(0), zr.stride(0), out.stride(0), maxima.stride(0),
        )  # fmt: skip

    def raise_rows(self, names: tuple[str, ...], totals: Tensor, shift: Tensor) -> None:
        _, m, depth = totals.shape
        present = sum(1 << FACTORS.index(name) for name in names)
        launch(
            "raise_rows", lambda meta: (-(-m // meta["BLOCK_M"]), -(-depth // meta["BLOCK_D"])),
            totals, shift, present, m, depth, totals.stride(0), totals.stride(1), shift.stride(0),
        )  # fmt: skip

    def gradient(self, call: Call, tile: Tile, coefficients: Tensor, dx: Tensor) -> None:
        (m, w), z, zr = tile.z.shape, tile.z, tile.zr
        constants = {"FULL": not call.small, "ROUND": z.dtype != call.working}
        targets = call.targets[tile.rows]
        if zr is None:
            launch(
                "gradient_one", _grid(m, w), z, dx, _bias(call, 0, tile.v0), targets, call.params,
                coefficients, _flags(call, tile), m, w, tile.v0, z.stride(0), dx.stride(0),
                coefficients.stride(0), **constants,
            )  # fmt: skip
            return
        za = z if tile.za is None else tile.za
        adv, adv_stride = _adv(call, tile)
        launch(
            "gradient_two", _grid(m, w), z, zr, za, adv, dx, _bias(call, 0, tile.v0),
            _bias(call, 1, tile.v0), targets, call.params, coefficients, _flags(call, tile), m, w,
            tile.v0, z.stride(0), zr.stride(0), za.stride(0), adv_stride, dx.stride(0),
            coefficients.stride(0), **constants,
        )  # fmt: skip


KERNELS = Kernels()
