"""Argument checks of the public functions: messages say what must hold, what came, what to do."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

# Numbers of the logits: a quotient of two of them is a normal float32.
SMALLEST, LARGEST = 1e-18, 1e18
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shape_text(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def check_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name} must be a torch.Tensor, got {type(value).__name__}; pass a tensor."
        )
    if type(value).__name__ == "DTensor":
        raise ValueError(
            f"{name} must be a plain tensor, got a DTensor; pass its local part (.to_local()), and "
            "compute inside the wrapped model's forward."
        )
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else str(value.layout)
        raise ValueError(f"{name} must be a dense tensor, got {kind}; pass {name}.to_dense().")
    return value


def is_number(value: object) -> bool:
    """Any real number but a bool; a 0-d tensor of numbers is one too."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and value.dtype != torch.bool and not value.is_complex()
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return True
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_number(name: str, value: object, or_none: bool = False) -> None:
    """Refuses what is no number, and a number that asks for a gradient: none reaches it."""
    if type(value) in (float, int) or (or_none and value is None):
        return
    if not is_number(value):
        got = f"a tensor {shape_text(value)}" if isinstance(value, Tensor) else repr(value)
        advice = "; write it without quotes" if isinstance(value, str) else ""
        raise ValueError(
            f"{name} must be a number{' or None' if or_none else ''}, got {got}{advice}."
        )
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(
            f"{name} must not require grad: it is a constant of the op, which has no gradient for "
            f"it; pass float({name}), or multiply hidden by it where it is learned."
        )


def readable(tensor: Tensor) -> bool:
    """Whether values may be read here: nobody waits for a CPU, and no trace ends."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, (bool, torch.SymBool)):
        raise ValueError(f"{name} must be True or False, got {value!r}.")


def check_ignore_index(ignore_index: object) -> None:
    """An int64, which no other kind of number is compared with in silence."""
    if isinstance(ignore_index, torch.SymInt):
        return
    whole = isinstance(ignore_index, int) and not isinstance(ignore_index, bool)
    if not whole or not -(2**63) <= ignore_index < 2**63:  # type: ignore[operator]
        raise ValueError(
            f"ignore_index must be an integer of 64 bits, got {ignore_index!r}; labels that are "
            "not scored hold it, usually -100."
        )


def check_float(name: str, value: object) -> Tensor:
    tensor = check_tensor(name, value)
    if tensor.dtype not in FLOATS:
        raise ValueError(
            f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}; cast it "
            "first."
        )
    return tensor


def check_same_device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on the device of {like_name} ({like.device}), got {tensor.device}; "
            f"move it with {name}.to({str(like.device)!r})."
        )


def check_integer_targets(name: str, value: object) -> Tensor:
    tensor = check_tensor(name, value)
    if tensor.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{name} must be integer labels (int64), got {tensor.dtype}; use {name}.long()."
        )
    return tensor


def check_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *,
    prefix: str = "",
    part: bool = False,
) -> None:
    """Shapes and devices of one model's head: hidden [..., D], weight [V, D], targets [...]. A
    `part` of a vocabulary may be empty."""
    head = f"{prefix}head: weight"
    check_float(f"{prefix}hidden", hidden)
    check_float(head, weight)
    if weight.dim() != 2:
        raise ValueError(
            f"{head} must be [V, D] (one row per vocabulary entry), got "
            f"{shape_text(weight)}; "
            "pass lm_head.weight."
        )
    if hidden.dim() in (2, 3) and hidden.shape[-1] == weight.shape[0] != weight.shape[1]:
        raise ValueError(
            f"{head} must be [V, D] with D = {hidden.shape[-1]} to match {prefix}hidden "
            f"{shape_text(hidden)}, got {shape_text(weight)}, which looks transposed; pass "
            "weight.T (lm_head.weight is [V, D] as it is)."
        )
    if hidden.dim() not in (2, 3) or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{prefix}hidden must be [N, D] or [B, T, D] with D = {weight.shape[1]} to match "
            f"{head} {shape_text(weight)}, got {shape_text(hidden)}."
        )
    if tuple(targets.shape) != tuple(hidden.shape[:-1]):
        raise ValueError(
            f"targets must be {list(hidden.shape[:-1])} to match {prefix}hidden "
            f"{shape_text(hidden)}, "
            f"got {shape_text(targets)}; pass the shifted labels, one per hidden row."
        )
    if weight.shape[1] == 0 or (weight.shape[0] == 0 and not part):
        raise ValueError(f"{head} must not be empty, got {shape_text(weight)}.")
    check_same_device(head, weight, f"{prefix}hidden", hidden)
    check_same_device("targets", targets, f"{prefix}hidden", hidden)
    if bias is not None:
        check_float(f"{prefix}head: bias", bias)
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(
                f"{prefix}head: bias must be [V] = [{weight.shape[0]}] to match the weight, "
                f"got {shape_text(bias)}."
            )
        check_same_device(f"{prefix}head: bias", bias, f"{prefix}hidden", hidden)


def check_logit_options(
    scale: float, softcap: float | None, temperature: float, prefix: str = ""
) -> None:
    for name, number in (("scale", scale), ("softcap", softcap), ("temperature", temperature)):
        if type(number) is not float:
            check_number(prefix + name, number, or_none=name == "softcap")
    for name, value in (("scale", scale), ("temperature", temperature)):
        if not (value == value and abs(value) != float("inf")):
            raise ValueError(f"{prefix}{name} must be a finite number, got {value}.")
    if temperature <= 0:
        raise ValueError(f"{prefix}temperature must be > 0, got {temperature}; use 1.0 for none.")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(
            f"{prefix}softcap must be > 0 or None, got {softcap}; use None for no cap."
        )
    for name, size in (("scale", abs(scale)), ("temperature", temperature), ("softcap", softcap)):
        if size and not SMALLEST <= size <= LARGEST:
            raise ValueError(
                f"{prefix}{name} must be between {SMALLEST:g} and {LARGEST:g} in size, so that "
                f"float32 holds it and its quotients, got {size}."
            )


def check_index_range(index: Tensor, vocabulary: int) -> None:
    """Raises for sparse indices outside [0, V). Reads values: CPU tensors only."""
    bad = (index < 0) | (index >= vocabulary)
    if bool(bad.any()):
        raise ValueError(
            f"values: every index must be in [0, {vocabulary}), got {int(index[bad][0])}; give "
            "absent "
            "entries any index with the value 0."
        )


def check_count(name: str, count: object) -> None:
    if count is None or (isinstance(count, torch.SymInt) and count >= 0):
        return
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ValueError(f"{name} must be an int >= 0 or None, got {count!r}.")


def check_num_scored(targets: Tensor, ignore_index: int, num_scored: int | None) -> None:
    """Raises for a stated count that is wrong. Reads values: CPU tensors only."""
    if num_scored is None:
        return
    real = int((targets != ignore_index).sum())
    if real != num_scored:
        raise ValueError(
            f"num_scored must be the number of targets that are not ignored ({real}), got "
            f"{num_scored}; "
            "pass None to have it counted."
        )


def check_target_range(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raises for labels outside [0, V) that are not ignore_index. Reads values: CPU only."""
    if targets.numel() == 0:
        return
    bad = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
    if bool(bad.any()):
        row = int(bad.flatten().nonzero()[0])
        raise ValueError(
            f"targets must be in [0, {vocabulary}) or ignore_index = {ignore_index}, got "
            f"{int(targets.flatten()[row])} at position {row}; mask that position with "
            "ignore_index "
            "or check that tokenizer and head have the same vocabulary."
        )


