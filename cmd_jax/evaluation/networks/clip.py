"""CLIP: how well an image fits a text, as the cosine of two embeddings.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021,
arXiv 2103.00020. Weights come from a folder of transformers' `CLIPModel` (its names are ours) or a
repository; the text encoder is Stable Diffusion's of the same kind.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from cmd_jax import stable_diffusion
from cmd_jax.errors import UserError
from cmd_jax.models.layers import linear
from cmd_jax.parallel import batches
from cmd_jax.parallel.mesh import make_mesh, shard
from cmd_jax.stable_diffusion import StableDiffusion, options, weights
from cmd_jax.stable_diffusion.text import Encoder

# The one that CLIPSIM is defined by.
REPOSITORY = 'openai/clip-vit-base-patch32'
VIT_B32 = dict(
    size=224,
    patch=32,
    dim=768,
    depth=12,
    heads=12,
    hidden=3072,
    activation='quick_gelu',
    projected=512,
)
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_PROMPTS_AT_ONCE = 64


class Patches(nnx.Module):
    """Embeddings of the patches of images, behind that of the whole."""

    def __init__(self, size: int, patch: int, dim: int, *, rngs):
        self.class_embedding = nnx.Param(jnp.zeros(dim))
        self.patch_embedding = nnx.Conv(
            *(3, dim, (patch, patch)), strides=patch, padding='VALID', use_bias=False, rngs=rngs
        )
        self.position_embedding = nnx.Embed((size // patch) ** 2 + 1, dim, rngs=rngs)

    def __call__(self, images: Float[Array, 'b h w 3']) -> Float[Array, 'b n k']:
        patches = rearrange(self.patch_embedding(images), 'b h w k -> b (h w) k')
        whole = jnp.broadcast_to(self.class_embedding[...], (len(images), 1, patches.shape[-1]))
        return jnp.concatenate([whole, patches], axis=1) + self.position_embedding.embedding[...]


class VisionTransformer(nnx.Module):
    def __init__(self, size, patch, dim, depth, heads, hidden, activation, *, rngs):
        self.embeddings = Patches(size, patch, dim, rngs=rngs)
        # transformers writes it so.
        self.pre_layrnorm = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)
        kwargs = dict(causal=False, dtype=jnp.float32, rngs=rngs)
        self.encoder = Encoder(depth, dim, heads, hidden, activation, **kwargs)
        self.post_layernorm = nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs)

    def __call__(self, images: Float[Array, 'b h w 3']) -> Float[Array, 'b k']:
        x = self.pre_layrnorm(self.embeddings(shard(images, 'batch', None, None, None)))
        return self.post_layernorm(self.encoder(x)[:, 0])


class ImageEncoder(nnx.Module):
    """CLIP's image encoder, and the projections of both encoders to one space.

    Args:
      size: of images, pixels a side.
      patch: pixels a side.
      dim, depth, heads, hidden, activation: see `stable_diffusion.text.TextEncoder`.
      projected: width of the common space.
      text_dim: width of the text encoder.
    """

    def __init__(
        self,
        *,
        size: int = 224,
        patch: int = 32,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden: int = 3072,
        activation: str = 'quick_gelu',
        projected: int = 512,
        text_dim: int = 512,
        rngs: nnx.Rngs,
    ):
        self.size = size
        sizes = (size, patch, dim, depth, heads, hidden, activation)
        self.vision_model = VisionTransformer(*sizes, rngs=rngs)
        kwargs = dict(use_bias=False, dtype=jnp.float32, rngs=rngs)
        self.visual_projection = linear(dim, projected, **kwargs)
        self.text_projection = linear(text_dim, projected, **kwargs)

    def __call__(self, images: Float[Array, 'b h w 3']) -> Float[Array, 'b k']:
        """Embeddings; values in [0, 1]."""
        normal = (images - jnp.array(_MEAN)) / jnp.array(_STD)
        return self.visual_projection(self.vision_model(normal))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIP:
    """Both encoders.

    Attributes:
      texts: the text encoder, with its tokenizer.
      images: the image encoder.
      arguments: of the image encoder.
      folder: where they were read.
      mesh: the devices that they run on.
    """

    texts: StableDiffusion
    images: ImageEncoder
    arguments: dict
    folder: pathlib.Path
    mesh: jax.sharding.Mesh

    def embed_texts(self, prompts: Sequence[str]) -> Float[np.ndarray, 'n k']:
        """Embeddings of texts, of length 1."""
        encoder = self.texts.text_encoder
        program = functools.partial(text_program, self.images.text_projection, encoder)
        ids = self.texts.tokenize(prompts)
        return batches.collect(batches.run(program, self.mesh, _PROMPTS_AT_ONCE, ids))

    def embed_videos(
        self, videos: UInt8[np.ndarray, 'n t h w 3'], batch_size: int = 64
    ) -> Float[np.ndarray, 'n t k']:
        """Embeddings of all frames, of length 1; `batch_size` of them at a time."""
        frames = np.stack([preprocess(x, self.images.size) for x in np.concatenate(videos)])
        program = functools.partial(image_program, self.images)
        found = batches.collect(batches.run(program, self.mesh, batch_size, frames))
        return found.reshape(*videos.shape[:2], -1)

    @property
    def is_vit_b32(self) -> bool:
        """Whether this is of the sizes and the activation of the network that CLIPSIM is defined
        by. Which weights it has, `sha256` tells."""
        return self.arguments == VIT_B32 and self.texts.text_encoder.dim == VIT_B32['projected']

    @functools.cached_property
    def sha256(self) -> str:
        """Of the files that the weights are in."""
        digest = hashlib.sha256()
        for path in weights.find_files(self.folder, ('model',)):
            digest.update(path.read_bytes())
        return digest.hexdigest()


def load(source: str | pathlib.Path = REPOSITORY, mesh: jax.sharding.Mesh | None = None) -> CLIP:
    """CLIP with the weights of a folder.

    Args:
      source: a folder that transformers' `CLIPModel.save_pretrained` has written, tokenizer
        included, or a repository id.
      mesh: all devices, if not given.

    Raises:
      UserError: for a folder of another model, unreadable files, or a repository that cannot be
        had.
    """
    mesh, there = mesh or make_mesh(), pathlib.Path(source)
    remedy = (
        f'give --clip=FOLDER with what transformers saves of {REPOSITORY} (docs/evaluation.md), or '
        'another repository'
    )
    if there.is_dir() and not (there / 'config.json').is_file():
        raise UserError(f'CLIP: {source} has no config.json: {remedy}')
    try:
        texts = stable_diffusion.load(source, parts=('text_encoder',), mesh=mesh)
    except UserError as e:
        if there.is_dir():
            raise
        # The hub's error comes with advice on diffusion models.
        raise UserError(f'CLIP: {str(e).partition(": ")[0]}: {remedy}') from e
    where = texts.folder / 'config.json'
    tree = json.loads(where.read_text())
    arguments = options.image_encoder(str(where), tree)
    images = weights.load(
        weights.abstract(ImageEncoder, **arguments, text_dim=texts.text_encoder.dim),
        *(texts.folder, ('model',), (), r'text_model\..*|logit_scale', mesh, jnp.float32),
    )
    return CLIP(texts=texts, images=images, arguments=arguments, folder=texts.folder, mesh=mesh)


def preprocess(frame: UInt8[np.ndarray, 'h w 3'], size: int) -> UInt8[np.ndarray, 's s 3']:
    """A frame as CLIP was trained on them: its short side scaled to `size` by Pillow's bicubic
    kernel, and the middle square."""
    height, width = frame.shape[:2]
    short = min(height, width)
    if short != size:
        # The long side is cut to whole pixels, as torchvision does.
        scaled = (int(size * width / short), int(size * height / short))
        frame = np.asarray(Image.fromarray(frame).resize(scaled, Image.Resampling.BICUBIC))
    top, left = (frame.shape[0] - size) // 2, (frame.shape[1] - size) // 2
    return frame[top : top + size, left : left + size]


@jax.jit
def image_program(network: ImageEncoder, images: UInt8[Array, 'b h w 3']) -> Float[Array, 'b k']:
    with jax.default_matmul_precision('float32'):
        return _unit_length(network(images.astype(jnp.float32) / 255))


@jax.jit
def text_program(projection: nnx.Linear, encoder, ids: Int[Array, 'b n']) -> Float[Array, 'b k']:
    with jax.default_matmul_precision('float32'):
        return _unit_length(projection(encoder(ids)[1]))


def _unit_length(x: Array) -> Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
