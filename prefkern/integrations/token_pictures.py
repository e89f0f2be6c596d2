"""A `TokenView` as HTML and as PNG: a column a token, a row a measure, the number as colour.

Both break an answer into lines of the same tokens. No display is needed, and the HTML loads
nothing.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .token_view import AnswerTokens, Measure, TokenView

_SOURCE = "prefkern view"  # in each file: such a one may be drawn again
LINE = 92  # characters of a line, numbers and gaps counted; an eighth more to spare a line
NARROW = 5  # characters that a number takes
BLUE, ORANGE, VIOLET = (0, 114, 178), (213, 94, 0), (106, 61, 154)  # apart for the colour-blind
Colour = tuple[int, int, int]


class Scale(NamedTuple):
    """From a number to a colour; one scale per measure over all answers of a view."""

    middle: float
    reach: float  # distance from the middle at which a colour is full
    below: Colour
    above: Colour
    words: str

    def colour(self, value: float) -> Colour:
        if not math.isfinite(value):
            return (200, 200, 200)
        share = (value - self.middle) / self.reach if self.reach > 0 else 0.0
        full = self.above if share > 0 else self.below
        t = min(abs(share), 1.0) ** 0.8 * 0.85  # small numbers are seen, text stays readable
        red, green, blue = (round(255 + t * (c - 255)) for c in full)
        return red, green, blue

    def steps(self) -> list[Colour]:
        """The colours of a legend, from the lowest number on."""
        lowest = 0 if self.below == self.above else -6
        return [self.colour(self.middle + self.reach * k / 6) for k in range(lowest, 7)]


def write_html(view: TokenView, path: str | Path) -> Path:
    """Writes one self-contained page.

    Raises:
        ValueError: the file is there and is no such page.
    """
    path = _free(Path(path))
    body = [f"<h1>{html.escape(view.title)}</h1>"]
    body += [f'<p class="prompt">{html.escape(view.prompt)}</p>', '<div class="legend">']
    scales = scales_of(view)
    body += [f"<div>{_legend(name, scale)}</div>" for name, scale in scales.items()]
    body.append("</div>")
    for answer in view.answers:
        body.append(
            f"<h2>{html.escape(answer.name)} <small>{html.escape(sums(answer))}</small></h2>"
        )
        for part in lines(answer):
            body.append("<table><tr><th></th>" + "".join(
                f"<td class=t>{html.escape(answer.tokens[i])}</td>" for i in part
            ) + "</tr>")  # fmt: skip
            for measure in answer.measures:
                cells = "".join(_cell(measure, scales[measure.name], i) for i in part)
                body.append(f"<tr><th>{html.escape(measure.name)}</th>{cells}</tr>")
            body.append("</table>")
    path.parent.mkdir(parents=True, exist_ok=True)
    title = html.escape(view.title)
    page = _PAGE.format(source=_SOURCE, title=title, style=_STYLE, body="\n".join(body))
    path.write_text(page, encoding="utf-8")
    return path


def write_png(view: TokenView, path: str | Path) -> Path:
    """Writes the same as a picture.

    Raises:
        ValueError: the file is there and is no such picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = _free(Path(path))
    scales = scales_of(view)
    label = 1 + max(len(m.name) for a in view.answers for m in a.measures)  # characters
    used = max(sum(width(a, i) for i in part) for a in view.answers for part in lines(a) or [[]])
    texts = [len(sums(a)) for a in view.answers] + [min(len(view.prompt), LINE)]
    total = max(label + used, round(0.85 * max(texts)), 60)
    rows = list(_rows(view, label, total))
    height = sum(row.height for row in rows) + 0.6
    # 0.085 in a character of 7.5 pt monospace, 0.2 in a row
    figure = Figure(figsize=(0.085 * (total + 2), 0.2 * height), dpi=160)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(-0.5, total + 1.5)
    axes.set_ylim(height, 0.0)
    axes.set_axis_off()
    y = 0.3
    for row in rows:
        row.draw(axes, y, scales)
        y += row.height
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the software entry the same view gives the same bytes under every version.
    figure.savefig(path, metadata={"Software": None, "Source": _SOURCE}, facecolor="white")
    return path


def scales_of(view: TokenView) -> dict[str, Scale]:
    """The scale of every measure, over all answers."""
    names = dict.fromkeys(m.name for a in view.answers for m in a.measures)
    return {name: _scale([m for a in view.answers for m in a.measures if m.name == name])
            for name in names}  # fmt: skip


