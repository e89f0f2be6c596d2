"""What a run reads is never written to: neither a model or a file, nor the base that an adapter
names."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from .config import TrainConfig
from .output import NAMES, OWN, check_writable

MODELS = (
    "model", "ref_model", "rejected_ref_model", "aux_model", "judge_model", "judge_ref_model",
)  # fmt: skip
# Options that name what `prefkern precompute` wrote, as the groups of options say.
STORED = tuple(
    name for group in reversed(TrainConfig.__mro__) for name in vars(group).get("STORED", ())
)
_READ = ("dataset", "eval_dataset", *STORED)
# Options whose value is a place, which may be another on another machine.
PATHS = frozenset({*MODELS, *_READ, "output_dir", "resume_from_checkpoint", "device"})


def check_inputs(config: TrainConfig) -> None:
    """Refuses an output folder that is, or lies in, one that the run reads, and a model or a file
    that stands in it under a name of the run's own.

    Raises:
        ValueError: naming the option and both paths.
    """
    out = Path(config.output_dir).resolve()
    for option in (*MODELS, *_READ):
        value = getattr(config, option)
        for source in value if isinstance(value, tuple) else [value]:
            if not isinstance(source, str) or not Path(source).exists():
                continue
            for what, path in ((source, Path(source)), *_base_of(source)):
                path = path.resolve()
                below = path.relative_to(out).parts if out in path.parents else ("",)
                taken = below[0] in NAMES or OWN.fullmatch(below[0])
                if path == out or (path.is_dir() and path in out.parents) or taken:
                    raise ValueError(
                        f"output_dir {config.output_dir} and {option} {what} overlap, and a run "
                        "never writes into what it reads; choose another --output-dir."
                    )


def _base_of(source: str | Path) -> list[tuple[str, Path]]:
    """The folder that an adapter names as its base, in words and as a path; empty: none here."""
    try:
        text = (Path(source) / "adapter_config.json").read_text(encoding="utf-8")
        base = Path(json.loads(text)["base_model_name_or_path"])
    except (OSError, ValueError, TypeError, KeyError):
        return []  # no adapter, or one that is told about where it is loaded
    return [(f"{source} (its base {base})", base)] if base.exists() else []


def new_folder(folder: str | Path, inputs: Iterable[str | Path] = ()) -> Path:
    """A folder to write into that holds nothing yet and is no input.

    Raises:
        ValueError: it is not empty, cannot be written, or is one of `inputs` or in it.
    """
    path = Path(folder)
    for source in inputs:
        for what, other in ((source, Path(source)), *_base_of(source)):
            if other.resolve() in (path.resolve(), *path.resolve().parents):
                raise ValueError(
                    f"output_dir {path} is, or lies in, the input {what}; name another."
                )
    check_writable(path)
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"output_dir {path} is not empty; name a new folder.")
    return path
