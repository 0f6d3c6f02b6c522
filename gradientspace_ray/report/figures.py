"""Figures as inline SVG: plain functions from numbers to a string, coloured by the page's CSS variables.

Every text that comes from data is escaped here. A `data-tip` attribute is what the page shows under the pointer.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from gradientspace_ray.report.page import shorten

WIDTH = 720
CURVE_POINTS, CURVE_HITS, DOT_PX = 240, 30, 6
"""Most places of one curve that are drawn, and that answer the pointer; the room that a dot of it needs."""
PALETTE_SIZE = 12
LEFT_OUT = -1
"""Group of a dot that belongs to none."""
ROW_PX = 30
CHARACTER_PX = 7.2
"""Width of a character of the page's text, generous: fonts differ."""
NEGLIGIBLE = 1e-9
"""A span below this, or below this share of its ends, is rounding; stretched over an axis it would look like more."""


@dataclass(frozen=True)
class Range:
    """A mean with the ends of its interval."""

    name: str
    mean: float
    low: float
    high: float
    strong: bool = False
    """Drawn in the accent colour."""


@dataclass(frozen=True)
class Cell:
    """One cell of a matrix."""

    text: str
    tint: float = 0.0
    """-1 (good) to 1 (bad); the cell's colour, 0 is none."""
    strong: bool = False
    tip: str = ""


@dataclass(frozen=True)
class Curve:
    """The losses of one finetune."""

    name: str
    colour: str
    losses: Sequence[float]
    """Of each step, at least one."""
    heldout: Sequence[tuple[int, float]] = ()
    """(steps done, loss)."""
    kept: int | None = None
    """Steps done by the weights that were kept, one of those in `heldout`; None where they are the last."""


def colour(index: int) -> str:
    """The CSS colour of cluster or domain number `index`; grey for `LEFT_OUT`."""
    return "var(--none)" if index == LEFT_OUT else f"var(--c{index % PALETTE_SIZE})"


def scatter(
    points_N2: np.ndarray,
    groups_N: Sequence[int],
    tips_N: Sequence[str],
    other_groups_N: Sequence[int] | None = None,
) -> str:
    """The map: a dot for each example, coloured by its group; by its other group under the page's class `by-other`.

    Args:
        points_N2: places in 0 .. 1.
        groups_N: group (cluster) of each example, or `LEFT_OUT`; decides the colour.
        tips_N: what the page shows under the pointer.
        other_groups_N: a second grouping (domain); None when there is none.
    """
    height, margin = 460, 14
    radius = 5.0 if len(points_N2) <= 600 else 3.2 if len(points_N2) <= 2000 else 2.4
    others = groups_N if other_groups_N is None else other_groups_N
    dots = []
    for (x, y), group, other, tip in zip(points_N2.tolist(), groups_N, others, tips_N, strict=True):
        cx, cy = margin + x * (WIDTH - 2 * margin), margin + y * (height - 2 * margin)
        dots.append(
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{radius}" data-group="{group}" data-other="{other}"'
            f' style="--a:{colour(group)};--b:{colour(other)}" data-tip="{escape(tip)}"/>'
        )
    return _svg(height, "Map of gradient space", "".join(dots), "map")


