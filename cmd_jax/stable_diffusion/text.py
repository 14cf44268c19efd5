"""The text encoders of Stable Diffusion: CLIP ViT-L/14 (1.x) and OpenCLIP ViT-H/14 (2.x).

    token ids [b n] -> hidden states [b n k] (behind the final norm), pooled [b k]

Pooled is the hidden state of the end-of-text token (Radford et al. 2021, arXiv 2103.00020). Modules
and attributes carry transformers' names (`CLIPTextModel`).
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from cmd_jax.models.layers import gelu, linear, restack, run_stack
from cmd_jax.parallel.mesh import shard


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x): CLIP's approximation."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {'quick_gelu': quick_gelu, 'gelu': gelu}


class Attention(nnx.Module):
    def __init__(self, dim: int, heads: int, causal: bool, *, dtype, rngs):
        self.heads, self.causal = heads, causal
        kwargs = dict(dtype=dtype, rngs=rngs)
        self.q_proj, self.k_proj = linear(dim, dim, **kwargs), linear(dim, dim, **kwargs)
        self.v_proj, self.out_proj = linear(dim, dim, **kwargs), linear(dim, dim, **kwargs)

    def __call__(self, x: Float[Array, 'b n k']) -> Float[Array, 'b n k']:
        q, k, v = (
            shard(rearrange(layer(x), 'b n (h d) -> b n h d', h=self.heads), 'batch', None, 'heads')
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        # 77 tokens, or 50 patches: nothing for a kernel of ours to gain.
        out = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(rearrange(out, 'b n h d -> b n (h d)'))


class Mlp(nnx.Module):
    def __init__(self, dim: int, hidden: int, activation: str, *, dtype, rngs):
        self.activation = activation
        self.fc1 = linear(dim, hidden, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, 'b n k']) -> Float[Array, 'b n k']:
        hidden = shard(self.fc1(x), 'batch', None, 'mlp')
        return self.fc2(ACTIVATIONS[self.activation](hidden))


class Layer(nnx.Module):
    def __init__(self, dim, heads, hidden, activation, causal, *, dtype, rngs):
        kwargs = dict(dtype=dtype, rngs=rngs)
        self.layer_norm1 = nnx.LayerNorm(dim, epsilon=1e-5, **kwargs)
        self.self_attn = Attention(dim, heads, causal, **kwargs)
        self.layer_norm2 = nnx.LayerNorm(dim, epsilon=1e-5, **kwargs)
        self.mlp = Mlp(dim, hidden, activation, **kwargs)

    def __call__(self, x: Float[Array, 'b n k']) -> Float[Array, 'b n k']:
        x = x + self.self_attn(self.layer_norm1(x))
        return shard(x + self.mlp(self.layer_norm2(x)), 'batch', None, None)


class Embeddings(nnx.Module):
    def __init__(self, vocabulary: int, length: int, dim: int, *, dtype, rngs):
        self.token_embedding = nnx.Embed(vocabulary, dim, dtype=dtype, rngs=rngs)
        self.position_embedding = nnx.Embed(length, dim, dtype=dtype, rngs=rngs)

    def __call__(self, ids: Int[Array, 'b n']) -> Float[Array, 'b n k']:
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))


class Encoder(nnx.Module):
    """CLIP's transformer, of texts (causal) and of images."""

    def __init__(self, depth: int, *sizes, causal: bool, dtype, rngs):
        kwargs = dict(causal=causal, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Layer(*sizes, **kwargs) for _ in range(depth)])

    def __call__(self, x: Float[Array, 'b n k']) -> Float[Array, 'b n k']:
        # Files and checkpoints name the layers one by one; a loop compiles in the time of one.
        layers = restack(list(self.layers))
        return run_stack(layers, x, lambda layer, x: layer(x), remat='none')


class TextTransformer(nnx.Module):
    def __init__(self, vocabulary, length, dim, depth, heads, hidden, activation, *, dtype, rngs):
        kwargs = dict(dtype=dtype, rngs=rngs)
        self.embeddings = Embeddings(vocabulary, length, dim, **kwargs)
        self.encoder = Encoder(depth, dim, heads, hidden, activation, causal=True, **kwargs)
        self.final_layer_norm = nnx.LayerNorm(dim, epsilon=1e-5, **kwargs)

    def __call__(self, ids: Int[Array, 'b n']) -> Float[Array, 'b n k']:
        x = self.encoder(shard(self.embeddings(ids), 'batch', None, None))
        return self.final_layer_norm(x).astype(jnp.float32)


def mean_over_text(
    hidden: Float[Array, 'b n k'], ids: Int[Array, 'b n'], end: int
) -> Float[Array, 'b k']:
    """Mean of the hidden states from the start token through the first end token.

    What follows is padding, which some tokenizers write as end tokens too.
    """
    is_end = ids == end
    ends = jnp.cumsum(is_end, axis=1)
    kept = (ends - is_end == 0)[..., None]
    return jnp.sum(hidden * kept, axis=1) / jnp.sum(kept, axis=1)


class TextEncoder(nnx.Module):
    """Args:
    vocabulary, length: number of tokens, most tokens of a prompt.
    dim, depth, heads, hidden: width, layers, attention heads, width of the MLP.
    activation: 'quick_gelu' or 'gelu'.
    end: id of the end-of-text token.
    dtype: what is computed in; parameters are float32.
    """

    def __init__(
        self,
        *,
        vocabulary: int = 49408,
        length: int = 77,
        dim: int = 1024,
        depth: int = 23,
        heads: int = 16,
        hidden: int = 4096,
        activation: str = 'gelu',
        end: int = 49407,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dim, self.length, self.end = dim, length, end
        sizes = (vocabulary, length, dim, depth, heads, hidden, activation)
        self.text_model = TextTransformer(*sizes, dtype=dtype, rngs=rngs)

    def __call__(self, ids: Int[Array, 'b n']) -> tuple[Float[Array, 'b n k'], Float[Array, 'b k']]:
        """Hidden states and the pooled one, float32."""
        hidden = self.text_model(ids)
        end = jnp.argmax(ids == self.end, axis=1)
        return hidden, jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0]
