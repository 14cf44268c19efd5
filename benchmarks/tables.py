"""Results as the tables of docs/speed.md."""

from benchmarks.networks import TARGETS


def compilation(rows: list[dict]) -> str:
    """As Markdown."""
    lines = ['| | seconds | target |', '|---|---|---|']
    for row in rows:
        if row['case'] == 'sample.py':
            first = (
                f'sample.py, one video of the quickstart: first start | {row["first_seconds"]:.1f}'
            )
            lines.append(f'| {first} | |')
            low, high = row['second_seconds_spread']
            told = f'{row["second_seconds"]:.1f} ({low:.1f} to {high:.1f})'
            lines.append(f'| later starts | {told} | {row["target"]} |')
            continue
        title = f'{row["case"]}, traced ({row["trace_seconds"]:.1f}) and compiled'
        low, high = row['seconds_spread']
        told = f'{row["seconds"]:.1f} ({low:.1f} to {high:.1f})'
        lines.append(f'| {title} | {told} | {row["target"]} |')
    return '\n'.join(lines)


def told_seconds(seconds: float) -> str:
    return f'{seconds:.1f} s' if seconds >= 1 else f'{1e3 * seconds:.1f} ms'


def beside_pytorch(rows: list[dict]) -> str:
    """As Markdown."""
    lines = [
        '| forward, and for the autoencoder backward | time | memory '
        '| ours / theirs: time | memory | target |',
        '|---|---|---|---|---|---|',
    ]
    for row in rows:
        title = row['case'].replace(' forward + backward', '').replace(' forward', '')
        if 'error' in row:
            lines.append(f'| {title}: {row["side"]} | failed | | | | |')
            continue
        told = f'| {title}: {row["side"]} | {told_seconds(row["seconds"])} | {row["gb"]:.1f} GB |'
        if 'seconds_ratio' not in row:
            lines.append(f'{told} | | |')
            continue
        low, high = row['seconds_ratio_spread']
        target = ', '.join(str(x) for x in TARGETS.get(row['case'], {}).values())
        lines.append(
            f'{told} {row["seconds_ratio"]:.2f} ({low:.2f} to {high:.2f}) '
            f'| {row["gb_ratio"]:.2f} | {target} |'
        )
    return '\n'.join(lines)


def convolutions(rows: list[dict]) -> str:
    """As Markdown."""
    lines = [
        '| image | channels | direct | Winograd | memory | error | taken |',
        '|---|---|---|---|---|---|---|',
    ]
    for row in rows:
        told = [' x '.join(map(str, row['image'])), ' to '.join(map(str, row['channels']))]
        for name in ('direct', 'winograd'):
            one = row[name]
            told.append(f'{1e3 * one["seconds"]:.0f} ms, {one["gflops_per_second"]:.0f} GFLOP/s')
        told += [f'{row["winograd"]["temporary_mb"]:.0f} MB', f'{row["winograd"]["error"]:.0e}']
        told.append('Winograd' if row['winograd_chosen'] else 'direct')
        lines.append(f'| {" | ".join(told)} |')
    return '\n'.join(lines)


def samplers(rows: list[dict]) -> str:
    """As Markdown."""
    names = {'ddim': 'DDIM', 'dpmpp_2m': 'DPM-Solver++', 'unipc': 'UniPC'}
    lines = [
        '| sampler, steps of both stages | seconds | class accuracy | Frechet distance |',
        '|---|---|---|---|',
    ]
    for row in rows:
        accuracy, frechet = row['accuracy'], row['frechet']
        lines.append(
            f'| {names[row["sampler"]]} {row["steps"]} | {row["seconds"]:.0f} '
            f'| {100 * accuracy["value"]:.1f} % '
            f'({100 * accuracy["low"]:.1f} to {100 * accuracy["high"]:.1f}) '
            f'| {frechet["value"]:.0f} ({frechet["low"]:.0f} to {frechet["high"]:.0f}) |'
        )
    return '\n'.join(lines)


def memory(rows: list[dict]) -> str:
    """As Markdown: a line a stage, with the activations of its policies."""
    lines = [
        '| stage | parameters | weights | EMA | Adam | gradients | frozen '
        '| activations of a clip by remat |',
        '|---|---|---|---|---|---|---|---|',
    ]
    names = ('parameters', 'average', 'optimizer', 'gradients', 'frozen')
    for stage in dict.fromkeys(row['stage'] for row in rows):
        mine = [row for row in rows if row['stage'] == stage]
        told = [stage, f'{mine[0]["parameters_million"]:.1f} M']
        told += [f'{mine[0][f"{name}_gb"]:.2f}' for name in names]
        told.append(', '.join(f'{x["remat"]} {x["activations_gb_a_clip"]:.2f}' for x in mine))
        lines.append(f'| {" | ".join(told)} |')
    return '\n'.join(lines)


def loading(rows: list[dict]) -> str:
    """As Markdown: of benchmarks/stable_diffusion.py, without the forward pass."""
    lines = ["| what | seconds | memory added / the largest part's |", '|---|---|---|']
    for row in rows:
        if row['case'].startswith('load '):
            added = row['added_over_largest_part']
            lines.append(f'| {row["case"]} | {row["seconds"]:.1f} | {added:.2f} |')
    return '\n'.join(lines)
