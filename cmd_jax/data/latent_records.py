"""Latent caches: content frames, motion latents and text features of a data set, computed once.

A cache is a folder of records (see `records`), made by `python -m cmd_jax.data.latents`, with the
fields

    content          [h w c], the content frame: pixels in [-1, 1] or scaled latents
    motion           [t s d], the motion latent, not normalised
    label            int32
    caption          text
    hidden           [n k], with text: hidden states of the content stage's text encoder
    pooled           [k], with text: what the motion stage is conditioned on

and text.safetensors, the features `hidden` and `pooled` of the empty prompt.
"""

import numpy as np
import safetensors.numpy

from cmd_jax.data import files, records
from cmd_jax.errors import UserError

FORMAT = 'cmd_jax latents 1'
EMPTY_PROMPT = 'text.safetensors'
ARRAYS = ('content', 'motion', 'hidden', 'pooled')
DTYPES = ('float32', 'float16')


class Latents:
    """What a latent cache holds of a split, by random access.

    `source[i]` is a dict of `content` and `motion` (float32), `label`, `caption`, `index` and,
    where the cache has text, `hidden` and `pooled` (float32). Nothing is drawn by chance.

    Attributes:
      name: 'latents'.
      class_names: of the data set; empty where it has none.
      captions: None: features come with the clips.
      header: of the cache.
      path: of the cache.
    """

    name = 'latents'
    captions = None

    def __init__(self, path: str, split: str):
        """Opens a split.

        Raises:
          UserError: no finished cache, or shards are missing.
        """
        self.path, self.header = path, records.read_header(path, FORMAT)
        self.class_names = self.header['class_names']
        self._shards = records.Shards(path, split)
        if not len(self._shards):
            raise UserError(f'{path}: its split {split!r} is empty')

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, i: int, rng: np.random.Generator | None = None) -> dict:
        """Clip i."""
        del rng
        record = records.unpack(self._shards[i])
        arrays = {name: record[name].astype(np.float32) for name in ARRAYS if name in record}
        return arrays | {
            'label': np.int32(record['label']),
            'caption': records.text(record['caption']),
            'index': np.int64(i),
        }

    def empty_prompt(self) -> dict[str, np.ndarray]:
        """{'hidden': [n k], 'pooled': [k]} of the empty prompt."""
        return safetensors.numpy.load(files.read(files.join(self.path, EMPTY_PROMPT)))
