"""The table of launches and the table of tiles: what may be launched, and that nothing else is."""

from __future__ import annotations

import ast
import enum
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import backends_on
from prefkern.kernels import launches, tiles

from prefkern import env

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "kernels"
interpreted = pytest.mark.skipif("triton" not in backends_on(), reason="the triton backend is off")


# ---- the guard


def fake(name="one", signature="*fp32 i64 fp32", **more) -> launches.Launch:
    return launches.Launch(name, "module:function", signature, "raise_rows b16", **more)


@pytest.fixture
def declared(monkeypatch):
    """LAUNCHES of three rows, and the list of what a kernel of theirs was launched with."""
    rows = (
        fake(constants={"FULL": False}),
        fake(constants={"FULL": True}),
        fake("two", "*bf16 none i32"),
    )
    monkeypatch.setattr(launches, "LAUNCHES", launches.by_name(rows))
    monkeypatch.setattr(launches, "_FOUND", {})
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: seen.append((grid, args, kwargs))

    monkeypatch.setattr(launches, "kernel_of", lambda name: Kernel())
    return seen


def test_a_declared_launch_gets_its_blocks(declared):
    x = torch.zeros(3)
    launches.launch("one", lambda meta: (meta["BLOCK_M"],), x, 7, 1.5, FULL=True)
    ((grid, args, kwargs),) = declared
    tile = tiles.tile("raise_rows", "b16", "interpreter")
    assert grid == (tile.blocks["BLOCK_M"],) and args[0] is x and args[1:] == (7, 1.5)
    assert kwargs == {"FULL": True, **tile.blocks, **launches.options(tile)}


def test_an_empty_grid_is_not_launched(declared):
    launches.launch("one", (0, 3), torch.zeros(0), 7, 1.5, FULL=True)
    assert not declared


X16, X32 = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2)


@pytest.mark.parametrize(
    ("name", "args", "constants", "row"),
    [
        ("one", (X16, 1, 2.0), {"FULL": True}, "'*bf16 i32 fp32'"),  # another dtype
        ("one", (X32, 1, 2.0), {}, "{}"),  # a constant is missing
        ("one", (X32, 1, 2.0), {"FULL": 2}, "{'FULL': 2}"),  # another constant
        ("one", (X32, 1), {"FULL": True}, "'*fp32 i32'"),  # an argument is missing
        ("two", (X16, X16, 1), {}, "'*bf16 *bf16 i32'"),  # a tensor where none was declared
        ("two", (X16, None, 2**31), {}, "'*bf16 none i64'"),  # a number too large for i32
        ("new", (X32, True), {}, "'*fp32 i1'"),  # an unknown kernel
    ],
)
def test_an_undeclared_launch_names_the_row_to_add(declared, name, args, constants, row):
    with pytest.raises(launches.UnknownLaunch, match="declares no such launch") as error:
        launches.launch(name, (1,), *args, **constants)
    assert f"Launch({name!r}" in str(error.value) and row in str(error.value)
    assert not declared


def sample(signature: str) -> list:
    """Arguments of these types."""
    dtypes = {f"*{name}": dtype for dtype, name in launches.TYPE_NAMES.items()}
    numbers = {"i32": 7, "i64": 2**31, "fp32": 1.5, "fp64": 1.5, "none": None, "i1": True}
    return [
        torch.zeros(1, dtype=dtypes[t]) if t in dtypes else numbers[t]
        for t in (word.partition(":")[0] for word in signature.split())
    ]


def answer(search, name, args, constants):
    try:
        return search(name, args, constants)
    except launches.UnknownLaunch as error:
        return str(error)


def test_signatures_of_different_launches_differ(monkeypatch):
    """Every row that is declared, and every neighbour of it in one argument or constant: what is
    remembered gives each the row, or the refusal, that a search gives, in either order."""
    kinds = ["*fp32", "*bf16", "*fp64", "*i64", "*i32", "i32", "i64", "fp32", "none", "i1"]
    tried = []
    for row in launches.ROWS:
        words = row.signature.split()
        tried.append((row.name, sample(row.signature), row.constants))
        for i in range(len(words)):
            for kind in kinds if row.name in ("fold_one", "list_pairs") else kinds[:2]:
                near = sample(" ".join((*words[:i], kind, *words[i + 1 :])))
                tried.append((row.name, near, row.constants))
        tried.append((row.name, sample(row.signature)[:-1], row.constants))
        tried += [(row.name, tried[-1][1], row.constants | {k: 2}) for k in row.constants]
    assert len(tried) > 500
    for order in (tried, tried[::-1]):
        monkeypatch.setattr(launches, "_FOUND", {})
        for launch in order:
            assert answer(launches.row_of, *launch) == answer(launches.find, *launch)
    assert len(launches._FOUND) >= len(launches.ROWS)


class Small(enum.IntEnum):
    ONE = 1
    MANY = 2**31


def test_numbers_are_told_apart_as_a_search_does():
    one = [launches.signature("one", (a,), {}) for a in (1, True, 1.0, None, 2**31, X32, X16)]
    assert len(set(one)) == len(one)
    assert len({launches.signature("one", (a,), {}) for a in Small}) == 2
    for a, b in ((1, 7), (X32, torch.ones(9)), (2**31, 2**40)):
        assert launches.signature("one", (a,), {}) == launches.signature("one", (b,), {})


