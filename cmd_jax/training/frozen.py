"""What a stage reads and does not train: the parts before it, and pretrained networks.

`load` reads them; `abstract` gives their shapes, dtypes and layouts, for a compiler.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cmd_jax import stable_diffusion
from cmd_jax.data.latent_records import Latents
from cmd_jax.errors import UserError
from cmd_jax.evaluation.networks import lpips
from cmd_jax.models.layers import in_compute_dtype
from cmd_jax.models.rngs import make_rngs
from cmd_jax.parallel.mesh import abstract_params, compute_dtype, param_sharding, replicated
from cmd_jax.parallel.placement import fetch, put, put_batch
from cmd_jax.stable_diffusion import weights
from cmd_jax.stable_diffusion.folder import PARTS
from cmd_jax.training import config as configs
from cmd_jax.training import latent_cache, losses, parts, previews, texts, trained


@dataclasses.dataclass(frozen=True)
class Frozen:
    """What a stage reads and does not train.

    Attributes:
      networks: networks and arrays that the loss reads, see `losses`.
      inputs: a host's batch from the pipeline -> what of it the loss reads.
      trained_on: what the stage's inputs.json has to say; None of what is not loaded.
    """

    networks: dict
    inputs: Callable[[dict], dict]
    trained_on: trained.Inputs | None = None


def load(name: str, config: configs.Config, workdir: Path, data, mesh) -> Frozen:
    """The parts of a stage; the later two stages read the autoencoder of `workdir`.

    Raises:
      UserError: for parts that are missing or do not fit the config.
    """
    vae = parts.load_vae(config, mesh)
    networks = {} if vae is None else {'vae': vae}
    if name == 'autoencoder':
        if config.autoencoder.loss.lpips_weight:
            networks['lpips'] = place(lpips.load('vgg'), mesh)
        return Frozen(networks, labelled, trained.Inputs(data.class_names))
    autoencoder = trained_autoencoder(config, workdir, mesh)
    networks['autoencoder'] = in_compute_dtype(autoencoder.network)
    trained_on = trained.inputs_on(data.class_names, autoencoder)
    text = load_text(name, config, autoencoder, data, mesh)
    if text is None:
        return Frozen(networks, labelled, trained_on)
    inputs = functools.partial(captioned, text.lookup)
    return Frozen(networks | {'text': text.frozen}, inputs, trained_on)


def load_text(
    name: str, config: configs.Config, autoencoder: trained.Trained, data, mesh
) -> texts.Texts | None:
    """The texts of a stage; None where classes are the condition."""
    cached = isinstance(data.source, Latents)
    if cached:
        latent_cache.check(data.source, config, autoencoder)
    if config.condition != 'text':
        return None
    if cached:
        return texts.given(data.source.empty_prompt(), pooled=name == 'motion', mesh=mesh)
    encoder = parts.load_frozen(parts.text_source(config, name), ('text_encoder',), mesh)
    dtype = compute_dtype(getattr(config, name).train.precision)
    return texts.make(encoder, data.captions, pooled=name == 'motion', dtype=dtype, mesh=mesh)


def abstract(name: str, config: configs.Config, mesh) -> tuple[Frozen, dict]:
    """The shapes of a stage's parts, and of a batch of what its loss reads.

    As for videos whose captions are not known ahead, the text encoder is part of each step, or for
    a latent cache (`data.source=latents:…`), which has features of text.
    """
    section, data = getattr(config, name), config.data
    source, dtype = config.stable_diffusion.source, compute_dtype('auto')
    # Not parsed: the place may be left out.
    cached = data.source.startswith('latents:')

    def pretrained(where, part):
        module = PARTS[part].module
        found = weights.abstract(module, **stable_diffusion.arguments(where, part), dtype=dtype)
        return shaped(found, mesh, dtype)

    networks = {'vae': pretrained(source, 'vae')} if source else {}
    size = section.train.batch_size
    video = size, data.frames, data.height, data.width, 3
    batch = {'video': (video, jnp.uint8), 'place': ((size,), jnp.int32)}
    if name == 'autoencoder' and section.loss.lpips_weight:
        module = nnx.eval_shape(lambda: lpips.LPIPS('vgg', rngs=make_rngs(0)))
        networks['lpips'] = shaped(module, mesh)
    if name != 'autoencoder':
        module = nnx.eval_shape(lambda: parts.make_autoencoder(config, make_rngs(0)))
        networks['autoencoder'] = in_compute_dtype(shaped(module, mesh))
        if cached:
            latent = size, data.frames, module.motion_tokens, module.motion_channels
            batch |= {'content': ((size, *parts.frame_shape(config)), jnp.float32)}
            batch |= {'motion': (latent, jnp.float32)}
            del batch['video']
    if name == 'motion':
        networks['statistics'] = abstract_statistics(config, mesh)
    if config.condition == 'text' and name != 'autoencoder':
        encoder = pretrained(parts.text_source(config, name), 'text_encoder')
        pooled = name == 'motion'
        null = (encoder.dim,) if pooled else (encoder.length, encoder.dim)
        kept = jnp.float32 if cached else compute_dtype(section.train.precision)
        leaf = jax.ShapeDtypeStruct(null, kept, sharding=replicated(mesh))
        if cached:
            networks['text'], batch['text'] = texts.Given(leaf), ((size, *null), kept)
        else:
            networks['text'] = texts.Encode(encoder, leaf, pooled)
            batch['text'] = (size, encoder.length), jnp.int32
    else:
        batch['label'] = (size,), jnp.int32
    return Frozen(networks, labelled), batch


def shaped(module: nnx.Module, mesh, dtype=None) -> nnx.Module:
    """An abstract network with layouts, and with parameters of another dtype if one is given."""
    graphdef, params = nnx.split(module, nnx.Param)
    return nnx.merge(graphdef, abstract_params(nnx.to_pure_dict(params), mesh, dtype))


def place(module: nnx.Module, mesh) -> nnx.Module:
    """A network of this host's arrays on the mesh."""
    graphdef, params = nnx.split(module, nnx.Param)
    params = nnx.to_pure_dict(params)
    return nnx.merge(graphdef, put(params, param_sharding(params, mesh)))


