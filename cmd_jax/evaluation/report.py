"""One self-contained HTML page for the evaluations of a run, and their numbers as JSON.

    RUN/report.html                      all protocols that were carried out
    RUN/evaluation/PROTOCOL.json         the numbers of one, and everything that they depend on
    RUN/evaluation/PROTOCOL.page.json    what the page shows of it

A protocol gives a list of sections and a flat dict of numbers; what they mean is its business.
Everything is inlined (style sheet, pictures as data URIs, no scripts), so the page can be mailed,
archived or opened from a disk without a network.
"""

import dataclasses
import html
import importlib.metadata
import json
import math
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence

import jax

from cmd_jax import atomic
from cmd_jax.errors import UserError, writable

FOLDER = 'evaluation'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture (GIF, PNG, SVG or video frame) as a data URI.

    Attributes:
      uri: `data:image/...`.
      caption: shown below the picture.
      alt: what a reader who cannot see the picture should know; the caption if empty.
    """

    uri: str
    caption: str = ''
    alt: str = ''

    def __post_init__(self):
        if not self.uri.startswith('data:'):
            raise ValueError(f'a figure is a data URI, got {self.uri[:40]!r}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text.

    Cells that read 'ok' or 'MISSED' are coloured as verdicts; what follows a line break in a cell
    is set in small print.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f'a row of {len(row)} cells in a table of {len(self.columns)}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, some text, then a table and figures; all but the heading may be left out.

    Attributes:
      width: smallest width of a figure in CSS pixels. As many stand in a row as fit.
    """

    heading: str
    text: str = ''
    table: Table | None = None
    figures: Sequence[Figure] = ()
    width: int = 280


def check(
    numbers: Mapping[str, object], targets: Mapping[str, tuple[float | None, float | None]]
) -> Table:
    """The headline table: what was measured, what was aimed at, and whether it was reached.

    Args:
      numbers: name -> value. A target whose number is absent or NaN counts as missed.
      targets: name -> (lowest, highest) value still accepted; None leaves that side open.
    """
    rows = []
    for name, (low, high) in targets.items():
        value = numbers.get(name)
        reached = value is not None and (
            (low is None or value >= low) and (high is None or value <= high)
        )
        reached = reached and not math.isnan(value)
        if low is not None and high is not None:
            aim = f'{text(low)} to {text(high)}'
        else:
            aim = f'>= {text(low)}' if low is not None else f'<= {text(high)}'
        rows.append((name, text(value), aim, 'ok' if reached else 'MISSED'))
    return Table(columns=('number', 'measured', 'target', 'result'), rows=rows)


def verdict(table: Table) -> str:
    """One sentence on a table made by `check`."""
    missed = [row[0] for row in table.rows if 'MISSED' in row]
    if not missed:
        return f'{len(table.rows)} of {len(table.rows)} targets met.'
    reached = len(table.rows) - len(missed)
    return f'{reached} of {len(table.rows)} targets met. Missed: {", ".join(missed)}.'


def lines(table: Table) -> str:
    """The table as aligned plain text, for a terminal."""
    rows = [table.columns, *table.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.columns))]
    return '\n'.join(
        '  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def text(value) -> str:
    """A number as a person would write it: four digits at most, whole numbers whole."""
    if value is None:
        return 'not measured'
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    if not math.isfinite(value) or abs(value) < 1000:
        return f'{value:.4g}'
    return f'{value:.0f}'


def environment() -> dict[str, str | int]:
    """What the numbers were measured on: versions and device, for a report's numbers."""
    devices = jax.devices()
    versions = {f'version_{name}': importlib.metadata.version(name) for name in ('jax', 'flax')}
    return {
        'device': devices[0].device_kind,
        'device_count': len(devices),
        'cpu_count': os.cpu_count(),
        'version_python': platform.python_version(),
        **versions,
    }


def write(
    run: str | os.PathLike, protocol: str, sections: Sequence[Section], numbers: Mapping
) -> pathlib.Path:
    """Writes what a protocol found into the folder of a run, makes the page of all protocols anew,
    and returns its path.

    Args:
      run: the folder.
      protocol: its name; what an earlier evaluation of this name has written is replaced.
      numbers: flat name -> number, string, bool or None, settings included. Infinite and NaN
        values, which JSON does not have, become null there.

    Raises:
      UserError: the folder cannot be written.
    """
    run = writable('out', run)
    numbers = {name: _plain(value) for name, value in numbers.items()}
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in numbers.items()
    }
    # As the page shows them: infinite stays infinite.
    shown = {name: text(value) for name, value in numbers.items()}
    page = {'sections': [dataclasses.asdict(section) for section in sections], 'numbers': shown}
    folder = run / FOLDER
    atomic.write(folder / f'{protocol}.json', json.dumps(finite, indent=2, allow_nan=False) + '\n')
    atomic.write(folder / f'{protocol}.page.json', json.dumps(page))
    # The newest first.
    names = sorted(path.name.removesuffix('.page.json') for path in folder.glob('*.page.json'))
    names.sort(key=lambda name: name != protocol)
    pages = {name: _stored(folder / f'{name}.page.json') for name in names}
    atomic.write(run / 'report.html', _page(run.resolve().name, pages))
    return run / 'report.html'


def read(run: str | os.PathLike, protocol: str) -> tuple[dict, list[Section]]:
    """The numbers and the page's sections of a protocol that was carried out on a run.

    Raises:
      UserError: it was not, or its files cannot be read.
    """
    folder = pathlib.Path(run) / FOLDER
    try:
        numbers = json.loads((folder / f'{protocol}.json').read_text())
        return numbers, _stored(folder / f'{protocol}.page.json')[0]
    except FileNotFoundError as e:
        raise UserError(
            f'{run} has no evaluation by {protocol}: python evaluate.py --workdir={run} '
            f'--protocol={protocol}'
        ) from e
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f'{folder}: the files of {protocol} cannot be read ({e})') from e


