"""Other people's networks as a run that is sampled from and trained on."""

import argparse
import json
import shlex
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import save_file

import cmd_jax
from cmd_jax import interop
from cmd_jax.errors import UserError
from cmd_jax.interop import runs
from cmd_jax.models.motion import MotionDiT
from cmd_jax.parallel.mesh import make_mesh
from cmd_jax.training import config as configs
from cmd_jax.training import loop, trained
from cmd_jax.training import state as states
from cmd_jax.training.checkpoint import Checkpoints
from tests import tiny
from tests.state_dicts import autoencoder_dict, dit_dict, params, tensors

DIGITS = 'zero one two three four five six seven eight nine'.split()
# Of videos of 4 frames of 16 x 16; the motion latent is an image of 4 x 8.
DICTS = {
    'autoencoder': autoencoder_dict(depth=1),
    'content': dit_dict(depth=1, channels=3, tokens=64, classes=10),
    'motion': dit_dict(depth=1, channels=5, tokens=8, content=(4, 3, 8)),
}


def tree():
    """A config that describes other networks; but a width of 96 is of no usual size, so that the
    heads are taken from here."""
    tree = tiny.tree()
    for stage in ('content', 'motion'):
        tree[stage]['model'].update(dim=96, heads=6)
    return tree


@pytest.fixture(scope='module')
def given(tmp_path_factory):
    """{stage: its file}, and class_names."""
    folder = tmp_path_factory.mktemp('files')
    for stage, state_dict in DICTS.items():
        save_file(state_dict, folder / f'{stage}.safetensors')
    (folder / 'names.txt').write_text('\n'.join(DIGITS) + '\n')
    names = {stage: folder / f'{stage}.safetensors' for stage in DICTS}
    return names | {'class_names': folder / 'names.txt'}


@pytest.fixture(scope='module')
def run(given, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('run')
    runs.import_run(workdir, tree(), **given)
    return workdir


@pytest.fixture(scope='module')
def generator(run):
    return cmd_jax.load(run)


def test_a_run_is_sampled_from(generator):
    assert generator.class_names == DIGITS
    assert generator.steps == dict.fromkeys(configs.STAGES, 1)
    videos = generator([3, 7], seed=1)
    assert videos.shape == (2, 4, 16, 16, 3)
    assert (videos[0] != videos[1]).any() and videos.std() > 1
    np.testing.assert_array_equal(generator.statistics['mean'], np.zeros(5))
    np.testing.assert_array_equal(generator.statistics['std'], np.ones(5))


def test_networks_are_those_of_the_files(generator):
    autoencoder = interop.load_nvlabs_autoencoder(
        DICTS['autoencoder'], frames=4, height=16, width=16
    )
    content = interop.load_nvlabs_content_dit(DICTS['content'], heads=6)
    motion = interop.load_nvlabs_motion_dit(DICTS['motion'], frames=4, heads=6)
    for ours, theirs in (
        (generator.autoencoder, autoencoder),
        (generator.content, content),
        (generator.motion, motion),
    ):
        found = params(ours)
        if theirs is motion:
            assert not found.pop('label_embed/embedding').any()
        jax.tree.map(np.testing.assert_array_equal, found, params(theirs))

    random = np.random.default_rng(0)
    video = np.tanh(random.standard_normal((2, 4, 16, 16, 3), np.float32))
    z = random.standard_normal((2, 4, 8, 5), np.float32)
    t = jnp.array([3.0, 900.0])
    label = jnp.array([4, 10])
    frame = video[:, 0]
    for one, other, arguments, condition in (
        (generator.autoencoder, autoencoder, (video,), ()),
        (generator.content, content, (frame, t, label), ()),
        # Without condition there, with one here.
        (generator.motion, motion, (z, t, frame), (label,)),
    ):
        theirs = jax.jit(other)(*arguments)
        ours = jax.jit(one)(*arguments, *condition)
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_the_config_describes_the_networks(run):
    stored = {stage: configs.load(run / stage / 'config.json') for stage in configs.STAGES}
    assert stored['autoencoder'] == stored['content'] == stored['motion']
    config = stored['motion']
    model = config.autoencoder.model
    assert (model.dim, model.depth, model.heads, model.motion_channels) == (32, 1, 8, 5)
    assert (model.position, model.output) == ('none', 'sigmoid')
    for section in (config.content, config.motion):
        assert section.process == configs.DiffusionProcess(
            schedule='linear', prediction='epsilon', learn_sigma=True
        )
        assert (section.model.patch, section.model.depth, section.train.steps) == (2, 1, 1)
        assert not section.model.rotary
    assert (config.motion.model.content_patch, config.motion.content_noise) == (8, 0)
    autoencoder = trained.load(run, 'autoencoder', make_mesh())
    for stage in ('content', 'motion'):
        assert trained.read_inputs(run / stage) == trained.inputs_on(DIGITS, autoencoder)


def command(*words):
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=600)
    return done.returncode, done.stderr


