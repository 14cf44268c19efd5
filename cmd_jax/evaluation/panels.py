"""What the pages of several protocols show: clips, stills, and sections made of them."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8

from cmd_jax import video as video_lib
from cmd_jax.evaluation import report

_FPS = 8


def clips(videos: UInt8[np.ndarray, 'n t h w 3'], columns: int, caption: str) -> report.Figure:
    """Clips side by side, all playing."""
    uri = video_lib.data_uri(video_lib.grid(videos, columns=columns), fps=_FPS, scale=2)
    return report.Figure(uri=uri, caption=caption, alt=f'{caption} ({len(videos)} playing)')


def stills(videos: UInt8[np.ndarray, 'n t h w 3'], caption: str) -> report.Figure:
    """A row of stills for each clip."""
    n, t = videos.shape[:2]
    uri = video_lib.data_uri(video_lib.filmstrip(videos), scale=2)
    return report.Figure(uri=uri, caption=caption, alt=f'{caption} ({n} rows of {t} stills)')


def outcome(
    numbers: Mapping, targets: Mapping, meaning: Mapping[str, str], text: str
) -> report.Section:
    """The verdict, and the table of targets with what each number means in small print."""
    table = report.check(numbers, targets)
    rows = [(f'{name}\n{meaning[name]}', *row) for name, *row in table.rows]
    return report.Section(
        heading=report.verdict(table),
        text=text,
        table=report.Table(columns=table.columns, rows=rows),
    )


def reconstructions(
    real: UInt8[np.ndarray, 'n t h w 3'], reconstructed: UInt8[np.ndarray, 'n t h w 3']
) -> report.Section:
    """Held-out digits, and what is left of them."""
    return report.Section(
        heading='Real clips and their reconstructions',
        text='Clips the autoencoder has never seen, of handwritten digits kept out of '
        'training; and the same clips after being compressed to one content frame and a small '
        'motion latent, and decoded again. The two should look alike.',
        figures=[
            clips(real, 6, 'Real, held out'),
            clips(reconstructed, 6, 'Reconstructed'),
        ],
        width=320,
    )


def content_frames(
    content: UInt8[np.ndarray, 'n h w 3'], real: UInt8[np.ndarray, 'n t h w 3']
) -> report.Section:
    """Eight content frames at most beside the clips that they sum up."""
    return report.Section(
        heading='Content frames',
        text='The encoder sums a clip up in one image: a weighted mean of its frames, with '
        'weights it has learned. What moved is smeared or chosen from one frame; the motion '
        'latent holds the rest.',
        figures=[
            stills(
                np.concatenate([content[i : i + 4, None], real[i : i + 4]], axis=1),
                'First column: the content frame. Then the frames it stands for.',
            )
            for i in range(0, min(len(content), 8), 4)
        ],
        width=320,
    )