def spectrum(singular_values: Sequence[float], energy_total: float) -> str:
    """Two panels: the share of the gradients' energy in each direction of the sketch, and their running sum."""
    shares_K = np.square(np.asarray(singular_values, dtype=np.float64)) / (energy_total or 1.0)
    height, top, bottom, left, gap = 240, 34, 34, 52, 70
    panel = (WIDTH - 2 * left - gap + 40) / 2
    plot = height - top - bottom
    parts = []
    panels = [(left, shares_K, "Energy in each direction"), (left + panel + gap, np.cumsum(shares_K), "Running sum")]
    for number, (x0, values_K, title) in enumerate(panels):
        peak = 1.0 if number else _span(0.0, float(values_K.max(initial=0.0)) * 1.08)
        parts.append(f'<text class="title" x="{x0}" y="16">{title}</text>')
        for tick in _ticks(0, peak, 4):
            y = top + plot * (1 - tick / peak)
            parts.append(f'<line class="grid" x1="{x0}" x2="{x0 + panel:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="muted end" x="{x0 - 6}" y="{y + 4:.1f}">{_percent(tick)}</text>')
        step = panel / max(len(values_K), 1)
        for index, value in enumerate(values_K.tolist()):
            tall = plot * value / peak
            what = f"first {index + 1} directions" if number else f"direction {index + 1}"
            parts.append(
                f'<rect class="bar" x="{x0 + index * step + step * 0.1:.2f}" y="{top + plot - tall:.2f}"'
                f' width="{step * 0.8:.2f}" height="{tall:.2f}" data-tip="{what}: {value:.2%} of the energy"/>'
            )
        parts.append(f'<text class="muted" x="{x0}" y="{height - 10}">1</text>')
        parts.append(f'<text class="muted end" x="{x0 + panel:.1f}" y="{height - 10}">{len(values_K)}</text>')
    return _svg(height, "Spectrum of the sketch", "".join(parts))


def ranges(rows: Sequence[Range], unit: str, zero: bool = False) -> str:
    """A dot with a whisker for each row, on a common axis; `zero` draws the line at 0 and includes it."""
    left = 30 + CHARACTER_PX * max(len(row.name) for row in rows)
    right, top = 84, 12
    ends = [end for row in rows for end in (row.low, row.high)] + ([0.0] if zero else [])
    low, high = min(ends), max(ends)
    pad = _span(low, high) * 0.06
    low, high = low - pad, high + pad
    span = WIDTH - left - right

    def place(value: float) -> float:
        return left + span * (value - low) / (high - low)

    height = top + ROW_PX * len(rows) + 40
    axis = top + ROW_PX * len(rows)
    parts = []
    for tick in _ticks(low, high, 6):
        x = place(tick)
        kind = "zero" if zero and abs(tick) < 1e-12 else "grid"
        parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{axis}"/>')
        parts.append(f'<text class="muted middle" x="{x:.1f}" y="{axis + 18}">{_number(tick)}</text>')
    parts.append(f'<text class="muted middle" x="{left + span / 2:.1f}" y="{axis + 36}">{escape(unit)}</text>')
    for index, row in enumerate(rows):
        y = top + ROW_PX * (index + 0.5)
        tip = f"{row.name}: {row.mean:.4f}, interval {row.low:.4f} to {row.high:.4f}"
        kind = "range strong" if row.strong else "range"
        parts.append(
            f'<g class="{kind}" data-tip="{escape(tip)}"><rect class="hit" x="0" y="{y - ROW_PX / 2:.1f}"'
            f' width="{WIDTH}" height="{ROW_PX}"/>'
            f'<text class="end" x="{left - 14:.1f}" y="{y + 4:.1f}">{escape(row.name)}</text>'
            f'<line x1="{place(row.low):.1f}" x2="{place(row.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<circle cx="{place(row.mean):.1f}" cy="{y:.1f}" r="5.5"/>'
            f'<text class="value" x="{WIDTH - right + 16}" y="{y + 4:.1f}">{_signed(row.mean, zero)}</text></g>'
        )
    return _svg(height, unit, "".join(parts))


