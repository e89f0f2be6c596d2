"""Timing on a CPU and on a GPU: the two devices, and interleaved rounds over any of them.

Nothing else asks what device it is on: a device says how long calls take, what memory they need and
whether it still answers.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

Call = Callable[[], object]


class Sample(NamedTuple):
    """Seconds of one round: the whole, all CPU threads together (nan on a GPU), the first call."""

    wall: float
    cpu: float
    first: float


class DeviceLost(RuntimeError):
    """The device answers no more (a bad launch ends a CUDA context); only a new process goes on."""


class Cpu:
    kind = tensors = "cpu"
    free_bytes: int | None = None  # not limited here

    def laps(self, calls: Sequence[Call]) -> Sample:
        marks, cpu = [time.perf_counter()], time.process_time()
        for call in calls:
            call()
            marks.append(time.perf_counter())
        return Sample(marks[-1] - marks[0], time.process_time() - cpu, marks[1] - marks[0])

    def seconds(self, call: Call) -> float:
        return self.laps([call]).wall

    def replayed(self, call: Call, repeats: int = 20, rounds: int = 7) -> float:
        """Median seconds of one call; on a GPU inside a replayed graph of `repeats` calls."""
        call()
        return statistics.median(self.seconds(call) for _ in range(rounds))

    def settle(self) -> None:
        gc.collect()

    def check(self) -> None:
        """Raises DeviceLost where nothing can run any more."""

    def peak_bytes(self, call: Call) -> int | None:
        """Memory allocated at most during the call above what was before; None: not measured in
        this process (measure.memory_row does, in one of its own)."""
        return None

    def describe(self) -> dict[str, Any]:
        return {"gpu": ""}


class Cuda(Cpu):
    kind = tensors = "cuda"

    def __init__(self, api: Any = torch.cuda) -> None:
        self.api = api

    def laps(self, calls: Sequence[Call]) -> Sample:
        events = [self.api.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        events[0].record()
        for call, event in zip(calls, events[1:], strict=True):
            call()
            event.record()
        events[-1].synchronize()
        whole, first = (events[0].elapsed_time(events[i]) / 1e3 for i in (-1, 1))
        return Sample(whole, float("nan"), first)

    def replayed(self, call: Call, repeats: int = 20, rounds: int = 7) -> float:
        side, here = self.api.Stream(), self.api.current_stream()
        side.wait_stream(here)  # what the call reads may still be on its way
        with self.api.stream(side):
            for _ in range(3):
                call()
        here.wait_stream(side)
        graph = self.api.CUDAGraph()
        with self.api.graph(graph):
            for _ in range(repeats):
                call()
        graph.replay()
        return statistics.median(self.seconds(graph.replay) for _ in range(rounds)) / repeats

    def settle(self) -> None:
        gc.collect()
        self.api.empty_cache()

    def check(self) -> None:
        try:
            self.api.synchronize()
        except RuntimeError as error:
            raise DeviceLost(str(error).splitlines()[0]) from error

    def peak_bytes(self, call: Call) -> int:
        self.settle()
        self.check()
        before = self.api.memory_allocated()
        self.api.reset_peak_memory_stats()
        call()
        self.check()
        return self.api.max_memory_allocated() - before

    @property
    def free_bytes(self) -> int:
        self.settle()
        return self.api.mem_get_info()[0]

    def describe(self) -> dict[str, Any]:
        found = self.api.get_device_properties(0)
        return {
            "gpu": found.name, "multiprocessors": found.multi_processor_count,
            "memory_gib": round(found.total_memory / 2**30, 1), "cuda": torch.version.cuda,
        }  # fmt: skip


def device_of(kind: str) -> Cpu:
    return Cuda() if kind == "cuda" else Cpu()


def interleaved(
    runs: Mapping[str, Sequence[Call]], device: Cpu, rounds: int, reset: Call = lambda: None
) -> dict[str, list[Sample]]:
    """Samples of every run (a sequence of calls), one per round; each round visits all of them in
    an order shuffled anew, so that a clock that moves meanwhile moves all of them. `reset` comes
    before each, untimed."""
    samples: dict[str, list[Sample]] = {name: [] for name in runs}
    order, dice = list(runs), random.Random(0)
    gc.collect()
    gc.freeze()  # imported modules need not be walked by every collection below
    for _ in range(rounds):
        dice.shuffle(order)
        for name in order:
            reset()
            gc.collect()
            samples[name].append(device.laps(runs[name]))
    gc.unfreeze()
    return samples


def quartile(values: Sequence[float], which: int) -> float:
    if len(values) < 2:
        return values[0]
    return statistics.quantiles(values, n=4, method="inclusive")[which - 1]
