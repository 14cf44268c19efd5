"""What the page shows of a protocol: numbers with intervals beside the paper's, videos side by
side, the guidance sweep, and other runs."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from cmd_jax.data.clips import fit
from cmd_jax.evaluation import panels, plots, report
from cmd_jax.evaluation.intervals import Estimate
from cmd_jax.evaluation.protocols import Protocol, published

MEANING = {
    'fvd': 'Frechet video distance: lower is nearer to the real clips',
    'frechet': "Frechet distance of I3D's features: comparable only with sets of the same size",
    'kvd': 'kernel video distance, without the bias of small sets: 0 is equal',
    'kernel': "kernel distance of I3D's features: 0 is equal",
    'psnr': 'peak signal-to-noise ratio in dB: higher is nearer',
    'ssim': 'structural similarity: 1 is equal',
    'lpips': 'perceptual distance (AlexNet): lower is nearer',
    'clipsim': 'similarity with the prompt (CLIP): higher is better',
}
# Of the parts of a protocol, on the page.
TITLES = {
    'real': 'Real',
    'reconstruction': 'Reconstructed',
    'motion_prediction': 'Their content frames, generated motion',
    'generation': 'Generated',
}
SIDE = 192  # pixels: larger frames are scaled down on the page
COLUMNS = 4


def headline(protocol: Protocol, numbers: Mapping) -> report.Table:
    """A row for each number: its interval, and what was published where the paper has it."""
    columns = ['number', 'measured', '95 % interval']
    beside = published(protocol, numbers)
    rows = []
    for key, estimate in estimates(protocol, numbers).items():
        row = [key, report.text(estimate.value)]
        row.append(f'{report.text(estimate.low)} to {report.text(estimate.high)}')
        if beside:
            row += beside.get(key, ('', ''))
        rows.append(row)
    if beside:
        columns += ['CMD, published', 'best other']
    return report.Table(columns=columns, rows=rows)


def estimates(protocol: Protocol, numbers: Mapping) -> dict[str, Estimate]:
    """{PART_MEASURE: its estimate} among the numbers of a protocol."""
    keys = [f'{part}_{measure}' for measure in MEANING for part in protocol.parts]
    return {
        key: Estimate(*(numbers[f'{key}{end}'] for end in ('', '_low', '_high')))
        for key in keys
        if f'{key}_low' in numbers
    }


def sections(
    name: str, protocol: Protocol, numbers: Mapping, pictures: Mapping
) -> list[report.Section]:
    """The page's sections, from what `measure.measure` returned."""
    return [
        _numbers(name, protocol, numbers),
        *_videos(protocol, pictures),
        *_sweep(numbers, pictures.get('sweep', [])),
        *_cost(protocol, numbers),
    ]


def _numbers(name, protocol, numbers):
    table = headline(protocol, numbers)
    rows = []
    for row in table.rows:
        measure = row[0].rpartition('_')[2]
        rows.append((f'{row[0]}\n{MEANING[measure]}', *row[1:]))
    told = [protocol.about]
    if not numbers['comparable']:
        told.append(
            f'Here it is not the protocol ({numbers["not_comparable_for"]}): no number is called '
            'FVD, and none can be compared with published ones.'
        )
    if numbers['warnings']:
        told.append(f'Warning: {numbers["warnings"]}.')
    return report.Section(
        heading=name.replace('_', ' ').capitalize().replace('Fvd', 'FVD'),
        text=' '.join(told),
        table=report.Table(columns=table.columns, rows=rows),
    )


def _videos(protocol, pictures):
    kinds = [kind for kind in TITLES if kind in pictures]
    figures = [panels.clips(small(pictures[kind]), COLUMNS, TITLES[kind]) for kind in kinds]
    yield report.Section(
        heading='Side by side',
        text='The first clips of each kind, playing. Where they stand for real clips, each is in '
        'the place of its own.',
        figures=figures,
        width=320,
    )
    yield panels.content_frames(small(pictures['content'][:, None])[:, 0], small(pictures['real']))


