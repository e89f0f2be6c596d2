"""A head sharded over 1, 2 and 4 gloo ranks of this machine: work and traffic of a rank.

CPU seconds of a rank's process over those of the whole head on one, formed inside a round; R times
that is the work of all ranks, 1 if sharding cost nothing. Waiting costs no CPU, so ranks may share
cores. Traffic is what a rank handed to collectives (benchmarks/traffic.py) and what its sockets
received.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .process import worker_environment
from .results import ROOT, Row, Table
from .sharded_call import Call
from .traffic import traffic, wire_bytes

WORLDS = (1, 2, 4)
N, D, V = 512, 512, 32_000
DIVERGENCE = ("logp", "ref_logp", "fkl")
CASES = (("logp", "same"), ("logp", "own"), ("divergence", "same"), ("divergence", "own"))
COLUMNS = ("case", "tokens", "ranks", "N", "D", "V", "dtype", "rounds", "cpu_s", "share", "work",
           "work_least", "work_most", "collectives", "handed_over", "ring_bytes",
           "received")  # fmt: skip


def call_of(case: str, tokens: str, world: int) -> Call:
    two = case == "divergence"
    return Call(
        DIVERGENCE if two else ("logp",), N if tokens == "same" else N // world, V, D, world,
        tokens, ref_D=D if two else 0, itemsize=4, folds_wide=True,
    )  # fmt: skip


def received() -> int:
    """Bytes that the TCP sockets of this process received; 0 where the system does not say."""
    total = 0
    for entry in Path("/proc/self/fd").glob("*") if Path("/proc/self/fd").exists() else ():
        try:
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as one:
                if one.type == socket.SOCK_STREAM and one.family != socket.AF_UNIX:
                    info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
                    total += struct.unpack_from("<Q", info, 128)[0]  # tcpi_bytes_received
        except OSError:
            continue
    return total


def step_of(call: Call, rank: int, group: Any) -> Any:
    """A function that runs one step, forward and backward."""
    import torch

    import prefkern
    from prefkern import Head, Shard

    g = torch.Generator().manual_seed(0)
    start = min(rank * call.vocabulary, V)
    rows = slice(start, min(start + call.vocabulary, V))
    mine = slice(0, N) if call.tokens == "same" else slice(rank * call.n, (rank + 1) * call.n)
    weight, hidden = torch.randn(V, D, generator=g) * 2 * D**-0.5, torch.randn(N, D, generator=g)
    targets = torch.randint(0, V, (N,), generator=g)[mine]
    ref_hidden = (hidden + 0.05 * torch.randn(N, D, generator=g))[mine].contiguous()
    shard = Shard(call.tokens, group, start, V) if call.ranks > 1 else None
    own = weight[rows].clone().requires_grad_()
    reference = Head(weight[rows].clone(), shard=shard)
    leaf = hidden[mine].clone().requires_grad_()

    def step() -> None:
        head = Head(own, shard=shard)
        if call.ref_D:
            out = prefkern.linear_divergence(
                leaf, head, targets, ref_hidden, reference, stats=call.stats, backend="cpu"
            )
            loss = out.logp.sum() + out.fkl.sum()
        else:
            loss = prefkern.linear_logps(leaf, head, targets, backend="cpu").logp.sum()
        loss.backward()
        own.grad = leaf.grad = None

    return step


def worker(rank: int, rounds: int, store: str) -> None:
    """One rank of the largest world, and of the smaller ones it belongs to: prints a line of JSON,
    {case: {ranks: {seconds of every round, calls, received}}}."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    most = max(WORLDS)
    dist.init_process_group("gloo", store=dist.FileStore(store, most), rank=rank, world_size=most)
    groups = {world: dist.new_group(list(range(world))) for world in WORLDS}
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for case, tokens in CASES:
        mine = [world for world in WORLDS if rank < world]
        steps = {w: step_of(call_of(case, tokens, w), rank, groups[w]) for w in mine}
        seen: dict[int, dict[str, Any]] = {}
        for world in WORLDS:
            if world in steps:
                steps[world]()
                before = received()
                with traffic() as counted:
                    steps[world]()
                seen[world] = {"calls": counted.calls, "received": received() - before, "cpu_s": []}
            dist.barrier()
        for _ in range(rounds):
            for world in WORLDS:
                if world in steps:
                    begin = time.process_time()
                    steps[world]()
                    seen[world]["cpu_s"].append(time.process_time() - begin)
                dist.barrier()  # the others wait, which costs no CPU
        found[f"{case}, {tokens}"] = seen
    print(json.dumps(found), flush=True)
    os._exit(0)


def start(rounds: int) -> list[dict[str, dict[str, Any]]]:
    """What each rank found.

    Raises:
        RuntimeError: a rank failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.ranks"]
        env = {**os.environ, **worker_environment(1, keep_memory=True), "GLOO_SOCKET_IFNAME": "lo"}
        ranks = [
            subprocess.Popen(
                [*command, str(rank), str(rounds), f"{folder}/store"], cwd=ROOT, env=env, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for rank in range(max(WORLDS))
        ]  # fmt: skip
        ended = [rank.communicate(timeout=1800) for rank in ranks]
    for rank, (_, errors) in zip(ranks, ended, strict=True):
        if rank.returncode:
            raise RuntimeError(f"a rank ended: {errors[-2000:]}")
    return [json.loads(text.strip().splitlines()[-1]) for text, _ in ended]


def measure(rounds: int) -> list[Row]:
    """The same processes run every world in turn, round by round."""
    ranks, found = start(rounds), []
    for case, tokens in CASES:
        seen = [rank[f"{case}, {tokens}"] for rank in ranks]
        whole = seen[0]["1"]["cpu_s"]
        for world in WORLDS:
            own = [one[str(world)] for one in seen[:world]]
            each = [
                statistics.mean(times) for times in zip(*(r["cpu_s"] for r in own), strict=True)
            ]
            work = sorted(world * a / b for a, b in zip(each, whole, strict=True))
            calls = own[0]["calls"]
            found.append({
                "case": case, "tokens": tokens, "ranks": world, "N": N, "D": D, "V": V,
                "dtype": "float32", "rounds": rounds, "cpu_s": statistics.median(each),
                "share": statistics.median(work) / world, "work": statistics.median(work),
                "work_least": work[0], "work_most": work[-1], "collectives": len(calls),
                "handed_over": sum(size for _, size in calls),
                "ring_bytes": round(sum(wire_bytes(n, s, world) for n, s in calls)),
                "received": own[0]["received"],
            })  # fmt: skip
    return found


def run(out: Path, rounds: int) -> Path:
    """Measures and writes `out`/ranks.csv."""
    table = Table(out / "ranks.csv", COLUMNS)
    table.add(measure(rounds))
    return table.path


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="one rank of `python -m benchmarks --cases ranks`")
    for name in ("rank", "rounds", "store"):
        p.add_argument(name, type=str if name == "store" else int)
    args = p.parse_args()
    worker(args.rank, args.rounds, args.store)
