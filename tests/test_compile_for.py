"""Programs for TPU slices that are not here, by the real TPU compiler."""

import builtins
import dataclasses
import json
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cmd_jax.errors import UserError
from cmd_jax.parallel import compile_only, compiled
from cmd_jax.parallel import mesh as meshes
from cmd_jax.training import compile_for
from cmd_jax.training import config as configs
from cmd_jax.training.parts import make_network
from tests import tiny
from tests.test_generate import one_error, script


def scanned(mesh, depth, x, kernel):
    """`depth` products with kernels that are split over the mesh, [depth k k]."""

    def body(x, kernel):
        kernel = jax.lax.with_sharding_constraint(kernel, NamedSharding(mesh, P()))
        return x @ kernel, None

    return jax.lax.scan(body, x, kernel)[0]


def lowered(place, depth=5, rows=64, width=512):
    mesh = meshes.make_mesh(devices=place.devices)
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16, sharding=meshes.batch_sharding(mesh))
        kernel = jax.ShapeDtypeStruct(
            (depth, width, width), jnp.bfloat16, sharding=NamedSharding(mesh, P(None, 'fsdp'))
        )
        return jax.jit(lambda x, k: scanned(mesh, depth, x, k)).lower(x, kernel)


def test_costs_of_a_program_that_can_be_counted_by_hand():
    _, cost = compile_only.compile_program(lowered(compile_only.find('v5e:2x2')))
    # On each of 4 chips: 16 rows of x, and a quarter of 5 kernels of 512 x 512.
    kernel = 512 * 512 * 2
    assert cost.arguments == 16 * 512 * 2 + 5 * kernel // 4
    assert list(cost.collectives) == ['all-gather']
    assert cost.collectives['all-gather'] == {'count': 5, 'bytes': 5 * kernel}
    # A gathered kernel is written and read, its part is read; rows are little beside it.
    assert 2 * 5 * kernel < cost.traffic < 4 * 5 * kernel
    assert cost.peak >= cost.arguments + kernel


def test_loops_count_as_often_as_they_run():
    found = [
        compile_only.compile_program(lowered(compile_only.find('v6e:2x2'), depth=d))[1]
        for d in (3, 6)
    ]
    counts = [cost.collectives['all-gather']['count'] for cost in found]
    assert counts == [3, 6]


def test_sizes_of_types():
    assert compiled.size('bf16[3,5]{1,0:T(8,128)(2,1)}') == 30
    assert compiled.size('(f32[2], pred[7], s32[])') == 8 + 7 + 4
    assert compiled.size('u8[0]') == 0 and compiled.size('token[]') == 0
    assert compiled.size('f8e4m3fn[10]') == 10


def test_what_does_not_fit_is_told():
    place = compile_only.find('v5e:2x2')
    mesh = meshes.make_mesh(devices=place.devices)
    x = jax.ShapeDtypeStruct((2**33,), jnp.float32, sharding=meshes.replicated(mesh))
    with jax.set_mesh(mesh), pytest.raises(compile_only.DoesNotFit) as e:
        compile_only.compile_program(jax.jit(lambda x: jnp.sin(x)).lower(x))
    assert e.value.needed > 2**35


@pytest.mark.parametrize(
    'message, needed',
    [
        (
            'Ran out of memory in memory space hbm. Used 32.50G of 15.75G hbm. Exceeded',
            32.5 * 2**30,
        ),
        ('required for HLO temporaries (800.0M) exceeds available HBM (15.75G).', 800 * 2**20),
        ('Attempting to allocate 3.00G. That was not possible.', None),
    ],
)
def test_what_a_program_needs_is_read(message, needed):
    assert compile_only._needed(message) == needed


def test_a_kernel_has_the_vector_memory_that_it_needs():
    mesh = meshes.make_mesh(devices=compile_only.find('v5e:1x1').devices)
    # With its result ten megabytes, of the chip's sixteen.
    x = jax.ShapeDtypeStruct((1024, 1280), jnp.float32, sharding=meshes.replicated(mesh))

    def kernel(x, out):
        out[...] = 2 * x[...]

    with jax.set_mesh(mesh):
        lowered = jax.jit(pl.pallas_call(kernel, out_shape=x)).lower(x)
    with pytest.raises(jax.errors.JaxRuntimeError, match='memory space vmem'):
        lowered.compile(compiler_options=compile_only.QUICK | compile_only.TILES)
    assert compile_only.compile_program(lowered)[1].arguments == x.size * 4


