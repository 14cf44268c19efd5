"""The networks that benchmarks/baseline.py compares: calls of ours and of PyTorch's.

Neither side imports the other's framework.
"""

import os

# 48 and not the paper's 64, at which plain PyTorch was killed for memory on a machine with 24 GB.
AUTOENCODER, DIT = 'autoencoder forward + backward, 16 x 48 x 48', 'DiT-L/2 forward, 64 x 64'
UNET, UNET3D = 'SD 2.1 U-Net forward, 64 x 128', '3D U-Net forward, 16 x 64 x 128'
OURS, COMPILED = 'ours', 'compiled'  # sides that are told apart
# Of our time and memory over theirs.
TARGETS = {AUTOENCODER: {'seconds': 0.8, 'gb': 0.4}, DIT: {'seconds': 1.0}, UNET: {'seconds': 1.0}}


def ours(case: str):
    """A call without arguments, and its multiply-adds in T."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from benchmarks import filled
    from cmd_jax import stable_diffusion
    from cmd_jax.models import flops
    from cmd_jax.models.autoencoder import VideoAutoencoder
    from cmd_jax.models.content import ContentDiT
    from cmd_jax.models.convolution import quick_convolutions
    from cmd_jax.models.dit import SIZES
    from cmd_jax.models.layers import in_compute_dtype
    from cmd_jax.parallel.mesh import compute_dtype
    from cmd_jax.stable_diffusion import UNet, weights

    dtype = compute_dtype('auto')
    t = jax.ShapeDtypeStruct((1,), jnp.float32)

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    if case == AUTOENCODER:
        network = nnx.eval_shape(
            lambda: VideoAutoencoder(
                frames=16,
                height=48,
                width=48,
                remat='mlp',  # the most that the target of memory leaves room for
                dtype=dtype,
                rngs=nnx.Rngs(0),
            )
        )
        inputs = (shape(1, 16, 48, 48, 3),)
    elif case == DIT:
        network = nnx.eval_shape(
            lambda: ContentDiT(
                height=64, width=64, num_classes=101, **SIZES['L'], dtype=dtype, rngs=nnx.Rngs(0)
            )
        )
        inputs = (shape(1, 64, 64, 3), t, jax.ShapeDtypeStruct((1,), jnp.int32))
    else:
        sizes = stable_diffusion.arguments('sd21', 'unet')
        network = weights.abstract(UNet, **sizes, dtype=dtype)
        inputs = (shape(1, 64, 128, 4), t, shape(1, 77, 1024))
    if case != AUTOENCODER:  # as a generator keeps it
        network = quick_convolutions(in_compute_dtype(network))
    graphdef, state = nnx.split(network, nnx.Param)
    params = nnx.to_pure_dict(state)

    def forward(params, *inputs):
        return nnx.merge(graphdef, params)(*inputs)

    def loss(params, video):
        return jnp.abs(forward(params, video) - video).mean()

    run = jax.jit(jax.value_and_grad(loss) if case == AUTOENCODER else forward)
    adds = flops.count(forward, params, *inputs).total * (3 if case == AUTOENCODER else 1)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), (params, *inputs)
    )
    arrays = filled.fill(placed)
    return lambda: jax.block_until_ready(run(*arrays)), adds / 1e12


def theirs(case: str, side: str):
    """The same for PyTorch."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    gpu = torch.cuda.is_available()
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)

    def make():
        one, text = torch.tensor([500]), torch.randn(1, 77, 1024)
        if case == AUTOENCODER:
            from benchmarks.torch_autoencoder import VideoAutoencoder

            return VideoAutoencoder(), (torch.rand(1, 16, 48, 48, 3) * 2 - 1,)
        import diffusers

        if case == DIT:
            model = diffusers.DiTTransformer2DModel(
                num_attention_heads=16,
                attention_head_dim=64,
                in_channels=3,
                out_channels=6,
                num_layers=24,
                sample_size=64,
                patch_size=2,
                num_embeds_ada_norm=101,
                norm_eps=1e-6,
            )
            return model, (torch.randn(1, 3, 64, 64), one, torch.tensor([3]))
        if case == UNET:
            model = diffusers.UNet2DConditionModel(
                sample_size=64,
                cross_attention_dim=1024,
                attention_head_dim=(5, 10, 20, 20),
                use_linear_projection=True,
            )
            return model, (torch.randn(1, 4, 64, 128), one, text)
        # ModelScope's sizes are the defaults.
        return diffusers.UNet3DConditionModel(), (torch.randn(1, 4, 16, 64, 128), one, text)

    def call(model, inputs):
        if case != AUTOENCODER:
            with torch.inference_mode():
                return model(*inputs)
        model.zero_grad()
        loss = (model(*inputs) - inputs[0]).abs().mean()
        loss.backward()
        return loss

    model, inputs = make()
    counter = FlopCounterMode(display=False)
    with torch.device('meta'):
        meta, nothing = make()
        with counter:
            call(meta, nothing)
    if gpu:
        # What is trained keeps float32 parameters, as ours does.
        kept = None if case == AUTOENCODER else torch.bfloat16
        model = model.to('cuda', kept)
        inputs = [x.to('cuda', kept if x.is_floating_point() else None) for x in inputs]
        if side == COMPILED:
            if case == UNET:  # of the others' arrays none is an image
                model = model.to(memory_format=torch.channels_last)
            model = torch.compile(model, mode='max-autotune')

    def run():
        with torch.autocast('cuda', torch.bfloat16, enabled=gpu and case == AUTOENCODER):
            call(model, inputs)
        if gpu:
            torch.cuda.synchronize()

    return run, counter.get_total_flops() / 2e12
