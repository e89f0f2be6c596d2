"""Which file of a model's folder is at fault, where a library says no more than that one is."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .output import NAMES

# Files of which a tokenizer has at least one.
_TEXTS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def fault(folder: Path, what: str) -> str:
    """The file that cannot be read, or is not there, and why; empty: nothing is seen.

    Args:
        folder: Of the model.
        what: "tokenizer", "adapter", or another thing that was to be read of it.
    """
    own = {name for name in NAMES if name.endswith(".json")}
    for file in sorted(p for p in folder.iterdir() if p.name in own or p.suffix == ".safetensors"):
        if why := _fault_of(file):
            return f"{file} {why}"
    adapter = [folder / f"adapter_model.{end}" for end in ("safetensors", "bin")]
    if what == "adapter" and not any(file.is_file() for file in adapter):
        return f"the folder holds no weights ({adapter[0].name})"
    if what == "tokenizer" and not any((folder / name).is_file() for name in _TEXTS):
        return f"the folder holds none ({', '.join(_TEXTS)}); copy that of its base model"
    return ""


def _fault_of(file: Path) -> str:
    try:
        with file.open("rb") as stored:
            if stored.read(40).startswith(b"version https://git-lfs"):
                return "is a pointer of Git LFS, not the file: run git lfs pull"
        if file.suffix == ".json":
            found = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                return "holds no JSON object"
            lists = file.name.endswith(".index.json")
            return "names no file of weights" if lists and not found.get("weight_map") else ""
        with safe_open(file, "pt"):
            return ""
    except (SafetensorError, OSError, ValueError) as error:
        return f"is damaged or not whole ({error})"