def one_error(result, *words):
    code, stderr = result
    line = stderr.strip().splitlines()[-1]
    assert code == 2 and line.startswith('error: ') and 'Traceback' not in stderr, stderr[-2000:]
    for word in words:
        assert word in line, line


def test_in_the_shell(given, tmp_path):
    """Imports, and trains on with the command that was told."""
    config = '--config=configs/quickstart.py:all,tiny'
    flags = [f'--config.data.{k}' for k in ('frames=4', 'height=16', 'width=16')]
    flags += [
        f'--config.{k}.model.{f}' for k in ('content', 'motion') for f in ('dim=96', 'heads=6')
    ]
    named = [f'--{name}={file}' for name, file in given.items()]
    code, stderr = command(
        '-m', 'cmd_jax.interop', config, *flags, f'--workdir={tmp_path}/run', *named
    )
    assert code == 0, stderr[-2000:]
    lines = [line for line in stderr.splitlines() if 'to train on: ' in line]
    told = dict(zip(DICTS, (line.partition('to train on: ')[2] for line in lines)))
    python, *words = shlex.split(told['content'])
    assert python == 'python' and '--config=configs/quickstart.py:content,tiny' in words
    steps = [f'--config.content.train.{k}' for k in ('steps=3', 'log_every=1')]
    code, stderr = command(*words, *steps)
    assert code == 0, stderr[-2000:]
    assert 'going on from step 1' in stderr and 'no position in the data' in stderr
    folder = tmp_path / 'run' / 'content'
    records = [json.loads(line) for line in (folder / 'metrics.jsonl').open()]
    assert [record['step'] for record in records] == [2, 3]
    saved = {p.parent.name for p in (folder / 'checkpoints').glob('*/data')}
    assert saved == {'3'}, 'the position in the data is saved from here on'
    assert cmd_jax.load(tmp_path / 'run').steps == {'autoencoder': 1, 'content': 3, 'motion': 1}


@pytest.mark.parametrize(
    'given, found',
    [
        ('', 'motion'),
        ('all', 'motion'),
        ('content,tiny', 'motion,tiny'),
        ('sd21,all,tiny', 'sd21,motion,tiny'),
        ('sd21', 'motion,sd21'),
    ],
)
def test_the_config_of_another_stage(given, found):
    assert runs.of_stage(given, 'motion') == found


def test_mistakes_in_the_shell(given, tmp_path):
    importer = ('-m', 'cmd_jax.interop', f'--workdir={tmp_path}/new')
    # Of the config that is taken where none is named.
    one_error(command(*importer, '--config.data.heigth=16'), 'data.heigth', 'data.height')
    file = f'--content={given["content"]}'
    one_error(command(*importer, file), 'has no autoencoder', '--autoencoder')
    assert not (tmp_path / 'new').exists(), 'nothing was written'


def test_stages_come_one_by_one(run, given, tmp_path):
    names = {'class_names': given['class_names']}
    # The motion network of a run without classes has none.
    files = {k: given[k] for k in ('autoencoder', 'motion')}
    runs.import_run(tmp_path / 'none', tree(), **files)
    assert trained.read_inputs(tmp_path / 'none' / 'motion').class_names == []
    # It goes with any content: what it draws does not depend on the class.
    runs.import_run(tmp_path / 'none', tree(), content=given['content'], **names)
    mixed = cmd_jax.load(tmp_path / 'none')
    assert mixed.class_names == DIGITS
    np.testing.assert_array_equal(mixed([3], seed=1), cmd_jax.load(run)([3], seed=1))
    # Classes and sizes of the stages that are there hold for later ones.
    for stage in configs.STAGES:
        file = {stage: given[stage]}
        runs.import_run(tmp_path / 'run', tree(), **file, **(names if stage == 'content' else {}))
    config = configs.load(tmp_path / 'run' / 'motion' / 'config.json')
    assert config == configs.load(run / 'motion' / 'config.json')
    videos = [cmd_jax.load(workdir)([3], seed=1) for workdir in (tmp_path / 'run', run)]
    np.testing.assert_array_equal(*videos)


