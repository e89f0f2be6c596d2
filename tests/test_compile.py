"""Every loss under torch.compile(fullgraph=True), with static and with dynamic shapes; programs of
torch.export that another process loads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from loss_batch import Batch

import prefkern
from prefkern import losses
from prefkern.backends import cpu

pytestmark = pytest.mark.filterwarnings("ignore:loss .* is provisional:UserWarning")
NAMES = [name for name, record in losses.LOSSES.items() if record.family != "diffusion"]
# One of every kind: a reference sweep, a KL, lists with an op of their own, tokens, a likelihood
# term. The rest takes minutes.
QUICK = ("dpo", "tdpo2", "infonca", "grpo", "orpo")


def check(name: str, dynamic: bool) -> None:
    """fullgraph=True, forward and backward, gives the numbers of eager mode."""
    torch._dynamo.reset()
    batch = Batch()

    def step(hidden, weight, targets, **args):
        return prefkern.preference_loss(hidden, weight, targets, loss=name, **args)[0]

    def run(f):
        leaves = [x.detach().clone().requires_grad_() for x in (batch.hidden, batch.weight)]
        loss = f(*leaves, batch.targets, **batch.arguments(name))
        loss.backward()
        return [loss.detach(), *(x.grad for x in leaves)]

    fast = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for got, want in zip(run(fast), run(step), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", QUICK)
def test_a_loss_compiles(name, dynamic):
    check(name, dynamic)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in QUICK])
def test_every_loss_compiles(name, dynamic):
    check(name, dynamic)


LOAD = """
import sys, torch, prefkern
program = torch.export.load(sys.argv[1]).module()
hidden, targets, want = torch.load(sys.argv[2])
for rows in (slice(None), slice(0, 3)):
    got = program(hidden[rows], targets[rows])
    assert torch.equal(got, want[rows]), (got, want[rows])
print("ok")
"""


def test_an_exported_program_loads_in_another_process(tmp_path):
    """Before any other call there: the ops exist, and their library loads, by the import. Before
    any other call here too: what the first call asks of the library is no part of the program."""

    class Scorer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(4, 11, bias=False)

        def forward(self, hidden, targets):
            return prefkern.linear_logps(hidden, self.head.weight, targets).logp

    model, hidden, targets = Scorer().eval(), torch.randn(6, 4), torch.arange(6)
    rows = torch.export.Dim("n")
    cpu.isa.cache_clear()
    with torch.no_grad():
        program = torch.export.export(
            model, (hidden, targets), dynamic_shapes={"hidden": {0: rows}, "targets": {0: rows}}
        )
        torch.save((hidden, targets, model(hidden, targets)), tmp_path / "numbers.pt")
    torch.export.save(program, tmp_path / "model.pt2")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "model.pt2"), str(tmp_path / "numbers.pt")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "ok", done.stderr[-2000:]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_numbers_of_a_call_may_be_symbolic(dynamic):
    """Under dynamic=True every float is, the defaults of our own functions among them."""
    torch._dynamo.reset()
    batch = Batch()

    def step(hidden, weight, targets, number):
        x, y = hidden.flatten(0, 1), targets.flatten().clamp(min=0)
        z = x @ weight.T
        found = [
            prefkern.logits_logps(z, y, temperature=number).logp,
            prefkern.selective_log_softmax(z, y[:, None], number)[:, 0],
            prefkern.linear_logps(x, prefkern.Head(weight, scale=number), y, tail_mass=0.1).logp,
        ]
        return sum(x.sum() for x in found)

    fast = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for number in (1.0, 0.5, 0.7):
        args = (batch.hidden, batch.weight, batch.targets, number)
        torch.testing.assert_close(fast(*args), step(*args))
