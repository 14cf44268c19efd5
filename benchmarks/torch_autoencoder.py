"""The video autoencoder in plain PyTorch, to be timed beside ours: same sizes, same arithmetic."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, turn):
        q, k, v = (
            rearrange(a, 'b n (h d) -> b h n d', h=self.heads)
            for a in self.qkv(self.norm(x)).chunk(3, -1)
        )
        q, k = rotated(q, turn), rotated(k, turn)
        out = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        return x + self.out(rearrange(out, 'b h n d -> b n (h d)'))


def rotated(x, turn):
    """Pairs (i, i + d/2) turned by angles whose (cos, sin) are [n d/2] each."""
    cos, sin = turn
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def turns(count: int, width: int, like):
    angles = torch.arange(count)[:, None] * torch.logspace(0, -1, width)
    return angles.cos().to(like), angles.sin().to(like)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.time, self.space = Attention(dim, heads), Attention(dim, heads)
        self.norm = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, 8 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x, turn_time, turn_space):
        t = x.shape[1]
        x = self.time(rearrange(x, 'b t n k -> (b n) t k'), turn_time)
        x = self.space(rearrange(x, '(b n) t k -> (b t) n k', n=turn_space[0].shape[0]), turn_space)
        value, gate = self.up(self.norm(x)).chunk(2, -1)
        x = x + self.down(value * F.gelu(gate))
        return rearrange(x, '(b t) n k -> b t n k', t=t)


class Backbone(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int):
        super().__init__()
        self.width = dim // heads // 2
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))

    def forward(self, x):
        _, t, h, w, _ = x.shape
        turn_time, turn_space = turns(t, self.width, x), turns(h * w, self.width, x)
        x = rearrange(x, 'b t h w k -> b t (h w) k')
        for block in self.blocks:
            x = block(x, turn_time, turn_space)
        return rearrange(x, 'b t (h w) k -> b t h w k', h=h)


class VideoAutoencoder(nn.Module):
    """Pixels [b t h w 3] to their reconstruction; sizes of the paper."""

    def __init__(self, patch=2, dim=384, depth=8, heads=8, motion_channels=8):
        super().__init__()
        pixels, self.patch = 3 * patch**2, patch
        self.patch_embed = nn.Linear(pixels, dim)
        self.encoder = Backbone(dim, depth, heads)
        self.importance = nn.Linear(dim, pixels)
        self.across, self.down = (nn.Linear(dim, motion_channels) for _ in range(2))
        self.content_embed = nn.Linear(pixels, dim)
        self.across_embed, self.down_embed = (nn.Linear(motion_channels, dim) for _ in range(2))
        self.decoder = Backbone(dim, depth, heads)
        self.output = nn.Linear(dim, pixels)

    def patches(self, x):
        return rearrange(x, '... (h p) (w q) c -> ... h w (p q c)', p=self.patch, q=self.patch)

    def forward(self, video):
        patches = self.patches(video)
        u = self.encoder(self.patch_embed(patches))
        content = (patches * self.importance(u).softmax(1)).sum(1)
        across, down = self.across(u.mean(2)).tanh(), self.down(u.mean(3)).tanh()
        u = self.content_embed(content)[:, None]
        u = u + self.across_embed(across)[:, :, None] + self.down_embed(down)[:, :, :, None]
        x = 2 * self.output(self.decoder(u)).sigmoid() - 1
        return rearrange(x, 'b t h w (p q c) -> b t (h p) (w q) c', p=self.patch, q=self.patch)
