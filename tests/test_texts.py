"""Captions as conditions, and the configs of text-to-video."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cmd_jax import stable_diffusion
from cmd_jax.errors import UserError
from cmd_jax.parallel import mesh as meshes
from cmd_jax.stable_diffusion import make as maker
from cmd_jax.training import config as configs
from cmd_jax.training import frozen, loop, losses, parts, stages, texts
from tests import tiny

PROMPTS = ['a three moving up', 'an eight moving down and left']


def test_table_and_encoder_give_the_same(small_pipeline):
    """Captions encoded once or in each step; the prompts' own hidden states and means."""
    encoder = stable_diffusion.load(small_pipeline, parts=('text_encoder',))
    captions = [*PROMPTS, 'a zero moving left']
    kwargs = dict(dtype=jnp.float32, mesh=meshes.make_mesh())
    for pooled in (False, True):
        made = [
            texts.make(encoder, given, pooled=pooled, table_bytes=size, **kwargs)
            for given, size in ((captions, 2**29), (captions, 10), (None, 2**29))
        ]
        assert [type(m.frozen) for m in made] == [texts.Table, texts.Encode, texts.Encode]
        asked = captions[::-1]
        features = [m.frozen(jnp.asarray(m.lookup({'caption': asked}))) for m in made]
        for other in features[1:]:
            np.testing.assert_allclose(features[0], other, atol=1e-5)
        assert np.abs(features[0][0] - features[0][1]).max() > 1e-2
        np.testing.assert_allclose(made[0].frozen.null, made[1].frozen.null, atol=1e-5)
        assert made[0].frozen.null.shape == features[0].shape[1:]


def test_dropped_text_is_the_empty_prompt(small_pipeline):
    """The U-Net is trained without text on what Stable Diffusion takes for none."""
    config = configs.parse(tiny.text_tree(small_pipeline))
    seen = {}

    class Network(stable_diffusion.UNet):
        def __init__(self):
            pass

        def __call__(self, x, t, text):
            seen['text'] = text
            return x

    encoder = stable_diffusion.load(small_pipeline, parts=('text_encoder',))
    text = texts.make(encoder, PROMPTS, pooled=False, dtype=jnp.float32, mesh=meshes.make_mesh())
    frozen = {'text': text.frozen}
    batch = {  # as of a latent cache
        'content': jnp.zeros((2, 4, 6, 4)),
        'motion': jnp.zeros((2, 4, 5, 8)),
        'text': jnp.asarray(text.lookup({'caption': PROMPTS})),
    }
    for drop, wanted in ((0.0, PROMPTS), (1.0, ['', ''])):
        section = dataclasses.replace(config.content.loss, label_drop=drop)
        process = parts.make_process(config.content.process)
        loss = losses.content_loss(process, section)
        loss(Network(), frozen, batch, jax.random.split(jax.random.key(0), 2))
        np.testing.assert_allclose(seen['text'], encoder.encode(wanted)[0], atol=1e-5)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        (dict(stable_diffusion__source=''), "condition='text' needs a Stable Diffusion"),
        (dict(stable_diffusion__source='/nowhere/a'), '/nowhere/a is neither a folder'),
        (dict(content__process__prediction='epsilon'), 'prediction=v'),
        (dict(content__process__schedule='linear'), 'schedule=scaled_linear'),
        (dict(content__model__remat='attention'), "remat='attention'"),
        (dict(content__start='dit.pt'), "content.start='dit.pt'"),
        (dict(autoencoder__loss__lpips_weight=1.0), 'lpips_weight=1.0'),
        (dict(autoencoder__model__output='sigmoid'), "output='sigmoid'"),
        (dict(data__height=18), 'data.height=18'),
        (dict(condition='class', motion__text_encoder='x'), "motion.text_encoder='x'"),
        (dict(condition='txt'), "condition='txt' is unknown: did you mean 'text'"),
    ],
)
def test_configs_that_cannot_be(small_pipeline, tmp_path, changes, words):
    with pytest.raises(UserError) as e:
        loop.train(configs.parse(tiny.text_tree(small_pipeline, **changes)), tmp_path)
    assert words in str(e.value)
    assert not list(tmp_path.rglob('*.json'))


@pytest.mark.parametrize('stage', configs.STAGES)
@pytest.mark.parametrize(('family', 'content'), [('sd15', 859.5), ('sd21', 865.9)])
def test_full_size_stages(family, content, stage, tmp_path):
    """The paper's sizes; every parameter has a rule, and nothing above 1 MB is on all devices."""
    maker.describe(tmp_path, family)
    tree = tiny.shipped('text_to_video', f'{family},{stage}')
    assert (tree['stage'], tree['stable_diffusion']['source']) == (stage, family)
    tree['stable_diffusion']['source'] = str(tmp_path)
    if family == 'sd15':
        assert tree['motion']['text_encoder'] == 'sd21'
        tree['motion']['text_encoder'] = str(tmp_path)
    config = configs.parse(tree)
    assert parts.frame_shape(config) == (64, 128 if family == 'sd21' else 64, 4)
    stages.check(stage, config, 0, meshes.make_mesh())
    model = nnx.eval_shape(lambda: parts.make_network(stage, config, 0, nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    count = sum(x.size for x in jax.tree.leaves(params)) / 1e6
    low, high = {'autoencoder': (47, 48), 'motion': (673, 678)}.get(stage, (content, content + 0.1))
    assert low <= count <= high, count
    sharding = meshes.param_sharding(params, meshes.make_mesh(fsdp=8))
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        assert meshes.rule(meshes.path_name(path)) < len(meshes.PARAMS) - 1
    large = jax.tree.map(lambda x, s: x.size * 4 <= 2**20 or any(s.spec), params, sharding)
    assert all(jax.tree.leaves(large))
    # What --compile_for begins with; it needs no data.
    given, shapes = frozen.abstract(stage, config, meshes.make_mesh(fsdp=8))
    assert config.data.source == 'folder:'
    assert shapes['video'][0][1:] == (16, 512, 1024 if family == 'sd21' else 512, 3)
    assert (stage == 'autoencoder') == ('text' not in given.networks)
