"""The reference beside a denoiser: a frozen model, or the denoiser with its adapters off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


def has_adapters(denoiser: object) -> bool:
    """True where `adapters_off` finds something to switch."""
    return bool(_of_peft(denoiser) or _of_diffusers(denoiser))


@contextmanager
def adapters_off(denoiser: object) -> Iterator[None]:
    """The denoiser without the adapters of the PEFT models in it, and of the diffusers models that
    `add_adapter` was called on.

    Raises:
        ValueError: a denoiser without adapters.
    """
    if not has_adapters(denoiser):
        raise ValueError(
            "a reference is needed, and the denoiser has no adapter to switch off; pass ref=, a "
            "frozen copy, or train an adapter (peft.get_peft_model, or add_adapter of a diffusers "
            "model)."
        )
    with ExitStack() as stack:
        for module in _of_peft(denoiser):
            stack.enter_context(module.disable_adapter())
        for module in _of_diffusers(denoiser):
            module.disable_adapters()
            stack.callback(module.enable_adapters)
        yield


def _modules(denoiser: object) -> Iterator[Any]:
    return denoiser.modules() if isinstance(denoiser, nn.Module) else iter((denoiser,))


def _of_peft(denoiser: object) -> list[Any]:
    return [m for m in _modules(denoiser) if hasattr(m, "disable_adapter")]


def _of_diffusers(denoiser: object) -> list[Any]:
    return [
        m for m in _modules(denoiser)
        if hasattr(m, "disable_adapters") and getattr(m, "_hf_peft_config_loaded", False)
    ]  # fmt: skip


@contextmanager
def evaluating(denoiser: object) -> Iterator[None]:
    """A block in which a module is called without gradient and without dropout."""
    training = [m for m in _modules(denoiser) if getattr(m, "training", False)]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