def test_a_launch_is_searched_for_once(declared, monkeypatch):
    searched, find = [], launches.find

    def spy(*launch):
        searched.append(launch[0])
        return find(*launch)

    monkeypatch.setattr(launches, "find", spy)
    for full in (False, True, False, True):
        launches.launch("one", (1,), X32, 7, 1.5, FULL=full)
        with pytest.raises(launches.UnknownLaunch):
            launches.launch("one", (1,), X16, 7, 1.5, FULL=full)
    assert [kwargs["FULL"] for _, _, kwargs in declared] == [False, True, False, True]
    assert len(searched) == 2 + 4  # a refusal is not remembered


def test_what_is_no_kernel_argument_is_refused(declared):
    with pytest.raises(TypeError, match="tensors, numbers and None"):
        launches.launch("one", (1,), X32, "text", 1.0)


def test_candidates_are_timed_on_request_alone(declared, monkeypatch, capsys):
    """PREFKERN_AUTOTUNE times declared tiles once and keeps the fastest; without it, the first."""
    slow, fast = tiles.Tile({"B": 1}, 4, 1), tiles.Tile({"B": 2}, 4, 1)
    monkeypatch.setattr(launches.Launch, "tiles_on", lambda self, arch: (slow, fast))
    monkeypatch.setattr(launches.tiles, "arch_of", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(launches, "_WINNERS", {})
    timed = []

    def do_bench(run):
        run()
        timed.append(declared[-1][2]["B"])
        return 1.0 / timed[-1]

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    x = torch.zeros(3)
    launches.launch("one", (1,), x, 7, 1.5, FULL=True)
    assert declared[-1][2]["B"] == 1 and not timed
    monkeypatch.setenv("PREFKERN_AUTOTUNE", "1")
    for _ in range(2):
        launches.launch("one", (1,), x, 7, 1.5, FULL=True)
        assert declared[-1][2]["B"] == 2 and declared[-1][1][0] is x
    assert timed == [1, 2] and "B=2 warps=4 stages=1 (B=1" in capsys.readouterr().out
    assert "PREFKERN_AUTOTUNE" in env.VARIABLES


def test_kernels_are_launched_through_the_guard_alone():
    """`kernel[grid](...)` is written once, in launches.py; nobody autotunes at import."""
    for path in KERNELS.glob("*.py"):
        text = path.read_text()
        assert "triton.autotune" not in text, f"{path.name} autotunes"
        if path.name == "launches.py":
            continue
        calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
        direct = [n.lineno for n in calls if isinstance(n.func, ast.Subscript)]
        assert not direct, f"{path.name}:{direct[0]} launches a kernel past launches.py"


def test_the_tables_import_without_triton():
    code = (
        "import sys, prefkern, prefkern.kernels.launches, prefkern.kernels.tiles; "
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- the rows


def test_rows_are_well_formed():
    assert len({str(row) for row in launches.ROWS}) == len(launches.ROWS), "a row is there twice"
    known = {f"*{t}" for t in launches.TYPE_NAMES.values()} | {"i32", "i64", "fp32", "fp64", "none"}
    for row in launches.ROWS:
        assert set(row.types) <= known, row
        assert re.fullmatch(r"\w+:\w+", row.kernel), row
        assert (KERNELS / f"{row.kernel.partition(':')[0]}.py").exists(), row


@interpreted
def test_rows_match_their_kernels():
    """Every parameter is either a typed argument, a constant or a block; on every arch."""
    for row in launches.ROWS:
        names = launches.kernel_of(row.kernel).arg_names
        for arch in tiles.ARCHS:
            for tile in row.tiles_on(arch):
                fixed = {*row.constants, *tile.blocks}
                assert fixed <= set(names), f"{row} on {arch}: {fixed - set(names)}"
                assert len(names) - len(fixed) == len(row.types), f"{row} on {arch}"


# ---- the tiles


@pytest.mark.parametrize("arch", tiles.ARCHS)
def test_every_kernel_has_a_tile_that_fits(arch):
    for row in launches.ROWS:
        for tile in row.tiles_on(arch):
            sizes = [*tile.blocks.values(), tile.num_warps]
            assert sizes and all(n > 0 and n & (n - 1) == 0 for n in sizes), f"{row}: {tile}"
            assert 1 <= tile.num_warps <= 16 and 1 <= tile.num_stages <= 6, f"{row}: {tile}"


def test_every_line_of_the_table_is_used():
    used = {row.tile.split()[0] for row in launches.ROWS}
    assert {name for name, _, _ in tiles.table()} == used


def test_a_missing_tile_names_its_line():
    with pytest.raises(LookupError, match="no line `nothing b16 sm_90`; add it to TABLE"):
        tiles.tile("nothing", "b16", "sm_90")


def test_devices_map_to_their_class(monkeypatch):
    from types import SimpleNamespace

    for major, minor, arch in ((8, 0, "sm_80"), (9, 0, "sm_90"), (10, 0, "sm_100"), (8, 9, None)):
        properties = SimpleNamespace(major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i, p=properties: p)
        tiles.device_class.cache_clear()
        assert tiles.device_class(0) == (arch, f"sm_{major}{minor}")
    with pytest.raises(LookupError, match="this GPU is sm_89"):
        tiles.arch_of(torch.device("cuda", 0))
    tiles.device_class.cache_clear()
    assert tiles.arch_of(torch.device("cpu")) == "interpreter"
