import importlib

import pytest

from cmd_jax.errors import UserError
from cmd_jax.training import config as configs
from tests import tiny

NAMES = ('quickstart', 'ucf101', 'text_to_video', 'folder')


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('arg', ['all', 'autoencoder', 'content,tiny', 'motion', 'all,tiny'])
def test_shipped_configs_fit_the_schema(name, arg):
    tree = importlib.import_module(f'configs.{name}').get_config(arg)
    assert tree.is_locked
    config = configs.parse(tree.to_dict())
    assert config.stage == arg.split(',')[0]
    assert importlib.import_module(f'configs.{name}').__doc__.strip()


@pytest.mark.parametrize(('arg', 'width', 'patch'), [('sd15', 512, 4), ('sd21,motion', 1024, 8)])
def test_text_to_video_is_the_papers_setting(arg, width, patch):
    config = configs.parse(tiny.shipped('text_to_video', arg))
    assert (config.data.frames, config.data.height, config.data.width) == (16, 512, width)
    assert config.condition == 'text' and config.stage == (arg.split(',') + ['all'])[1]
    assert config.autoencoder.loss.l2_weight == 1.0 and config.autoencoder.loss.l1_weight == 0.0
    model = config.motion.model
    assert (model.dim, model.depth, model.heads) == (1152, 28, 16)
    assert (model.patch, model.content_patch) == (2, patch)
    assert config.content.process.prediction == 'epsilon'
    for section, steps in ((config.content, 50), (config.motion, 100)):
        assert (section.train.batch_size, section.train.learning_rate) == (256, 1e-4)
        assert (section.sampling.steps, section.sampling.guidance) == (steps, 7.5)
    assert config.motion.train.clip_norm == 1.0


def test_ucf101_is_the_papers_setting():
    config = configs.parse(tiny.shipped('ucf101'))
    assert (config.data.frames, config.data.height, config.data.width) == (16, 64, 64)
    model = config.autoencoder.model
    assert (model.patch, model.dim, model.depth, model.heads) == (2, 384, 8, 8)
    assert model.motion_channels == 8
    train = config.autoencoder.train
    assert (train.batch_size, train.learning_rate, train.b1, train.b2) == (24, 1e-5, 0.5, 0.9)
    loss = config.autoencoder.loss
    assert (loss.l1_weight, loss.lpips_weight) == (4.0, 4.0)
    for section in (config.content, config.motion):
        assert (section.model.dim, section.model.depth, section.model.heads) == (1024, 24, 16)
        assert section.process.learn_sigma and section.process.schedule == 'linear'
        assert (section.train.batch_size, section.train.learning_rate) == (256, 1e-4)
        assert section.sampling.guidance == 4.0 and section.loss.label_drop == 0.1
    assert config.motion.model.content_patch == 4
    assert config.motion.train.clip_norm == 1.0


def change(path, value):
    tree = tiny.tree()
    *sections, field = path.split('.')
    at = tree
    for section in sections:
        at = at[section]
    at[field] = value
    return tree


@pytest.mark.parametrize(
    'path, value, words',
    [
        ('content.train.step', 3, ['content.train.step', 'did you mean steps']),
        ('dataa', {}, ['dataa', 'did you mean data']),
        ('data.frames', 'many', ['data.frames', "'many'", 'int']),
        ('data.frames', 0, ['data.frames=0', 'positive']),
        ('data.flip', 1, ['data.flip', 'bool']),
        ('content.loss.min_snr', 'x', ['content.loss.min_snr', 'float']),
        ('content.loss.label_drop', 7.0, ['content.loss.label_drop=7.0', '0.0..1.0']),
        ('content.sampling.sampler', 'ddimm', ["did you mean 'ddim'"]),
        ('content.process.schedule', 'cosin', ["did you mean 'cosine'"]),
        ('motion.model.remat', 'ful', ["did you mean 'full'"]),
        ('motion.model.patch', 0, ['motion.model.patch=0', 'positive']),
        ('mesh.tensor', 0, ['mesh.tensor=0', 'positive']),
        ('seed', -1, ['seed=-1']),
        ('content', 3, ['content=3', 'section']),
        ('stage', 'movie', ["stage='movie'", 'autoencoder, content, motion, all']),
        ('motion.train.schedule', 'cosin', ["'cosin'", "did you mean 'cosine'"]),
        ('motion.train.precision', 'fp8', ["'fp8'", 'bfloat16']),
        ('motion.train.device_batch', -1, ['motion.train.device_batch=-1']),
        ('motion.train.steps', -1, ['motion.train.steps=-1', 'positive']),
        ('motion.sampling.guidance', -1.0, ['motion.sampling.guidance=-1.0']),
        ('content.sampling.guidance_rescale', 7.0, ['content.sampling.guidance_rescale=7.0']),
        ('motion.train.b1', 1.0, ['motion.train.b1=1.0', '0.9999']),
        ('motion.train.b2', 1.0, ['motion.train.b2=1.0', '0.999999']),
    ],
)
def test_bad_fields_are_named(path, value, words):
    with pytest.raises(UserError) as e:
        configs.parse(change(path, value))
    for word in words:
        assert word in str(e.value)


def test_missing_field_is_named():
    tree = tiny.tree()
    del tree['motion']['model']['patch']
    with pytest.raises(UserError, match='motion.model.patch is missing'):
        configs.parse(tree)


def test_integers_pass_as_floats():
    assert (
        configs.parse(change('content.train.learning_rate', 1)).content.train.learning_rate == 1.0
    )


def test_round_trip_through_json(tmp_path):
    config = tiny.config()
    configs.save(config, tmp_path / 'run' / 'config.json')
    assert configs.load(tmp_path / 'run' / 'config.json') == config
    (tmp_path / 'run' / 'config.json').write_text('{')
    with pytest.raises(UserError, match='JSON'):
        configs.load(tmp_path / 'run' / 'config.json')


def test_differences_are_those_that_bear_on_the_stage():
    old = tiny.config()
    tree = tiny.tree()
    tree['content']['train']['steps'] = 7
    tree['mesh']['tensor'] = 2
    # How it is gone about, which a smaller slice may need otherwise.
    tree['content']['train'].update(device_batch=2, save_every=5, log_every=3, keep_every=4)
    tree['data']['workers'] = 3
    for stage in configs.STAGES:
        tree[stage]['model']['remat'] = 'full'
    tree['autoencoder']['train']['steps'] = 9
    new = configs.parse(tree)
    assert configs.differences('content', old, new) == ['content.train.steps: 6 -> 7']
    assert configs.differences('motion', old, new) == []
    assert configs.differences('autoencoder', old, new) == ['autoencoder.train.steps: 6 -> 9']
