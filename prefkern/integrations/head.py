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
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..head import Head
from ..shard import is_distributed
from . import hf, packed_attention

IGNORE = -100


class View(NamedTuple):
    """What a computation at the head reads; the head is valid inside the head's call only."""

    hidden: Tensor  # [B, T, D]
    head: Head  # weight, bias, scale, soft cap, adapters as low_rank terms
    layers: Tensor | None  # [L, B, T, D] after every block, with output_hidden_states=True
    source: OutputLayer


class Adapter(NamedTuple):
    """One LoRA term of an output embedding: u = scaling * a(dropout(hidden)), logits += u B^T."""

    dropout: nn.Module
    a: nn.Module
    b: nn.Module
    scaling: float


class OutputLayer(NamedTuple):
    """An output embedding as PEFT left it: the modules to call through, the linear one last, and
    the active adapters on it."""

    chain: list[nn.Module]
    adapters: list[Adapter]
    options: dict[str, Any]  # scale and soft cap of the family
    rows: int | None  # of a padded vocabulary, those the model's logits keep

    @property
    def linear(self) -> nn.Module:
        return self.chain[-1]

    def head(self, pairs: list[tuple[Tensor, Tensor]]) -> Head:
        """The Head of the weights at hand; `pairs` are its low-rank terms."""
        weight, bias = self.linear.weight, getattr(self.linear, "bias", None)
        if self.rows is not None and self.rows < weight.shape[0]:
            weight, bias = weight[: self.rows], None if bias is None else bias[: self.rows]
            pairs = [(u, b[: self.rows]) for u, b in pairs]
        return Head(weight, bias, low_rank=pairs, **self.options)


Compute = Callable[[View], Any]


def at_head(model: Any, *, packed: bool = False) -> None:
    """Adds the keyword `at_head` to `model.forward`; a PEFT model passes it on.

    model(**batch, at_head=fn) returns fn(view), or (fn(view), aux_loss) where the model returns
    the auxiliary loss of its routers (output_router_logits). `labels` must not be given: fn has
    what the loss needs. Calling it again only changes `packed`.

    Args:
        model: A transformers model with a linear output embedding, or a PEFT model around one.
        packed: Take padding out before the backbone and put hidden states back in place after it:
            fn and its caller still see [B, T]. Needs an attention that keeps packed sequences
            apart: FlashAttention, or prefkern's `packed_attention`.

    Raises:
        ValueError: a model or an adapter whose logits are not a linear function of hidden states,
            by name.
    """
    base = hf.causal_lm(model)
    hf.refuse_unsupported(model)
    resolve(base)  # says early what it cannot read
    state = base.__dict__.setdefault("_prefkern_at_head", {})
    state["packed"] = packed
    if "plain" in state:
        return
    state["plain"] = plain = base.forward

    @functools.wraps(type(base).forward)  # generate and trainers read the signature
    def forward(self: Any, *args: Any, at_head: Compute | None = None, **kwargs: Any) -> Any:
        if at_head is None:
            return plain(*args, **kwargs)
        return _run(self, state, at_head, args, kwargs)

    base.forward = types.MethodType(forward, base)


def resolve(model: Any) -> OutputLayer:
    """The output embedding of a causal model.

    isinstance throughout: FSDP2 swaps a module's class, so that its type no longer lies in peft.

    Raises:
        ValueError: adapters whose logits are not hidden W^T + s drop(hidden) A^T B^T, by name.
    """
    layer = hf.causal_lm(model).get_output_embeddings()
    config = hf.text_config(model)
    scale, softcap = hf.logit_options(config, at_head=True)
    options = {"scale": scale, "softcap": softcap}
    chain, adapters = _adapted(layer)
    return OutputLayer(chain, adapters, options, getattr(config, "unpadded_vocab_size", None))


