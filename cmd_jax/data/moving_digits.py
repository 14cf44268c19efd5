"""Real handwritten digits in motion: a data set that needs no download.

The images are scikit-learn's `load_digits` (1,797 digits, 8x8, 10 classes; Alpaydin
and Kaynak, 1998). Each clip shows one of them, enlarged smoothly, that moves at constant velocity
and bounces off the walls.
"""

import functools
import itertools
import math

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from cmd_jax.errors import UserError

CLASS_NAMES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
# Counter-clockwise from the right in steps of 45 degrees; up is towards row 0.
DIRECTIONS = (
    'right',
    'up and right',
    'up',
    'up and left',
    'left',
    'down and left',
    'down',
    'down and right',
)
# Side of a digit, as a part of the frame's short side.
DIGIT_SHARE = 0.7

CLIPS = {'train': 100_000, 'test': 2_000}
_TEST_EVERY = 6


@functools.cache
def digit(split: str) -> tuple[Float[np.ndarray, 'n 8 8'], Int[np.ndarray, 'n']]:
    """The digit images of a split, in [0, 1], and their labels.

    Every sixth image of each class is a test image, so no handwritten digit is in both splits.
    """
    from sklearn.datasets import load_digits  # takes a second: only if digits are asked for

    if split not in CLIPS:
        raise UserError(f"split={split!r}: moving_digits has 'train' and 'test'")
    data = load_digits()
    test = np.zeros(len(data.target), bool)
    for label in range(len(CLASS_NAMES)):
        test[np.flatnonzero(data.target == label)[_TEST_EVERY - 1 :: _TEST_EVERY]] = True
    chosen = test if split == 'test' else ~test
    return (data.images[chosen] / 16).astype(np.float32), data.target[chosen].astype(np.int32)


def enlarge(image: Float[np.ndarray, '8 8'], size: int) -> Float[np.ndarray, 'p p']:
    """Bicubic enlargement of an 8x8 digit to size x size (>= 8), in [0, 1].

    The patch has a margin that holds the half source pixel over which a stroke at the border fades
    out: all outside is black.
    """
    margin = math.ceil(size / 16 - 0.5)
    source = Image.fromarray(np.pad(image, 2))
    half = (size / 2 + margin) * 8 / size
    box = (6 - half, 6 - half, 6 + half, 6 + half)
    patch = source.resize((size + 2 * margin,) * 2, Image.Resampling.BICUBIC, box)
    return np.asarray(patch).clip(0, 1)  # bicubic overshoots at edges


def caption(label: int, direction: int) -> str:
    """What a clip of a digit shows, in words; `direction` is an index of DIRECTIONS."""
    article = 'an' if CLASS_NAMES[label] == 'eight' else 'a'
    return f'{article} {CLASS_NAMES[label]} moving {DIRECTIONS[direction]}'


class MovingDigits:
    """Random-access source of clips of one moving digit; white on black.

    Clip i depends on (seed, split, i) alone. Its direction is uniform over all angles; its start is
    such that the digit does not touch a wall in the first half of the clip (or, where the clip is
    too long for that, so that it crosses the whole frame first).

    Attributes:
      name: 'moving_digits'.
      class_names: ten words; the class is the digit.
      captions: sorted; one for each digit and direction.
    """

    name = 'moving_digits'
    class_names = list(CLASS_NAMES)
    captions = sorted(
        itertools.starmap(
            caption, itertools.product(range(len(CLASS_NAMES)), range(len(DIRECTIONS)))
        )
    )

    def __init__(
        self,
        split: str = 'train',
        frames: int = 8,
        height: int = 32,
        width: int = 32,
        digit_size: int | None = None,
        speed: tuple[float, float] | None = None,
        size: int | None = None,
        seed: int = 0,
    ):
        """Makes the source.

        Args:
          split: 'train' or 'test': disjoint digit images.
          frames: frames in a clip.
          height: of a frame, pixels.
          width: of a frame, pixels.
          digit_size: side of the digit in pixels; DIGIT_SHARE of the short side if None.
          speed: (least, most) pixels per frame; (0.7, 0.8) at a short side of 32 if None.
          size: clips in an epoch; 100,000 (train) or 2,000 (test) if None.
          seed: of the whole set.
        """
        images, self._labels = digit(split)
        short = min(height, width)
        digit_size = digit_size or round(DIGIT_SHARE * short)
        if digit_size < 8:
            raise UserError(f'digit_size={digit_size} at {height}x{width}: must be at least 8')
        self._speed = speed or (0.7 * short / 32, 0.8 * short / 32)
        if not 0 <= self._speed[0] <= self._speed[1]:
            raise UserError(f'speed={speed}: must be (least, most), 0 <= least <= most')
        self._patches = np.stack([enlarge(image, digit_size) for image in images])
        self._by_class = [np.flatnonzero(self._labels == c) for c in range(len(CLASS_NAMES))]
        self._frames, self._height, self._width = frames, height, width
        # How far the corner of the patch moves: no light leaves the frame.
        self._room = np.array([height, width]) - float(self._patches.shape[1])
        if self._room.min() <= 0:
            raise UserError(f'digit_size={digit_size}: leaves no room to move in {height}x{width}')
        self._size = CLIPS[split] if size is None else size
        self._key = (seed, sorted(CLIPS).index(split))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, i: int, rng: np.random.Generator | None = None) -> dict:
        """Clip i: video uint8 [t h w 3], label, caption, index. `rng` is for other sources."""
        del rng
        rng = np.random.default_rng((*self._key, int(i)))
        label = rng.integers(len(CLASS_NAMES))
        patch = self._patches[rng.choice(self._by_class[label])]
        angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(*self._speed)
        velocity = speed * np.array([-np.sin(angle), np.cos(angle)])
        path = bounce(self._start(velocity, rng), velocity, self._frames, self._room)

        rows = tent(path[:, 0], self._height, len(patch))
        columns = tent(path[:, 1], self._width, len(patch))
        grey = np.rint(255 * (rows @ patch @ columns.swapaxes(1, 2))).astype(np.uint8)
        direction = round(angle / (np.pi / 4)) % len(DIRECTIONS)
        return {
            'video': np.repeat(grey[..., None], 3, axis=-1),
            'label': np.int32(label),
            'caption': caption(int(label), direction),
            'index': np.int64(i),
        }

    def _start(self, velocity, rng):
        """A uniform place from which the first half of the clip stays off the walls ahead."""
        travel = np.minimum(np.abs(velocity) * (self._frames - 1) / 2, self._room)
        start = rng.uniform(0, self._room - travel)
        return np.where(velocity < 0, start + travel, start)


def bounce(
    start: Float[np.ndarray, '2'],
    velocity: Float[np.ndarray, '2'],
    frames: int,
    room: Float[np.ndarray, '2'],
) -> Float[np.ndarray, 't 2']:
    """Places of a point that is reflected at 0 and at `room`: the straight path, folded."""
    straight = start + velocity * np.arange(frames)[:, None]
    return room - np.abs(straight % (2 * room) - room)


def tent(place: Float[np.ndarray, 't'], size: int, patch: int) -> Float[np.ndarray, 't size patch']:
    """Bilinear placement as a matrix: what pixel y of a line gets of pixel j put at place + j."""
    distance = np.arange(size)[:, None] - np.arange(patch) - place[:, None, None]
    return np.maximum(1 - np.abs(distance), 0).astype(np.float32)