def _scale(measures: list[Measure]) -> Scale:
    values = [v for m in measures for v in m.values if math.isfinite(v)] or [0.0]
    low, high, kind = min(values), max(values), measures[0].kind
    reach = max(abs(low), abs(high))
    if kind == "signed":
        return Scale(
            0.0, reach, BLUE, ORANGE, f"{-reach:.2g} (blue), 0 (white), {reach:.2g} (orange)"
        )
    if kind == "weight" and low > 0 and high > 1:  # about 1: differences from 1 are what matters
        reach = max(abs(low - 1), abs(high - 1))
        words = f"{1 - reach:.2g} (blue), 1 (white), {1 + reach:.2g} (orange)"
        return Scale(1.0, reach, BLUE, ORANGE, words)
    colour, name = (VIOLET, "violet") if kind == "weight" else (ORANGE, "orange")
    return Scale(0.0, high, colour, colour, f"0 (white) to {high:.2g} ({name})")


def sums(answer: AnswerTokens) -> str:
    """What a sum over the answer is of each measure, and of the log-ratio under its weight."""
    found = {m.name: m.values for m in answer.measures}
    signs = {"signed": "+", "positive": ""}
    parts = [
        f"{m.name} {sum(m.values):{signs[m.kind]}.2f}"
        for m in answer.measures
        if m.kind != "weight"
    ]
    for m in answer.measures:
        if m.kind == "weight":
            of = (
                m.name.removeprefix("weight of ") if m.name != "weight" else answer.measures[0].name
            )
            total = sum(w * v for w, v in zip(m.values, found[of], strict=True))
            parts.append(f"weighted {of} {total:+.2f}")
    return f"{len(answer.tokens)} tokens; sums in nats: " + ", ".join(parts)


def width(answer: AnswerTokens, i: int) -> int:
    return max(len(_short(answer.tokens[i])), NARROW) + 1