def _stored(path: pathlib.Path) -> tuple[list[Section], dict[str, str]]:
    page = json.loads(path.read_text())
    sections = []
    for section in page['sections']:
        table = section.pop('table')
        figures = [Figure(**figure) for figure in section.pop('figures')]
        table = table and Table(**table)
        sections.append(Section(**section, table=table, figures=figures))
    return sections, page['numbers']


def _plain(value):
    """NumPy and JAX scalars as Python's own, which JSON knows."""
    return value.item() if hasattr(value, 'item') else value


def _page(title: str, pages: Mapping[str, tuple[list[Section], dict[str, str]]]) -> str:
    body = '\n'.join(_protocol(name, *page) for name, page in pages.items())
    links = ' '.join(f'<a href="#{html.escape(name)}">{html.escape(name)}</a>' for name in pages)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}: {html.escape(', '.join(pages))}</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{html.escape(title)}</h1>
{f'<nav>{links}</nav>' if len(pages) > 1 else ''}
{body}
</main>
</body>
</html>
"""


def _protocol(name: str, sections: Sequence[Section], numbers: Mapping[str, str]) -> str:
    everything = _table(Table(columns=('name', 'value'), rows=list(numbers.items())))
    body = '\n'.join(_section(section) for section in sections)
    return f"""<article id="{html.escape(name)}">
<p class="protocol">{html.escape(name)}</p>
{body}
<details>
<summary>All numbers and settings</summary>
<p>The same values are in <code>evaluation/{html.escape(name)}.json</code>.</p>
{everything}
</details>
</article>"""


def _section(section: Section) -> str:
    parts = [f'<h2>{html.escape(section.heading)}</h2>']
    if section.text:
        parts.append(f'<p>{html.escape(section.text)}</p>')
    if section.table:
        parts.append(_table(section.table))
    if section.figures:
        figures = '\n'.join(_figure(figure) for figure in section.figures)
        parts.append(f'<div class="figures" style="--width:{section.width}px">\n{figures}\n</div>')
    return '<section>\n' + '\n'.join(parts) + '\n</section>'


def _figure(figure: Figure) -> str:
    uri, alt = html.escape(figure.uri), html.escape(figure.alt or figure.caption)
    caption = f'<figcaption>{html.escape(figure.caption)}</figcaption>' if figure.caption else ''
    return f'<figure><img src="{uri}" alt="{alt}">{caption}</figure>'


def _table(table: Table) -> str:
    head = ''.join(f'<th scope="col">{html.escape(column)}</th>' for column in table.columns)
    rows = '\n'.join(f'<tr>{"".join(_cell(cell) for cell in row)}</tr>' for row in table.rows)
    return (
        f'<div class="table"><table>\n<thead><tr>{head}</tr></thead>\n'
        f'<tbody>\n{rows}\n</tbody>\n</table></div>'
    )


def _cell(cell: str) -> str:
    if cell == 'ok':
        return '<td class="ok">✓ ok</td>'
    if cell == 'MISSED':
        return '<td class="missed">✗ MISSED</td>'
    value, _, note = html.escape(cell).partition('\n')
    return f'<td>{value}<small>{note}</small></td>' if note else f'<td>{value}</td>'


# Pictures here are small frames enlarged: pixelated keeps them honest (and leaves SVG plots alone).
_STYLE = """
:root {
  color-scheme: light dark;
  --page: #fafaf8; --card: #fff; --ink: #1d1d1f; --soft: #66666b; --line: #e2e2de;
  --ok: #1a7f37; --missed: #b42318;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131416; --card: #1c1d20; --ink: #ececee; --soft: #a0a0a8; --line: #34353a;
    --ok: #5fd17f; --missed: #ff8a7a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif;
}
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 1.5rem; }
h2 { font-size: 1.2rem; margin: 0 0 .4rem; }
nav a { margin-right: 1rem; color: inherit; }
nav { margin: 0 0 1.2rem; }
p.protocol { font-size: .82rem; font-weight: 600; letter-spacing: .04em; margin: 0 0 .5rem; }
article + article { margin-top: 3rem; }
p { max-width: 44rem; margin: 0 0 1rem; color: var(--soft); }
section, details {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 1.25rem 1.4rem; margin: 0 0 1.1rem;
}
.figures {
  display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--width)), 1fr));
}
figure { margin: 0; }
img { display: block; width: 100%; height: auto; border-radius: 6px; image-rendering: pixelated; }
figcaption { font-size: .88rem; color: var(--soft); margin-top: .35rem; }
.table { overflow-x: auto; margin-bottom: .5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .45rem .8rem .45rem 0; border-bottom: 1px solid var(--line); }
th { font-size: .82rem; font-weight: 600; color: var(--soft); }
tbody tr:last-child td { border-bottom: 0; }
td:not(:first-child) { white-space: nowrap; }
td.ok { color: var(--ok); font-weight: 600; }
td.missed { color: var(--missed); font-weight: 600; }
small { display: block; color: var(--soft); }
@media (max-width: 40rem) {
  main { padding: 1.25rem .75rem 3rem; }
  section, details { padding: 1rem; }
}
summary { cursor: pointer; font-weight: 600; }
summary + p { margin-top: .6rem; }
code { font-size: .92em; }
"""
