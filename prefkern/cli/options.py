"""Options from a command line: a YAML file fills them, flags beat it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import io
import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import tyro

from .. import losses
from ..train.config import TrainConfig
from ..train.read_config import as_number, nearest, options_from, read_yaml

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """What stands on the command line of train, eval and precompute."""

    options: tyro.conf.OmitArgPrefixes[TrainConfig]
    loss_arg: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A hyper-parameter of the loss as name=value; may be given several times."""
    column: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What a loss reads and the column it stands in, as name=column; may be given several times."""
    dry_run: bool = False
    """train: print the resolved configuration, the model's head and the data counts, and stop."""
    json: bool = False
    """eval: print JSON."""
    row: int = 0
    """view: which row of the data is drawn, from 0."""


def parse(verb: str, args: list[str]) -> tuple[TrainConfig, Command]:
    """The configuration and the command it came from.

    Raises:
        ValueError: an unknown option or YAML key (nearest names given), a value that does not fit.
        SystemExit: --help.
    """
    args, defaults, absent = _from_yaml(TrainConfig, args)
    from_file, columns = defaults.loss_args, defaults.columns
    # dictionaries are no flags: --loss-arg name=value and --column name=column stand for them
    defaults = dataclasses.replace(defaults, loss_args={}, columns={}, **absent)
    with _one_line():
        parsed, unknown = tyro.cli(
            Command,
            args=args,
            default=Command(options=defaults),
            prog=f"prefkern {verb} [CONFIG.yaml]",
            description=inspect.getdoc(TrainConfig),
            return_unknown_args=True,
            config=(tyro.conf.SuppressFixed,),
        )
    _refuse_unknown(unknown, TrainConfig, ("loss_arg", "column", "dry_run", "json", "row"))
    for flag, of in (("dry_run", "train"), ("json", "eval"), ("row", "view")):
        if verb != of and getattr(parsed, flag) != getattr(Command, flag):
            raise ValueError(f"--{flag.replace('_', '-')} is an option of prefkern {of} alone.")
    loss_args = from_file | parse_loss_args(parsed.loss_arg)
    columns = columns | parse_columns(parsed.column)
    return dataclasses.replace(parsed.options, loss_args=loss_args, columns=columns), parsed


def parse_table_options(verb: str, kind: type[T], args: list[str]) -> T:
    """The options of `score` or `sample` from a YAML file and flags; raises as `parse`."""
    args, defaults, absent = _from_yaml(kind, args)
    with _one_line():
        parsed, unknown = tyro.cli(
            kind,
            args=args,
            default=dataclasses.replace(defaults, **absent),
            prog=f"prefkern {verb} [CONFIG.yaml]",
            description=inspect.getdoc(kind),
            return_unknown_args=True,
        )
    _refuse_unknown(unknown, kind)
    return parsed


def _from_yaml(kind: type[Any], args: list[str]) -> tuple[list[str], Any, dict[str, Any]]:
    """The flags, what a YAML file says, and what flags must give (with tyro's mark)."""
    if args and args[0].endswith((".yaml", ".yml")):
        args = ["--config", *args]
    elif args and not args[0].startswith("-"):
        raise ValueError(
            f"{args[0]!r} is neither an option nor a .yaml file; options are written --name value, "
            "such as --model and --dataset."
        )
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    found, args = first.parse_known_args(args)
    values = {} if found.config is None else read_yaml(found.config)
    given = {str(key).replace("-", "_") for key in values}
    absent: dict[str, Any] = {
        f.name: tyro.MISSING
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and f.name not in given
    }
    blank = dict.fromkeys(absent, "")
    origin = found.config or "configuration"
    return args, options_from(kind, values | blank, origin=origin), absent


# Options of other trainers, and ours.
_ELSEWHERE = {
    "model_name_or_path": "model", "dataset_name": "dataset", "loss_type": "loss",
    "lr": "learning-rate", "epochs": "num-train-epochs", "num_epochs": "num-train-epochs",
    "batch_size": "per-device-train-batch-size", "use_peft": "lora-r", "lora_rank": "lora-r",
    "torch_dtype": "dtype", "ref_model_name_or_path": "ref-model",
}  # fmt: skip


def _refuse_unknown(unknown: list[str], kind: type[Any], further: tuple[str, ...] = ()) -> None:
    if unknown:
        names = [f.name for f in dataclasses.fields(kind)] + [*further, "debug", "config"]
        name = unknown[0].lstrip("-").partition("=")[0].replace("-", "_")
        near = nearest(name, names).replace("_", "-")
        if name in _ELSEWHERE:
            near = f"; here it is --{_ELSEWHERE[name]}"
        elif kind is TrainConfig and any(name in losses.arguments(r) for r in losses.LOSSES):
            near = f"; an argument of a loss is written --loss-arg {name}=VALUE"
        raise ValueError(f"unknown option {unknown[0]}{near}.")


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """What tyro draws in a box and leaves with, as the text of a ValueError."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as left:
        text = re.sub(r"\x1b\[[0-9;]*m|[\u2500-\u257f]+|-{4,}", " ", said.getvalue())
        if not left.code or not text.strip():
            raise
        raise ValueError(" ".join(text.split())) from None


def parse_loss_args(pairs: Iterable[str]) -> dict[str, Any]:
    """('alpha=0.5', 'normalize=sum') -> {'alpha': 0.5, 'normalize': 'sum'}, values read as YAML."""
    import yaml

    found: dict[str, Any] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign or not name:
            raise ValueError(f"--loss-arg must be written name=value, got {pair!r}.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(
                f"--loss-arg {pair}: {text!r} is no value; write name=value."
            ) from None
        found[name.replace("-", "_")] = as_number(value)
    return found


def parse_columns(pairs: Iterable[str]) -> dict[str, str]:
    """('eta=reliability',) -> {'eta': 'reliability'}."""
    found = {}
    for pair in pairs:
        name, sign, column = pair.partition("=")
        if not (sign and name and column):
            raise ValueError(f"--column must be written name=column, got {pair!r}.")
        found[name.replace("-", "_")] = column
    return found