def _adapted(layer: nn.Module) -> tuple[list[nn.Module], list[Adapter]]:
    """(modules to call through, active adapters)."""
    if "peft" not in sys.modules:
        return [layer], []
    from peft.tuners import lora
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if isinstance(layer, ModulesToSaveWrapper):
        active = [name for name in layer.active_adapters if name in layer.modules_to_save]
        off = layer.disable_adapters or not active
        inner = layer.original_module if off else layer.modules_to_save[active[0]]
        return [layer, inner], []
    if not isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        return [layer], []
    if not isinstance(layer, lora.Linear):
        raise ValueError(
            f"{type(layer).__name__} on the output embedding is not supported; use LoRA or "
            "modules_to_save there."
        )
    if layer.merged and layer.disable_adapters:
        raise ValueError(
            "the adapter of the output embedding is merged, and switching it off would unmerge it; "
            "unmerge it first (model.unmerge_adapter())."
        )
    if layer.disable_adapters or layer.merged:
        return [layer, layer.base_layer], []
    adapters = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        for what, there in (
            ("DoRA", layer.use_dora.get(name, False)),
            ("a LoRA bias", layer.lora_bias.get(name, False)),
            ("fan_in_fan_out", layer.fan_in_fan_out),
        ):
            if there:
                raise ValueError(
                    f"adapter {name!r} on the output embedding uses {what}, which is not "
                    "supported there; leave it out of target_modules or use plain LoRA."
                )
        adapters.append(
            Adapter(layer.lora_dropout[name], layer.lora_A[name], layer.lora_B[name],
                    layer.scaling[name])
        )  # fmt: skip
    return [layer, layer.base_layer], adapters


# ---- one call ------------------------------------------------------------------------------------


def _run(model: Any, state: dict[str, Any], fn: Compute, args: tuple, kwargs: dict) -> Any:
    if kwargs.pop("labels", None) is not None:
        raise ValueError("labels and at_head= exclude each other: give the labels to fn.")
    layer = resolve(model)
    outer = layer.chain[0]
    kwargs |= {"use_cache": False, "return_dict": True}
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        kwargs["logits_to_keep"] = 0
    found: list[Any] = []
    seen: dict[str, Any] = {}

    with ExitStack() as stack:
        put, more = _unpadded(stack, model, kwargs) if state["packed"] else (lambda x: x, {})
        kwargs |= more
        if kwargs.get("output_hidden_states"):
            stack.enter_context(_hidden_states(model, seen))

        def compute(hidden: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Any:
            layers = seen.get("layers")
            if layers is not None:
                layers = torch.stack([put(x) for x in layers])
            terms = [(put(u), b) for u, b in pairs]
            return fn(View(put(hidden), layer.head(terms), layers, layer))

        def keep(module: nn.Module, inputs: Any, output: Any) -> Tensor:
            """Runs after every other hook on the head: what they saw is the result, what the
            model's forward goes on with are two logits."""
            found.append(output)
            return _probe(inputs[0])

        handle = outer.register_forward_hook(keep)
        stack.callback(handle.remove)
        stack.enter_context(_replaced(outer, _through(layer, layer.chain[1:], compute)))
        out = state["plain"](*args, **kwargs)
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} calls its output embedding {len(found)} times in a forward; "
            "prefkern needs exactly one call."
        )
    if not state.get("checked") and getattr(out, "logits", None) is not None:
        _check_probe(model, layer, out.logits)
        state["checked"] = True
    router = getattr(out, "aux_loss", None)
    return found[0] if router is None else (found[0], router)


PROBE = (1.0, -2.0)


def _probe(hidden: Tensor) -> Tensor:
    """[..., 2] logits whose fate shows what a family does to its own."""
    probe = hidden.new_full((*hidden.shape[:-1], 2), PROBE[0])
    probe[..., 1] = PROBE[1]
    return probe


def _check_probe(model: Any, layer: OutputLayer, logits: Tensor) -> None:
    """On the first call: the family did to the probe what its config says."""
    head = Head(logits.new_zeros(2, 1).float(), **layer.options)
    want = torch.tensor(PROBE) * head.scale
    if head.softcap is not None:
        want = head.softcap * torch.tanh(want / head.softcap)
    got = logits.detach().float().cpu().reshape(-1, logits.shape[-1])[:1]
    if got.shape != (1, 2) or not torch.allclose(got[0], want, rtol=1e-2, atol=1e-3):
        raise ValueError(
            f"{type(model).__name__} turns the logits {list(PROBE)} into {got.tolist()}, where its "
            f"config says {want.tolist()} (scale={head.scale:g}, softcap={head.softcap}): prefkern "
            "does not know this family's treatment of logits, so its losses would be wrong."
        )


@contextmanager
def _replaced(module: nn.Module, fn: Callable[..., Any]) -> Iterator[None]:
    """module(x) runs fn in place of its forward: hooks run as ever."""
    own = module.__dict__.get("forward")  # tensor parallelism puts one there
    module.forward = fn  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]


def _call(module: nn.Module, x: Tensor, fn: Callable[[Tensor], Any]) -> Any:
    with _replaced(module, fn):
        return module(x)