def lines(answer: AnswerTokens) -> list[list[int]]:
    """Positions of the tokens of each line, lines of about one length."""
    found = _filled(answer, LINE + LINE // 8)
    for limit in range(LINE, 0, -1):
        shorter = _filled(answer, limit)
        if len(shorter) > len(found):
            break
        found = shorter
    return found


def _filled(answer: AnswerTokens, limit: int) -> list[list[int]]:
    found: list[list[int]] = []
    used = limit
    for i in range(len(answer.tokens)):
        if used + width(answer, i) > limit:
            found.append([])
            used = 0
        found[-1].append(i)
        used += width(answer, i)
    return found


def _short(text: str) -> str:
    return text if len(text) <= 18 else text[:17] + "\u2026"


def number(value: float) -> str:
    """At most five characters."""
    if not math.isfinite(value):
        return str(value)
    text = f"{value:.2f}"
    if len(text) > NARROW:
        text = f"{value:.1f}" if len(f"{value:.1f}") <= NARROW else f"{value:.0f}"
    if float(text) == 0:
        return "0" if value == 0 else "0.00"
    return text


# ---- html ----------------------------------------------------------------------------------------


def _legend(name: str, scale: Scale) -> str:
    swatches = "".join(f'<span style="background:{_css(c)}"></span>' for c in scale.steps())
    return f"<b>{html.escape(name)}</b> {swatches} <small>{html.escape(scale.words)}</small>"


def _cell(measure: Measure, scale: Scale, i: int) -> str:
    value = measure.values[i]
    colour = _css(scale.colour(value))
    return f'<td style="background:{colour}" title="{value:.6g}">{number(value)}</td>'


def _css(colour: Colour) -> str:
    return "#%02x%02x%02x" % colour  # noqa: UP031


_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
h1 { font-size: 20px } h2 { font-size: 16px; margin: 1.4em 0 .4em }
small { font-weight: normal; color: #666; font-size: 12px }
.prompt { white-space: pre-wrap; color: #444; border-left: 3px solid #ccc; padding-left: .8em }
.legend div { margin: 2px 0; font-size: 13px }
.legend span { display: inline-block; width: 14px; height: 12px; outline: 1px solid #ddd }
table { border-collapse: separate; border-spacing: 2px 1px; margin-bottom: 8px }
th { text-align: right; font: 12px system-ui, sans-serif; color: #666 }
th { padding-right: 8px; min-width: 11em }
td { text-align: center; font: 11px ui-monospace, monospace }
td { padding: 1px 4px; border-radius: 2px }
td.t { font-size: 13px; font-weight: 600 }
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="{source}">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""


# ---- png -----------------------------------------------------------------------------------------


class _Row(NamedTuple):
    height: float
    kind: str  # "text", "tokens", "measure"
    label: str
    answer: AnswerTokens | None = None
    part: tuple[int, ...] = ()
    measure: Measure | None = None
    indent: int = 0
    style: tuple[float, str, str] = (7.5, "normal", "0.15")  # size, weight, colour

    def draw(self, axes: Any, y: float, scales: dict[str, Scale]) -> None:
        size, weight, colour = self.style
        words = dict(fontsize=size, fontweight=weight, color=colour, va="center", parse_math=False)
        middle = y + 0.5 * min(self.height, 1.0)
        if self.kind == "legend":
            self._legend(axes, middle, scales[self.label])
            return
        if self.answer is None:
            axes.text(0, middle, _drawable(self.label), ha="left", family="DejaVu Sans", **words)
            return
        from matplotlib.patches import Rectangle

        if self.label:
            axes.text(
                self.indent - 1,
                middle,
                self.label,
                ha="right",
                fontsize=7,
                color="0.4",
                va="center",
            )
        x = float(self.indent)
        for i in self.part:
            w = width(self.answer, i)
            if self.measure is None:
                text = _drawable(_short(self.answer.tokens[i]))
                axes.text(
                    x + (w - 0.3) / 2, middle, text, ha="center", family="DejaVu Sans Mono", **words
                )
            else:
                value = self.measure.values[i]
                face = [c / 255 for c in scales[self.measure.name].colour(value)]
                axes.add_patch(Rectangle((x, y + 0.04), w - 0.3, 0.92, facecolor=face, linewidth=0))
                axes.text(
                    x + (w - 0.3) / 2, middle, number(value), ha="center", va="center", fontsize=6,
                    color="0.1", family="DejaVu Sans Mono",
                )  # fmt: skip
            x += w

    def _legend(self, axes: Any, middle: float, scale: Scale) -> None:
        from matplotlib.patches import Rectangle

        axes.text(
            self.indent - 1, middle, self.label, ha="right", fontsize=7, color="0.4", va="center"
        )
        for k, colour in enumerate(scale.steps()):
            face, at = [c / 255 for c in colour], self.indent + k
            box = Rectangle((at, middle - 0.35), 1.0, 0.7, facecolor=face, edgecolor="0.8", lw=0.3)
            axes.add_patch(box)
        axes.text(at + 2, middle, scale.words, ha="left", fontsize=7, color="0.4", va="center")


def _rows(view: TokenView, label: int, total: int) -> Iterator[_Row]:
    yield _Row(1.5, "text", view.title, style=(10.5, "bold", "0.1"))
    for line in _wrapped(view.prompt, total):
        yield _Row(1.0, "text", line, style=(8.0, "normal", "0.3"))
    yield _Row(0.4, "text", "")
    for name in scales_of(view):
        yield _Row(0.9, "legend", name, indent=label)
    for answer in view.answers:
        yield _Row(0.7, "text", "")
        yield _Row(1.2, "text", answer.name, style=(9.0, "bold", "0.1"))
        yield _Row(1.1, "text", sums(answer), style=(7.0, "normal", "0.4"))
        for part in lines(answer):
            yield _Row(
                1.1, "tokens", "", answer, tuple(part), indent=label, style=(7.5, "bold", "0.1")
            )
            for measure in answer.measures:
                yield _Row(1.0, "measure", measure.name, answer, tuple(part), measure, label)
            yield _Row(0.5, "text", "")


def _wrapped(text: str, columns: int) -> list[str]:
    import textwrap

    found = [line for part in text.splitlines() for line in textwrap.wrap(part, columns) or [""]]
    return found if len(found) <= 6 else [*found[:5], "\u2026"]


def _drawable(text: str) -> str:
    """Characters that the font lacks as a box, instead of a warning for each."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont("DejaVu Sans Mono"))
    return "".join(c if c == " " or font.get_char_index(ord(c)) else "\u25a1" for c in text)


def _free(path: Path) -> Path:
    if path.exists() and _SOURCE.encode() not in path.read_bytes()[:4096]:
        raise ValueError(f"{path} was not written by {_SOURCE} and is not replaced; move it away.")
    return path
