"""A TrainConfig from a mapping or a YAML file; mistakes are told with the nearest names."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import typing
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from .config import TrainConfig

C = typing.TypeVar("C", bound=Any)


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """'; nearest: a, b' or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; nearest: {', '.join(close)}" if close else ""


def as_number(value: Any) -> Any:
    """A text that is a number, such as 1e-3 in YAML 1.1, as that number; all else as it is."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _coerce(name: str, value: Any, kind: Any) -> Any:
    """`value` from YAML in the type of the field; raises ValueError where it does not fit."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, UnionType):
        if value is None:
            return None
        return _coerce(name, value, next(a for a in typing.get_args(kind) if a is not type(None)))
    if origin is Literal:
        # YAML reads on/off as booleans
        if isinstance(value, bool) and "on" in typing.get_args(kind):
            value = "on" if value else "off"
        if value in typing.get_args(kind):
            return value
        raise ValueError(f"{name} must be one of {list(typing.get_args(kind))}, got {value!r}.")
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_coerce(name, item, typing.get_args(kind)[0]) for item in items)
    if origin is dict:
        if isinstance(value, dict):
            numbers = typing.get_args(kind)[1] is Any  # arguments of losses, and no names
            return {k: as_number(v) if numbers else v for k, v in value.items()}
    elif kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
    elif kind is float and isinstance(value, int | float | str):
        try:
            return float(value)  # YAML 1.1 reads 1e-6 as a string
        except (ValueError, OverflowError):
            raise ValueError(f"{name} must be a number, got {value!r}.") from None
    elif kind is int and isinstance(value, int):
        return value
    elif kind is str and isinstance(value, str | int | float):
        return str(value)
    expected = getattr(kind, "__name__", str(kind))
    raise ValueError(f"{name} must be {expected}, got {value!r}.")


def from_mapping(values: dict[str, Any], *, origin: str = "configuration") -> TrainConfig:
    """A TrainConfig from a mapping (YAML, JSON); unknown keys are errors with the nearest names."""
    return options_from(TrainConfig, values, origin=origin)


def options_from(kind: type[C], values: dict[str, Any], *, origin: str) -> C:
    """As `from_mapping`, of any dataclass of options."""
    hints = typing.get_type_hints(kind)
    kinds = {option.name: hints[option.name] for option in dataclasses.fields(kind)}
    known = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in kinds:
            raise ValueError(f"{origin}: unknown key {key!r}{nearest(name, kinds)}.")
        known[name] = _coerce(f"{origin}: {key}", value, kinds[name])
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and f.name not in known
    ]
    if missing:
        raise ValueError(f"{origin}: {' and '.join(missing)} must be given.")
    return kind(**known)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises ValueError naming the file when it is none, or says a key
    twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := sorted({key for key in keys if key != "<<" and keys.count(key) > 1}):
                raise yaml.YAMLError(f"{', '.join(twice)} is given twice")
            return super().construct_mapping(node, deep)

    if not Path(path).is_file():
        raise ValueError(f"there is no file {str(path)!r} (here: {Path.cwd()}).")
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a readable YAML file: {reason}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `key: value` lines, got {type(values).__name__}.")
    return values
