"""From captions to what the networks are conditioned on.

The text encoders are frozen. Where the data can tell its captions, and their features are not too
large to keep, each caption is encoded once, before training (`Table`); else in each step
(`Encode`). Either is called as frozen['text'](batch['text']) inside the step.
"""

import dataclasses
import typing
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import logging
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from cmd_jax.parallel.mesh import replicated, shard
from cmd_jax.parallel.placement import put
from cmd_jax.stable_diffusion import StableDiffusion, TextEncoder
from cmd_jax.stable_diffusion.text import mean_over_text

Leaf = typing.Any  # jax.Array, or what jax puts in its place when it looks at trees
TABLE_BYTES = 2**29  # most memory of a table


@struct.dataclass
class Table:
    """Features of known captions.

    Attributes:
      features: [m n k] hidden states, or [m k] their means over the text.
      null: features of the empty prompt, [n k] or [k].
    """

    features: Leaf
    null: Leaf

    def __call__(self, rows: Int[Array, 'b']) -> Float[Array, 'b *s']:
        found = self.features[rows]
        return shard(found, 'batch', *[None] * (found.ndim - 1))


@struct.dataclass
class Encode:
    """The encoder itself.

    Attributes:
      encoder: network.
      null: features of the empty prompt.
      pooled: whether features are means over the text.
    """

    encoder: TextEncoder
    null: Leaf
    pooled: bool = struct.field(pytree_node=False)

    def __call__(self, ids: Int[Array, 'b n']) -> Float[Array, 'b *s']:
        hidden = self.encoder(ids)[0]
        return mean_over_text(hidden, ids, self.encoder.end) if self.pooled else hidden


@struct.dataclass
class Given:
    """Features come with the batch.

    Attributes:
      null: features of the empty prompt.
    """

    null: Leaf

    def __call__(self, features: Float[Array, 'b *s']) -> Float[Array, 'b *s']:
        return features


@dataclasses.dataclass(frozen=True)
class Texts:
    """What a stage needs of text.

    Attributes:
      frozen: the part inside the step.
      lookup: a batch from the pipeline -> batch['text'] of the step: int32 [b] or [b n], or
        features.
    """

    frozen: Table | Encode | Given
    lookup: Callable[[dict], np.ndarray]


def make(
    encoder: StableDiffusion,
    captions: Sequence[str] | None,
    *,
    pooled: bool,
    dtype,
    mesh: jax.sharding.Mesh,
    table_bytes: int = TABLE_BYTES,
) -> Texts:
    """The texts of a stage.

    Args:
      encoder: tokenizer and text encoder.
      captions: all that the data can have, or None where that is not known.
      pooled: means over the text (motion) rather than hidden states (content).
      dtype: what features are kept in.
      mesh: where they lie.
      table_bytes: a larger table is not made.
    """

    def features(prompts):
        hidden, mean = encoder.encode(prompts)
        return np.asarray(mean if pooled else hidden, dtype)

    null = put(features([''])[0], replicated(mesh))
    if captions is None or len(captions) * null.size * null.dtype.itemsize > table_bytes:
        logging.info('captions are encoded in each step')
        frozen = Encode(encoder.text_encoder, null, pooled)
        return Texts(frozen, lambda batch: encoder.tokenize([str(c) for c in batch['caption']]))
    rows = {caption: i for i, caption in enumerate(captions)}
    logging.info('%d captions are encoded once', len(rows))

    def lookup(batch):
        return np.asarray([rows[str(caption)] for caption in batch['caption']], np.int32)

    return Texts(Table(put_table(features(list(rows)), mesh), null), lookup)


def put_table(features: np.ndarray, mesh: jax.sharding.Mesh) -> jax.Array:
    """Each device has a part of the channels of all rows."""
    split = 'fsdp' if features.shape[-1] % mesh.shape['fsdp'] == 0 else None
    spec = PartitionSpec(*[None] * (features.ndim - 1), split)
    return put(features, NamedSharding(mesh, spec))


def given(empty_prompt: dict, *, pooled: bool, mesh: jax.sharding.Mesh) -> Texts:
    """The texts of a stage whose batches bring features, from a latent cache.

    `empty_prompt` has the features of no text: `hidden` [n k] and `pooled` [k].
    """
    name = 'pooled' if pooled else 'hidden'
    null = put(np.asarray(empty_prompt[name], np.float32), replicated(mesh))
    return Texts(Given(null), lambda batch: batch[name])