def matrix(rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[Cell]], label: str) -> str:
    """A table of tinted cells, `cells[row][column]`; the columns' names stand aslant above them."""
    left = 24 + CHARACTER_PX * max(len(row) for row in rows)
    slant = math.radians(32)
    longest = CHARACTER_PX * max(len(column) for column in columns)
    top = 22 + longest * math.sin(slant)
    # The last column's name starts in the middle of its column and must end on the page.
    wide = min(104.0, (WIDTH - left - longest * math.cos(slant)) / (len(columns) - 0.5))
    high = 34
    parts = []
    for index, column in enumerate(columns):
        x, y = left + wide * (index + 0.5) - 4, top - 8
        parts.append(f'<text transform="translate({x:.1f} {y:.1f}) rotate(-32)">{escape(column)}</text>')
    for number, (row, values) in enumerate(zip(rows, cells, strict=True)):
        y = top + high * number
        parts.append(f'<text class="end" x="{left - 12:.1f}" y="{y + high / 2 + 4:.1f}">{escape(row)}</text>')
        for index, cell in enumerate(values):
            x = left + wide * index
            tint = "var(--good)" if cell.tint < 0 else "var(--bad)"
            opacity = min(abs(cell.tint), 1.0) * 0.72
            kind = "cell strong" if cell.strong else "cell"
            parts.append(
                f'<g class="{kind}" data-tip="{escape(cell.tip)}"><rect x="{x + 1:.1f}" y="{y + 1}" rx="4"'
                f' width="{wide - 2:.1f}" height="{high - 2}" style="fill:{tint};fill-opacity:{opacity:.3f}"/>'
                f'<text class="middle" x="{x + wide / 2:.1f}" y="{y + high / 2 + 4:.1f}">{escape(cell.text)}</text></g>'
            )
    return _svg(top + high * len(rows) + 6, label, "".join(parts))


def histogram(values_N: np.ndarray, threshold: float, bins: int = 20) -> str:
    """Counts of confidences in 0 .. 1; what lies under the threshold is shaded."""
    height, top, bottom, left, right = 230, 26, 46, 46, 16
    counts = np.histogram(values_N, bins=bins, range=(0.0, 1.0))[0].tolist()
    peak = max(*counts, 1)
    span, plot = WIDTH - left - right, height - top - bottom
    border = left + span * min(threshold, 1.0)
    parts = [f'<rect class="shade" x="{left}" y="{top}" width="{border - left:.1f}" height="{plot}"/>']
    for tick in _ticks(0, peak, 4):
        if tick == int(tick):
            y = top + plot * (1 - tick / peak)
            parts.append(f'<line class="grid" x1="{left}" x2="{left + span}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text class="muted end" x="{left - 6}" y="{y + 4:.1f}">{int(tick)}</text>')
    step = span / bins
    for index, count in enumerate(counts):
        tall = plot * count / peak
        tip = f"confidence {index / bins:.2f} to {(index + 1) / bins:.2f}: {count} prompts"
        parts.append(
            f'<rect class="bar" x="{left + index * step + 1:.1f}" y="{top + plot - tall:.1f}" width="{step - 2:.1f}"'
            f' height="{tall:.1f}" data-tip="{tip}"/>'
        )
    for tick in np.linspace(0, 1, 6).tolist():
        parts.append(f'<text class="muted middle" x="{left + span * tick:.1f}" y="{top + plot + 18}">{tick:.1f}</text>')
    parts.append(f'<text class="muted middle" x="{left + span / 2:.1f}" y="{height - 8}">calibrated confidence</text>')
    if threshold > 0:
        side = "end" if threshold > 0.5 else ""
        shift = -6 if threshold > 0.5 else 6
        parts.append(f'<line class="zero" x1="{border:.1f}" x2="{border:.1f}" y1="{top - 8}" y2="{top + plot}"/>')
        text = f"generalist below {threshold:.2f}"
        parts.append(f'<text class="muted {side}" x="{border + shift:.1f}" y="{top - 10}">{text}</text>')
    return _svg(height, "Confidence of the router", "".join(parts))


def bars(rows: Sequence[tuple[str, float, str]], label: str) -> str:
    """A horizontal bar for each (name, value, text beside it)."""
    left = 24 + CHARACTER_PX * max(len(name) for name, _, _ in rows)
    right = 24 + CHARACTER_PX * max(len(text) for _, _, text in rows)
    peak = max(value for _, value, _ in rows) or 1.0
    parts = []
    for index, (name, value, text) in enumerate(rows):
        y, long = ROW_PX * index + 4, (WIDTH - left - right) * value / peak
        middle = y + ROW_PX / 2 + 1
        parts.append(f'<text class="end" x="{left - 12:.1f}" y="{middle:.1f}">{escape(name)}</text>')
        parts.append(
            f'<rect class="bar" x="{left:.1f}" y="{y + 3}" rx="3" width="{max(long, 1):.1f}" height="{ROW_PX - 12}"/>'
        )
        parts.append(f'<text class="value" x="{left + long + 10:.1f}" y="{middle:.1f}">{escape(text)}</text>')
    return _svg(ROW_PX * len(rows) + 8, label, "".join(parts))


