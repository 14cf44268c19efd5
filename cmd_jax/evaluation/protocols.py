"""Protocols by name: what exactly is compared with what, so that a number can be compared with
another one.

A Frechet distance depends on which clips are taken, how many, how they were resized and which
network looks at them, by factors. docs/evaluation.md tells whose protocol each of these is.
"""

import dataclasses
import functools
import hashlib
import importlib.resources
import json
from collections.abc import Mapping

from cmd_jax.errors import UserError

# What stands in the place of real clips: they through the autoencoder; their content frames with
# generated motion; generated videos. Each needs these stages of a run.
STAGES = {
    'reconstruction': ('autoencoder',),
    'motion_prediction': ('autoencoder', 'motion'),
    'generation': ('autoencoder', 'content', 'motion'),
}


UCF101 = 'ucf101', 64, 64  # the paper's class-conditional rows

# Videos below which a distance of sets goes by another name than FVD.
LEAST = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is measured.

    Attributes:
      about: in one sentence, for the page.
      parts: of STAGES, each compared with the real clips.
      split: of the real clips; of 'train' one clip at a random place of a video, of 'test' the one
        in its middle.
      source: kind of the real clips' source, see `data.sources`; '': any.
      num_real: clips, each of another video; None: one of every video, LEAST at least.
      num_fake: generated videos; None: one for each real clip.
      frames: that clips must have; None: whatever the run has.
      distance: whether sets of videos are compared, by FVD and the kernel distance.
      pairs: whether each real clip is compared with what stands in its place, by PSNR, SSIM, LPIPS.
      similarity: whether generated videos are compared with their prompts, by CLIPSIM.
      prompts: the conditions of generated videos: those of the 'real' clips in their order, or the
        prompts of 'ucf101', equally many of each class.
      paper: {number: (CMD's published value, the best other one)}, both as text.
      paper_data: what these are of: kind of the source, height and width; None: captioned videos.
    """

    about: str
    parts: tuple[str, ...] = ('generation',)
    split: str = 'train'
    source: str = ''
    num_real: int | None = 2048
    num_fake: int | None = 2048
    frames: int | None = 16
    distance: bool = True
    pairs: bool = False
    similarity: bool = False
    prompts: str = 'real'
    paper: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    paper_data: tuple[str, int, int] | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        """Of a run that it needs."""
        return max((STAGES[part] for part in self.parts), key=len)


PROTOCOLS = {
    'fvd_2048': Protocol(
        about='FVD of 2,048 generated videos and one random clip of each of 2,048 training videos, '
        'as StyleGAN-V computes it.',
        paper={'generation_fvd': ('107 (UCF-101, 64 x 64)', 'VideoFusion 173')},
        paper_data=UCF101,
    ),
    'fvd_10000': Protocol(
        about='FVD of 10,000 generated videos and one random clip of every training video, as the '
        'line of TATS and MAGVIT computes it.',
        num_real=None,
        num_fake=10_000,
        paper={'generation_fvd': ('73 (UCF-101, 64 x 64)', 'MAGVIT 76')},
        paper_data=UCF101,
    ),
    'fvd_5000_text': Protocol(
        about='FVD and CLIPSIM of 5,000 videos generated from the captions of as many clips of the '
        'test split, as for the validation set of WebVid-10M.',
        split='test',
        num_real=5000,
        num_fake=5000,
        similarity=True,
        paper={
            'generation_fvd': ('238.3 (WebVid-10M, guidance 9)', 'VideoFactory 292.4'),
            'generation_clipsim': ('0.3020 (WebVid-10M, guidance 9)', 'VideoFactory 0.3070'),
        },
    ),
    'zero_shot_ucf101': Protocol(
        about='FVD of 100 videos for each class of UCF-101, generated from one prompt a class, and '
        'one random clip of every training video of UCF-101, which the run has never seen.',
        source='ucf101',
        num_real=None,
        num_fake=10_100,
        prompts='ucf101',
        paper={'generation_fvd': ('504 (Stable Diffusion 1.5)', 'VideoLDM 551')},
    ),
    'clipsim': Protocol(
        about='CLIPSIM of videos generated from 2,000 captions of the test split.',
        split='test',
        num_real=2000,
        num_fake=None,
        frames=None,
        distance=False,
        similarity=True,
        paper={'generation_clipsim': ('0.2894 (MSR-VTT)', 'ModelScope 0.2930')},
    ),
    'reconstruction': Protocol(
        about='2,048 clips of the test split through the autoencoder: R-FVD, PSNR, SSIM and LPIPS.',
        parts=('reconstruction',),
        split='test',
        num_fake=None,
        frames=None,
        pairs=True,
        paper={'reconstruction_fvd': ('69.5 (WebVid, D 8, T 16); 56.8 (D 16); 81.3 (T 24)', '')},
    ),
    'motion_prediction': Protocol(
        about='2,048 clips of the test split: their own content frames with generated motion.',
        parts=('motion_prediction',),
        split='test',
        num_fake=None,
        frames=None,
    ),
    'generation': Protocol(
        about='2,048 generated videos against as many clips of the test split.',
        split='test',
        frames=None,
    ),
    'ablation': Protocol(
        about="The paper's table 4a: what each part of the model costs. One random clip of every "
        'training video against its reconstruction, against its content frame with generated '
        'motion, and against 10,000 generated videos.',
        parts=('reconstruction', 'motion_prediction', 'generation'),
        num_real=None,
        num_fake=10_000,
        pairs=True,
        paper={
            'reconstruction_fvd': ('7.72 (UCF-101, 64 x 64)', ''),
            'motion_prediction_fvd': ('19.5 (UCF-101, 64 x 64)', ''),
            'generation_fvd': ('73.1 (UCF-101, 64 x 64)', ''),
        },
        paper_data=UCF101,
    ),
}


def published(protocol: Protocol, numbers: Mapping) -> dict[str, tuple[str, str]]:
    """The paper's values beside which these numbers may stand: of the same kind of data."""
    if not numbers['comparable']:
        return {}
    source = numbers['real_prepared_from'] or numbers['real_source']
    kind = source.partition(':')[0]
    if protocol.paper_data is None:
        unlike = () if protocol.source else ('ucf101', 'moving_digits')
        return {} if kind in unlike else protocol.paper
    same = (kind, numbers['real_height'], numbers['real_width']) == protocol.paper_data
    return protocol.paper if same else {}


@functools.cache
def ucf101_prompts() -> dict[str, str]:
    """{class: prompt} of the 101 classes, after PYoCo (Ge et al. 2023, arXiv 2305.10474)."""
    file = importlib.resources.files(__package__) / 'ucf101_prompts.tsv'
    lines = file.read_text(encoding='utf-8').splitlines()
    return dict(line.split('\t') for line in lines if line)


def check_text(protocol: Protocol, text: bool):
    """Raises UserError where prompts are needed. `text`: whether the run is conditioned on them."""
    if (protocol.similarity or protocol.prompts == 'ucf101') and not text:
        raise UserError('this protocol needs a run that is conditioned on text')


def check_captions(protocol: Protocol, text: bool, captions: list[str] | None):
    """Raises UserError where captions are needed, and real clips have none.

    Args:
      text: whether the run is conditioned on prompts.
      captions: of the clips, or all that they can have; None: unknown.
    """
    needed = text and protocol.parts != ('reconstruction',) and protocol.prompts == 'real'
    if needed and captions is not None and not any(captions):
        raise UserError(
            'the real clips have no captions for a run that is conditioned on text: give --data '
            'with captions (docs/data.md)'
        )


def fake_conditions(
    protocol: Protocol, count: int, labels: list[int], captions: list[str], text: bool
) -> dict[str, list]:
    """The condition of each of `count` generated videos, as `Generator.stream` takes it.

    Args:
      labels, captions: of the real clips, in their order.
      text: whether the run is conditioned on prompts.
    """
    name, values = ('prompt', captions) if text else ('labels', labels)
    if protocol.prompts == 'ucf101':
        values = list(ucf101_prompts().values())
    return {name: [values[i % len(values)] for i in range(count)]}


def fingerprint(settings: dict) -> str:
    """A hash of what decides a result, for the names of cached features."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]
