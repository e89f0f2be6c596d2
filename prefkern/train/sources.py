"""What the models and files that a run reads hold, as short hashes: a name may come to mean another
content between a checkpoint and its resumption."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path

from .config import TrainConfig, short_hash
from .inputs import MODELS, STORED
from .seals import file_sum, file_sums

_FILES = (*STORED, "judge")
_CONFIGS = ("config.json", "adapter_config.json")
# What of a model folder decides its numbers.
_READ = ("*.safetensors", "*.bin", "*.json")
_NOT_READ = frozenset(
    {"trainer_state.json", "prefkern_run.json", "rounds.json", "data.json", "demo.json"}
)


def contents(config: TrainConfig) -> dict[str, str]:
    """Option -> hash of what stands behind it, for every model and file that is given."""
    found = {}
    for option in (*MODELS, *_FILES):
        value = getattr(config, option)
        names = list(value) if isinstance(value, tuple) else [value]
        parts = [content(name, option in MODELS) for name in names if name]
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


def content(name: str, is_model: bool) -> str:
    """Of a folder, a file or a hub name; empty where nothing is known of it."""
    path = Path(name)
    if not is_model and not path.exists():  # a judge: file.py:function or module:function
        path = _file_of(name.rpartition(":")[0])
    if path.is_file():
        return short_hash(file_sum(path))
    if path.is_dir():
        files = {p.name for pattern in _READ for p in path.glob(pattern)} - _NOT_READ
        return _of_folder(path, files)
    return _of_hub(name) if is_model else ""


def _of_folder(folder: Path, files: Iterable[str]) -> str:
    """Of the files, and of the base that an adapter among them names. Checksums take one CPU second
    per 2.9 GB in the page cache, where a model that was just loaded is: 5.5 s for 8 billion weights
    in bf16, over up to four cores."""
    parts: list[object] = [file_sums(folder, sorted(files))]
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        parts.append(content(str(base), True) if base else "")
    return short_hash(parts)


def _file_of(module: str) -> Path:
    """The file of a judge; a path to nothing where it has none."""
    if not module or module.endswith(".py"):
        return Path(module or "none")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return Path("none")
    return Path(spec.origin) if spec is not None and spec.origin else Path("none")


def _of_hub(name: str) -> str:
    """Of the files that stand in the cache under a name of the hub's; the commit alone where the
    weights are not among them. A branch that moved to the same weights is the same model."""
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = [try_to_load_from_cache(name, config) for config in _CONFIGS]
    except ValueError:  # not a name of the hub's
        return ""
    folders = [Path(file).parent for file in cached if isinstance(file, str)]
    if not folders:
        return ""
    weights = _weights(folders[0])
    if not weights:
        return folders[0].name
    return _of_folder(folders[0], [c for c in _CONFIGS if (folders[0] / c).is_file()] + weights)


def _weights(folder: Path) -> list[str]:
    """The files that from_pretrained reads; what else a cache holds, or will, does not count."""
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        index = folder / f"{stem}.{ending}.index.json"
        if (folder / f"{stem}.{ending}").is_file():
            return [f"{stem}.{ending}"]
        if index.is_file():
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return [index.name, *sorted(name for name in shards if (folder / name).is_file())]
    return [p.name for p in sorted(folder.glob("adapter_model.*"))]
