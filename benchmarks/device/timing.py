"""Interleaved timing on a device: events on a GPU, the host clock elsewhere."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def stopwatch(run: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    if device != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(
    runs: Mapping[str, Callable[[], object]], device: str, rounds: int, warm: int = 2
) -> dict[str, list[float]]:
    """Seconds per round of every run; each round visits all of them in shuffled order, so that a
    clock that moves during the measurement moves all of them."""
    for run in runs.values():
        for _ in range(warm):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order, dice = list(runs), random.Random(0)
    for _ in range(rounds):
        dice.shuffle(order)
        for name in order:
            seconds[name].append(stopwatch(runs[name], device))
    return seconds


def median_ratio(of: list[float], to: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def graph_seconds(run: Callable[[], object], repeats: int = 20, rounds: int = 7) -> float:
    """Median seconds of one call inside a replayed CUDA graph of `repeats` calls: kernel time
    without the host's launch time."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    graph.replay()
    return statistics.median(stopwatch(graph.replay, "cuda") for _ in range(rounds)) / repeats


def peak_bytes(run: Callable[[], object]) -> int:
    """Device bytes allocated at most during one call, above what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth(bytes_each: int = 4 << 30, rounds: int = 7) -> float:
    """Bytes per second of a device-to-device copy, counting bytes read and bytes written."""
    source = torch.randn(bytes_each // 4, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = statistics.median(
        stopwatch(lambda: target.copy_(source), "cuda") for _ in range(rounds)
    )
    return 2 * source.numel() * 4 / seconds


def product_rate(size: int = 8192, rounds: int = 7) -> float:
    """FLOP per second of a bf16 product of random square matrices."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(3):
        torch.mm(a, b, out=out)
    seconds = statistics.median(
        stopwatch(lambda: torch.mm(a, b, out=out), "cuda") for _ in range(rounds)
    )
    return 2 * size**3 / seconds
