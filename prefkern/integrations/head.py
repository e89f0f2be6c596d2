"""model(..., at_head=fn): any computation on hidden states and head inside the head's own call.

`at_head(model)` gives a transformers model one more keyword. With it, the model's own forward runs
as ever up to its output embedding, and that module is *called* with its forward replaced by `fn`
for this one call. So everything that hangs on module calls happens where it should: FSDP2 and
ZeRO-3 gather the weight for forward and backward and reduce its gradient, DDP sees the parameters
used, PEFT decides which adapter is active, router losses and images take their usual way. Nothing
reads `lm_head.weight` from outside.

Shapes: B rows of T tokens, N tokens, D hidden size, V vocabulary, L blocks, r rank of an adapter.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import hf, packed_attention
from .head_view import NOTE, Compute, HeadState, Result, View, state_of
from .output_layer import OutputLayer, output_layer_of, replaced, through
from .verify import verify_head


def at_head(model: Any, *, packed: bool = False) -> None:
    """Adds the keyword `at_head` to `model.forward`; a PEFT model passes it on.

    model(**batch, at_head=fn).value is fn(view). `labels` must not be given: fn has what the loss
    needs. fn returns tensors, alone or in tuples, dicts or named tuples. Calling it again only
    changes `packed`.

    Args:
        model: A transformers model with a linear output embedding, or a PEFT model around one.
        packed: Take padding out before the backbone and put hidden states back in place after it:
            fn and its caller still see [B, T]. Needs an attention that keeps packed sequences
            apart by their positions: eager, sdpa, FlashAttention, or prefkern's
            `packed_attention`, the fast one on a CPU; two short rows are tried here, since not
            every family does. Batches with images stay padded.

    Raises:
        ValueError: a model or an adapter whose logits are not a linear function of hidden states,
            by name; packed=True for a model that mixes packed sequences.
    """
    base = hf.causal_lm(model)
    hf.refuse_unsupported(model)
    output_layer_of(base)  # says early what it cannot read
    if packed:
        _check_packing(model, base)
    state = state_of(base)
    if state is None:
        state = base.__dict__[NOTE] = HeadState(base.forward)
        base.forward = _forward(base)
    state.packed = packed
    if packed and verify_head(model) is None:
        raise ValueError(
            "packed=True tries the model on two short rows, and its weights are not here "
            "(meta tensors, ZeRO-3 partitions, not finite); use packed=False."
        )


def ensure_head(model: Any, *, backend: str = "auto") -> None:
    """`at_head(model)` and `verify_head(model)` the first time; nothing where at_head was called
    before. For adapters that meet their model at its first call only.

    Raises:
        ValueError: as `at_head` and `verify_head`.
    """
    if state_of(hf.causal_lm(model)) is None:
        at_head(model)
        verify_head(model, backend=backend)


def _forward(base: Any) -> Callable[..., Any]:
    own = type(base).forward

    def forward(self: Any, *args: Any, at_head: Compute | None = None, **kwargs: Any) -> Any:
        state = self.__dict__[NOTE]
        if at_head is None:
            return state.plain(*args, **kwargs)
        named = inspect.signature(own).bind_partial(self, *args).arguments
        named.pop(next(iter(named)))
        return _run(self, state, at_head, {**named, **kwargs})

    functools.update_wrapper(forward, own)
    # `generate` and trainers read the signature; accelerate would follow __wrapped__ past this one
    del forward.__wrapped__  # type: ignore[attr-defined]
    forward.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    return types.MethodType(forward, base)


# ---- one call ------------------------------------------------------------------------------------


@functools.partial(torch.compiler.disable, recursive=False)
def _run(model: Any, state: HeadState, fn: Compute, kwargs: dict[str, Any]) -> Result:
    if kwargs.pop("labels", None) is not None:
        raise ValueError("labels and at_head= exclude each other: give the labels to fn.")
    if state.guard is not None:
        state.guard()
    layer = output_layer_of(model)
    outer = layer.chain[0]
    own = type(model).forward
    settings = {"use_cache": False, "return_dict": True, "logits_to_keep": 0}
    kwargs |= {name: value for name, value in settings.items() if _takes(own, name)}
    found: list[Any] = []
    seen: dict[str, Any] = {}

    with ExitStack() as stack:
        put: Callable[[Tensor], Tensor] = lambda x: x  # noqa: E731
        if state.packed and (rows := _unpadded(kwargs)) is not None:
            kwargs, put = rows
            positions = kwargs["position_ids"]
            kwargs |= stack.enter_context(packed_attention.arguments(model, positions, None))
        if kwargs.get("output_hidden_states"):
            stack.enter_context(_hidden_states(model, seen))

        def compute(hidden: Tensor, left: list[Tensor]) -> Any:
            if found:
                _refuse_calls(model, "more than once")
            layers = seen.get("layers")
            if layers is not None:
                layers = torch.stack([put(x) for x in layers])
            head = layer.head(layer.parameters, [put(u) for u in left])
            return fn(View(put(hidden), head, layers, layer))

        def keep(module: nn.Module, inputs: Any, output: Any) -> Tensor:
            """Runs after every other hook on the head: what they saw is the result, what the
            model's forward goes on with are a few logits."""
            found.append(output)
            return _probe(inputs[0])

        handle = outer.register_forward_hook(keep)
        stack.callback(handle.remove)
        stack.enter_context(replaced(outer, through(layer, compute)))
        try:
            out = state.plain(**kwargs)
        except Exception as error:
            # From here on only the few logits of the probe can be at fault, and only until a call
            # went through: what else ends a forward (memory, a device, a rank) speaks for itself.
            if not found or state.probed or not _of_shapes(error):
                raise
            raise ValueError(
                f"{type(model).__name__} does more to its logits than its config says (its forward "
                f"ends in {type(error).__name__}: {error}): prefkern does not know this family, so "
                "its losses would be wrong."
            ) from error
    if not found:
        _refuse_calls(model, "never")
    if not state.probed:
        _check_probe(model, layer, getattr(out, "logits", None))
        state.probed = True
    return Result(found[0], _router_loss(model, out, kwargs))


