"""The command line: prefkern train | eval | score | sample | losses | plot | view | ...

Options come from dataclasses through tyro, a YAML file fills them and flags beat it.
A mistake of the user's ends in one line and exit status 2; --debug shows the traceback.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

USER_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_overview())
        return 0 if args else USER_ERROR
    if args[0] in ("-V", "--version"):
        from .. import __version__

        print(f"prefkern {__version__}")
        return 0
    verb, *rest = args
    if verb not in VERBS:
        from ..train.read_config import nearest

        print(f"prefkern: unknown verb {verb!r}{nearest(verb, VERBS)}.\n", file=sys.stderr)
        print(_overview(), file=sys.stderr)
        return USER_ERROR
    debug = verb != "bench" and "--debug" in rest
    if debug:
        rest.remove("--debug")
    try:
        return VERBS[verb][0](rest)
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        if debug or (isinstance(error, ImportError) and not _is_missing_extra(error)):
            raise
        print(f"prefkern {verb}: error: {_one_line(error)}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        if debug:
            raise
        print(f"prefkern {verb}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        if not debug and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = next((line for line in str(error).splitlines() if line.strip()), "")
            print(
                f"prefkern {verb}: error: torch cannot compile the model's code here ({reason}); "
                "another --attn-implementation may need no compiler (--debug shows where).",
                file=sys.stderr,
            )
            return USER_ERROR
        if debug or not _is_out_of_memory(error):
            raise
        print(
            f"prefkern {verb}: error: out of memory ({_one_line(error)}): lower the batch size, "
            "token_budget or max_length.",
            file=sys.stderr,
        )
        return USER_ERROR


def _overview() -> str:
    lines = ["usage: prefkern VERB [OPTIONS]     (prefkern VERB --help shows the options)", ""]
    lines += [f"  {name:<11} {text}" for name, (_, text) in VERBS.items()]
    return "\n".join(lines)


def _one_line(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed; install it with: pip install 'prefkern[train]'"
    return " ".join(str(error).split())


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """torch's are RuntimeErrors, of a class of their own on devices and with a text on the host;
    torch is not imported here for a name alone."""
    own = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return own or "DefaultCPUAllocator" in str(error)


def _is_missing_extra(error: ImportError) -> bool:
    """True for an absent third-party package, False for a fault of ours or of an installed one."""
    if isinstance(error, ModuleNotFoundError):
        return not (error.name or "").startswith("prefkern")
    return "prefkern[train]" in str(error)


# Verbs that load a model.


def _configure(verb: str, args: list[str]) -> tuple[Any, Any]:
    """(TrainConfig, Command) from an optional YAML file and flags."""
    from ..train import require_train_extra

    require_train_extra()
    from .options import parse

    return parse(verb, args)


def _train(args: list[str]) -> int:
    config, command = _configure("train", args)
    from ..train import train
    from ..train.recipes.prepared import prepared_run
    from ..train.recipes.rounds import describe_rounds
    from ..train.run import describe

    if command.dry_run:
        print(describe_rounds(config) if config.has_rounds else describe(prepared_run(config)))
        return 0
    final = train(config)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps({k: v for k, v in final.items() if k != "log_history"}))
    return 0


def _eval(args: list[str]) -> int:
    config, command = _configure("eval", args)
    from ..train.evaluate import evaluate
    from ..train.recipes.prepared import prepared_run
    from ..train.together import ended_together

    if config.eval_dataset is not None:  # the training data are not needed
        config = dataclasses.replace(
            config,
            dataset=config.eval_dataset,
            dataset_split=config.eval_split,
            limit=config.eval_limit,
            eval_dataset=None,
        )
    with ended_together():
        run = prepared_run(config, training=False)
        found = evaluate(run, run.examples)
    run.accelerator.end_training()
    if run.is_main:
        if command.json:
            print(json.dumps(found | {"data": run.facts["data"]}, indent=1))
        else:
            run.say(f"data: {run.report}")
            print(_table([(k, f"{v:.6g}") for k, v in found.items()], ("metric", "value")))
    return 0


def _precompute(args: list[str]) -> int:
    config, _ = _configure("precompute", args)
    from ..train.precompute import precompute

    paths = precompute(config)
    from accelerate import PartialState

    state = PartialState()
    if state.is_main_process:
        print(*paths, sep="\n")
    state.destroy_process_group()
    return 0


def _score(args: list[str]) -> int:
    from ..train import require_train_extra

    require_train_extra()
    from ..train.stored.options import ScoreConfig
    from .options import parse_table_options

    config = parse_table_options("score", ScoreConfig, args)
    from ..train.stored.score import score

    print(score(config))
    return 0


def _sample(args: list[str]) -> int:
    from ..train import require_train_extra

    require_train_extra()
    from ..train.stored.options import SampleConfig
    from .options import parse_table_options

    config = parse_table_options("sample", SampleConfig, args)
    from ..train.stored.sample import write_samples

    print(write_samples(config))
    return 0


def _merge(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="prefkern merge",
        description="One LoRA adapter that is the weighted sum of several on the same base model.",
    )
    parser.add_argument("adapters", nargs="+", help="folders of runs with lora_r")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--weights", nargs="+", type=float, help="one each (default: the mean)")
    options = parser.parse_args(args)
    from ..train import require_train_extra

    require_train_extra()
    from ..train.recipes.merge import merge_adapters

    print(merge_adapters(options.adapters, options.output_dir, options.weights))
    return 0


# The other verbs.


def _losses(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="prefkern losses", description="The losses, or one of them in full."
    )
    parser.add_argument("name", nargs="?", help="show this loss: formula, arguments, source")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true", help="the page docs/losses.md")
    options = parser.parse_args(args)
    from .. import losses

    if options.markdown:
        from ..losses.page import page

        print(page(), end="")
        return 0
    if options.name is not None:
        record, fixed = losses.resolve(options.name)
        print(inspect.getdoc(record.fn))
        arguments = losses.arguments(record)
        needed = losses.required(record)
        rows = [
            (name, "required" if name in needed else repr(fixed.get(name, parameter.default)))
            for name, parameter in arguments.items()
        ]
        print("\n" + _table(rows, ("argument", "default")))
        print(f"\nstatus: {record.status}\nsource: {record.source}")
        for part in record.parts:
            print(f"in training, only with {part.how}; without it {part.without}")
        return 0
    found: list[dict[str, str]] = []
    for name, record in losses.LOSSES.items():
        found.append(
            {
                "loss": name,
                "family": record.family,
                "reference": "yes" if record.needs_reference else "no",
                "statistics": ", ".join(record.stats),
                "needs": ", ".join(losses.required(record)),
                "source": record.source,
                "status": record.status,
            }
        )
    if options.json:
        aliases = {name: {"loss": t, **fixed} for name, (t, fixed) in losses.ALIASES.items()}
        print(json.dumps({"losses": found, "aliases": aliases}, indent=1))
        return 0
    print(_table([tuple(row.values()) for row in found], tuple(found[0])))
    for name, (target, fixed) in losses.ALIASES.items():
        extra = "".join(f" {key}={value}" for key, value in fixed.items())
        print(f"{name} (TRL's name): {target}{extra}")
    return 0


def _plot(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="prefkern plot", description="PNG curves of one run, or of several on one picture."
    )
    parser.add_argument("runs", nargs="+", help="output folders, or log_history.jsonl files")
    parser.add_argument("--output-dir", help="where the pictures go (default: the first run)")
    options = parser.parse_args(args)
    from ..train.plots import plot_history

    files = [p / "log_history.jsonl" if p.is_dir() else p for p in map(Path, options.runs)]
    out = Path(options.output_dir or files[0].parent)
    plotted = plot_history({run: file for run, file in zip(options.runs, files, strict=True)}, out)
    if not plotted.files:
        raise ValueError(f"nothing to draw: {'; '.join(plotted.notes)}")
    print(plotted)
    return 0


def _view(args: list[str]) -> int:
    config, command = _configure("view", args)
    from ..integrations.token_pictures import write_html, write_png
    from ..train.output import check_writable, writing
    from ..train.run import prepare
    from ..train.token_view import view_example

    folder = Path(config.output_dir)
    check_writable(folder)
    run = prepare(config, training=False)
    if not 0 <= command.row < len(run.examples):
        raise ValueError(
            f"--row must be in [0, {len(run.examples)}), the rows that were kept, got "
            f"{command.row}."
        )
    view = view_example(run, run.examples[command.row])
    for write, name in ((write_png, "tokens.png"), (write_html, "tokens.html")):
        if run.is_main:
            with writing(folder / name):
                print(write(view, folder / name))
    return 0


def _env(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="prefkern env",
        description="Versions, this machine, and which backend is on, or why not.",
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="numerical self-test of every backend")
    options = parser.parse_args(args)
    from . import env_report

    return env_report.run(as_json=options.json, check=options.check)


def _bench(args: list[str]) -> int:
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise ValueError(
            "the benchmarks are in the source tree, not in the installed package; run this in a "
            "clone installed with pip install -e ."
        )
    # A process of its own: the benchmark sets threads and backends before it imports torch.
    return subprocess.call([sys.executable, "-m", "benchmarks", *args], cwd=root)


def _demo(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="prefkern demo",
        description="Trains a small model from a generated task; minutes on a CPU.",
    )
    parser.add_argument("--output-dir", default="prefkern-demo")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(args)
    from ..train import require_train_extra

    require_train_extra()
    from ..train.demo import DemoSettings, run_demo

    run_demo(options.output_dir, DemoSettings(seed=options.seed))
    return 0


def _table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> str:
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, tuple("-" * width for width in widths), *rows]
    ]
    return "\n".join(lines)


VERBS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (_train, "train a causal language model from preferences"),
    "eval": (_eval, "measure a model on held-out preferences"),
    "precompute": (_precompute, "write reference log-probabilities for later runs"),
    "score": (_score, "put scores of stored answers into columns of a new file"),
    "sample": (_sample, "sample answers of a model to stored prompts"),
    "merge": (_merge, "add up the adapters of several runs"),
    "losses": (_losses, "list the losses, or show one"),
    "plot": (_plot, "draw the curves of finished or running runs"),
    "view": (_view, "draw one row token by token: log-ratios, KL, weights"),
    "env": (_env, "what this installation can do, and why not more"),
    "bench": (_bench, "run the benchmarks of a source tree"),
    "demo": (_demo, "watch a small model learn a generated task"),
}
