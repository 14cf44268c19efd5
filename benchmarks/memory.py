"""What each stage of text-to-video holds at 16 x 512 x 1024: parameters, optimizer, activations.

    python -m benchmarks.memory --out=benchmarks/results/memory_sd21.json

Nothing is allocated and no weight is read. Parameters are counted; activations are what the traced
training step keeps between its forward and its backward pass: the residuals of jax.vjp of the loss
for one clip, without those that are parameters or inputs. A compiler keeps no more than that by
choice, and needs room to work in besides. Linear layers compute in bfloat16.
"""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from benchmarks import rows
from cmd_jax import cli
from cmd_jax.stable_diffusion import VAE, TextEncoder, arguments
from cmd_jax.stable_diffusion.make import describe
from cmd_jax.training import config as configs
from cmd_jax.training import losses, parts, texts
from cmd_jax.training import state as states
from configs import text_to_video

FAMILY = flags.DEFINE_enum('family', 'sd21', ['sd15', 'sd21'], 'Of configs/text_to_video.py')
OUT = flags.DEFINE_string('out', None, 'JSON file')

# Of each stage: without remat, and what saves most; the config's own is between or one of them.
POLICIES = {
    'autoencoder': ('none', 'mlp', 'attention', 'full'),
    'content': ('none', 'full'),
    'motion': ('none', 'mlp', 'attention', 'full'),
}


def config_of(folder: pathlib.Path, stage: str, remat: str) -> configs.Config:
    tree = text_to_video.get_config(f'{FAMILY.value},{stage}').to_dict()
    tree['stable_diffusion']['source'] = tree['motion']['text_encoder'] = str(folder)
    tree[stage]['model']['remat'] = remat
    for part in configs.STAGES:
        tree[part]['train']['precision'] = 'bfloat16'
    return configs.parse(tree)


def abstract(make, dtype):
    """A network with shapes for parameters."""
    module = nnx.eval_shape(make)
    graphdef, params = nnx.split(module, nnx.Param)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), nnx.to_pure_dict(params))
    return nnx.merge(graphdef, params)


def frozen_parts(config: configs.Config, stage: str, source: str) -> dict:
    """What the loss of a stage reads, as shapes."""
    half = jnp.bfloat16

    def make(network, part):
        return lambda: network(**arguments(source, part), dtype=half, rngs=nnx.Rngs(0))

    frozen = {'vae': abstract(make(VAE, 'vae'), half)}
    if stage == 'autoencoder':
        return frozen
    frozen['autoencoder'] = abstract(lambda: parts.make_autoencoder(config, nnx.Rngs(0)), 'float32')
    sizes = arguments(source, 'text_encoder')
    encoder = abstract(make(TextEncoder, 'text_encoder'), half)
    pooled = stage == 'motion'
    null = jnp.zeros((sizes['dim'],) if pooled else (sizes['length'], sizes['dim']), half)
    frozen['text'] = texts.Encode(encoder, null, pooled)
    if pooled:
        vector = jax.ShapeDtypeStruct((config.autoencoder.model.motion_channels,), 'float32')
        frozen['statistics'] = {'mean': vector, 'std': vector}
    return frozen


def loss_of(config: configs.Config, stage: str):
    section = getattr(config, stage)
    frames = losses.Frames(at_once=config.stable_diffusion.frames_at_once)
    if stage == 'autoencoder':
        return losses.autoencoder_loss(section.loss, frames)
    process = parts.make_process(section.process)
    make = {'content': losses.content_loss, 'motion': losses.motion_loss}[stage]
    return make(process, section.loss, frames)


def size(tree) -> int:
    """Bytes of a tree of shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def kept(loss, graphdef, params, frozen, batch, keys) -> int:
    """Bytes of what the forward pass leaves to the backward pass."""

    def residuals(params, frozen, batch, keys):
        def forward(params):
            return loss(nnx.merge(graphdef, params), frozen, batch, keys)[0]

        return jax.vjp(forward, params)[1]

    jaxpr = jax.make_jaxpr(residuals)(params, frozen, batch, keys).jaxpr
    given = {*jaxpr.invars, *jaxpr.constvars}
    left = {v for v in jaxpr.outvars if isinstance(v, type(jaxpr.invars[0])) and v not in given}
    return sum(v.aval.size * v.aval.dtype.itemsize for v in left)


def measure(folder: pathlib.Path, stage: str, remat: str) -> dict:
    config = config_of(folder, stage, remat)
    section, data = getattr(config, stage), config.data
    model = abstract(lambda: parts.make_network(stage, config, 0, nnx.Rngs(0)), 'float32')
    graphdef, params = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(params)
    frozen = frozen_parts(config, stage, str(folder))
    batch = {'video': jax.ShapeDtypeStruct((1, data.frames, data.height, data.width, 3), 'uint8')}
    batch['text'] = jax.ShapeDtypeStruct((1, 77), 'int32')
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    slots = jax.eval_shape(states.optimizer(section.train).init, params)
    return {
        'stage': stage,
        'remat': remat,
        'parameters_million': sum(x.size for x in jax.tree.leaves(params)) / 1e6,
        'parameters_gb': size(params) / 1e9,
        'average_gb': size(params) / 1e9,
        'optimizer_gb': size(slots) / 1e9,
        'gradients_gb': size(params) / 1e9,
        'frozen_gb': size(jax.tree.leaves(frozen)) / 1e9,
        'activations_gb_a_clip': kept(loss_of(config, stage), graphdef, params, frozen, batch, keys)
        / 1e9,
    }


def main():
    about = {'family': FAMILY.value, 'jax': jax.__version__}
    table = rows.Rows(OUT.value, about, ('stage', 'remat'))
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        describe(folder, FAMILY.value)
        print(
            '| stage | remat | parameters | weights | average | optimizer | gradients | frozen '
            '| activations of a clip |'
        )
        print('|---|---|---|---|---|---|---|---|---|')
        for stage, policies in POLICIES.items():
            for remat in policies:
                table.add(row := measure(folder, stage, remat))
                gb = [f'{x:.2f} GB' for name, x in row.items() if '_gb' in name]
                print(
                    f'| {stage} | {remat} | {row["parameters_million"]:.1f} M | {" | ".join(gb)} |'
                )


if __name__ == '__main__':
    cli.run(main)