def check_constant(name: str, tensor: Tensor | None) -> None:
    """A reference input must not ask for a gradient: none is computed for it."""
    if tensor is not None and tensor.requires_grad:
        raise ValueError(
            f"{name} must not require grad: the reference is a constant here; pass it detached "
            "(.detach()), or compute it under torch.no_grad()."
        )


def check_cu_seqlens(
    cu: object, total: int, *, name: str = "cu_seqlens", of: str = "tokens", read: bool = True
) -> Tensor:
    """Boundaries [S+1]: integer, from 0 to `total`, never decreasing. Reads values on CPU only, and
    not without `read`, where `check_boundaries` is called later."""
    tensor = check_tensor(name, cu)
    if tensor.dtype not in (torch.int32, torch.int64) or tensor.dim() != 1 or tensor.numel() < 1:
        raise ValueError(
            f"{name} must be a 1-d int32 tensor of boundaries, got {tensor.dtype} "
            f"{shape_text(tensor)}; "
            f"build it as the cumulative sum of the lengths with a leading 0."
        )
    if read and tensor.device.type == "cpu" and not torch.compiler.is_compiling():
        check_boundaries(tensor, total, name=name, of=of)
    return tensor


def narrow_boundaries(cu: Tensor, total: int) -> Tensor:
    """int32, what is out of range staying so: 2^32 would become 0."""
    if cu.dtype != torch.int32:
        cu = cu.clamp(-1, total + 1).to(torch.int32)
    return cu.contiguous()


def check_boundaries(cu: Tensor, total: int, *, name: str, of: str) -> None:
    """The value part of `check_cu_seqlens`."""
    if int(cu[0]) != 0 or int(cu[-1]) != total:
        raise ValueError(
            f"{name} must start at 0 and end at {total} (the number of {of}), got "
            f"{int(cu[0])} ... {int(cu[-1])}."
        )
    steps = cu[1:] - cu[:-1]
    if bool((steps < 0).any()):
        i = int((steps < 0).nonzero()[0])
        raise ValueError(
            f"{name} must never decrease (sequences must not overlap), got {int(cu[i])} then "
            f"{int(cu[i + 1])} at position {i}; sort the boundaries."
        )
