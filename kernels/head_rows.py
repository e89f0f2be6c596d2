"""The rows of launches.py for the head ops: (name, kernel, signature, tile, constants).

Types of a tile: what its products have, what the backward reads. 16-bit logits are folded as they
are (statistics that allow it, and logits given by the caller) or from fp32 products (`wide`).
bfloat16 and float32 also have small kernels, for the statistics nearly every loss asks for.
"""

from __future__ import annotations

Row = tuple[str, str, str, str, dict[str, object]]

GROUPS = {"bf16": "b16", "fp16": "b16", "fp32": "b32", "fp64": "b64"}
# (tile, working dtype, fold dtype)
PLAIN = tuple((t, t, "fp64" if t == "fp64" else "fp32") for t in GROUPS)
WIDE = (("fp32", "bf16", "fp32"), ("fp32", "fp16", "fp32"))


def _row(name: str, module: str, signature: str, entry: str, tile: str, **constants: object) -> Row:
    return name, f"{module}:{name}", signature, f"{entry} {GROUPS[tile]}", constants


def _head_rows(tile: str, work: str, acc: str, full: bool, one: bool, two: bool) -> list[Row]:
    """Fold and gradient of one or two models for one combination of types."""
    flags = {"FULL": full, "ROUND": tile != work}
    z, w, a = f"*{tile}:16", f"*{work}:16", f"*{acc}:16"
    sizes, stride = "i32 i32 i32:16 i32", "i64:16"
    rows = []
    if one:
        rows += [
            _row("fold_one", "fold", f"{z} {w} {a} *i64 {a} {a} {a} {sizes} {stride} {stride} i64 "
                 "i64", "fold_one", tile, **flags),
            _row("gradient_one", "gradient", f"{z} {w} {a} *i64 {a} {a} {sizes} {stride} {stride} "
                 "i64", "gradient_one", tile, **flags),
        ]  # fmt: skip
    if two:
        rows += [
            _row("fold_two", "fold", f"{z} {z} {z} {a} {w} {w} {a} {a} *i64 {a} {a} {a} {sizes} "
                 f"{stride} {stride} {stride} {stride} {stride} i64 i64 i64", "fold_two", tile,
                 **flags),
            _row("gradient_two", "gradient", f"{z} {z} {z} {a} {w} {a} {a} *i64 {a} {a} {sizes} "
                 f"{stride} {stride} {stride} {stride} {stride} i64", "gradient_two", tile,
                 **flags),
        ]  # fmt: skip
    return rows


def _rows() -> list[Row]:
    rows = []
    for tile, work, acc in (*PLAIN, *WIDE):
        rows += _head_rows(tile, work, acc, True, True, True)
        z, w, a, stride = f"*{tile}:16", f"*{work}:16", f"*{acc}:16", "i64:16"
        rows += [
            _row("fold_second", "fold", f"{z} {z} {w} {a} {a} *i64 {a} {a} {a} i32 i32 "
                 f"i32:16 i32 {stride} {stride} i64 i64 i64", "fold_two", tile, ROUND=tile != work),
            _row("seen_logits", "fold", f"{z} {w} {a} {a} {a} i32 i32 i32:16 {stride} {stride}",
                 "factor", tile, ROUND=tile != work),
            _row("factor", "gradient", f"{z} {z} {w} {a} {a} *i64 {a} {a} i32 i32 "
                 f"i32 i32:16 {stride} {stride} {stride} i64", "factor", tile),
        ]  # fmt: skip
    rows += _head_rows("bf16", "bf16", "fp32", False, True, False)
    rows += _head_rows("fp32", "fp32", "fp32", False, True, True)
    rows += _head_rows("fp32", "bf16", "fp32", False, False, True)
    # a kept tile of two models; their fold reads fp32 products
    rows += _head_rows("bf16", "bf16", "fp32", False, False, True)[1:]
    for acc in ("fp32", "fp64"):
        rows.append(
            _row("raise_rows", "gradient", f"*{acc}:16 *{acc} i32 i32 i32:16 i64 {stride} i64",
                 "raise_rows", acc)
        )  # fmt: skip
    return rows


ROWS: tuple[Row, ...] = tuple(_rows())
