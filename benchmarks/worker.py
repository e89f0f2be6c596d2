"""One measuring process: `python -m benchmarks.worker SPEC OUT`, both JSON files.

SPEC: {"mode": "time" | "memory", "case", "size", "threads", "variants", "rounds", "truth"}. OUT
receives a list of rows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from . import harness
from .cases import CASES
from .oracle import Truth
from .peers import VARIANTS


def work(spec: dict[str, Any]) -> list[harness.Row]:
    case = CASES[spec["case"]].resized(spec["size"])
    variants = [VARIANTS[name] for name in spec["variants"]]
    if spec["mode"] == "memory":
        return [harness.memory_row(case, variants[0])]
    truth = Truth(*torch.load(spec["truth"]))
    return harness.time_case(case, variants, truth, spec["rounds"])


def main() -> None:
    spec_file, out_file = (Path(arg) for arg in sys.argv[1:])
    rows = work(json.loads(spec_file.read_text()))
    out_file.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
