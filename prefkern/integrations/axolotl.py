"""Axolotl: one line of YAML swaps the trainer.

    trainer_cls: prefkern.integrations.axolotl.DPOTrainer
    plugins: [prefkern.integrations.axolotl.Plugin]       # for the keys below
    dpo_loss_type: ["tdpo2:alpha=0.5"]
    prefkern_args: {beta: 0.2}                            # loss_args
    prefkern_columns: {item_weights: weight}              # loss_columns

Read: 0.19.0, which pins trl 1.9: prefkern's trainers stand on TRL 1.15's fused head, so the adapter
works with an Axolotl whose TRL they know, and says so otherwise. A plugin's trainer class gets no
model from Axolotl's builder, so the class goes into `trainer_cls`.
"""

from __future__ import annotations

from typing import Any

from . import signatures

TESTED = "axolotl 0.19.0"
_TRAINER = "axolotl.core.trainers.dpo.trainer:AxolotlDPOTrainer"
_BASE = "axolotl.integrations.base:BasePlugin"
KEYS = {"prefkern_args": "loss_args", "prefkern_columns": "loss_columns"}


def trainer_class(base: Any = None) -> Any:
    """`base` (default Axolotl's DPO trainer) with prefkern's losses; its mixins stay.

    Raises:
        ImportError: Axolotl is absent, or its TRL is not one that prefkern knows.
    """
    from .trl import PreferenceLosses

    if base is None:
        base = signatures.imported(_TRAINER, TESTED)

    class DPOTrainer(PreferenceLosses, base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            config = kwargs.get("args")
            for name in KEYS.values():  # Axolotl's configuration class has no such fields
                if config is not None and not hasattr(config, name):
                    setattr(config, name, _given.get(name))
            super().__init__(*args, **kwargs)

    return DPOTrainer


_given: dict[str, Any] = {}  # what the configuration file holds, by field


def read(config: dict[str, Any]) -> dict[str, Any]:
    """loss_args and loss_columns of an Axolotl configuration.

    Raises:
        ValueError: they are not mappings, or a key with prefkern's prefix is unknown.
    """
    unknown = [k for k in config if k.startswith("prefkern_") and k not in KEYS]
    if unknown:
        raise ValueError(f"unknown keys {unknown}; prefkern's are {sorted(KEYS)}.")
    for key in KEYS:
        if not isinstance(config.get(key) or {}, dict):
            raise ValueError(f"{key} must be a mapping, got {config[key]!r}.")
    return {field: dict(config.get(key) or {}) for key, field in KEYS.items()}


def plugin_class(base: Any = None) -> Any:
    """A plugin of Axolotl that validates prefkern's keys before the run."""
    if base is None:
        base = signatures.imported(_BASE, TESTED)

    class Plugin(base):
        def get_input_args(self) -> str:
            return f"{__name__}.Arguments"

        def pre_model_load(self, cfg: Any) -> None:
            _given.update(read({k: cfg.get(k) for k in KEYS}))

    return Plugin


def _arguments() -> type:
    import pydantic

    fields: dict[str, Any] = dict.fromkeys(KEYS, (dict[str, Any] | None, None))
    return pydantic.create_model("Arguments", **fields)


def __getattr__(name: str) -> Any:
    made = {"DPOTrainer": trainer_class, "Plugin": plugin_class, "Arguments": _arguments}
    if name not in made:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made[name]()
    return globals()[name]
