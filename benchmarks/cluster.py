"""The account on paper of many GPUs: products, traffic and memory of a rank, and which plan fits.

`python -m benchmarks.cluster` writes the tables of docs/distributed_costs.md between their marks;
`python -m benchmarks --cases cluster` writes results/cluster.csv. tests/distributed/test_traffic.py
counts the collectives of four ranks against `Call` and `Unit`.

Shapes: R ranks in groups of T, n tokens of a rank, V vocabulary, D hidden size, L layers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from .results import ROOT, Row, Table, read
from .sharded_call import Call, Sent
from .traffic import wire_bytes

GIB = 1 << 30
RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/distributed_costs.md"
GPUS = (8, 16, 32, 64, 128, 256, 512)
CARDS = {"80 GB": 79 * GIB, "141 GB": 139 * GIB}
USABLE = 0.9  # of a card; the rest is the driver's, the communication library's, fragmentation
V, D = 262_144, 16_384
TOKENS = 4096  # of a rank and step
LAYERS, FFN, KEYS = 126, 53_248, 1024  # the body: grouped keys and values of KEYS columns
RANK = 16  # of adapters
STATES = 16  # bytes of a trained number: fp32 master, two moments, gradient
COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce")
DIVERGENCE = ("logp", "ref_logp", "fkl")


class Unit(NamedTuple):
    """Parameters that FSDP2 gathers and reduces together, over `ranks`, resharded after forward."""

    size: float  # numbers
    ranks: int
    trained: bool = True
    itemsize: int = 2  # gathered in
    passes: int = 1  # forwards: policy, reference by the same weights

    def step(self) -> list[Sent]:
        """One forward each pass and one backward; gradients are summed in fp32."""
        own = self.size / self.ranks * self.itemsize
        found = [Sent("all_gather", own, "forward")] * self.passes
        found += [Sent("all_gather", own, "backward")] if self.passes else []
        return found + ([Sent("reduce_scatter", self.size * 4, "gradient")] if self.trained else [])


LAYER = 2 * D * D + 2 * D * KEYS + 3 * D * FFN
BODY = LAYERS * LAYER
TABLE_SIZE = V * D  # of the head, and of the embedding
# adapters of rank RANK on every projection of a layer: in and out widths of each
ADAPTERS = LAYERS * RANK * (2 * 2 * D + 2 * (D + KEYS) + 3 * (D + FFN))


class ParallelPlan(NamedTuple):
    """How a model lies on R ranks; the body is always sharded over all of them."""

    name: str
    group: int  # ranks that hold the vocabulary together; 1: the head is gathered like a layer
    tokens: str  # of the head, as in Shard
    body: bool  # the group shares each layer's products (tensor parallelism)


PLANS = (
    ParallelPlan("gathered", 1, "same", False),
    ParallelPlan("rows, own tokens", 8, "own", False),
    ParallelPlan("rows, same tokens", 8, "same", True),
    ParallelPlan("rows, sequence", 8, "sequence", True),
)


class Rank:
    """A rank of R under a plan; `reference`: "precomputed" log-probabilities, "shared" with the
    policy (its adapters off), "sharded" as a second model."""

    def __init__(self, gpus: int, plan: ParallelPlan, full: bool, reference: str) -> None:
        self.gpus, self.plan, self.full, self.reference = gpus, plan, full, reference

    @cached_property
    def call(self) -> Call:
        """Its head op. A group that shares its tokens has those of all its ranks."""
        group, tokens = self.plan.group, self.plan.tokens
        n = TOKENS * group if tokens == "same" else TOKENS
        two = self.reference != "precomputed"
        return Call(
            DIVERGENCE if two else ("logp",), n, V, D, group, tokens, ref_D=D if two else 0,
            trained=self.full,
        )  # fmt: skip

    @property
    def passes(self) -> int:
        return 2 if self.reference == "shared" else 1

    def _unit(self, size: float, trained: bool, passes: int) -> Unit:
        """Sharded over all ranks; each gathers what its group leaves it."""
        share = self.plan.group if self.plan.body else 1
        return Unit(size / share, self.gpus // share, trained, passes=passes)

    def products(self, card: int) -> dict[str, float]:
        """FLOP of a step: body with recomputed layers, the reference's body, and the head."""
        one = 2.0 * BODY * TOKENS  # a group that shares layers has the tokens of all its ranks
        found = {"body": one * (4 if self.full else 3)}
        if self.reference != "precomputed":
            found["reference's body"] = one
        again = self.call.again(self.call.memory(card)["logits kept"])
        return found | {"head": sum(self.call.products().values()) + again}

    def sent(self) -> Iterator[tuple[str, Sent, int]]:
        """(part, collective, ranks that take part) of a step."""
        models = [("body", self.full, self.passes)]
        if self.reference == "sharded":
            models.append(("reference's body", False, 0))
        for part, trained, passes in models:
            unit = self._unit(LAYER, trained, passes)
            steps = unit.step() or [Sent("all_gather", unit.size / unit.ranks * 2, "forward")]
            for sent in steps:
                yield part, sent._replace(size=sent.size * LAYERS), unit.ranks
            if self.plan.body:
                yield from self._tensor_parallel(part, backward=passes > 0)
        group, two = self.plan.group, self.reference == "sharded"
        head = Unit(TABLE_SIZE / group, self.gpus // group, self.full, passes=self.passes)
        for sent in head.step():
            yield "head", sent, head.ranks
        if two:  # in its own call, and (gathered) beside the policy's
            own = Sent("all_gather", head.size / head.ranks * 2, "forward")
            for sent in [own] * (2 if group == 1 else 1):
                yield "head", sent, head.ranks
        if group > 1:
            for sent in (*self.call.forward(), *self.call.backward()):
                yield "head", sent, group

    def _tensor_parallel(self, part: str, backward: bool) -> Iterator[tuple[str, Sent, int]]:
        """Two sums of hidden states a layer in each direction, and again where it is recomputed;
        of parts of the sequence each is a reduce-scatter and an all-gather."""
        group = self.plan.group
        times = 2 * LAYERS * ((self.passes + 2) if backward else 1)
        size = TOKENS * group * D * 2
        if self.plan.tokens == "sequence":
            yield part, Sent("reduce_scatter", times * size, "hidden states"), group
            yield part, Sent("all_gather", times * size // group, "hidden states"), group
        else:
            yield part, Sent("all_reduce", times * size, "hidden states"), group

    def traffic(self) -> dict[tuple[str, str], float]:
        """(part, collective) -> bytes sent by a rank in a step, by rings."""
        found: dict[tuple[str, str], float] = {}
        for part, sent, ranks in self.sent():
            key = (part, sent.collective)
            found[key] = found.get(key, 0.0) + wire_bytes(sent.collective, sent.size, ranks)
        return found

    def memory(self, card: int) -> dict[str, float]:
        """Bytes by item. Layers, head and embedding have their peak one after the other."""
        share = self.plan.group if self.plan.body else 1
        every = BODY + 2 * TABLE_SIZE
        states = every * STATES if self.full else every * 2 + ADAPTERS * STATES
        found = {"states": states / self.gpus}
        if self.reference == "sharded":
            found["reference"] = every * 2 / self.gpus
        # what enters each layer; a group without parts of the sequence holds all its tokens
        held = TOKENS * (share if self.plan.tokens == "same" else 1)
        found["activations"] = LAYERS * held * D * 2
        live = TOKENS * (6 * D + 4 * FFN) * 2 + held * 4 * D * 2  # a layer while it is recomputed
        # gathered with the next one; its gradient in bf16 and, to be summed, in fp32
        layer = LAYER / share * (2 * 2 + (2 + 4 if self.full else 0)) + live
        # the embedding is gathered, and its gradient is as large
        embedding = TABLE_SIZE / share * (2 + (2 + 4 if self.full else 0))
        head = dict(self.call.memory(card))
        if self.plan.group == 1 and self.full:
            head["fp32 to be summed"] = TABLE_SIZE * 4
        elif self.full:
            head["fp32 to be summed"] = TABLE_SIZE // self.plan.group * 4
        if self.reference == "shared":  # one head for both
            head["head rows"] //= 2
        peaks = {"layer": layer, "embedding": embedding, "head": float(sum(head.values()))}
        return found | peaks

    def needs(self, card: int) -> float:
        items = self.memory(card)
        peaks = [items.pop(name) for name in ("layer", "embedding", "head")]
        return sum(items.values()) + max(peaks)

    def fits(self, card: int) -> bool:
        return self.needs(card) <= USABLE * card


def kinds() -> list[tuple[bool, str]]:
    """(all parameters trained, reference); a shared one is the policy without its adapters."""
    return [(True, "precomputed"), (True, "sharded"), (False, "precomputed"), (False, "shared")]


# ---- tables --------------------------------------------------------------------------------------


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def head_table() -> str:
    """The op alone, for groups of 1 to 64 ranks with 4,096 tokens each."""
    rows = []
    for tokens in ("same", "own"):
        for ranks in (1, 2, 4, 8, 16, 64):
            if ranks == 1 and tokens == "own":
                continue
            n = TOKENS * ranks if tokens == "same" else TOKENS
            call = Call(DIVERGENCE, n, V, D, ranks, tokens, ref_D=D)
            sent = [wire_bytes(x.collective, x.size, ranks) for x in call.forward()]
            back = [wire_bytes(x.collective, x.size, ranks) for x in call.backward()]
            items = call.memory(CARDS["141 GB"])
            rows.append([
                f"{tokens}, {ranks}", f"{sum(call.products().values()) / 1e12:,.0f}",
                f"{sum(sent) / GIB:.3f}", f"{sum(back) / GIB:.2f}",
                f"{items['head rows'] / GIB:.2f}", f"{items['gradient of the head'] / GIB:.2f}",
                f"{(sum(items.values())) / GIB:.1f}",
            ])  # fmt: skip
    header = ["tokens, ranks", "TFLOP", "forward GiB", "backward GiB", "head rows GiB", "dW GiB",
              "memory GiB"]  # fmt: skip
    return _table(header, rows)


def statistics_table() -> str:
    """Bytes a token and rank hand over in the forward, whatever the vocabulary."""
    rows = []
    for stats, ref in (
        (("logp",), 0), (("logp", "ref_logp"), D), (DIVERGENCE, D),
        (("logp", "ref_logp", "fkl", "rkl", "ent"), D), (("logp", "jsd:0.5"), D),
        (("logp", "bkl:10"), D),
    ):  # fmt: skip
        call = Call(stats, 1, V, D, 8, ref_D=ref, itemsize=4)
        each = [f"{x.collective} {x.size:,}" for x in call.forward()]
        rows.append(
            [", ".join(stats), " + ".join(each), f"{sum(x.size for x in call.forward()):,}"]
        )
    return _table(["statistics", "collectives", "bytes"], rows)


def plans_table(full: bool, reference: str) -> str:
    """GiB a rank needs; bold where it fits the smaller card, italic the larger alone."""
    rows = []
    for gpus in GPUS:
        cells = []
        for plan in PLANS:
            rank, text = Rank(gpus, plan, full, reference), []
            need = rank.needs(CARDS["141 GB"])
            text = f"{need / GIB:,.0f}"
            if rank.fits(CARDS["80 GB"]):
                text = f"**{text}**"
            elif rank.fits(CARDS["141 GB"]):
                text = f"*{text}*"
            cells.append(text)
        rows.append([str(gpus), *cells])
    return _table(["GPUs", *(plan.name for plan in PLANS)], rows)


def fits_table() -> str:
    """The plan that sends least among those that fit."""
    rows = []
    for gpus in GPUS:
        cells = []
        for full, reference in kinds():
            for size in CARDS.values():
                fitting = [r for p in PLANS if (r := Rank(gpus, p, full, reference)).fits(size)]
                least = min(fitting, key=lambda r: sum(r.traffic().values()), default=None)
                cells.append("none" if least is None else least.plan.name)
        rows.append([str(gpus), *cells])
    names = [
        f"{'all' if full else 'LoRA'}, {ref}, {card}" for full, ref in kinds() for card in CARDS
    ]
    return _table(["GPUs", *names], rows)


def step_table(gpus: int = 256) -> str:
    """Products and traffic of a step, all parameters trained, reference sharded."""
    rows = []
    for plan in PLANS:
        rank = Rank(gpus, plan, True, "sharded")
        work, sent = rank.products(CARDS["141 GB"]), rank.traffic()
        whole = sum(size for (part, _), size in sent.items() if part != "head")
        head = {c: size for (part, c), size in sent.items() if part == "head"}
        rows.append([
            plan.name, *(f"{work[p] / 1e12:,.0f}" for p in ("body", "reference's body", "head")),
            f"{whole / GIB:,.0f}",
            *(f"{head.get(c, 0.0) / GIB:,.1f}" for c in COLLECTIVES),
        ])  # fmt: skip
    header = ["plan", "body TFLOP", "reference TFLOP", "head TFLOP", "bodies GiB",
              *(f"head {name} GiB" for name in COLLECTIVES)]  # fmt: skip
    return _table(header, rows)


def items_table(gpus: int = 256) -> str:
    """Memory by item in GiB, all parameters trained, reference sharded."""
    rows = []
    for plan in PLANS:
        items = Rank(gpus, plan, True, "sharded").memory(CARDS["141 GB"])
        rows.append([plan.name, *(f"{items[n] / GIB:,.1f}" for n in items)])
    return _table(["plan", *items], rows)


def measured_table() -> str:
    """results/ranks.csv, which `python -m benchmarks --cases ranks` makes."""
    cells = []
    for row in read(RESULTS / "ranks.csv"):
        work = f"{float(row['work']):.2f}"
        if row["ranks"] != "1":
            work += f" ({float(row['work_least']):.2f} to {float(row['work_most']):.2f})"
        cells.append([
            f"{row['case']}, {row['tokens']}", row["ranks"], f"{float(row['share']):.3f}", work,
            row["collectives"], f"{int(row['handed_over']):,}", f"{int(row['ring_bytes']):,}",
            f"{int(row['received']):,}",
        ])  # fmt: skip
    header = ["statistics, tokens", "ranks", "CPU of a rank", "work of all", "collectives",
              "bytes handed over", "by a ring", "received"]  # fmt: skip
    return _table(header, cells)


TABLES = {
    "head": head_table, "statistics": statistics_table, "step": step_table, "items": items_table,
    "fits": fits_table, "all-sharded": lambda: plans_table(True, "sharded"),
    "lora-shared": lambda: plans_table(False, "shared"), "measured": measured_table,
}  # fmt: skip


def page(text: str) -> str:
    """The page with its tables made anew: <!-- table NAME --> ... <!-- end -->.

    Raises:
        ValueError: a table without its marks.
    """
    for name, make in TABLES.items():
        before, start, rest = text.partition(f"<!-- table {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not start or not end:
            raise ValueError(f"the page has no marks of the table {name!r}.")
        text = f"{before}{start}{make()}\n{end}{after}"
    return text


# ---- rows ----------------------------------------------------------------------------------------
COLUMNS = ("gpus", "plan", "trained", "reference", "card", "what", "item", "value")


def rows() -> Iterator[Row]:
    """results/cluster.csv: FLOP, bytes sent by a ring and bytes of memory of a rank and step."""
    for gpus in GPUS:
        for plan in PLANS:
            for full, reference in kinds():
                rank = Rank(gpus, plan, full, reference)
                for card, size in CARDS.items():
                    own = {"gpus": gpus, "plan": plan.name, "trained": "all" if full else "LoRA",
                           "reference": reference, "card": card}  # fmt: skip
                    for what, found in (
                        ("FLOP", rank.products(size)), ("memory", rank.memory(size)),
                        ("sent", {" ".join(k): v for k, v in rank.traffic().items()}),
                        ("needs", {"memory": rank.needs(size)}),
                    ):  # fmt: skip
                        for item, value in found.items():
                            yield own | {"what": what, "item": item, "value": float(value)}


def write(out: Path) -> Path:
    table = Table(out / "cluster.csv", COLUMNS, place=False)
    table.add(rows())
    return table.path


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}")
    sys.exit(0)