def test_the_motion_network_learns_the_condition(run, tmp_path):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    changed = json.loads((run / 'motion' / 'config.json').read_text())
    changed['stage'] = 'motion'
    changed['motion']['train']['steps'] = 3
    loop.train(configs.parse(changed), tmp_path, force_config=True)
    table = params(cmd_jax.load(tmp_path).motion)['label_embed/embedding']
    assert table.any()


def test_a_condition_on_text_begins_with_nothing(monkeypatch):
    """Features of zeros times a kernel of zeros, too: the network's function is the same."""

    def make(stage, config, classes, rngs):
        sizes = dict(frames=4, tokens=8, channels=5, content_size=(16, 16, 3), content_patch=8)
        return MotionDiT(**sizes, dim=96, depth=1, heads=6, text_dim=7, rngs=rngs)

    monkeypatch.setattr(runs, 'make_network', make)
    changed = tree()
    runs.write_sizes('motion', changed['motion'], DICTS['motion'])
    found = runs.read_params('motion', configs.parse(changed), 0, DICTS['motion'])
    text = found.pop('text_embed')
    assert text['kernel'].shape == (7, 96) and text['bias'].shape == (96,)
    assert not text['kernel'].any() and not text['bias'].any()
    theirs = interop.load_nvlabs_motion_dit(DICTS['motion'], frames=4, heads=6)
    theirs = nnx.to_pure_dict(nnx.state(theirs, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, found, theirs)


def test_names_of_classes_that_are_not_given(given, tmp_path):
    files = {k: given[k] for k in ('autoencoder', 'content')}
    runs.import_run(tmp_path, tree(), **files)
    names = trained.read_inputs(tmp_path / 'content').class_names
    assert names == [f'class {i}' for i in range(10)]


def test_a_checkpoint_without_a_place_in_the_data(tmp_path):
    mesh = make_mesh()
    tx = optax.sgd(0.1)
    _, abstract, init = states.prepare(lambda rngs: nnx.Linear(2, 3, rngs=rngs), tx, mesh)
    state = init(jax.random.key(0), {})
    for name, position in (('with', 3), ('without', None)):
        with Checkpoints(tmp_path / name) as checkpoints:
            checkpoints.save(state, None, position)
            found, _, place = checkpoints.restore(abstract, None)
            jax.tree.map(np.testing.assert_array_equal, found.params, state.params)
            assert place == position


# --- What a user can do wrong -----------------------------------------------------------------


def spoil(given, stage, change, tmp_path):
    """`given` with a changed file of a stage."""
    state_dict = dict(DICTS[stage])
    change(state_dict)
    save_file(state_dict, tmp_path / 'spoiled.safetensors')
    return given | {stage: tmp_path / 'spoiled.safetensors'}


@pytest.mark.parametrize(
    'stage, change, words',
    [
        (
            'autoencoder',
            lambda d: d.update({'post_xt.weight': np.zeros((32, 6, 1, 1), np.float32)}),
            ['of another shape: post_xt.weight (32, 6, 1, 1)'],
        ),
        ('content', lambda d: d.pop('blocks.0.mlp.fc1.bias'), ['1 missing: blocks.0.mlp.fc1.bias']),
        ('content', lambda d: d.update(DICTS['motion']), ['content network', '5 channels']),
        (
            'content',
            lambda d: d.update(pos_embed=np.zeros((1, 16, 96), np.float32)),
            ['data.height=16, data.width=16', '64 patches', '16 (pos_embed)'],
        ),
        (
            'motion',
            lambda d: d.update(pos_embed=np.zeros((1, 16, 96), np.float32)),
            ['data.frames=4', '8 patches', '16 (pos_embed)'],
        ),
        (
            'motion',
            lambda d: d.update(keyframe_pos_embed=np.zeros((1, 16, 96), np.float32)),
            ['data.height=16', '4 patches', '16 (keyframe_pos_embed)'],
        ),
        (
            'motion',
            lambda d: d.update(dit_dict(depth=1, tokens=8, content=(4, 3, 8))),
            ['4 channels', 'motion_channels=5'],
        ),
        (
            'content',
            lambda d: d.update(dit_dict(dim=32, depth=1, channels=3, tokens=64, classes=10)),
            ['width of 32', '--config.content.model.heads', '--config.content.model.dim=32'],
        ),
    ],
)
def test_networks_that_do_not_fit(stage, change, words, given, tmp_path):
    given = spoil(given, stage, change, tmp_path)
    with pytest.raises(UserError) as e:
        runs.import_run(tmp_path / 'run', tree(), **given)
    for word in ['spoiled.safetensors: ', *words]:
        assert word in str(e.value)
    assert not (tmp_path / 'run').exists(), 'nothing was written'


def test_nothing_is_overwritten_or_mixed(run, given, tmp_path):
    before = sorted((p, p.stat().st_mtime_ns) for p in run.rglob('*'))
    with pytest.raises(UserError, match='content exists already: use another --workdir'):
        runs.import_run(run, tree(), content=given['content'])
    with pytest.raises(UserError, match='nothing to import'):
        runs.import_run(run, tree())
    with pytest.raises(UserError, match='the content network is the U-Net of'):
        runs.import_run(tmp_path / 'text', tiny.shipped('text_to_video'), content=given['content'])
    assert before == sorted((p, p.stat().st_mtime_ns) for p in run.rglob('*'))

    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / 'motion')
    wide = tree()
    wide['data']['width'] = 32
    with pytest.raises(UserError, match='data.width=32, but the autoencoder of this run has 16'):
        runs.import_run(tmp_path, wide, motion=given['motion'])
    path = tmp_path / 'names.txt'
    path.write_text('\n'.join(reversed(DIGITS)))
    with pytest.raises(UserError, match='names.txt differs from the class_names in'):
        runs.import_run(tmp_path, tree(), motion=given['motion'], class_names=path)
    unfinished = json.loads((tmp_path / 'autoencoder' / 'config.json').read_text())
    unfinished['autoencoder']['train']['steps'] = 6
    path = tmp_path / 'begun' / 'autoencoder'
    shutil.copytree(tmp_path / 'autoencoder', path)
    (path / 'config.json').write_text(json.dumps(unfinished))
    with pytest.raises(UserError, match='1 of 6 steps done'):
        runs.import_run(tmp_path / 'begun', tree(), content=given['content'])
    assert [p.name for p in (tmp_path / 'begun').iterdir()] == ['autoencoder'], 'nothing is written'
    shutil.rmtree(tmp_path / 'autoencoder')
    with pytest.raises(UserError, match='holds content of another autoencoder'):
        runs.import_run(tmp_path, tree(), autoencoder=given['autoencoder'])


