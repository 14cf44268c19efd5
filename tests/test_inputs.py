"""What a stage was trained on: stages are used together only where they belong together."""

import dataclasses
import json
import shutil

import pytest

import cmd_jax
from cmd_jax.errors import UserError
from cmd_jax.training import config as configs
from cmd_jax.training import loop, trained
from tests import tiny


def test_parts_of_different_autoencoders_do_not_mix(digits_run, tmp_path):
    shutil.copytree(digits_run, tmp_path, dirs_exist_ok=True)
    path = tmp_path / 'motion' / 'inputs.json'
    inputs = json.loads(path.read_text())
    path.write_text(json.dumps(inputs | {'autoencoder_step': 5}))
    with pytest.raises(UserError, match='motion was trained on the autoencoder of step 5'):
        cmd_jax.load(tmp_path)
    tree = tiny.tree('motion')
    with pytest.raises(UserError, match='the autoencoder of step 5, which is now at step 6'):
        loop.train(configs.parse(tree), tmp_path)
    # Another one of as many steps.
    path.write_text(json.dumps(inputs | {'autoencoder': 'ab' * 32}))
    with pytest.raises(UserError, match='motion was trained on another autoencoder than is there'):
        cmd_jax.load(tmp_path)
    with pytest.raises(UserError, match='motion was trained on another autoencoder than is there'):
        loop.train(configs.parse(tree), tmp_path)
    # As an older run has it.
    del inputs['autoencoder']
    path.write_text(json.dumps(inputs))
    assert cmd_jax.load(tmp_path).steps['motion'] == 6


def test_content_and_motion_take_the_same_classes(digits_run, tmp_path):
    shutil.copytree(digits_run, tmp_path, dirs_exist_ok=True)
    inputs = trained.read_inputs(tmp_path / 'content')
    swapped = dataclasses.replace(inputs, class_names=inputs.class_names[::-1])
    trained.save_inputs(tmp_path / 'content', swapped)
    with pytest.raises(UserError, match="other classes .class 0: 'nine' and 'zero'"):
        cmd_jax.load(tmp_path)
    with pytest.raises(UserError, match="content and motion have other classes .class 0: 'nine'"):
        loop.train(tiny.config('motion'), tmp_path)
    with pytest.raises(UserError, match="other classes than the data has now .class 0: 'nine'"):
        loop.train(tiny.config('content'), tmp_path)
    alone = cmd_jax.load(tmp_path, stages=('autoencoder', 'motion'))
    assert alone.class_names == inputs.class_names


@pytest.mark.usefixtures('unchecked_types')
@pytest.mark.parametrize(
    'text, said',
    [
        (b'{"class', 'not readable'),
        (b'\xff', 'not readable'),
        (b'[]', 'list'),
        (b'{"a": 1}', 'fields'),
        (b'{"class_names": null}', 'class_names=None'),
    ],
)
def test_damaged_inputs(digits_run, text, said, tmp_path):
    shutil.copytree(digits_run / 'autoencoder', tmp_path / 'autoencoder')
    (tmp_path / 'autoencoder' / 'inputs.json').write_bytes(text)
    with pytest.raises(UserError, match=f'inputs.json.*{said}'):
        cmd_jax.load(tmp_path, stages=['autoencoder'])


def test_activations_may_be_computed_again_from_another_stage_on(digits_run, tmp_path):
    shutil.copytree(digits_run, tmp_path, dirs_exist_ok=True)
    tree = tiny.tree('content')
    tree['autoencoder']['model']['remat'] = tree['content']['model']['remat'] = 'full'
    tree['content']['train']['log_every'] = 2
    loop.train(configs.parse(tree), tmp_path)  # trained already
    assert configs.load(tmp_path / 'content' / 'config.json') == configs.parse(tree)
