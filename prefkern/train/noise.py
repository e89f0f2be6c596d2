"""Forward passes in training mode without the noise of training, for every family of models.

Models draw noise where `self.training` is set: dropout modules, rates read from attributes or from
the config in forward, skipped layers, jitter of routers. So the modules stay in evaluation mode
while the model trains. Gradient checkpointing asks for training mode in the modules that it wraps:
these alone get it, with every dropout rate at 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
# Float attributes of modules and configs: attention_dropout, resid_pdrop, dropout_p, layerdrop, ...
_RATE = re.compile(r"dropout|pdrop|layer_?drop|drop_path")


def silence(model: Any) -> None:
    """From here on `model.train()` switches no noise on."""
    kept = []
    for module in model.modules():
        if isinstance(module, _DROPOUTS):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and _RATE.search(name):
                setattr(module, name, 0.0)
        config = getattr(module, "config", None)
        for name, value in vars(config).items() if hasattr(config, "__dict__") else ():
            if isinstance(value, float) and value and _RATE.search(name):
                kept.append((config, name, value))
                setattr(config, name, 0.0)
    model.rates_of_config = kept  # a saved config keeps its rates
    model.train = partial(_train, model)


def _train(model: nn.Module, mode: bool = True) -> nn.Module:
    nn.Module.train(model, False)
    for module in model.modules():
        if mode and getattr(module, "gradient_checkpointing", False):
            module.training = True
    # the flag of the model itself is what callers put back; its forward is not called in training
    model.training = mode
    return model


@contextmanager
def own_rates(model: Any) -> Iterator[None]:
    """Inside, the model's config has the rates it was loaded with."""
    kept = getattr(model, "rates_of_config", [])
    for config, name, value in kept:
        setattr(config, name, value)
    try:
        yield
    finally:
        for config, name, _ in kept:
            setattr(config, name, 0.0)
