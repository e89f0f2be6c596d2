"""The rows of launches.py for the head ops: (name, kernel, signature, tile, constants).

Types of a tile: what its products have, what the backward reads. 16-bit logits are folded as they
are (statistics that allow it, and logits given by the caller) or from fp32 products, which a
backward reads as they are or rounded (ROUND). bfloat16 and float32 also have small kernels, for the
statistics nearly every loss asks for.
"""

from __future__ import annotations

Row = tuple[str, str, str, str, dict[str, object]]

GROUPS = {"bf16": "b16", "fp16": "b16", "fp32": "b32", "fp64": "b64"}
# (tile, working dtype, fold dtype)
PLAIN = tuple((t, t, "fp64" if t == "fp64" else "fp32") for t in GROUPS)
WIDE = (("fp32", "bf16", "fp32"), ("fp32", "fp16", "fp32"))
# flags, m, w, v0, ignore; then strides of tiles, of which 16 divides every one
NUMBERS, STRIDE = "i32 i32 i32:16 i32 i64", "i64:16"


def _row(name: str, module: str, signature: str, entry: str, tile: str, **constants: object) -> Row:
    return name, f"{module}:{name}", signature, f"{entry} {GROUPS[tile]}", constants


def _fold(models: int, tile: str, work: str, acc: str, *, full: bool) -> Row:
    x, w, a = f"*{tile}:16", f"*{work}:16", f"*{acc}:16"
    flags = {"FULL": full, "ROUND": tile != work}
    name = "fold_one" if models == 1 else "fold_two"
    tiles = x if models == 1 else f"{x} {x} {x}"
    biases = " ".join([a] * (1 if models == 1 else 3))
    strides = " ".join([STRIDE] * (3 if models == 1 else 5))
    rest = "i64 i64" if models == 1 else "i64 i64 i64"
    signature = f"{tiles} {a} {w} {biases} *i64 {a} {a} *fp64 {NUMBERS} {strides} {rest}"
    entry = name if full else f"{name}_small"
    return _row(name, "folds", signature, entry, tile, **flags)


def _gradient_one(tile: str, work: str, acc: str, *, full: bool, rounds: bool) -> Row:
    x, w, a = f"*{tile}:16", f"*{work}:16", f"*{acc}:16"
    signature = f"{x} {a} {w} {a} *i64 {a} {a} {NUMBERS} {STRIDE} {STRIDE} {STRIDE} i64"
    return _row("gradient_one", "gradients", signature, "gradient_one", tile, FULL=full,
                ROUND=rounds)  # fmt: skip


def _gradient_two(tile: str, work: str, acc: str, *, full: bool) -> Row:
    x, w, a = f"*{tile}:16", f"*{work}:16", f"*{acc}:16"
    strides = " ".join([STRIDE] * 5)
    signature = f"{x} {x} {x} {a} {w} {a} {a} {a} *i64 {a} {a} {NUMBERS} {strides} i64"
    return _row("gradient_two", "gradients", signature, "gradient_two", tile, FULL=full)


def _factor(tile: str, work: str, acc: str) -> Row:
    x, w, a = f"*{tile}:16", f"*{work}:16", f"*{acc}:16"
    signature = (
        f"{x} {x} {w} {a} {a} *i64 {a} {a} i32 i32 i32 i32:16 i64 {STRIDE} {STRIDE} {STRIDE} i64"
    )
    return _row("factor", "gradients", signature, "factor", tile)


def _rows() -> list[Row]:
    rows = []
    for tile, work, acc in (*PLAIN, *WIDE):
        rows += [_fold(n, tile, work, acc, full=True) for n in (1, 2)]
        rows.append(_gradient_one(tile, work, acc, full=True, rounds=tile != work))
        rows.append(_gradient_two(tile, work, acc, full=True))
        rows.append(_factor(tile, work, acc))
    for tile, work, acc in WIDE:  # a gradient of unrounded products; their fold is that of fp32
        rows.append(_gradient_one(tile, work, acc, full=True, rounds=False))
    for tile, _, acc in PLAIN:
        x, a = f"*{tile}:16", f"*{acc}:16"
        signature = f"{x} {x} {a} {a} *i64 {a} {a} {a} {NUMBERS} {STRIDE} {STRIDE} i64 i64 i64"
        rows.append(_row("fold_second", "folds", signature, "fold_two", tile))
    for tile in ("bf16", "fp32"):
        rows.append(_fold(1, tile, tile, "fp32", full=False))
        rows.append(_gradient_one(tile, tile, "fp32", full=False, rounds=False))
    rows.append(_gradient_one("fp32", "bf16", "fp32", full=False, rounds=True))
    for work in ("fp32", "bf16"):
        rows.append(_fold(2, "fp32", work, "fp32", full=False))
        rows.append(_gradient_two("fp32", work, "fp32", full=False))
    for acc in ("fp32", "fp64"):
        signature = f"*{acc}:16 *{acc} i32 i32 i32:16 i64 {STRIDE} i64"
        rows.append(_row("raise_rows", "gradients", signature, "raise_rows", acc))
    return rows


ROWS: tuple[Row, ...] = tuple(_rows())
