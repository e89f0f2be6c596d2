"""The reference trainer: one configuration (config), one loop (loop), read top to bottom."""

from __future__ import annotations

from importlib.util import find_spec

from .. import integrations  # noqa: F401  (before any import of transformers, see there)

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
