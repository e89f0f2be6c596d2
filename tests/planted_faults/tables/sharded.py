"""Faults of runs whose model several processes share (rows.of)."""

from __future__ import annotations

from rows import TESTS, TRAIN, Row, of

RANKS = f"{TESTS}test_sharded.py"

MUTANTS: list[Row] = [
    *of(
        f"{TRAIN}loop.py",
        RANKS,
        ("(run.world if real else 0.0)", "run.world"),
        ("(run.world if real else 0.0)", "float(real)"),
    ),
    *of(
        f"{TRAIN}optimizer.py",
        RANKS,
        ("    return whole(norm)\n", "    return local(norm)\n"),
    ),
    *of(
        f"{TRAIN}reference.py",
        RANKS,
        ("parameter.requires_grad_(flag)", "pass"),
        ("self.root(self._read, self.policy, batch)", "self._read(self.policy, batch)"),
    ),
    *of(
        f"{TRAIN}recipes/masks.py",
        RANKS,
        ("            fill_module(self.masks, drawn.state_dict())\n", ""),
    ),
    *of(
        f"{TRAIN}recipes/sync.py",
        RANKS,
        ('return {"reference": self.reference}', "return {}"),
        ("                reshard(model)\n", "                pass\n"),
    ),
    *of(
        f"{TRAIN}checkpoint.py",
        RANKS,
        ("if len(rng) != processes.accelerator.num_processes:", "if False:"),
        ("state = sharded_files.spread_state(state, parameters)", "pass"),
        ("seal(building, output.run, sums)", "seal(building, output.run)"),
    ),
    *of(
        f"{TRAIN}seals.py",
        RANKS,
        ("if name not in known]) | known", "if name not in known])"),
    ),
    *of(
        f"{TRAIN}resumed.py",
        RANKS,
        ("if before * each != now * run.config.gradient_accumulation_steps:", "if False:"),
    ),
    *of(
        f"{TRAIN}sharded_files.py",
        RANKS,
        ("if parameter.requires_grad or prefix in frozen:", "if prefix in frozen:"),
        ("sharded.fill(found[name], value)", "pass"),
    ),
    *of(
        f"{TRAIN}sharded.py",
        RANKS,
        ("if id(tensor) not in seen:", "if True:"),
        ("return model if is_sharded(model) else", "return"),
    ),
    *of(
        f"{TRAIN}together.py",
        RANKS,
        ("first = _watch[0].tell(error) if _watch else None", "first = None"),
        ("                os._exit(1)\n", "                pass\n"),
    ),
]
