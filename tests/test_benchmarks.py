"""Each benchmark starts, and those that a GPU is waited for with measure something here."""

import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks import rows
from cmd_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
# Modules that the commands share.
PARTS = {'__init__', 'counts', 'filled', 'networks', 'rows', 'tables', 'timing'}
PARTS |= {'torch_autoencoder'}


def command(name, *flags):
    return subprocess.Popen(
        [sys.executable, '-m', f'benchmarks.{name}', *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said_by(started) -> str:
    """All of it, at the end."""
    try:
        return started.communicate(timeout=600)[0]
    finally:
        started.kill()


def said_by_all(started: dict) -> dict:
    """{name: (process, what it said)} of several that run at the same time."""
    try:
        return {name: (one, said_by(one)) for name, one in started.items()}
    finally:
        for one in started.values():
            one.kill()


def test_each_starts():
    names = {path.stem for path in (ROOT / 'benchmarks').glob('*.py')} - PARTS
    assert len(names) > 10
    started = {name: command(name, '--help') for name in sorted(names)}
    for name, (one, said) in said_by_all(started).items():
        # absl's --help ends with 1, an error of flags or imports with a traceback.
        assert one.returncode in (0, 1) and 'Traceback' not in said, (name, said[-2000:])
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
    said = said_by(started)
    assert started.returncode == 0, said[-2000:]
    (row,) = json.loads(out.read_text())['rows']
    low, high = row['seconds_spread']
    assert 0 < low <= row['seconds'] <= high and row['tflop'] > 0 and 0 < row['mfu'] < 2


ABOUT = {'device': 'cpu', 'shape': (1, 2), 'date': 'today'}


def test_rows_are_written_as_they_come(tmp_path):
    """A call for some of the rows leaves the others, a call for all of them does not."""
    out = tmp_path / 'new' / 'out.json'
    for part, cases, left in (
        (False, {1: 'a', 2: 'b'}, {1: 'a', 2: 'b'}),
        (True, {2: 'c', 3: 'd'}, {1: 'a', 2: 'c', 3: 'd'}),
        (False, {3: 'e'}, {3: 'e'}),
    ):
        table = rows.Rows(str(out), ABOUT, ('case',), part)
        for case, seconds in cases.items():
            table.add({'case': case, 'seconds': seconds})
            assert json.loads(out.read_text())['rows'][-1]['date']
        found = json.loads(out.read_text())
        assert found['device'] == 'cpu'
        assert {row['case']: row['seconds'] for row in found['rows']} == left


def test_rows_of_another_machine_are_not_mixed(tmp_path):
    out = tmp_path / 'out.json'
    rows.Rows(str(out), ABOUT, ('case',)).add({'case': 1})
    before = out.read_text()
    rows.Rows(str(out), ABOUT | {'date': 'tomorrow'}, ('case',), part=True)
    with pytest.raises(UserError, match="rows of device='cpu', not 'TPU v5e': name another"):
        rows.Rows(str(out), ABOUT | {'device': 'TPU v5e'}, ('case',), part=True)
    assert out.read_text() == before
    out.write_text('{')
    with pytest.raises(UserError, match='not readable as JSON'):
        rows.Rows(str(out), ABOUT, ('case',), part=True)
    with pytest.raises(UserError, match='--out'):
        rows.Rows(str(out / 'x' / 'out.json'), ABOUT, ('case',))


def test_samplers(digits_run, tmp_path):
    out = tmp_path / 'out.json'
    few = ['--num_videos=10', '--steps=2', '--few=1', '--size=32']
    started = command('samplers', f'--workdir={digits_run}', f'--out={out}', *few)
    said = said_by(started)
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
    said = said_by(started)
    assert started.returncode == 2 and 'Traceback' not in said, said[-2000:]
    assert words in said.splitlines()[-1]


def in_python(program, *flags) -> subprocess.CompletedProcess:
    """A program behind a benchmark's flags, which two of them could not define in one process."""
    program = f'import sys\nfrom absl import flags\n{program}'
    command = [sys.executable, '-c', program, *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


LARGEST_BATCH = """
import json

from benchmarks import timing, training

timing.matmul_peak = lambda **_: 1.0
training.line = str
flags.FLAGS(sys.argv[:-1])
for limit, each, really in json.loads(sys.argv[-1]):

    def measure(name, config, classes, batch_size, peak):
        memory = {'state_and_batch_gb': 2.0, 'work_gb': each * batch_size}
        about = {'stage': name, 'batch_size': batch_size, 'frozen_networks': False}
        return about | memory | {'fits': batch_size <= really}

    training.measure = measure
    timing.device_memory = {'bytes_limit': limit}.get
    flags.FLAGS.out = f'{flags.FLAGS.out}_'
    training.main()
"""


def test_the_largest_batch_is_looked_for(tmp_path):
    out = tmp_path / 'out'
    # What JAX may take, what an example takes besides 2 GB, and what fits all the same.
    sizes = {
        (100, 0.5, 1024): [1, 4, 128],  # 0.9 * 100 = 2 + 176 * 0.5
        (100, 0.5, 50): [1, 4, 128, 64, 32],
        (100, 0.5, 4): [1, 4, 128, 64, 32, 16, 8],
        (1000, 0.01, 5000): [1, 4, 1024],
        (6, 0.5, 5): [1, 4],
        (6, 0.5, 1): [1, 4],
    }
    flags = ['--stages=motion', f'--out={out}', '--config=configs/quickstart.py:all,tiny']
    done = in_python(LARGEST_BATCH, *flags, json.dumps(list(sizes)))
    assert done.returncode == 0, done.stderr[-2000:]
    for (_, _, really), wanted in sizes.items():
        out = out.with_name(f'{out.name}_')
        found = json.loads(out.read_text())['rows']
        assert [row['batch_size'] for row in found] == wanted
        assert [row['fits'] for row in found] == [size <= really for size in wanted]


PAIRS = """
from benchmarks import baseline

flags.FLAGS(sys.argv)
for gpu, only in ((False, ''), (True, ''), (True, 'SD'), (True, 'compiled'), (False, 'DiT,plain')):
    baseline.on_gpu = lambda: gpu
    flags.FLAGS['only'].parse(only)
    print('; '.join(' '.join((case.split()[0], *names)) for case, names in baseline.chosen()))
"""


def test_pairs_of_the_baseline():
    done = in_python(PAIRS)
    assert done.returncode == 0, done.stderr[-2000:]
    cpu = ['autoencoder ours plain', 'DiT-L/2 ours diffusers', 'SD ours diffusers', '3D diffusers']
    compiled = ['autoencoder ours compiled', 'DiT-L/2 ours compiled', 'SD ours compiled']
    compiled.append('3D compiled')
    found = [line.split('; ') for line in done.stdout.splitlines()]
    assert found == [cpu, cpu + compiled, [cpu[2], compiled[2]], compiled, cpu[:2]]


def test_mistakes_are_told_at_once():
    cases = [
        ('sampling', '--cases=99', '--cases=99'),
        ('training', '--stages=motoin', "did you mean 'motion'"),
        ('training', '--batches=1,x', '--batches=x'),
        ('compile', '--only=nothing', '--only=nothing'),
        ('data', '--long=500', '--long=500'),
    ]
    started = {words: command(name, flag) for name, flag, words in cases}
    for words, (one, said) in said_by_all(started).items():
        assert one.returncode == 2 and 'Traceback' not in said, said[-2000:]
        assert words in said.splitlines()[-1]


SHARED = """
from benchmarks import sampling
from cmd_jax.parallel.mesh import make_mesh
from cmd_jax.training import config as configs
import jax

flags.FLAGS(sys.argv)
config = configs.parse(sampling.CONFIG.value.to_dict())
mesh = make_mesh(devices=jax.devices()[:1])
with jax.set_mesh(mesh):
    programs = sampling.Programs(config, mesh)
    for case in (dict(), dict(pixels=True), dict(guidance=2.0), dict(guidance=2.0, pixels=True)):
        programs.of(sampling.Case(steps=2, **case))
        print(len(programs.compiled))
print(len(sampling.CASES), len(set(map(sampling.plain, sampling.CASES))))
"""


def test_cases_of_sampling_share_programs():
    """And all of the paper's table are there."""
    done = in_python(SHARED, '--config=configs/quickstart.py:all,tiny')
    assert done.returncode == 0, done.stderr[-2000:]
    # Without a VAE, pixels are a program of their own all the same.
    assert done.stdout.split() == ['3', '4', '6', '6', '17', '17']