def small(videos: UInt8[np.ndarray, 'n t h w 3']) -> UInt8[np.ndarray, 'n t h2 w2 3']:
    """Videos of at most SIDE pixels a side, for a page that can still be mailed."""
    height, width = videos.shape[2:4]
    shrink = max(height, width) / SIDE
    if shrink <= 1:
        return videos
    size = max(1, round(height / shrink)), max(1, round(width / shrink))
    return np.stack([fit(video, *size) for video in videos])


def _sweep(numbers, sweep: Sequence[tuple[float, Mapping[str, Estimate]]]):
    if not sweep:
        return
    figures = []
    for measure in sweep[0][1]:
        points = [(scale, found[measure]) for scale, found in sweep]
        # The run's own scales may differ from stage to stage: that is no point of this line.
        own = numbers['guidance_content']
        if own == numbers['guidance_motion'] and own not in (scale for scale, _ in sweep):
            key = f'generation_{measure}'
            ends = (numbers[f'{key}{end}'] for end in ('', '_low', '_high'))
            points.append((own, Estimate(*ends)))
        caption = f'{measure} against the guidance scale'
        points.sort(key=lambda point: point[0])
        uri = plots.line(points, 'guidance', measure)
        figures.append(report.Figure(uri=uri, caption=caption))
    rows = [
        (report.text(scale), *(str(estimate) for estimate in found.values()))
        for scale, found in sweep
    ]
    yield report.Section(
        heading='Guidance',
        text='Generation at other guidance scales, from the same noise, with 95 % intervals.',
        table=report.Table(columns=('guidance', *sweep[0][1]), rows=rows),
        figures=figures,
    )


def _cost(protocol, numbers):
    if 'generation' not in protocol.parts:
        return
    each = numbers['seconds_generation'] / numbers['num_generated']
    stages = [
        (
            stage,
            numbers[f'sampler_{stage}'],
            str(numbers[f'steps_{stage}']),
            report.text(numbers[f'guidance_{stage}']),
        )
        for stage in ('content', 'motion')
    ]
    yield report.Section(
        heading='What sampling took',
        text=f'{report.text(each)} seconds a video, over {numbers["num_generated"]} videos, '
        'compilation and the networks of the evaluation included.',
        table=report.Table(columns=('stage', 'sampler', 'steps', 'guidance'), rows=stages),
    )


def comparison(name: str, numbers: Mapping, runs: Sequence[str]) -> list[report.Section]:
    """This run beside others that the same protocol has measured: numbers, what was set otherwise,
    and the pictures of the others."""
    if not runs:
        return []
    others = {run: report.read(run, name) for run in runs}
    columns = ['number', 'this run', *others]
    sets = [numbers, *(theirs for theirs, _ in others.values())]
    rows, set_otherwise = [], []
    for key, value in numbers.items():
        if key.endswith(('_low', '_high')):
            continue
        row = (key, *(interval(found, key) for found in sets))
        if f'{key}_low' in numbers:
            rows.append(row)
        elif any(found.get(key) != value for found in sets):
            set_otherwise.append(row)
    found = [
        report.Section(heading='Beside other runs', table=report.Table(columns=columns, rows=rows))
    ]
    if set_otherwise:
        found.append(
            report.Section(
                heading='What differs besides',
                text='Settings, versions, costs and numbers without intervals.',
                table=report.Table(columns=columns, rows=set_otherwise),
            )
        )
    for run, (_, theirs) in others.items():
        figures = [figure for section in theirs for figure in section.figures]
        found.append(report.Section(heading=f'Pictures of {run}', figures=figures[:8], width=320))
    return found


def interval(numbers: Mapping, key: str) -> str:
    """A number, with its interval in small print if it has one."""
    ends = [numbers.get(f'{key}_{end}') for end in ('low', 'high')]
    value = report.text(numbers.get(key))
    return value if None in ends else f'{value}\n{" to ".join(map(report.text, ends))}'