def _of_shapes(error: Exception) -> bool:
    """Whether code that was given other shapes than it knows may have raised this. Subclasses of
    RuntimeError tell of memory, devices and ranks; torch's CPU allocator has none of its own."""
    kinds = (RuntimeError, IndexError, ValueError, TypeError, AttributeError, AssertionError)
    return type(error) in kinds and "allocat" not in str(error)


def _refuse_calls(model: Any, how_often: str) -> None:
    raise ValueError(
        f"{type(model).__name__} calls its output embedding {how_often} in a forward; prefkern "
        "needs exactly one call."
    )


def _router_loss(model: Any, out: Any, kwargs: dict[str, Any]) -> Tensor | None:
    aux = getattr(out, "aux_loss", None)
    if aux is None and kwargs.get("output_router_logits"):
        raise ValueError(
            f"{type(model).__name__} was asked for router logits and returns no aux_loss; leave "
            "output_router_logits out (router_aux_loss_coef=0 in a trainer)."
        )
    return aux


@functools.cache
def _takes(forward: Callable[..., Any], name: str) -> bool:
    """Whether a model's forward has the parameter `name`."""
    parameters = inspect.signature(forward).parameters
    loose = name != "logits_to_keep" and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return name in parameters or loose


# Large values too: a clamp and a soft cap that the config does not name show there.
PROBE = (1.0, -2.0, 40.0, -90.0)


def _probe(hidden: Tensor) -> Tensor:
    """[..., 4] logits whose fate shows what a family does to its own."""
    probe = torch.tensor(PROBE, dtype=hidden.dtype, device=hidden.device)
    return probe.expand(*hidden.shape[:-1], len(PROBE)).clone()


def _check_probe(model: Any, layer: OutputLayer, logits: Tensor | None) -> None:
    """On the first call: the family did to the probe what its config says."""
    scale, softcap = layer.options["scale"], layer.options["softcap"]
    want = torch.tensor(PROBE) * scale
    if softcap is not None:
        want = softcap * torch.tanh(want / softcap)
    if logits is None:
        raise ValueError(f"{type(model).__name__} returns no logits: it is no causal model.")
    short = logits.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(
        logits.device.type
    )
    got = logits.detach().float().cpu().reshape(-1, logits.shape[-1])
    bound = 2e-2 if short else 1e-5
    same = got.shape[-1] == len(PROBE) and torch.allclose(got, want.expand_as(got), rtol=bound)
    if not same:
        raise ValueError(
            f"{type(model).__name__} turns the logits {list(PROBE)} into {got[0].tolist()}, where "
            f"its config says {want.tolist()} (scale={scale:g}, softcap={softcap}): prefkern does "
            "not know this family's treatment of logits, so its losses would be wrong."
        )


@contextmanager
def _hidden_states(model: Any, seen: dict[str, Any]) -> Iterator[None]:
    """Notes the hidden states after every block as the backbone returns them."""

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        seen["layers"] = output.hidden_states[1:]

    handle = hf.backbone(model).register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


# ---- packing -------------------------------------------------------------------------------------

# Kinds of layers that mix tokens by attention alone, masked by positions.
_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


def _check_packing(outer: Any, model: Any) -> None:
    """Refuses models whose blocks do not keep packed sequences apart."""
    refuse_prompt_learning(getattr(outer, "peft_config", {}).values())
    name, config = type(model).__name__, model.config.get_text_config()
    if not hf.takes_position_ids(model):
        raise ValueError(
            f"{name} takes no position_ids, so packed sequences would run on; use packed=False."
        )
    if config is not model.config:
        raise ValueError(f"{name} reads more than text and is not packed; use packed=False.")
    other = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION)
    if other:
        raise ValueError(
            f"{name} has layers of kind {other}, whose state would run from one packed sequence "
            "into the next; use packed=False."
        )


def refuse_prompt_learning(settings: Iterable[Any], option: str = "packed") -> None:
    """Virtual tokens stand before every row, which packed rows have no place for. `option` is the
    caller's name of packing."""
    if any(getattr(s, "is_prompt_learning", False) for s in settings):
        raise ValueError(
            f"{option}=True: prompt learning puts virtual tokens before every row, and packed rows "
            f"have no place for them; use {option}=False or LoRA."
        )


def _unpadded(
    kwargs: dict[str, Any],
) -> tuple[dict[str, Any], Callable[[Tensor], Tensor]] | None:
    """The arguments of the packed call [1, N, ...], and how a result goes back to [B, T, ...];
    None where there is nothing to take out."""
    mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
    if mask is None or ids is None or mask.dim() != 2 or "pixel_values" in kwargs:
        return None
    keep = mask.bool()
    if bool(keep.all()) and len(keep) == 1:
        return None
    kwargs = {"position_ids": mask.long().cumsum(1) - 1, **kwargs, "attention_mask": None}
    for name, value in kwargs.items():  # token types and the like as well
        if isinstance(value, Tensor) and value.shape[:2] == keep.shape:
            kwargs[name] = value[keep][None]

    def put(x: Tensor) -> Tensor:
        return x.new_zeros(*keep.shape, x.shape[-1]).masked_scatter(keep[..., None], x[0])

    return kwargs, put
