"""The reference trainer: one configuration (config), one prepared run (run), one loop (loop).

What a single method needs beyond them stands in `recipes`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .. import integrations  # noqa: F401  (before any import of transformers, see there)

if TYPE_CHECKING:
    from .config import TrainConfig

# Import name -> name on the package index, for what the trainer cannot do without.
_REQUIRED = {
    "accelerate": "accelerate",
    "safetensors": "safetensors",
    "tqdm": "tqdm",
    "transformers": "transformers",
    "tyro": "tyro",
    "yaml": "pyyaml",
}


def require_train_extra() -> None:
    """Raises ImportError naming the extra when a package the trainer needs is not installed."""
    missing = [package for name, package in _REQUIRED.items() if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"the trainer needs {', '.join(missing)}, not installed here; "
            "install it with: pip install 'prefkern[train]'"
        )


def train(config: TrainConfig) -> dict[str, Any]:
    """Runs a configuration to its end; returns the last row of the log, and `log_history`.

    Raises:
        ImportError: a package of the extra `train` is not installed.
        ValueError: a mistake in the options or the data, with what to do.
    """
    require_train_extra()
    from .together import ended_together

    with ended_together():
        if config.has_rounds:
            from .recipes.rounds import train_rounds

            return train_rounds(config)
        from .loop import train_run
        from .recipes.prepared import prepared_run

        return train_run(prepared_run(config))