@pytest.mark.parametrize(
    'text, words',
    [
        ('one\ntwo\n', 'has 2 names, but the content network 10 classes'),
        ('\n', 'is empty'),
        (None, 'cannot be read'),
    ],
)
def test_files_of_class_names(text, words, given, tmp_path):
    path = tmp_path / 'names.txt'
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=words):
        runs.import_run(tmp_path / 'run', tree(), **given | {'class_names': path})


@pytest.mark.parity
def test_files_of_pytorch(generator, tmp_path):
    """As training scripts write them: averaged weights beside others, flags, names of DDP."""
    import torch

    zeros = {k: np.zeros_like(x) for k, x in DICTS['content'].items()}
    saved = {
        'autoencoder': {'autoenc': tensors(DICTS['autoencoder'], 'module.'), 'epoch': 3},
        'content': {
            'cdiff_model': tensors(zeros),
            'ema': {k: torch.nn.Parameter(x) for k, x in tensors(DICTS['content']).items()},
            'args': argparse.Namespace(lr=1e-4),
        },
        'motion': tensors(DICTS['motion']),
    }
    for stage in saved:
        torch.save(saved[stage], tmp_path / f'{stage}.pt')
    named = {stage: tmp_path / f'{stage}.pt' for stage in saved}
    runs.import_run(tmp_path / 'run', tree(), **named)
    found = cmd_jax.load(tmp_path / 'run')
    for stage in saved:
        expected = params(getattr(generator, stage))
        jax.tree.map(np.testing.assert_array_equal, params(getattr(found, stage)), expected)
