"""What the models and files that a run reads hold, as short hashes: a name may come to mean another
content between a checkpoint and its resumption."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from .checkpoint import file_sum, file_sums
from .config import TrainConfig, short_hash

_MODELS = ("model", "ref_model", "aux_model", "judge_model", "judge_ref_model")
_FILES = ("precomputed_ref", "precomputed_aux", "fused_ref", "judge")
# What of a model folder decides its numbers.
_READ = ("*.safetensors", "*.bin", "*.json")
_NOT_READ = frozenset(
    {"trainer_state.json", "prefkern_run.json", "rounds.json", "data.json", "demo.json"}
)


def contents(config: TrainConfig) -> dict[str, str]:
    """Option -> hash of what stands behind it, for every model and file that is given."""
    found = {}
    for option in (*_MODELS, *_FILES):
        value = getattr(config, option)
        names = list(value) if isinstance(value, tuple) else [value]
        parts = [_content(name, option in _MODELS) for name in names if name]
        if any(parts):
            found[option] = short_hash(parts)
    return found


def check_same(saved: dict[str, str], config: TrainConfig) -> None:
    """Refuses to continue a run whose models or files hold something else than when it was saved.

    Raises:
        ValueError: naming the options.
    """
    now = contents(config)
    changed = sorted(name for name, value in saved.items() if now.get(name) != value)
    if changed:
        what = ", ".join(f"{name} {getattr(config, name)}" for name in changed)
        raise ValueError(
            f"the content of {what} changed since the checkpoint was written, so the run would "
            "continue towards another objective; restore it, or start afresh in another "
            "--output-dir."
        )


def _content(name: str, is_model: bool) -> str:
    """Of a folder, a file or a hub name; empty where nothing is known of it."""
    path = Path(name)
    if not is_model and not path.exists():  # a judge: file.py:function or module:function
        path = _file_of(name.rpartition(":")[0])
    if path.is_file():
        return short_hash(file_sum(path))
    if path.is_dir():
        files = sorted({p.name for pattern in _READ for p in path.glob(pattern)} - _NOT_READ)
        parts: list[object] = [file_sums(path, files)]
        adapter = path / "adapter_config.json"
        if adapter.is_file():
            base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
            parts.append(_content(str(base), True) if base else "")
        return short_hash(parts)
    return _commit(name) if is_model else ""


def _file_of(module: str) -> Path:
    """The file of a judge; a path to nothing where it has none."""
    if not module or module.endswith(".py"):
        return Path(module or "none")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return Path("none")
    return Path(spec.origin) if spec is not None and spec.origin else Path("none")


def _commit(name: str) -> str:
    """The commit of the hub's that stands in the cache under a name."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # not a name of the hub's
        return ""
    return Path(found).parent.name if isinstance(found, str) else ""