def trained_autoencoder(config: configs.Config, workdir: Path, mesh) -> trained.Trained:
    """The autoencoder of the run, if it is the one that this config describes."""
    found = trained.load(workdir, 'autoencoder', mesh)
    stored, given = configs.flatten(found.config), configs.flatten(config)
    fields = (
        *('autoencoder.model.', 'data.frames', 'data.height', 'data.width'),
        'stable_diffusion.source',
    )
    wrong = [
        f'{k}: {stored[k]!r} -> {given[k]!r}'
        for k in given
        if k.startswith(fields) and not k.endswith(configs.FREE) and stored[k] != given[k]
    ]
    if wrong:
        raise UserError(
            f'the autoencoder in {workdir} was trained with another config '
            f'(stored -> given: {"; ".join(wrong)}): use its config or another workdir'
        )
    return found


def abstract_statistics(config: configs.Config, mesh) -> dict:
    """The shapes of `measure_statistics`."""
    channels = config.autoencoder.model.motion_channels
    vector = jax.ShapeDtypeStruct((channels,), jnp.float32, sharding=replicated(mesh))
    return {'mean': vector, 'std': vector}


def measure_statistics(
    networks: dict, batches: Iterator[dict], clips: int, at_once: int, mesh
) -> dict:
    """Mean and standard deviation per channel of the motion latents of the first `clips` clips.

    `batches` gives this process's shares of them. Returns {'mean': [d], 'std': [d]} in float32, on
    every device; sums are taken in float64.
    """
    count = total = squares = 0
    seen = 0
    while seen < clips:
        batch = {name: x for name, x in next(batches).items() if name in losses.READ}
        motion = fetch(previews.encode(networks, put_batch(batch, mesh), at_once)[1])
        seen += len(motion)
        flat = motion.astype(np.float64).reshape(-1, motion.shape[-1])
        count, total, squares = count + len(flat), total + flat.sum(0), squares + (flat**2).sum(0)
    mean = total / count
    # A channel that never moves would otherwise be divided by zero.
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-6))
    found = {'mean': mean.astype(np.float32), 'std': std.astype(np.float32)}
    return put(found, replicated(mesh))


def labelled(batch: dict) -> dict:
    """What of a batch the losses read, with labels."""
    return {name: batch[name] for name in (*losses.READ, 'label') if name in batch}


def captioned(lookup: Callable[[dict], np.ndarray], batch: dict) -> dict:
    """What of a batch the losses read, with text."""
    return {name: batch[name] for name in losses.READ if name in batch} | {'text': lookup(batch)}