@pytest.fixture(scope='module')
def report():
    config = configs.parse(tiny.tree('motion') | {'seed': 0})
    tree = tiny.tree('motion')
    tree['motion']['train']['precision'] = 'bfloat16'
    config = configs.parse(tree)
    return config, compile_for.measure('motion', config, compile_only.find('v5e:2x2'))


def test_report_of_a_stage(report):
    config, found = report
    assert found.fits and found.replicated == {} and found.chips == 4
    assert found.mesh == {'data': 1, 'fsdp': 4, 'tensor': 1}
    # Parameters, average and two moments, in float32; most of them are in 4 parts.
    whole = 4 * 4 * found.parameters
    assert whole / 4 < found.state_bytes < whole
    assert found.model_flops > 0 and found.step_seconds > 0
    text = found.lines()
    assert 'motion on v5e:2x2 (4 chips)' in text and 'GiB of 16.00 GiB' in text
    assert found.cost.collectives['all-gather']['count'] > 0 and ' all-gather (' in text
    json.dumps(dataclasses.asdict(found))


def test_a_latent_cache_leaves_the_encoders_out(report):
    config, of_videos = report
    data = dataclasses.replace(config.data, source='latents:cache')
    config = dataclasses.replace(config, data=data)
    found = compile_for.measure('motion', config, compile_only.find('v5e:2x2'))
    assert found.fits
    assert found.model_flops < of_videos.model_flops
    assert found.cost.traffic < of_videos.cost.traffic


def test_arrays_on_every_chip_are_found():
    mesh = meshes.make_mesh(fsdp=8)
    tree = {
        'whole': jax.ShapeDtypeStruct((1000, 1000), jnp.float32, sharding=meshes.replicated(mesh)),
        'split': jax.ShapeDtypeStruct(
            (1000, 1000), jnp.float32, sharding=NamedSharding(mesh, P('fsdp'))
        ),
        'small': jax.ShapeDtypeStruct((1000,), jnp.float32, sharding=meshes.replicated(mesh)),
    }
    assert compile_for.replicated(tree) == {'whole': 4_000_000}
    assert compile_for.bytes_on_chip(tree) == 4_000_000 + 500_000 + 4_000


def test_largest_batch(report, monkeypatch):
    """Against a compiler of ours, whose memory is known: 1 GiB and 10 MiB an example of a chip."""
    config, found = report

    def measure(name, changed, place, search):
        batch = changed.motion.train.batch_size
        compiles.append(batch)
        peak = 2**30 + batch / 4 * 10 * 2**20
        cost = dataclasses.replace(found.cost, peak=int(peak)) if peak < 17 * 2**30 else None
        return dataclasses.replace(found, batch_size=batch, cost=cost)

    compiles = []
    monkeypatch.setattr(compile_for, 'measure', measure)
    place = compile_only.find('v5e:2x2')
    first = measure('motion', config, place, False)
    assert compile_for.largest_batch('motion', config, place, first, False) == 15 * 1024 // 10 * 4
    assert len(compiles) < 8
    # One that goes in parts is measured anew, in one.
    first = dataclasses.replace(first, accumulation=2)
    assert compile_for.largest_batch('motion', config, place, first, False) == 15 * 1024 // 10 * 4


@pytest.mark.parametrize(
    'name, words',
    [
        ('v5e', 'CHIP:SHAPE'),
        ('v5x:2x2', "did you mean 'v5"),
        ('v5e:2x2x2', '2 axes'),
        ('v5p:4x4', '3 axes'),
        ('v5e:3x3', 'not divisible'),
    ],
)
def test_unknown_slices(name, words):
    with pytest.raises(UserError, match=words):
        compile_only.find(name)


