"""Our networks beside PyTorch's and diffusers', on the same machine in one run.

    python -m benchmarks.baseline [--out=benchmarks/results/baseline_cpu.json]

Needs requirements-parity.txt. Each side of a case runs in a process of its own, in turn, so that
its memory is its own and what else the machine does is shared: --rounds of each, each the median of
--repeats calls; the median round is told. float32 on CPUs, on as many threads as there are cores;
bfloat16 on a GPU. Random weights. 'plain' is attention by matrix products and a softmax, as in the
authors' release; 'fused' PyTorch's own.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time

from absl import app, flags

CASE = flags.DEFINE_string('case', None, 'Run one case in this process')
SIDE = flags.DEFINE_string('side', None, 'The side of it')
ONLY = flags.DEFINE_string('only', '', 'Cases with this in their names')
ROUNDS = flags.DEFINE_integer('rounds', 3, 'Processes of each side', lower_bound=1)
REPEATS = flags.DEFINE_integer('repeats', 3, 'Timed calls in a process', lower_bound=1)
OUT = flags.DEFINE_string('out', None, 'JSON file')

AUTOENCODER, DIT = 'autoencoder forward + backward, 16 x 48 x 48', 'DiT-L/2 forward, 64 x 64'
UNET, UNET3D = 'SD 2.1 U-Net forward, 64 x 128', '3D U-Net forward, 16 x 64 x 128'
# {case: sides}; the first is ours, and the targets are of it against the second.
SIDES = {
    AUTOENCODER: ('ours', 'plain', 'fused'),
    DIT: ('ours', 'diffusers'),
    UNET: ('ours', 'diffusers'),
    UNET3D: ('diffusers',),
}
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
    from cmd_jax.models.dit import SIZES
    from cmd_jax.stable_diffusion import UNet, weights
    from cmd_jax.training import parts

    dtype = parts.compute_dtype('auto')
    t = jax.ShapeDtypeStruct((1,), jnp.float32)

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    if case == AUTOENCODER:
        network = nnx.eval_shape(
            lambda: VideoAutoencoder(
                frames=16, height=48, width=48, remat='attention', dtype=dtype, rngs=nnx.Rngs(0)
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
    graphdef, params = nnx.split(network, nnx.Param)

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
        import diffusers

        from benchmarks.torch_autoencoder import VideoAutoencoder

        one, text = torch.tensor([500]), torch.randn(1, 77, 1024)
        if case == AUTOENCODER:
            return VideoAutoencoder(side == 'fused'), (torch.rand(1, 16, 48, 48, 3) * 2 - 1,)
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
        model = model.to('cuda', torch.bfloat16)
        inputs = [x.to('cuda', torch.bfloat16 if x.is_floating_point() else None) for x in inputs]
        if side == 'compiled':
            model = torch.compile(model)

    def run():
        call(model, inputs)
        if gpu:
            torch.cuda.synchronize()

    return run, counter.get_total_flops() / 2e12


def measure(case: str, side: str) -> dict:
    """Seconds of a call, and the most that this process held."""
    run, adds = ours(case) if side == 'ours' else theirs(case, side)
    times = []
    for _ in range(REPEATS.value + 1):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return {
        'seconds': statistics.median(times[1:]),
        'first_seconds': times[0],
        'gb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        'tera_multiply_adds': adds,
    }


def main(_):
    if CASE.value:
        print(json.dumps(measure(CASE.value, SIDE.value)))
        return
    # Behind the branch above: PyTorch's processes do without JAX.
    import torch

    from benchmarks import timing
    from cmd_jax import atomic

    rows = []
    about = timing.machine() | {'torch': torch.__version__}
    for case, sides in SIDES.items():
        if ONLY.value not in case:
            continue
        if torch.cuda.is_available():
            sides += ('compiled',)
        found = {side: [] for side in sides}
        for _ in range(ROUNDS.value):
            for side in sides:
                command = [sys.executable, '-m', 'benchmarks.baseline', f'--case={case}']
                command += [f'--side={side}', f'--repeats={REPEATS.value}']
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
        for side in sides:
            rows.append({'case': case, 'side': side} | merged(found[side]))
            if side != sides[0]:
                rows[-1] |= ratios(found[sides[0]], found[side])
            print(line(rows[-1]), flush=True)
        if OUT.value:
            atomic.write(OUT.value, json.dumps(about | {'rows': rows}, indent=1) + '\n')


def merged(rounds: list[dict]) -> dict:
    """Medians of the rounds, and the spread of their times."""
    row = {name: statistics.median(x[name] for x in rounds) for name in rounds[0]}
    times = [x['seconds'] for x in rounds]
    return row | {'seconds_spread': [min(times), max(times)]}


def ratios(mine: list[dict], others: list[dict]) -> dict:
    """Ours to theirs, round by round: the median."""
    return {
        f'{name}_ratio': statistics.median(a[name] / b[name] for a, b in zip(mine, others))
        for name in ('seconds', 'gb')
    }


def line(row: dict) -> str:
    """For people."""
    low, high = row['seconds_spread']
    told = f'{row["case"]:46} {row["side"]:10} {row["seconds"]:7.2f} s ({low:.2f} to {high:.2f})  '
    told += f'{row["gb"]:5.2f} GB  {row["tera_multiply_adds"]:6.2f} T multiply-adds'
    if 'seconds_ratio' in row:
        told += f'   ours / theirs: time {row["seconds_ratio"]:.2f}, memory {row["gb_ratio"]:.2f}'
        target = TARGETS.get(row['case'], {}) if row['side'] in ('plain', 'diffusers') else {}
        told += ''.join(f', target {name} <= {x}' for name, x in target.items())
    return told


if __name__ == '__main__':
    app.run(main)
