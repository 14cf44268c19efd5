"""State dicts with the documented names of the authors' networks and of DiT, and random values."""

import jax
import numpy as np
from flax import nnx

from cmd_jax.parallel.mesh import path_name


def random_dict(shapes: dict[str, tuple], seed: int = 0) -> dict[str, np.ndarray]:
    """A value for each name, of a size that keeps signals of about one."""
    random = np.random.RandomState(seed)
    out = {}
    for name, shape in shapes.items():
        scale = 0.3 if len(shape) == 1 else np.prod(shape[1:]) ** -0.5
        norm = name.endswith('norm.weight')
        out[name] = (norm + scale * random.standard_normal(shape)).astype(np.float32)
    return out


def linear(name: str, out: int, *inputs: int) -> dict:
    return {f'{name}.weight': (out, *inputs), f'{name}.bias': (out,)}


def autoencoder_dict(dim=32, depth=2, patch=4, channels=3, motion_channels=5) -> dict:
    shapes = {}
    for side in ('encoder', 'decoder'):
        for i in range(depth):
            for j in range(3):
                shapes |= {f'{side}.layers.{i}.{j}.norm.{w}': (dim,) for w in ('weight', 'bias')}
            for j in range(2):
                shapes |= linear(f'{side}.layers.{i}.{j}.fn.qkv', 3 * dim, dim)
                shapes |= linear(f'{side}.layers.{i}.{j}.fn.proj', dim, dim)
            shapes |= linear(f'{side}.layers.{i}.2.fn.net.0', 8 * dim, dim)
            shapes |= linear(f'{side}.layers.{i}.2.fn.net.3', dim, 4 * dim)
        shapes |= {
            f'{side}.frame_rot_emb.inv_freqs': (2,),
            f'{side}.image_rot_emb.scales': (2,),
        }
    pixels = patch * patch * channels
    shapes |= linear('encoder.to_patch_embedding', dim, pixels)
    shapes |= linear('to_patch_embedding_xy', dim, pixels)
    for name in ('to_logit.1', 'to_output.1'):
        shapes |= {f'{name}.weight': (dim, channels, patch, patch), f'{name}.bias': (channels,)}
    for name in ('pre_xt', 'pre_yt'):
        shapes |= linear(name, motion_channels, dim, 1, 1)
    for name in ('post_xt', 'post_yt'):
        shapes |= linear(name, dim, motion_channels, 1, 1)
    return random_dict(shapes)


def dit_dict(dim=96, depth=2, patch=2, channels=4, tokens=24, classes=None, content=None) -> dict:
    """`classes`: of a content network; `content` = (tokens, channels, patch): a motion network."""
    shapes = linear('x_embedder.proj', dim, channels, patch, patch)
    shapes |= linear('t_embedder.mlp.0', dim, 256) | linear('t_embedder.mlp.2', dim, dim)
    shapes['pos_embed'] = (1, tokens, dim)
    for i in range(depth):
        shapes |= linear(f'blocks.{i}.attn.qkv', 3 * dim, dim)
        shapes |= linear(f'blocks.{i}.attn.proj', dim, dim)
        shapes |= linear(f'blocks.{i}.mlp.fc1', 4 * dim, dim)
        shapes |= linear(f'blocks.{i}.mlp.fc2', dim, 4 * dim)
        shapes |= linear(f'blocks.{i}.adaLN_modulation.1', 6 * dim, dim)
    shapes |= linear('final_layer.adaLN_modulation.1', 2 * dim, dim)
    shapes |= linear('final_layer.linear', patch * patch * channels * 2, dim)
    if classes is not None:
        shapes['y_embedder.embedding_table.weight'] = (classes + 1, dim)
    if content is not None:
        count, content_channels, content_patch = content
        shapes |= linear('keyframe_embedder.proj', dim, content_channels, *2 * (content_patch,))
        shapes['keyframe_pos_embed'] = (1, count, dim)
    return random_dict(shapes)


def tensors(state_dict: dict, prefix: str = '') -> dict:
    """As PyTorch's tensors."""
    import torch

    return {f'{prefix}{k}': torch.from_numpy(x) for k, x in state_dict.items()}


def params(module: nnx.Module) -> dict:
    """{path: array} of one of our networks."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    return {path_name(path): np.asarray(x) for path, x in leaves}
