"""Inputs of the checks of sharded heads, and one call beside the whole head's."""

from __future__ import annotations

import torch
import torch.distributed as dist

import prefkern
from prefkern import Head, Shard

FP64 = torch.float64
ONE = ("logp", "lse", "zy", "ent", "col", "top1", "zmean", "xent")
TWO = (
    "logp", "lse", "ent", "col", "top1", "zmean", "ref_logp", "ref_lse", "fkl", "rkl", "jsd:0.3",
    "alpha:0.4", "renyi:0.6", "tv", "bkl:5", "mix:0.25", "ev",
)  # fmt: skip
V, D, DR, DA, R = 53, 12, 9, 7, 2
ALL = ("hidden", "weight", "bias", "u", "b")
LEFT = ("hidden", "u")  # of tokens; the others are of rows of the head


def draw(*shape, seed, dtype=FP64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=FP64).to(dtype)


def bounds(kind: str, world: int) -> list[int]:
    """First row of every rank and V: even, uneven, with an empty one, tiny ones, the last with
    nothing but padding."""
    if kind == "even":
        return [V * i // world for i in range(world)] + [V]
    if kind == "uneven":
        return [0, *(V - 3 * (world - 1 - i) for i in range(world - 1)), V]
    if kind == "empty":
        return [0, *([V // 2] * (world - 1)), V] if world > 2 else [0, V, V]
    if kind == "padding":
        return [0, *(V - 4 - (world - 2 - i) for i in range(world - 1)), V]
    return [0, *range(1, world), V]


class Case:
    """Inputs of all ranks; ranks that bring their own tokens have other numbers of them, and of
    three one brings none that counts."""

    def __init__(self, tokens: str, dtype, padded: bool):
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self.tokens, self.dtype = tokens, dtype
        counts = [7] if tokens == "same" else [4, 7, 1][: self.world]
        n = sum(counts)
        start = 0 if tokens == "same" else sum(counts[: self.rank])
        self.mine = slice(start, start + (7 if tokens == "same" else counts[self.rank]))
        self.hidden, self.ref_hidden = draw(n, D, seed=1), draw(n, DR, seed=2)
        self.weight, self.ref_weight = draw(V, D, seed=3), draw(V, DR, seed=4)
        self.aux_hidden, self.aux_weight = draw(n, DA, seed=12), draw(V, DA, seed=13)
        self.bias = draw(V, seed=5)
        # no logit of the reference is near 0, which a place that nobody fills might hold
        self.ref_bias = torch.full((V,), -20.0, dtype=dtype)
        if padded:
            self.bias[-4:] = -torch.inf
        self.u, self.b = draw(n, R, seed=6), draw(V, R, seed=7)
        self.targets = torch.randint(0, V - 4, (n,), generator=torch.Generator().manual_seed(8))
        self.targets[::4] = -100
        if tokens != "same" and self.world > 2:
            self.targets[counts[0] : counts[0] + counts[1]] = -100
        self.values = draw(V, seed=9)
        index = torch.randint(0, V - 4, (n, 3), generator=torch.Generator().manual_seed(10))
        self.teacher = index, torch.rand(n, 3, generator=torch.Generator().manual_seed(11))
        for name in ("hidden", "ref_hidden", "aux_hidden", "weight", "ref_weight", "aux_weight",
                     "bias", "u", "b"):  # fmt: skip
            setattr(self, name, getattr(self, name).to(dtype))

    def leaves(self, wanted, rows=slice(None), tokens=slice(None), dtype=None):
        """The policy's tensors; those `wanted` get a gradient."""
        return {
            name: getattr(self, name)[tokens if name in LEFT else rows]
            .to(dtype or self.dtype, copy=True)
            .requires_grad_(name in wanted)
            for name in ALL
        }

    def run(self, leaf, stats, ref, *, rows=slice(None), tokens=slice(None), shard=None, **options):
        """`ref`: "none", "whole" or "sharded". `ev` reads the third head where "aux" is given,
        else a number per column, of single columns where "sparse" is given."""
        dtype = leaf["hidden"].dtype
        head = Head(leaf["weight"], leaf["bias"], softcap=8.0, low_rank=[(leaf["u"], leaf["b"])],
                    shard=shard)  # fmt: skip
        aux, sparse = options.pop("aux", False), options.pop("sparse", False)
        if "xent" in stats or sparse:
            options["values"] = tuple(x[tokens] for x in self.teacher)
        elif "ev" in stats and not aux:
            options["values"] = self.values
        if ref == "none":
            out = prefkern.linear_logps(
                leaf["hidden"], head, self.targets[tokens], stats=stats, **options
            )
            return {s: getattr(out, s.partition(":")[0]) for s in stats}
        own = {} if ref == "whole" else {"shard": shard}
        part = slice(None) if ref == "whole" else rows
        if aux:
            options["aux_hidden"] = self.aux_hidden[tokens].to(dtype)
            options["aux_head"] = Head(self.aux_weight[part].to(dtype), scale=0.7, **own)
        out = prefkern.linear_divergence(
            leaf["hidden"], head, self.targets[tokens], self.ref_hidden[tokens].to(dtype),
            Head(self.ref_weight[part].to(dtype), self.ref_bias[part], temperature=1.1, **own),
            stats=stats, **options,
        )  # fmt: skip
        return {s: getattr(out, s.partition(":")[0]) for s in stats}

    def total(self, values, tokens):
        """A loss with another weight for every statistic and token."""
        n = self.hidden.shape[0]
        parts = [
            (x * draw(n, seed=20 + i, dtype=x.dtype)[tokens]).sum()
            for i, x in enumerate(values.values())
            if x.requires_grad
        ]
        return sum(parts)

    def whole(self, stats, wanted, ref, dtype=None, **options):
        """(values, gradients) of the head in one piece, of all tokens."""
        leaf = self.leaves(wanted, dtype=dtype)
        found = self.run(leaf, stats, ref, **options)
        self.total(found, slice(None)).backward()
        return found, {name: leaf[name].grad for name in wanted}

    def sharded(self, cuts, stats, wanted, ref, **options):
        """(values, gradients) of this rank's rows and tokens."""
        rows = slice(cuts[self.rank], cuts[self.rank + 1])
        shard = Shard(self.tokens, dist.group.WORLD, rows.start, cuts[-1])
        leaf = self.leaves(wanted, rows, self.mine)
        found = self.run(leaf, stats, ref, rows=rows, tokens=self.mine, shard=shard, **options)
        self.total(found, self.mine).backward()
        return found, {name: leaf[name].grad for name in wanted}

    def mine_of(self, name, gradient, cuts):
        """This rank's part of a whole head's gradient; where ranks are data parallel a head's is
        the mean over ranks."""
        if name in LEFT:
            return gradient[self.mine]
        part = gradient[cuts[self.rank] : cuts[self.rank + 1]]
        return part / (self.world if self.tokens == "own" else 1)


def check(case, kind, stats, wanted, ref, backend, atol, **options):
    """Values and gradients of the local shard against slices of the whole."""
    cuts = kind if isinstance(kind, list) else bounds(kind, case.world)
    shared = {name: options[name] for name in ("aux", "sparse") if name in options}
    values, grads = case.whole(stats, wanted, ref, backend="eager", **shared)
    got, found = case.sharded(cuts, stats, wanted, ref, backend=backend, **options)
    what = f"{kind} {stats} {wanted} {ref} {case.tokens} {case.dtype} {options}: "
    for name, value in got.items():
        torch.testing.assert_close(
            value, values[name][case.mine], rtol=0, atol=atol, equal_nan=True,
            msg=lambda m, name=name: f"{what}{name}: {m}",
        )  # fmt: skip
    for name in wanted:
        right = case.mine_of(name, grads[name], cuts)
        size = float(right.abs().max()) if right.numel() else 1.0
        torch.testing.assert_close(
            found[name], right, rtol=0, atol=20 * atol * max(1.0, size),
            msg=lambda m, name=name: f"{what}gradient of {name}: {m}",
        )  # fmt: skip
