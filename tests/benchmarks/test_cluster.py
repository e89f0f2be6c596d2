"""The account of many GPUs and the page made of it."""

from __future__ import annotations

import socket
import sys

import pytest

from benchmarks import cluster, ranks
from benchmarks.sharded_call import Call
from benchmarks.traffic import wire_bytes

CARD = cluster.CARDS["141 GB"]


def test_the_page_holds_what_the_script_computes():
    """After a change: python -m benchmarks.cluster"""
    text = cluster.PAGE.read_text(encoding="utf-8")
    assert text == cluster.page(text)
    with pytest.raises(ValueError, match="no marks"):
        cluster.page("")


def test_sharding_moves_products_and_adds_none():
    for tokens in ("same", "own"):
        whole = Call(("logp", "fkl"), 4096, 2**18, 64, 1, ref_D=32)
        for world in (2, 8, 64):
            n = 4096 if tokens == "same" else 4096 // world
            part = Call(("logp", "fkl"), n, 2**18, 64, world, tokens, ref_D=32)
            for name, flop in whole.products().items():
                assert part.products()[name] * world == flop
            # all that is not kept is computed again: once for each model that the gradient reads
            assert part.again(0) * world == whole.products()["forward"]
            assert part.again(1 << 50) == 0


def test_traffic_of_a_token_is_the_statistics_alone():
    """2 sums and a logit for logp; 7 numbers with the reference and fkl, as the ops' docs say."""
    assert [x.size for x in Call(("logp",), 1, 10**6, 64, 8, itemsize=4).forward()] == [24]
    both = ("logp", "ref_logp", "fkl")
    (sums,) = Call(both, 1, 10**6, 64, 8, ref_D=64, itemsize=4).forward()
    assert sums.size == 56
    for stats in (both, ("jsd:0.5",), ("bkl:4",)):
        calls = [Call(stats, 16, v, 64, 8, ref_D=64) for v in (1000, 10**6)]
        assert calls[0].forward() == calls[1].forward()
        assert calls[0].backward() == calls[1].backward()


@pytest.mark.parametrize("plan", cluster.PLANS, ids=lambda plan: plan.name)
def test_items_of_a_rank(plan):
    """Against figures worked out by hand for 256 GPUs, all parameters trained."""
    rank = cluster.Rank(256, plan, True, "sharded")
    items = rank.memory(CARD)
    every = 126 * (2 * 16384**2 + 2 * 16384 * 1024 + 3 * 16384 * 53248) + 2 * 2**32
    assert items["states"] == every * 16 / 256 and items["reference"] == every * 2 / 256
    work = rank.products(CARD)
    assert work["body"] == 8.0 * (every - 2 * 2**32) * 4096
    assert work["head"] == pytest.approx(4 * 2.0 * 4096 * 2**18 * 16384, rel=1e-12)
    # gathered three times by each rank (forward, backward, reference), summed once in fp32
    if plan.group == 1:
        sent, layers = rank.traffic(), (every - 2 * 2**32) * 255 / 256
        assert sent["body", "all_gather"] == pytest.approx(2 * 2 * layers)
        assert sent["body", "reduce_scatter"] == pytest.approx(4 * layers)
        assert sent["reference's body", "all_gather"] == pytest.approx(2 * layers)
        assert sent["head", "all_gather"] == pytest.approx(4 * 2 * 2**32 * 255 / 256)
    assert rank.needs(CARD) < sum(items.values())
    assert rank.needs(CARD) > cluster.Rank(512, plan, True, "sharded").needs(CARD)
    assert rank.needs(CARD) > cluster.Rank(256, plan, True, "precomputed").needs(CARD)


def test_ring_bytes():
    """What 4 ranks send one another in a ring of 3 (all-gather, reduce-scatter) or 6 steps."""
    assert wire_bytes("all_gather", 100, 4) == 300
    assert wire_bytes("reduce_scatter", 400, 4) == 300
    assert wire_bytes("all_reduce", 400, 4) == 600
    assert all(wire_bytes(name, 8, 1) == 0 for name in cluster.COLLECTIVES)


def test_rows(tmp_path):
    written = cluster.write(tmp_path).read_text().splitlines()
    assert written[0] == ",".join(cluster.COLUMNS)
    assert len(written) > len(cluster.GPUS) * len(cluster.PLANS) * len(cluster.kinds()) * 10


@pytest.mark.skipif(sys.platform != "linux", reason="asks the sockets as Linux answers")
def test_bytes_that_sockets_received():
    before = ranks.received()
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as sender,
        server.accept()[0] as reader,
    ):
        sender.sendall(b"x" * 12_345)
        while len(reader.recv(1 << 16, socket.MSG_PEEK)) < 12_345:
            pass
        assert ranks.received() - before == 12_345


def test_the_measured_steps_have_the_same_products():
    for case, tokens in ranks.CASES:
        work = [
            world * sum(ranks.call_of(case, tokens, world).products().values())
            for world in ranks.WORLDS
        ]
        assert len(set(work)) == 1
