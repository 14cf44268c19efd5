"""Multiply-adds of the networks, as the paper counts them and as they are; benchmarks/flops.py
prints them."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
from flax import nnx

from cmd_jax.models.flops import Flops, count
from cmd_jax.parallel.mesh import make_mesh
from cmd_jax.training import compile_for, compile_sampler
from cmd_jax.training import config as configs

# T multiply-adds that the paper tells: a network's forward pass for one clip of 16 x 512 x 512; a
# video of 16 x 512 x 1024 by steps of both stages.
PARTS = {'autoencoder': 0.77, 'content': 0.34, 'motion': 0.14}
SAMPLING = {50: 46.8, 100: 92.1}


def shipped(arg: str) -> configs.Config:
    """The text-to-video config for an argument, such as 'sd21,all'."""
    found = importlib.import_module('configs.text_to_video').get_config(arg)
    return configs.parse(found.to_dict())


def called(network: nnx.Module, *args) -> Flops:
    return count(lambda network, *args: network(*args), network, *args)


def without_vae(call: compile_sampler.Call) -> compile_sampler.Call:
    """The decoding of a video by the autoencoder alone."""

    @jax.jit
    def decode(autoencoder, content, motion):
        return autoencoder.decode(content, motion)

    arrays = {name: x for name, x in call.arrays.items() if name != 'vae'}
    return compile_sampler.Call(decode, arrays, {})


def evaluations(config: configs.Config) -> dict[str, Flops]:
    """One evaluation of each network for one video, and the decoders."""
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        calls = compile_sampler.calls(config, compile_for.known_classes(config), 1, mesh)[1]
        content, motion, video = (
            calls[name].arrays for name in ('content frame', 'motion latent', 'video')
        )
        t = jax.ShapeDtypeStruct((1,), jnp.float32)
        frame, latent = video['content'], video['motion']
        clip = jax.ShapeDtypeStruct((1, config.data.frames, *frame.shape[1:]), jnp.float32)
        decode, pixels = without_vae(calls['video']), calls['video']
        without = count(decode.program, **decode.arrays)
        whole = count(lambda **arrays: pixels.program(**arrays, **pixels.static), **pixels.arrays)
        return {
            'autoencoder': called(video['autoencoder'], clip),
            'content': called(content['model'], frame, t, content['condition']),
            'motion': called(motion['model'], latent, t, frame, motion['condition']),
            'autoencoder decoder': without,
            'VAE decoder': whole + without * -1,
        }


def told(x: Flops) -> dict[str, float]:
    """T multiply-adds: as fvcore counts, and all."""
    return {'fvcore': (x.linear + x.convolution) / 1e12, 'all': x.total / 1e12}


def table() -> list[dict]:
    """Rows of name, the paper's figure, and `told`."""
    small, large = shipped('sd15,all'), shipped('sd21,all')
    # The paper's motion network has content patches of 8; ours of 4 for small frames.
    model = dataclasses.replace(small.motion.model, content_patch=8)
    small = dataclasses.replace(small, motion=dataclasses.replace(small.motion, model=model))
    small, large = evaluations(small), evaluations(large)
    rows = [
        {'name': f'{name}, 16 x 512 x 512', 'paper': paper, **told(small[name])}
        for name, paper in PARTS.items()
    ]
    for steps, paper in SAMPLING.items():
        networks = (large['content'] + large['motion']) * steps
        both = networks + large['autoencoder decoder']
        name = f'sampling 16 x 512 x 1024, {steps} + {steps} steps'
        counted = told(networks + large['autoencoder'])['fvcore']
        rows.append({'name': name, 'paper': paper, **told(both), 'fvcore': counted})
        guided = told(both + networks + large['VAE decoder'])
        rows.append({'name': f'{name}, guided, to pixels', 'paper': None, **guided})
    return rows