def _through(
    layer: OutputLayer, chain: list[nn.Module], compute: Callable[[Tensor, list], Any]
) -> Callable[..., Any]:
    """A forward that calls the rest of the chain, then the right factors of the adapters, each of
    which may be a unit of its own, and then computes."""

    def base(hidden: Tensor, *_: Any, **__: Any) -> Any:
        pairs: list[tuple[Tensor, Tensor]] = []

        def add(rest: list[Adapter]) -> Any:
            if not rest:
                return compute(hidden, pairs)
            adapter, *more = rest
            wide = hidden.to(adapter.a.weight.dtype)
            u = adapter.a(adapter.dropout(wide)) * adapter.scaling  # [..., r]

            def low_rank(u: Tensor) -> Any:
                pairs.append((u.to(hidden.dtype), adapter.b.weight))
                return add(more)

            return _call(adapter.b, u, low_rank)

        return add(layer.adapters)

    if not chain:
        return base
    first, *rest = chain
    return lambda hidden, *_, **__: _call(first, hidden, _through(layer, rest, compute))


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


def _unpadded(
    stack: ExitStack, model: Any, kwargs: dict[str, Any]
) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """(how [1, N, ...] goes back to [B, T, ...], the arguments of the packed call)."""
    mask, ids = kwargs.get("attention_mask"), kwargs.get("input_ids")
    images = "pixel_values" in kwargs or kwargs.get("inputs_embeds") is not None
    if mask is None or ids is None or images or bool(mask.all()):
        return (lambda x: x), {}
    keep = mask.bool()
    positions = (mask.long().cumsum(1) - 1)[keep][None]
    extra = stack.enter_context(packed_attention.arguments(model, positions, None))
    more = {"input_ids": ids[keep][None], "position_ids": positions, "attention_mask": None}

    def put(x: Tensor) -> Tensor:
        return x.new_zeros(*keep.shape, x.shape[-1]).masked_scatter(keep[..., None], x[0])

    return put, more | extra


# ---- a reference ---------------------------------------------------------------------------------


class Reference(NamedTuple):
    """What `constant` keeps of a reference model's call."""

    hidden: Tensor  # [B, T, D]
    left: list[Tensor]  # [B, T, r] left factors of the adapters on its head
    source: OutputLayer
    layers: Tensor | None  # [L, B, T, D]

    @contextmanager
    def gathered(self) -> Iterator[Head]:
        """The reference's head as plain, constant tensors, whoever shards them; for use inside the
        policy's call. A forward that keeps its own would find its storage freed."""
        linear = self.source.linear
        parameters = [linear.weight, getattr(linear, "bias", None)]
        parameters += [adapter.b.weight for adapter in self.source.adapters]
        with ExitStack() as stack:
            _gather_zero3(stack, [p for p in parameters if hasattr(p, "ds_status")])
            weight, bias, *right = (_plain(p) for p in parameters)
            pairs = list(zip(self.left, right, strict=True))
            rows = self.source.rows
            if rows is not None and rows < weight.shape[0]:
                weight, bias = weight[:rows], None if bias is None else bias[:rows]
                pairs = [(u, b[:rows]) for u, b in pairs]
            yield Head(weight, bias, low_rank=pairs, **self.source.options)


def constant(view: View) -> Reference:
    """For at_head=: what a two-model statistic needs of a reference, without gradient."""
    left = [u.detach() for u, _ in view.head.low_rank]
    layers = None if view.layers is None else view.layers.detach()
    return Reference(view.hidden.detach(), left, view.source, layers)


def _plain(parameter: Any) -> Any:
    """A constant's whole value: no gradient comes back, so every rank may have all of it."""
    if parameter is None:
        return None
    with torch.no_grad():
        whole = parameter.full_tensor() if is_distributed(parameter) else parameter
    return whole.detach()


def _gather_zero3(stack: ExitStack, parameters: list[Any]) -> None:
    """DeepSpeed ZeRO-3 partitions; those that are there already (tied embeddings) stay."""
    from_ds = {id(p): p for p in parameters if p.ds_status.name != "AVAILABLE"}
    if from_ds:
        import deepspeed

        stack.enter_context(deepspeed.zero.GatheredParameters(list(from_ds.values())))


def shifted(labels: Tensor) -> Tensor:
    """labels [B, T] -> the next token's label at every position [B, T], IGNORE at the last."""
    last = labels.new_full((labels.shape[0], 1), IGNORE)
    return torch.cat([labels[:, 1:], last], 1)