def smoothed(losses_S: Sequence[float]) -> np.ndarray:
    """Mean of the losses around each step, [S]: of a tenth of all steps, at both ends of those that are there."""
    count, half = len(losses_S), len(losses_S) // 20
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(losses_S, dtype=np.float64))])
    low = np.maximum(np.arange(count) - half, 0)
    high = np.minimum(np.arange(count) + half + 1, count)
    return (sums[high] - sums[low]) / (high - low)


def curves(panels: Sequence[Curve], label: str) -> str:
    """A panel for each finetune: every step faint, their moving average strong, the held-out losses in the text's ink.

    The panels share the loss's axis, so that levels compare; each has its own steps, so that the shape of a short
    finetune is seen as well as that of a long one. The loss's axis leaves out the far ends of single steps.
    """
    columns = next(columns for columns, most in ((1, 1), (2, 4), (3, 9), (4, len(panels))) if len(panels) <= most)
    left, right, gap, head, foot = 46, 8, 24, 46, 34
    wide, tall = (WIDTH - left - right - gap * (columns - 1)) / columns, (200, 150, 110, 96)[columns - 1]
    ends = [end for panel in panels for end in _loss_ends(panel)]
    pad = _span(min(ends), max(ends)) * 0.06
    low, high = min(ends) - pad, max(ends) + pad
    parts = []
    for index, panel in enumerate(panels):
        x, y = left + index % columns * (wide + gap), index // columns * (head + tall + foot) + head
        for tick in _ticks(low, high, 4):
            at = y + tall * (high - tick) / (high - low)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x + wide:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
            if index % columns == 0:
                parts.append(f'<text class="muted end" x="{x - 6:.1f}" y="{at + 4:.1f}">{_number(tick)}</text>')
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x + wide:.1f}" y1="{y + tall}" y2="{y + tall}"/>')
        parts.append(_curve(panel, (x, y, wide, tall), (low, high)))
    return _svg(math.ceil(len(panels) / columns) * (head + tall + foot), label, "".join(parts))


def _loss_ends(panel: Curve) -> list[float]:
    """Losses that the axis must reach."""
    mean_S = smoothed(panel.losses)
    single = np.quantile(panel.losses, [0.02, 0.98]).tolist()
    return [float(mean_S.min()), float(mean_S.max()), *single, *(loss for _, loss in panel.heldout)]


def _curve(panel: Curve, box: tuple[float, float, float, float], axis: tuple[float, float]) -> str:
    """One panel in its box (x, y, width, height), its loss within the axis's ends."""
    (x, y, wide, tall), (low, high) = box, axis
    steps = len(panel.losses)
    first = min([1, *(step for step, _ in panel.heldout)])

    def point(step: float, loss: float) -> tuple[float, float]:
        across = x + wide * ((step - first) / (steps - first) if steps > first else 0.5)
        return across, y + tall * (high - min(max(loss, low), high)) / (high - low)

    def line(kind: str, places: Iterable[tuple[float, float]]) -> str:
        return f'<polyline class="{kind}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in places)}"/>'

    mean_S = smoothed(panel.losses)
    name = shorten(panel.name, int(wide / CHARACTER_PX))
    parts = [
        f'<text class="title" x="{x:.1f}" y="{y - 26:.1f}" data-tip="{escape(panel.name)}">{escape(name)}</text>',
        f'<text class="muted" x="{x:.1f}" y="{y - 10:.1f}">{mean_S[0]:.3f} → {mean_S[-1]:.3f}</text>',
        f'<text class="muted" x="{x:.1f}" y="{y + tall + 16:.1f}">{first}</text>',
        f'<text class="muted end" x="{x + wide:.1f}" y="{y + tall + 16:.1f}">'
        f"{steps:,} step{'' if steps == 1 else 's'}</text>",
    ]
    if steps * DOT_PX > wide:
        parts.append(line("raw", (point(i + 1, panel.losses[i]) for i in _thinned(panel.losses, CURVE_POINTS))))
    else:
        dots = (point(step, loss) for step, loss in enumerate(panel.losses, start=1))
        parts += [f'<circle class="raw" cx="{a:.1f}" cy="{b:.1f}" r="2.4"/>' for a, b in dots]
    shown = np.unique(np.linspace(0, steps - 1, CURVE_POINTS).round().astype(int)).tolist()
    parts.append(line("mean", (point(i + 1, mean_S[i]) for i in shown)))
    for some in np.array_split(np.arange(steps), min(steps, CURVE_HITS)):
        (start, _), (end, _) = point(some[0] + 0.5, low), point(some[-1] + 1.5, low)
        what = f"step {some[0] + 1:,}" if len(some) == 1 else f"steps {some[0] + 1:,} to {some[-1] + 1:,}"
        tip = f"{panel.name}, {what}: loss {np.mean([panel.losses[i] for i in some]):.4f}"
        parts.append(
            f'<rect class="hit" x="{max(start, x):.1f}" y="{y}" width="{min(end, x + wide) - max(start, x):.1f}"'
            f' height="{tall}" data-tip="{escape(tip)}"/>'
        )
    return f'<g class="curve" style="--a:{panel.colour}">{"".join(parts)}{_heldout(panel, wide, point, line)}</g>'