def test_several_slices_and_one_chip():
    found = compile_only.find('v5e:4x4*2')
    mesh = meshes.make_mesh(devices=found.devices, batch=64)
    assert dict(mesh.shape) == {'data': 2, 'fsdp': 16, 'tensor': 1}
    slices = [{d.slice_index for d in row.flat} for row in mesh.devices]
    assert slices == [{0}, {1}], 'only the data axis crosses slices'
    with pytest.raises(UserError, match='2 slices: mesh.data must be a multiple of 2'):
        meshes.make_mesh(data=1, devices=found.devices)
    with pytest.raises(UserError, match='mesh.data must divide 32'):
        meshes.make_mesh(data=64, tensor=-1, batch=64, devices=found.devices)
    assert len(compile_only.find('v5e:1x1').devices) == 1
    assert len(compile_only.find('v4:2x2x2').devices) == 8, 'a device a chip, not a core'


def test_a_step_for_several_slices():
    """In a process of its own: what the compiler is told holds for the whole process."""
    command = [sys.executable, 'train.py', '--config=configs/quickstart.py:motion,tiny']
    command.append('--compile_for=v5e:2x2*2')
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'motion on v5e:2x2*2 (8 chips)' in done.stdout and 'data 2' in done.stdout


def test_no_compiler_is_one_line(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == 'libtpu':
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', missing)
    with pytest.raises(UserError, match='pip install -r requirements-tpu-compile.txt'):
        compile_only.find('v5e:2x2')


def test_sampling(tmp_path):
    config = '--config=configs/quickstart.py:all,tiny'
    failed = script('sample.py', config, '--compile_for=v5e:2x2')
    one_error(failed, '--num_videos=1', 'multiple of 4')
    failed = script('sample.py', config, '--compile_for=v5e:1x1', '--steps=5000')
    one_error(failed, 'steps=5000 is out of range')
    one_error(script('sample.py', '--workdir=x', '--compile_report=y'), 'needs --compile_for')
    out = tmp_path / 'report.json'
    done = subprocess.run(
        [
            *(sys.executable, 'sample.py', config, '--compile_for=v5e:1x1'),
            f'--compile_report={out}',
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'sampling on v5e:1x1 (1 chips)' in done.stdout
    (row,) = json.loads(out.read_text())
    assert row['fits'] and set(row['programs']) == {'content frame', 'motion latent', 'video'}
    # The largest program needs more than nothing, and all networks are there at a time.
    works = [cost['work'] for cost in row['programs'].values()]
    assert row['peak'] == row['weights_bytes'] + max(works) and min(works) > 0
    counted = 0
    parsed = configs.parse(tiny.shipped('quickstart', 'all,tiny'))
    for stage in configs.STAGES:
        network = nnx.eval_shape(lambda s=stage: make_network(s, parsed, 10, nnx.Rngs(0)))
        for path, x in nnx.to_flat_state(nnx.state(network, nnx.Param)):
            # The layers compute in bfloat16, but for norms, times and what makes the output.
            name = '/'.join(map(str, path))
            full = re.search('norm/|head/|time_embed|final_modulation', name)
            half = path[-1] in ('kernel', 'bias') and not full
            counted += (2 if half else 4) * math.prod(x.shape)
    assert row['weights_bytes'] == counted


def test_the_command(tmp_path):
    config = '--config=configs/quickstart.py:autoencoder,tiny'
    one_error(script('train.py', config, '--compile_for=v5e:9'), '2 axes')
    one_error(script('train.py', config, '--compile_for=', '--workdir=x'), '--compile_for is empty')
    one_error(script('train.py', config, '--largest_batch', '--workdir=x'), 'needs --compile_for')
    one_error(script('train.py', config, '--workdir=gs://b/x'), "'gs://b/x' is an address")
    out = tmp_path / 'report.json'
    done = subprocess.run(
        [
            *(sys.executable, 'train.py', config, '--compile_for=v5e:2x2,v6e:2x2'),
            *('--config.data.source=moving_digits', f'--compile_report={out}'),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'autoencoder on v5e:2x2 (4 chips)' in done.stdout
    assert 'autoencoder on v6e:2x2 (4 chips)' in done.stdout
    rows = json.loads(out.read_text())
    assert [row['slice'] for row in rows] == ['v5e:2x2', 'v6e:2x2'] and all(r['fits'] for r in rows)
