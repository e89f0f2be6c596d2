"""TRL's fused head on prefkern's statistics: same contract, adapters on the head included.

Shapes: B rows of T tokens.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from trl.trainer.utils import FusedCausalLMOutput

from ...ops.budget import check_budget
from ...ops.linear_stats import linear_logps
from ...stats import TokenStats
from .. import hf, packed_attention
from ..head import at_head
from ..head_view import IGNORE, View, guard, shifted
from ..verify import verify_head
from .versions import swapped

# TRL's name of a statistic -> ours. Of these TRL differentiates the first two.
OUR_STATISTICS = {
    "log_probs": "logp", "entropy": "ent", "log_sum_sq_probs": "col", "mean_logits": "zmean",
    "is_top1": "top1",
}  # fmt: skip


def add_fused_lm_head(
    model: Any,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
    *,
    entropy_moves: bool = True,
    packed: bool = False,
    max_length: int | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> None:
    """What trl.trainer.utils.add_fused_lm_head does, and `at_head=` beside it.

    Args:
        model, temperature, cast_lm_head_to_fp32, outputs: TRL's.
        entropy_moves: Whether the entropy gets a gradient; a frozen head then keeps a row per
            token for it.
        packed, max_length: Take padding out of batches of at most `max_length` tokens a row.
        memory_budget, backend: As in `linear_logps`.

    Raises:
        ValueError: a model whose log-probabilities at the head are not those of its own logits.
    """
    if packed:
        packed_attention.use(hf.causal_lm(model), max_length or sys.maxsize)
    at_head(model, packed=packed)
    verify_head(model, backend=backend)
    stats = tuple(OUR_STATISTICS[name] for name in dict.fromkeys(("log_probs", *outputs)))
    quiet = {"col"} | (set() if entropy_moves else {"ent"})
    options: dict[str, Any] = {
        "stats": stats, "no_grad_stats": tuple(quiet.intersection(stats)),
        "memory_budget": memory_budget, "backend": backend,
    }  # fmt: skip
    model.__dict__["_prefkern_inner"] = model.forward  # a deep copy of the model has its own

    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,  # [B, T]
        shift_labels: Tensor | None = None,  # [B, T]
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        inner = self.__dict__["_prefkern_inner"]
        if not fused_lm_head:
            given = {
                "labels": labels, "shift_labels": shift_labels,
                "num_items_in_batch": num_items_in_batch,
            }  # fmt: skip
            return inner(*args, **kwargs, **{k: v for k, v in given.items() if v is not None})
        if shift_labels is None:
            assert labels is not None
            targets = shifted(labels)
        else:
            targets = shift_labels
        if getattr(hf.text_config(self), "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)

        def compute(view: View) -> TokenStats:
            hidden, head = view.hidden, replace(view.head, temperature=temperature)
            autocast: Any = nullcontext()
            if cast_lm_head_to_fp32:
                hidden = hidden.float()
                autocast = torch.autocast(hidden.device.type, enabled=False)
            with autocast:
                return linear_logps(hidden, head, targets.to(hidden.device), **options)

        out = inner(*args, at_head=compute, **kwargs)
        # TRL's loss is over T - 1 positions unless the labels were shifted before
        end = None if shift_labels is not None else -1
        coefficient = getattr(hf.text_config(self), "router_aux_loss_coef", 0.0)
        return _output(out.value, targets, end, num_items_in_batch, out.aux_loss, coefficient)

    functools.update_wrapper(forward, type(model).forward)
    del forward.__wrapped__  # type: ignore[attr-defined]
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def _output(
    tokens: TokenStats, targets: Tensor, end: int | None, num_items: Any, aux_loss: Tensor | None,
    coefficient: float,
) -> FusedCausalLMOutput:  # fmt: skip
    found = {
        theirs: value[:, :end]
        for theirs, ours in OUR_STATISTICS.items()
        if (value := getattr(tokens, ours)) is not None
    }
    if "is_top1" in found:
        found["is_top1"] = found["is_top1"].bool()
    mask = (targets != IGNORE)[:, :end].to(found["log_probs"].device)
    count = mask.sum().clamp(min=1) if num_items is None else num_items
    loss = -found["log_probs"].sum() / count
    if aux_loss is not None:
        loss = loss + coefficient * aux_loss
    return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **found)


class _Never:
    """Stands in for BaseTunerLayer in the one check that refuses adapters on the head."""


class FusedHead:
    """Mixin before a TRL trainer that has a fused head (DPO, KTO, SFT, GRPO, RLOO) or a subclass of
    one: its formulas on prefkern's statistics.

    Args:
        memory_budget, backend: As in `linear_logps`.
        The rest: The trainer's own.

    Raises:
        ValueError: a model or an adapter that prefkern cannot read, by name.
    """

    packs = False  # padding_free is done here; SFT has its own

    def __init__(
        self, *args: Any, memory_budget: int | None = None, backend: str = "auto", **kwargs: Any
    ) -> None:
        own = trl_trainer(type(self))
        names = list(inspect.signature(own.__init__).parameters)[1:]  # a subclass keeps their order
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        config = arguments.get("args")
        check_budget(memory_budget)
        self._budget, self._backend = memory_budget, backend
        self._head_options: dict[str, Any] = {
            "memory_budget": memory_budget, "backend": backend,
            "max_length": getattr(config, "max_length", None),
            "packed": self.packs and bool(getattr(config, "padding_free", False)),
        }  # fmt: skip
        swaps = self._swaps(sys.modules[own.__module__], arguments)
        try:
            if self._head_options["packed"]:
                assert config is not None
                config.padding_free = False  # TRL warns and switches it off
            with swapped(sys.modules[own.__module__], swaps):
                super().__init__(**arguments)
        finally:
            if self._head_options["packed"]:
                assert config is not None
                config.padding_free = self.padding_free = True

    def _swaps(self, module: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        """Names of TRL's module that stand for ours while the constructor runs: two at most."""
        names: dict[str, Any] = {"add_fused_lm_head": self._add_head}
        # GRPO's cast_lm_head_to_fp32 would lose the adapter when it generates: TRL refuses that
        if not getattr(arguments.get("args"), "cast_lm_head_to_fp32", False):
            names |= {"BaseTunerLayer": _Never} if hasattr(module, "BaseTunerLayer") else {}
        return names

    def _add_head(self, model: Any, *args: Any, **kwargs: Any) -> None:
        # GRPO alone may put the entropy into its loss
        moves = bool(getattr(self, "_entropy_bonus_enabled", False))
        options: dict[str, Any] = {**self._head_options, "entropy_moves": moves}
        try:
            add_fused_lm_head(model, *args, **{**kwargs, **options})
        except ValueError as error:
            if not options["packed"]:
                raise
            raise ValueError(f"padding_free=True: {error}") from error

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        base = self.accelerator.unwrap_model(model)  # type: ignore[attr-defined]
        guard(base, _inside(model))
        return super().training_step(model, *args, **kwargs)  # type: ignore[misc]


def trl_trainer(cls: type) -> Any:
    """The trainer of TRL that `cls` extends; its module is where TRL looks its functions up.

    Raises:
        TypeError: there is none, or it has no fused head.
    """
    for base in cls.__mro__:
        module = sys.modules.get(base.__module__)
        if base.__module__.startswith("trl.") and hasattr(module, "add_fused_lm_head"):
            return base
    raise TypeError(
        f"{cls.__name__} must extend a trainer of TRL that has a fused head (DPO, KTO, SFT, GRPO, "
        f"RLOO), got {[base.__name__ for base in cls.__mro__]}."
    )


def _inside(wrapper: Any) -> Callable[[], None] | None:
    """A check that a call with gradients runs inside its DistributedDataParallel."""
    if not isinstance(wrapper, DistributedDataParallel) or wrapper._use_python_reducer:
        return None

    def check() -> None:
        if torch.is_grad_enabled() and DistributedDataParallel._active_ddp_module is not wrapper:
            raise RuntimeError(
                "the model was called outside its DistributedDataParallel wrapper: no gradient "
                "would be synchronised, and the ranks would drift apart. Call the model that "
                "compute_loss is given, not what unwrap_model makes of it."
            )

    return check