def _heldout(
    panel: Curve,
    wide: float,
    point: Callable[[float, float], tuple[float, float]],
    line: Callable[[str, Iterable[tuple[float, float]]], str],
) -> str:
    """The held-out losses of a panel; the one of the weights that were kept has a ring and its number."""
    if not panel.heldout:
        return ""
    chosen = _thinned([loss for _, loss in panel.heldout], CURVE_POINTS)
    parts = [line("heldout", (point(*panel.heldout[i]) for i in chosen))]
    kept = len(panel.losses) if panel.kept is None else panel.kept
    for step, loss in panel.heldout:
        across, down = point(step, loss)
        tip = f'data-tip="{escape(panel.name)}, after {step:,} steps: held-out loss {loss:.4f}'
        if step == kept:
            late = step > 0.6 * len(panel.losses)
            parts.append(f'<circle class="kept" cx="{across:.1f}" cy="{down:.1f}" r="4.5" {tip}, kept"/>')
            parts.append(
                f'<text class="halo{" end" if late else ""}" x="{across + (-7 if late else 7):.1f}"'
                f' y="{down - 7:.1f}">{loss:.3f}</text>'
            )
        elif len(panel.heldout) * DOT_PX <= wide:
            parts.append(f'<circle class="heldout" cx="{across:.1f}" cy="{down:.1f}" r="2.2" {tip}"/>')
    return "".join(parts)


def _thinned(values: Sequence[float], most: int) -> list[int]:
    """Places of at most so many values, in order: all, or the lowest and the highest of each of equal parts."""
    if len(values) <= most:
        return list(range(len(values)))
    parts = np.array_split(np.asarray(values), most // 2)
    starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
    found = {
        int(start + place)
        for start, part in zip(starts, parts, strict=True)
        for place in (part.argmin(), part.argmax())
    }
    return sorted(found)


def _svg(height: float, label: str, content: str, kind: str = "") -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}"'
        f' xmlns="http://www.w3.org/2000/svg">{content}</svg>'
    )


def _span(low: float, high: float) -> float:
    """The width of low .. high, above 0: where it is negligible, 1 or the size of the ends, whichever is larger."""
    size = max(abs(low), abs(high))
    return high - low if high - low > NEGLIGIBLE * max(size, 1.0) else max(size, 1.0)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers within low .. high, about `count` of them."""
    rough = _span(low, high) / count
    magnitude = 10 ** math.floor(math.log10(rough))
    step = magnitude * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= rough * 0.999)
    return [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".").replace("-0", "0" if abs(value) < 1e-12 else "-0")


def _signed(value: float, signed: bool) -> str:
    return f"{value:+.3f}" if signed else f"{value:.3f}"


def _percent(share: float) -> str:
    return f"{share * 100:.3f}".rstrip("0").rstrip(".") + "%"
