"""Horizontal bars on a logarithmic scale, as SVG that reads on light and on dark ground."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, LEFT, RIGHT, TOP = 960, 300, 110, 74
BAR, GAP, GROUP = 11, 3, 16  # heights: a bar, between bars, between groups
LEAST = 0.1  # seconds at the left edge
# Each stands out from white and from near-black.
COLOURS = ("#1f9d76", "#d08a1d", "#7a74d8", "#d0577a", "#4a90c2")
_STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #24292f } .dim { fill: #6b7480; font-size: 11px }
  .title { font-size: 15px; font-weight: 600 } line { stroke: #8c959f; stroke-opacity: .35 }
  @media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .dim { fill: #9aa4af } }
"""


class Bar(NamedTuple):
    """`seconds` None: not found until the end of the run."""

    group: str
    tool: str
    seconds: float | None


def draw(bars: Sequence[Bar], seconds: float) -> str:
    """One group of bars a fault, one colour a tool; what was not found runs to the end and fades."""
    tools = list(dict.fromkeys(b.tool for b in bars))
    groups = list(dict.fromkeys(b.group for b in bars))
    high = len(tools) * (BAR + GAP) + GROUP
    height = TOP + len(groups) * high + 34
    end = math.log10(seconds / LEAST)

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log10(max(value, LEAST) / LEAST) / end

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img" '
        f'aria-label="Seconds from a fault to the alarm, for each tool">',
        f"<style>{_STYLE}</style>",
        '<text class="title" x="16" y="26">Seconds from the fault to the alarm (logarithmic)</text>',
    ]
    for number, tool in enumerate(tools):
        at = 16 + number * 225
        out.append(f'<rect x="{at}" y="40" width="12" height="12" rx="2" fill="{COLOURS[number % len(COLOURS)]}"/>')
        out.append(f'<text x="{at + 18}" y="50">{escape(tool)}</text>')
    ticks = [t for t in (0.1, 1.0, 10.0, 60.0, 300.0, 1000.0) if t <= seconds]
    for tick in ticks:
        out.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP - 6}" y2="{height - 28}"/>')
        out.append(f'<text class="dim" x="{x(tick):.1f}" y="{height - 12}" text-anchor="middle">{tick:g} s</text>')
    for place, group in enumerate(groups):
        y = TOP + place * high
        out.append(f'<text x="{LEFT - 12}" y="{y + high / 2 - 4:.0f}" text-anchor="end">{escape(group)}</text>')
        for bar in (b for b in bars if b.group == group):
            number = tools.index(bar.tool)
            out += _bar(bar, y + number * (BAR + GAP), x, seconds, COLOURS[number % len(COLOURS)])
    return "\n".join([*out, "</svg>", ""])


def _bar(bar: Bar, y: float, x: Callable[[float], float], seconds: float, colour: str) -> list[str]:
    value = seconds if bar.seconds is None else bar.seconds
    faded = ' fill-opacity=".28"' if bar.seconds is None else ""
    label = f"not in {seconds:.0f} s" if bar.seconds is None else f"{value:.1f} s" if value >= 10 else f"{value:.2f} s"
    width = max(2.0, x(value) - LEFT)
    return [
        f'<rect x="{LEFT}" y="{y:.0f}" width="{width:.1f}" height="{BAR}" rx="2" fill="{colour}"{faded}/>',
        f'<text class="dim" x="{LEFT + width + 5:.1f}" y="{y + BAR - 1:.0f}">{label}</text>',
    ]
