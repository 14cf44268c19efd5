"""The documented arithmetic of the authors' networks and of DiT in plain PyTorch."""

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

HEADS = 8


class Weights:
    """A state dict whose layers can be called."""

    def __init__(self, state_dict: dict, prefix: str = ''):
        self.tensors = {k: torch.as_tensor(v) for k, v in state_dict.items()}
        self.prefix = prefix

    def at(self, prefix: str) -> 'Weights':
        return Weights(self.tensors, self.prefix + prefix)

    def __getitem__(self, name: str):
        return self.tensors[self.prefix + name]

    def linear(self, name: str, x):
        return F.linear(x, self[f'{name}.weight'], self[f'{name}.bias'])

    def conv(self, name: str, x, stride: int = 1):
        return F.conv2d(x, self[f'{name}.weight'], self[f'{name}.bias'], stride=stride)

    def transpose(self, name: str, x, stride: int):
        return F.conv_transpose2d(x, self[f'{name}.weight'], self[f'{name}.bias'], stride=stride)

    def norm(self, name: str, x):
        return F.layer_norm(x, x.shape[-1:], self[f'{name}.weight'], self[f'{name}.bias'], eps=1e-5)


def attend(w: Weights, x, heads: int):
    """x [b n k], with layers qkv and proj."""
    q, k, v = (
        rearrange(a, 'b n (h d) -> b h n d', h=heads) for a in w.linear('qkv', x).chunk(3, -1)
    )
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return w.linear('proj', rearrange(scores.softmax(-1) @ v, 'b h n d -> b n (h d)'))


def backbone(w: Weights, u):
    """u [b t h w k]: temporal attention, spatial attention, feed-forward."""
    b, t, h, _, _ = u.shape
    i = 0
    while f'{w.prefix}layers.{i}.0.norm.weight' in w.tensors:
        time, space, mlp = (w.at(f'layers.{i}.{j}.') for j in range(3))
        x = rearrange(u, 'b t h w k -> (b h w) t k')
        x = x + attend(time.at('fn.'), time.norm('norm', x), HEADS)
        x = rearrange(x, '(b n) t k -> (b t) n k', b=b)
        x = x + attend(space.at('fn.'), space.norm('norm', x), HEADS)
        value, gate = mlp.linear('fn.net.0', mlp.norm('norm', x)).chunk(2, -1)
        x = x + mlp.linear('fn.net.3', value * F.gelu(gate))
        u = rearrange(x, '(b t) (h w) k -> b t h w k', t=t, h=h)
        i += 1
    return u


def autoencoder(state_dict: dict, video: np.ndarray, output: str = 'sigmoid'):
    """(content frame [b h w c], motion latent [b t s d], reconstruction) of video [b t h w c]."""
    w, video = Weights(state_dict), torch.from_numpy(video)
    b, t = video.shape[:2]
    p = w['to_logit.1.weight'].shape[-1]

    def patches(x):
        return rearrange(x, 'b t (h p) (w q) c -> b t h w (p q c)', p=p, q=p)

    def unpatch(name, u):
        x = w.transpose(name, rearrange(u, 'b t h w k -> (b t) k h w'), p)
        return rearrange(x, '(b t) c h w -> b t h w c', b=b)

    u = backbone(w.at('encoder.'), w.linear('encoder.to_patch_embedding', patches(video)))
    content = (video * unpatch('to_logit.1', u).softmax(1)).sum(1)
    across = w.conv('pre_xt', rearrange(u.mean(2), 'b t w k -> b k t w')).tanh()
    down = w.conv('pre_yt', rearrange(u.mean(3), 'b t h k -> b k t h')).tanh()
    motion = rearrange(torch.cat([across, down], -1), 'b d t s -> b t s d')
    u = w.linear('to_patch_embedding_xy', patches(content[:, None]))
    u = u + rearrange(w.conv('post_xt', across), 'b k t w -> b t 1 w k')
    u = u + rearrange(w.conv('post_yt', down), 'b k t h -> b t h 1 k')
    out = unpatch('to_output.1', backbone(w.at('decoder.'), u))
    return content, motion, 2 * out.sigmoid() - 1 if output == 'sigmoid' else out


def dit(state_dict: dict, x: np.ndarray, t: np.ndarray, heads: int, label=None, content=None):
    """x [b h w c] (a motion latent is an image of frames x tokens) -> [b h w 2c]."""
    w, x, t = Weights(state_dict), torch.from_numpy(x), torch.from_numpy(t)
    p = w['x_embedder.proj.weight'].shape[-1]
    rows = x.shape[1] // p

    def embed(name, image):
        stride = w[f'{name}.weight'].shape[-1]
        tokens = w.conv(name, rearrange(image, 'b h w c -> b c h w'), stride)
        return rearrange(tokens, 'b k h w -> b (h w) k')

    tokens = embed('x_embedder.proj', x) + w['pos_embed']
    read = tokens.shape[1]
    if content is not None:
        frame = embed('keyframe_embedder.proj', torch.from_numpy(content))
        tokens = torch.cat([tokens, frame + w['keyframe_pos_embed']], 1)
    angles = t[:, None] * torch.exp(-np.log(10000.0) * torch.arange(128) / 128)
    c = w.linear('t_embedder.mlp.0', torch.cat([angles.cos(), angles.sin()], -1))
    c = w.linear('t_embedder.mlp.2', F.silu(c))
    if label is not None:
        c = c + w['y_embedder.embedding_table.weight'][torch.from_numpy(label)]
    c = F.silu(c)[:, None]
    plain = tokens.shape[-1:]
    i = 0
    while f'blocks.{i}.attn.qkv.weight' in w.tensors:
        block = w.at(f'blocks.{i}.')
        parts = block.linear('adaLN_modulation.1', c).chunk(6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        h = F.layer_norm(tokens, plain, eps=1e-6) * (1 + scale1) + shift1
        tokens = tokens + gate1 * attend(block.at('attn.'), h, heads)
        h = F.layer_norm(tokens, plain, eps=1e-6) * (1 + scale2) + shift2
        h = F.gelu(block.linear('mlp.fc1', h), approximate='tanh')
        tokens = tokens + gate2 * block.linear('mlp.fc2', h)
        i += 1
    shift, scale = w.linear('final_layer.adaLN_modulation.1', c).chunk(2, -1)
    out = F.layer_norm(tokens[:, :read], plain, eps=1e-6) * (1 + scale) + shift
    out = w.linear('final_layer.linear', out)
    return rearrange(out, 'b (h w) (p q c) -> b (h p) (w q) c', h=rows, p=p, q=p)
