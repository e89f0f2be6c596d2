"""Instructions on the hot path of a kernel's loop, from its machine code (cuobjdump -sass).

The path is the shortest cycle of basic blocks that does the work of one packet of logits: at least
so many exponentials (MUFU.EX2), 16-byte loads and stores. Ends of rows and caps lie on other paths,
which are longer or lack some of them.
"""

from __future__ import annotations

import heapq
import re
from collections import defaultdict
from typing import NamedTuple


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
    blocks, best = blocks_of(code), None
    heads = {n for first, block in blocks.items() for n in block.next if n <= first}
    for head in heads:
        queue, seen = [(0, head, Work(0, 0, 0), True)], set()
        while queue:
            length, at, done, start = heapq.heappop(queue)
            if not start and at == head and done == packet:
                best = length if best is None else min(best, length)
                break
            if (at, done, start) in seen or (best is not None and length >= best):
                continue
            seen.add((at, done, start))
            block = blocks[at]
            more = Work(*map(min, packet, map(sum, zip(done, block.work, strict=True))))
            for n in block.next:
                heapq.heappush(queue, (length + block.size, n, more, False))
    assert best is not None, f"no loop does {packet}"
    return best
