"""Our networks beside PyTorch's and diffusers', on the same machine in one run.

    python -m benchmarks.baseline [--out=benchmarks/results/baseline_cpu.json]

Needs requirements-parity.txt. Ours and another side of a case are each a process of its own, whose
memory is its own, and are called in turn, --repeats times each: so what else the machine does falls
on both, and what is told of two is the median of their ratios. float32 on CPUs, on as many threads
as there are cores; bfloat16 on a GPU. Random weights. 'plain' is attention by matrix products and a
softmax, as in the authors' release; 'compiled', on a GPU, torch.compile of theirs.
'ours, wide' keeps more for the backward pass.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from absl import app, flags

CASE = flags.DEFINE_string('case', None, 'Run one case in this process')
SIDE = flags.DEFINE_string('side', None, 'The side of it')
ONLY = flags.DEFINE_string('only', '', 'Cases with this in their names')
REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed calls of each side', lower_bound=1)
OUT = flags.DEFINE_string('out', None, 'JSON file')

# 48 and not the paper's 64, at which plain PyTorch was killed for memory on a machine with 24 GB.
AUTOENCODER, DIT = 'autoencoder forward + backward, 16 x 48 x 48', 'DiT-L/2 forward, 64 x 64'
UNET, UNET3D = 'SD 2.1 U-Net forward, 64 x 128', '3D U-Net forward, 16 x 64 x 128'
OURS, WIDE = 'ours', 'ours, wide'
# {case: the pairs of sides that run together}; targets are of ours against the first of the others.
PAIRS = {
    AUTOENCODER: ((OURS, 'plain'), (WIDE, 'plain')),
    DIT: ((OURS, 'diffusers'),),
    UNET: ((OURS, 'diffusers'),),
    UNET3D: (('diffusers',),),
}
TARGETS = {AUTOENCODER: {'seconds': 0.8, 'gb': 0.4}, DIT: {'seconds': 1.0}, UNET: {'seconds': 1.0}}


def ours(case: str, side: str = OURS):
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
                frames=16,
                height=48,
                width=48,
                remat='attention' if side == OURS else 'mlp',
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
            return VideoAutoencoder(), (torch.rand(1, 16, 48, 48, 3) * 2 - 1,)
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


def work(case: str, side: str) -> None:
    """One side's process: a call for each line that comes in, a line of JSON for each that goes
    out: what the first call took, the later ones, and at the end the most that was held."""
    run, adds = (ours if side.startswith(OURS) else theirs)(case, side)
    tell({'first_seconds': timed(run), 'tera_multiply_adds': adds})
    for _ in sys.stdin:
        tell({'seconds': timed(run)})
    tell({'gb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6})


def timed(run: Callable) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def tell(what: dict) -> None:
    print(json.dumps(what), flush=True)


class Side:
    """The other end of `work`."""

    def __init__(self, case: str, name: str):
        command = [sys.executable, '-m', 'benchmarks.baseline', f'--case={case}', f'--side={name}']
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name, self.process, self.times = name, subprocess.Popen(command, **pipes), []
        self.told = self.read()

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f'{self.name} ended with {self.process.wait()}: its error is above')
        return json.loads(line)

    def call(self) -> None:
        self.process.stdin.write('\n')
        self.process.stdin.flush()
        self.times.append(self.read()['seconds'])

    def row(self) -> dict:
        """Ends the process."""
        self.process.stdin.close()
        self.told |= self.read()
        self.process.wait()
        spread = [min(self.times), max(self.times)]
        return {'seconds': statistics.median(self.times), 'seconds_spread': spread} | self.told


def compare(case: str, names: tuple[str, ...]) -> list[dict]:
    """A row for each of these sides, called in turn; ratios in those behind the first."""
    sides = [Side(case, name) for name in names]
    for _ in range(REPEATS.value):
        for side in sides:
            side.call()
    rows = [{'case': case, 'side': side.name} | side.row() for side in sides]
    for side, row in zip(sides[1:], rows[1:]):
        ratios = [a / b for a, b in zip(sides[0].times, side.times)]
        row |= {
            'against': names[0],
            'seconds_ratio': statistics.median(ratios),
            'seconds_ratio_spread': [min(ratios), max(ratios)],
            'gb_ratio': rows[0]['gb'] / row['gb'],
        }
    return rows


def main(_):
    if CASE.value:
        work(CASE.value, SIDE.value)
        return
    # Behind the branch above: PyTorch's processes do without JAX.
    import torch

    from benchmarks import timing
    from cmd_jax import atomic

    rows = []
    about = timing.machine() | {'torch': torch.__version__, 'repeats': REPEATS.value}
    for case, pairs in PAIRS.items():
        if ONLY.value not in case:
            continue
        if torch.cuda.is_available():
            others = (pairs[0][:1] if pairs[0][0] == OURS else ()) + ('compiled',)
            pairs += (others,)
        for names in pairs:
            for row in compare(case, names):
                rows.append(row)
                print(line(row), flush=True)
        if OUT.value:
            atomic.write(OUT.value, json.dumps(about | {'rows': rows}, indent=1) + '\n')


def line(row: dict) -> str:
    """For people."""
    low, high = row['seconds_spread']
    told = f'{row["case"]:46} {row["side"]:10} {row["seconds"]:7.2f} s ({low:.2f} to {high:.2f})  '
    told += f'{row["gb"]:5.2f} GB  {row["tera_multiply_adds"]:6.2f} T multiply-adds'
    if 'seconds_ratio' in row:
        low, high = row['seconds_ratio_spread']
        told += f'   {row["against"]} / {row["side"]}: time {row["seconds_ratio"]:.2f}'
        told += f' ({low:.2f} to {high:.2f}), memory {row["gb_ratio"]:.2f}'
        target = TARGETS.get(row['case'], {}) if row['side'] in ('plain', 'diffusers') else {}
        told += ''.join(f', target {name} <= {x}' for name, x in target.items())
    return told


if __name__ == '__main__':
    app.run(main)
