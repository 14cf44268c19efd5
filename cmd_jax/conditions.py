"""What a generator is asked for: classes, prompts, pictures; checked, and as networks take them."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Int, Shaped, UInt8

from cmd_jax.data.clips import fit_frame
from cmd_jax.errors import UserError
from cmd_jax.models.content import ContentDiT
from cmd_jax.models.motion import MotionDiT
from cmd_jax.stable_diffusion import StableDiffusion


@dataclasses.dataclass(frozen=True)
class Conditions:
    """What the two networks are conditioned on, and what guidance leads them away from.

    Labels [n]; or text features, [n k l] for the content and [n l] for the motion.
    """

    content: Shaped[Array, 'n *k']
    content_null: Shaped[Array, 'n *k']
    motion: Shaped[Array, 'n *l']
    motion_null: Shaped[Array, 'n *l']


def of_labels(
    content: ContentDiT | MotionDiT, motion: MotionDiT, labels: Int[Array, 'n']
) -> Conditions:
    """Of classes, for these networks; guidance leads away from none."""
    return Conditions(labels, content.null_condition(labels), labels, motion.null_condition(labels))


def of_prompts(
    content: StableDiffusion,
    motion: StableDiffusion,
    network: MotionDiT,
    prompts: Sequence[str],
    negative_prompt: str,
) -> Conditions:
    """Of prompts; without a negative one, guidance leads away from no text.

    Args:
      content, motion: text encoders of the two stages.
      network: of the motion stage, which says what no text is to it (to the U-Net: the empty one).
      prompts, negative_prompt: of all videos.
    """
    given = [*prompts, negative_prompt]
    hidden = jnp.asarray(content.encode(given)[0])
    mean = jnp.asarray(motion.encode(given)[1])
    away = [jnp.broadcast_to(x[-1], x[:-1].shape) for x in (hidden, mean)]
    if not negative_prompt:
        away[1] = network.null_condition(mean[:-1])
    return Conditions(hidden[:-1], away[0], mean[:-1], away[1])


def check_labels(
    labels: Sequence[int] | None, num_videos: int | None, classes: int
) -> Int[Array, 'n']:
    """The label of each of `num_videos` videos; see `Generator.__call__`.

    Raises:
      UserError: no label, one out of range, or labels where there are no classes.
    """
    if labels is not None and len(labels) == 0:
        raise UserError('labels is empty: name at least one class')
    if labels is None:
        labels = range(classes) if classes else [0]
        labels = [labels[i % len(labels)] for i in range(num_videos or 1)]
    elif not classes:
        raise UserError(f'labels={list(labels)}: this run has no classes; leave labels out')
    for label in labels:
        if classes and not 0 <= label < classes:
            raise UserError(f'label {label} is out of range: this run has 0..{classes - 1}')
    n = num_videos or len(labels)
    return jnp.asarray([labels[i % len(labels)] for i in range(n)], jnp.int32)


def check_prompts(prompt: str | Sequence[str] | None, num_videos: int | None) -> list[str]:
    """The prompt of each of `num_videos` videos; see `Generator.__call__`.

    Raises:
      UserError: no prompt.
    """
    if prompt is None:
        raise UserError("prompt is missing: this run is conditioned on text ('' is no text)")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise UserError('prompt is empty: give at least one')
    n = num_videos or len(prompts)
    return [prompts[i % len(prompts)] for i in range(n)]


def check_bytes(name: str, x: np.ndarray):
    """Floats in another range would pass as videos, and look like noise."""
    if np.asarray(x).dtype != np.uint8:
        raise UserError(f'{name} has the type {np.asarray(x).dtype}: give uint8 in 0..255')


def fit_image(image: np.ndarray, height: int, width: int) -> UInt8[np.ndarray, 'h w 3']:
    """The middle of a picture, scaled to a size."""
    image = np.asarray(image)
    check_bytes('image', image)
    if image.ndim != 3 or image.shape[-1] != 3 or not image.size:
        raise UserError(f'image has the shape {image.shape}: give RGB, (height, width, 3)')
    if image.shape[:2] == (height, width):
        return image
    logging.warning(
        'image of %d x %d: scaled, and its middle of %d x %d used', *image.shape[:2], height, width
    )
    return fit_frame(image, height, width)
