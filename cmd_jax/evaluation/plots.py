"""A plot as SVG, for pages without scripts."""

import base64
import html
from collections.abc import Sequence

from cmd_jax.evaluation.intervals import Estimate

_WIDTH, _HEIGHT = 420, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 16, 44
_INK, _LINE = '#777', '#2f6fdb'


def line(points: Sequence[tuple[float, Estimate]], x_name: str, y_name: str) -> str:
    """Estimates with their intervals against a number, as a data URI.

    Args:
      points: in the order of their numbers.
      x_name, y_name: what the axes show.
    """
    xs = [x for x, _ in points]
    ends = [end for _, y in points for end in (y.low, y.high, y.value)]
    x_place = _scale(min(xs), max(xs), _LEFT + 16, _WIDTH - _RIGHT - 16)
    y_place = _scale(min(ends), max(ends), _HEIGHT - _BOTTOM - 8, _TOP + 8)
    marks = []
    for x in xs:
        marks.append(_text(x_place(x), _HEIGHT - _BOTTOM + 18, f'{x:g}', 'middle'))
    for i in range(4):
        y = min(ends) + (max(ends) - min(ends)) * i / 3
        marks.append(_text(_LEFT - 8, y_place(y) + 4, f'{y:.3g}', 'end'))
    for x, y in points:
        marks.append(
            f'<path d="M{x_place(x):.1f} {y_place(y.low):.1f}V{y_place(y.high):.1f}" '
            f'stroke="{_LINE}" stroke-width="2" opacity=".5"/>'
            f'<circle cx="{x_place(x):.1f}" cy="{y_place(y.value):.1f}" r="4" fill="{_LINE}"/>'
        )
    path = ' '.join(f'{x_place(x):.1f},{y_place(y.value):.1f}' for x, y in points)
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="sans-serif" font-size="12" fill="{_INK}">'
        f'<path d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}" fill="none" '
        f'stroke="{_INK}"/><polyline points="{path}" fill="none" stroke="{_LINE}"/>'
        f'{"".join(marks)}{_text(middle, _HEIGHT - 8, x_name, "middle")}'
        f'<text transform="translate(14 {(_TOP + _HEIGHT - _BOTTOM) / 2}) rotate(-90)" '
        f'text-anchor="middle">{html.escape(y_name)}</text></svg>'
    )
    return f'data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}'


def _scale(low: float, high: float, start: float, end: float):
    """Places of numbers on an axis; a single one lies in the middle."""
    if high == low:
        return lambda x: (start + end) / 2
    return lambda x: start + (x - low) / (high - low) * (end - start)


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'
