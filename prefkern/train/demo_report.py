"""What the demonstration says of itself, at its start and at its end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .demo_task import Data

MEASURES = (
    ("preference_accuracy", "right answer preferred over the wrong one"),
    ("greedy_right", "right answers, greedy"),
    ("sampled_right", "right answers, sampled"),
)


def introduction(data: Data, parameters: int) -> Iterator[str]:
    """The task, an example of it, the model, and what it reads first."""
    example = data.held_out[0]
    yield "The task: double each number. The common mistake: a wrong carry."
    yield f"  {example['prompt']}   right:{example['chosen']}   wrong:{example['rejected']}"
    yield f"The model: Llama, {parameters} random parameters, on one thread of the CPU."
    yield (
        f"\n1. Likelihood: {len(data.demonstrations)} demonstrations, half of all numbers in them "
        "wrong"
    )


def report(result: dict[str, Any], count: int) -> Iterator[str]:
    """The lines of a report, of the numbers that `run_demo` returns."""
    before, after = result["before"], result["after"]
    yield f"\n{f'On {count} held-out questions':44s} likelihood   tdpo2"
    for key, name in MEASURES:
        yield f"  {name:42s} {before[key]:10.3f}   {after[key]:.3f}"
    yield f"  {'always preferring the longer answer':42s} {result['length_baseline']:10.3f}"
    yield "Greedy answers, wrong numbers in brackets:"
    for row in result["answers"]:
        yield f"  {row['prompt']}"
        for when in ("before", "after"):
            yield f"    {when:6s} {_marked(row[when], row['right'])}"
    yield (
        f"KL from the likelihood model, nats per answer: {result['kl']['chosen']:.2f} on right, "
        f"{result['kl']['rejected']:.2f} on wrong ones"
    )
    yield (
        f"{result['likelihood']['tokens_per_second']:.0f} tokens/s in likelihood, "
        f"{result['tokens_per_second']:.0f} tokens/s in tdpo2 (policy and reference); "
        f"peak memory {result['peak_memory_mib']:.0f} MiB; {result['seconds']:.0f} s in all"
    )
    yield "Pictures: " + " ".join(result["pictures"])


def _marked(said: str, right: str) -> str:
    """The numbers of an answer, wrong ones in brackets."""
    pairs = zip(said.split(), right.split(), strict=True)
    return " ".join(a if a == b else f"[{a}]" for a, b in pairs)
