"""Instructions on the hot path of a kernel, from its machine code (cuobjdump -sass).

Of a loop the path is the shortest cycle of basic blocks that does the work of one packet of logits:
at least so many exponentials (MUFU.EX2), 16-byte loads and stores. Ends of rows and caps lie on
other paths, which are longer or lack some of them. Of a kernel without a loop it is the shortest
path from its start to an exit that does the work of all logits of a thread.
"""

from __future__ import annotations

import heapq
import re
from collections import defaultdict
from typing import NamedTuple

# Most instructions per logit (of two models: per logit of both) on sm_90, (CUDA, Triton), of the
# kernels that every step runs.
MOST = {
    "fold_one_small": (10.5, 13.5),
    "fold_two_small": (34.0, 41.5),
    "gradient_one_small": (14.0, 17.5),
}


class Work(NamedTuple):
    """What is done for one packet, or in one basic block."""

    exponentials: int
    loads: int
    stores: int


class Block(NamedTuple):
    size: int
    work: Work
    next: set[int]  # blocks, by the index of their first instruction


def listings(text: str) -> dict[str, list[tuple[int, str]]]:
    """Mangled function -> (address, instruction) of `cuobjdump -sass`."""
    found: dict[str, list[tuple[int, str]]] = defaultdict(list)
    name = ""
    for line in text.splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            name = match[1]
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            found[name].append((int(match[1], 16), match[2]))
    return found


def blocks_of(code: list[tuple[int, str]]) -> dict[int, Block]:
    place = {address: i for i, (address, _) in enumerate(code)}

    def target(text: str) -> int | None:
        numbers = re.findall(r"0x([0-9a-f]+)", text)
        return place.get(int(numbers[-1], 16)) if numbers else None

    firsts, meeting = {0}, {}  # where a BSSY says that its barrier's BSYNC goes on
    for i, (_, text) in enumerate(code):
        if re.search(r"\b(BRA|BSSY)\b", text) and (goal := target(text)) is not None:
            firsts.add(goal)
        if re.search(r"\b(BRA|BSYNC|EXIT|RET)\b", text):
            firsts.add(i + 1)
        if match := re.search(r"\bBSSY\S*\s+(?:\S+\s+)?(B\d+)", text):
            meeting[i] = (match[1], target(text))
    order = sorted(i for i in firsts if i < len(code))
    found = {}
    for first, end in zip(order, [*order[1:], len(code)], strict=True):
        body, last = [text for _, text in code[first:end]], code[end - 1][1]
        following = set()
        conditional = last.startswith("@")
        if re.search(r"\bBRA\b", last):
            following.add(target(last))
            conditional |= bool(re.search(r"BRA(\.\w+)*\s+!?U?P\d", last))
        elif match := re.search(r"\bBSYNC\S*\s+(?:\S+\s+)?(B\d+)", last):
            before = [goal for i, (name, goal) in meeting.items() if name == match[1] and i < end]
            following.update(before[-1:])
        elif not re.search(r"\b(EXIT|RET)\b", last):
            conditional = True
        if conditional:
            following.add(end)
        found[first] = Block(
            len(body),
            Work(
                sum("MUFU.EX2" in x for x in body),
                sum("LDG" in x and ".128" in x for x in body),
                sum("STG" in x for x in body),
            ),
            {x for x in following if x is not None and x in firsts and x < len(code)},
        )
    return found


def instructions(code: list[tuple[int, str]], packet: Work) -> int:
    """Of the shortest cycle that does the work of a packet."""
    blocks = blocks_of(code)
    heads = {n for first, block in blocks.items() for n in block.next if n <= first}
    found = (_shortest(blocks, head, {head}, packet) for head in heads)
    best = min((length for length in found if length is not None), default=None)
    assert best is not None, f"no loop does {packet}"
    return best


def instructions_to_the_end(code: list[tuple[int, str]], everything: Work) -> int:
    """Of the shortest path from the start to an exit that does all the work of a thread."""
    blocks = blocks_of(code)
    ends = {
        first
        for first, block in blocks.items()
        if re.search(r"\bEXIT\b", code[first + block.size - 1][1])
    }
    length = _shortest(blocks, 0, ends, everything, through=True)
    assert length is not None, f"no path does {everything}"
    return length


def _shortest(
    blocks: dict[int, Block], start: int, ends: set[int], work: Work, *, through: bool = False
) -> int | None:
    """Instructions from a block to the first of `ends` that is reached with the work done; with
    those of that end where the path goes `through` it."""
    queue, seen = [(0, start, Work(0, 0, 0), True)], set()
    while queue:
        length, at, done, first = heapq.heappop(queue)
        block = blocks[at]
        more = Work(*map(min, work, map(sum, zip(done, block.work, strict=True))))
        if at in ends and (through or not first) and (more if through else done) == work:
            return length + (block.size if through else 0)
        if (at, done, first) in seen:
            continue
        seen.add((at, done, first))
        for n in block.next:
            heapq.heappush(queue, (length + block.size, n, more, False))
    return None
