"""Each benchmark starts, and those that a GPU is waited for with measure something here."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# Modules that the commands share.
PARTS = {'__init__', 'counts', 'filled', 'networks', 'tables', 'timing', 'torch_autoencoder'}


def command(name, *flags):
    return subprocess.Popen(
        [sys.executable, '-m', f'benchmarks.{name}', *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_each_starts():
    names = {path.stem for path in (ROOT / 'benchmarks').glob('*.py')} - PARTS
    assert len(names) > 10
    for name, started in {name: command(name, '--help') for name in sorted(names)}.items():
        said = started.communicate()[0]
        # absl's --help ends with 1, an error of flags or imports with a traceback.
        assert started.returncode in (0, 1) and 'Traceback' not in said, (name, said[-2000:])
        assert f'benchmarks.{name}' in said or f'benchmarks/{name}' in said, (name, said[-2000:])


@pytest.mark.parametrize(
    'name, flags',
    [
        ('sampling', ['--cases=1']),
        ('training', ['--stages=motion', '--batches=2']),
    ],
)
def test_measures(name, flags, tmp_path):
    out = tmp_path / 'out.json'
    config = '--config=configs/quickstart.py:all,tiny'
    started = command(name, config, '--repeats=2', f'--out={out}', *flags)
    said = started.communicate()[0]
    assert started.returncode == 0, said[-2000:]
    (row,) = json.loads(out.read_text())['rows']
    low, high = row['seconds_spread']
    assert 0 < low <= row['seconds'] <= high and row['tflop'] > 0 and 0 < row['mfu'] < 2


def test_samplers(digits_run, tmp_path):
    out = tmp_path / 'out.json'
    few = ['--num_videos=10', '--steps=2', '--few=1', '--size=32']
    started = command('samplers', f'--workdir={digits_run}', f'--out={out}', *few)
    said = started.communicate()[0]
    assert started.returncode == 0, said[-2000:]
    told = json.loads(out.read_text())
    assert told['num_videos'] == 10 and told['i3d_size'] == 32
    steps = [(row['sampler'], row['steps']) for row in told['rows']]
    assert steps == [('ddim', 2), ('dpmpp_2m', 1), ('unipc', 1)]
    for row in told['rows']:
        for name in ('accuracy', 'frechet'):
            assert 0 <= row[name]['low'] <= row[name]['value'] <= row[name]['high']


@pytest.mark.parametrize(
    'flags, words', [(['--num_videos=15'], '--num_videos=15'), ([], 'nowhere')]
)
def test_samplers_tell_what_is_wrong(flags, words):
    started = command('samplers', '--workdir=nowhere', *flags)
    said = started.communicate()[0]
    assert started.returncode == 2 and 'Traceback' not in said, said[-2000:]
    assert words in said.splitlines()[-1]
