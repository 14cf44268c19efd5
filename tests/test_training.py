"""The update and the loop: sharding, accumulation, guards."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import cmd_jax
from cmd_jax import sampling, stable_diffusion
from cmd_jax.data import pipeline
from cmd_jax.models import flops
from cmd_jax.parallel import mesh as meshes
from cmd_jax.parallel.placement import put_batch
from cmd_jax.stable_diffusion import UNet, weights
from cmd_jax.training import config as configs
from cmd_jax.training import frozen, losses, parts, program, stages, texts
from cmd_jax.training import state as states
from cmd_jax.training.parts import make_autoencoder, make_content, make_motion, make_process
from cmd_jax.training.stacks import Stacks
from cmd_jax.video import to_float
from tests import tiny


def pieces(name, mesh, device_batch=0, precision='float32'):
    """(step function, state, its sharding, frozen, batch) of a tiny stage on a mesh."""
    tree = tiny.tree()
    tree[name]['train'].update(device_batch=device_batch, ema_decay=0.9, precision=precision)
    tree['motion']['content_noise'] = 0.5
    config = configs.parse(tree)
    networks = {}
    if name != 'autoencoder':
        networks = {'autoencoder': make_autoencoder(config, nnx.Rngs(0))}
        networks['statistics'] = {'mean': jnp.zeros(4), 'std': jnp.full(4, 0.3)}
    made = program.make(stages.make(name, config, 10, mesh))
    state = made.init(jax.random.key(1), {})
    sharding = jax.tree.map(lambda x: x.sharding, made.abstract)
    # Zero-initialised layers would hide what is behind them.
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda p: np.asarray(p) + 0.02 * rng.standard_normal(p.shape, np.float32), state.params
    )
    state = jax.device_put(state.replace(params=params), sharding)
    source = parts.make_source(config, 'train')
    clips = pipeline.Batches(source, 8, seed=0, shuffle=False, repeat=True)
    batch = put_batch(frozen.labelled(next(clips)), mesh)
    return made.step, state, sharding, networks, batch


def run(name, mesh, steps=2, **options):
    with jax.set_mesh(mesh):
        step, state, sharding, networks, batch = pieces(name, mesh, **options)
        for _ in range(steps):
            state, metrics = step(state, networks, batch, jax.random.key(2))
        assert step._cache_size() == 1, 'one compilation'
        same = jax.tree.map(lambda x, s: x.sharding == s, state, sharding)
        assert all(jax.tree.leaves(same)), 'outputs lie where the inputs lay'
        return jax.device_get((state, metrics))


def moments(state):
    """Adam's first and second moments, each a tree like the parameters."""
    leaves = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, dict))
    return [leaf for leaf in leaves if isinstance(leaf, dict)]


@functools.cache
def one_device(name):
    return run(name, meshes.make_mesh(devices=jax.devices()[:1]))


def assert_same_update(one, other):
    (state, metrics), (state2, metrics2) = one, other
    np.testing.assert_allclose(metrics['loss'], metrics2['loss'], rtol=2e-5)
    np.testing.assert_allclose(metrics['grad_norm'], metrics2['grad_norm'], rtol=2e-4)
    # The first moments are the gradients; an update itself divides by their size, so that where
    # they are rounding noise it may point anywhere.
    for a, b in zip(moments(state), moments(state2), strict=True):
        largest = max(np.abs(x).max() for x in jax.tree.leaves(a))
        assert largest > 0
        wrong = jax.tree.map(lambda x, y: np.abs(x - y).max(), a, b)
        assert max(jax.tree.leaves(wrong)) <= 1e-4 * largest


@pytest.mark.parametrize('name', configs.STAGES)
def test_sharded_step_equals_one_device(name):
    sharded = run(name, meshes.make_mesh(data=2, fsdp=2, tensor=2))
    assert_same_update(one_device(name), sharded)


@pytest.mark.parametrize('name', configs.STAGES)
def test_half_precision_is_close(name):
    """What accelerators train in: float32 parameters, layers in bfloat16."""
    (state, metrics), (half, rounded) = (
        one_device(name),
        run(name, meshes.make_mesh(devices=jax.devices()[:1]), precision='bfloat16'),
    )
    assert all(x.dtype == np.float32 for x in jax.tree.leaves((half.params, moments(half))))
    assert rounded['loss'] != metrics['loss']
    np.testing.assert_allclose(rounded['loss'], metrics['loss'], rtol=0.02)
    # The gradients of all parameters as one vector: nearly the same direction and length.
    a, b = (
        np.concatenate([x.ravel() for x in jax.tree.leaves(moments(x)[0])]) for x in (state, half)
    )
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.99
    np.testing.assert_allclose(np.linalg.norm(b), np.linalg.norm(a), rtol=0.05)


def test_parts_of_a_batch():
    mesh = meshes.make_mesh(fsdp=4, tensor=2)
    for batch, device_batch, expected in ((48, 0, 1), (48, 12, 1), (48, 5, 3), (48, 1, 12)):
        assert meshes.accumulation(batch, device_batch, mesh) == expected


def test_accumulation_equals_one_batch():
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    assert_same_update(one_device('content'), run('content', mesh, device_batch=2))


def test_accumulation_on_shards():
    mesh = meshes.make_mesh(data=1, fsdp=2, devices=jax.devices()[:2])
    assert_same_update(one_device('content'), run('content', mesh, device_batch=1))


def test_parameters_differ_after_a_step():
    """The comparisons above see real updates."""
    with jax.set_mesh(meshes.make_mesh(devices=jax.devices()[:1])):
        _, before, _, _, _ = pieces('content', meshes.make_mesh(devices=jax.devices()[:1]))
        before = jax.device_get(before.params)
    after = one_device('content')[0].params
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, after)
    assert max(jax.tree.leaves(moved)) > 1e-3


SHIPPED = [(name, part) for name in ('quickstart', 'ucf101', 'folder') for part in configs.STAGES]


@pytest.mark.parametrize('name, part', SHIPPED)
def test_parameters_of_shipped_configs_are_sharded(name, part):
    """Every parameter has a rule of its own, and nothing above 1 MB is on all devices."""
    config = configs.parse(
        tiny.importlib.import_module(f'configs.{name}').get_config('all').to_dict()
    )
    make = {
        'autoencoder': make_autoencoder,
        'content': functools.partial(make_content, num_classes=101),
        'motion': functools.partial(make_motion, num_classes=101),
    }[part]
    model = nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
    sharding = meshes.param_sharding(params, meshes.make_mesh(fsdp=8))
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        name = meshes.path_name(path)
        assert meshes.rule(name) < len(meshes.PARAMS) - 1, f'{name} has no rule'

    def fits(x, sharding):
        return x.size * 4 <= 2**20 or any(sharding.spec)

    large = jax.tree.map(fits, params, sharding)
    assert all(jax.tree.leaves(large))


def test_optimizer_slots_lie_like_their_parameters():
    mesh = meshes.make_mesh(fsdp=4, tensor=2)
    with jax.set_mesh(mesh):
        _, state, _, _, _ = pieces('autoencoder', mesh)
    found = state.params['decoder']['blocks']['mlp']['up']['kernel']
    assert found.ndim == 4 and found.sharding.spec == P(None, None, 'fsdp', 'tensor')
    assert len(moments(state)) == 2
    for slots in (*moments(state), state.ema):
        same = jax.tree.map(lambda x, y: x.sharding == y.sharding, slots, state.params)
        assert all(jax.tree.leaves(same))


def test_stacks_are_trained_as_single_arrays():
    """Adam's updates are those of the arrays one by one: kernels decay, biases of their shape do
    not, and arrays that lie differently on a mesh are not stacked."""

    keys = iter(jax.random.split(jax.random.key(1), 16))

    def layer():
        values = {kind: jax.random.normal(next(keys), (4, 4)) for kind in ('kernel', 'bias')}
        return nnx.Dict({kind: nnx.Param(x) for kind, x in values.items()})

    layers = ('qkv', 'up', 'out', 'down')
    network = nnx.Dict({part: nnx.Dict({name: layer() for name in layers}) for part in 'ab'})
    made = Stacks(network, meshes.make_mesh())
    params = nnx.to_pure_dict(nnx.state(network, nnx.Param))
    grads = optax.tree.random_like(jax.random.key(0), params)
    stacks = made.stack(params)
    assert [x.shape for x in jax.tree.leaves(stacks)] == 4 * [(4, 4, 4)]
    jax.tree.map(np.testing.assert_array_equal, made.unstack(stacks), params)
    config = dataclasses.replace(
        tiny.config().content.train, weight_decay=0.5, warmup_steps=0, clip_norm=1.0
    )
    tx = states.optimizer(config)
    expected, _ = tx.update(grads, tx.init(params), params)
    updates, _ = tx.update(made.stack(grads), tx.init(stacks), stacks)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), made.unstack(updates), expected
    )


def test_stacks_of_stable_diffusion():
    sizes = stable_diffusion.arguments('sd21', 'unet')
    network = weights.abstract(UNet, **sizes, dtype=jnp.float32)
    made = Stacks(network, meshes.make_mesh())
    stacks = jax.eval_shape(made.stack, made.params)
    assert (len(jax.tree.leaves(made.params)), len(jax.tree.leaves(stacks))) == (686, 59)


def linear_step(loss, **kwargs):
    """A step of a one-parameter model."""
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    tx = optax.sgd(0.1)
    stacks, _, init = states.prepare(lambda rngs: nnx.Linear(1, 1, rngs=rngs), tx, mesh)
    kwargs = dict(ema_decay=0.5, accumulation=1) | kwargs
    return functools.partial(states.train_step, stacks=stacks, loss=loss, tx=tx, **kwargs), init(
        jax.random.key(0), {}
    )


def test_non_finite_updates_are_skipped_and_counted():
    def loss(model, frozen, batch, keys):
        value = (model(batch['x']) ** 2).mean() * batch['scale'].mean()
        return value, {'loss': value}

    step, state = linear_step(loss)
    counts = []
    for scale in (1.0, np.nan, np.inf, 1.0):
        before = jax.device_get(state)
        batch = {'x': jnp.ones((2, 1)), 'scale': jnp.full(2, scale), 'place': jnp.arange(2)}
        state, metrics = step(state, {}, batch, jax.random.key(0))
        counts.append((int(metrics['nonfinite']), int(metrics['skipped'])))
        same = jax.tree.map(lambda a, b: bool((a == b).all()), before.params, state.params)
        assert all(jax.tree.leaves(same)) == (not np.isfinite(scale))
        assert np.isfinite(state.ema['kernel']).all()
    assert counts == [(0, 0), (1, 1), (2, 2), (0, 2)]
    assert int(state.step) == 4


def test_average_follows_its_formula():
    def loss(model, frozen, batch, keys):
        value = (model(batch['x']) ** 2).mean()
        return value, {'loss': value}

    step, state = linear_step(loss, ema_decay=0.15)
    ema = float(state.ema['kernel'][0, 0, 0])
    for n in range(3):
        batch = {'x': jnp.ones((2, 1)), 'place': jnp.arange(2)}
        state, _ = step(state, {}, batch, jax.random.key(0))
        decay = min(0.15, (1 + n) / (10 + n))
        ema = decay * ema + (1 - decay) * float(state.params['kernel'][0, 0, 0])
        assert float(state.ema['kernel'][0, 0, 0]) == pytest.approx(ema, rel=1e-5)


def test_learning_rate_warms_up_and_decays():
    train = tiny.config().content.train
    tree = vars(train) | dict(learning_rate=1.0, warmup_steps=10, steps=110)
    cosine = states.learning_rate(configs.Train(**tree | {'schedule': 'cosine'}))
    constant = states.learning_rate(configs.Train(**tree | {'schedule': 'constant'}))
    np.testing.assert_allclose([cosine(5), constant(5)], 0.5, rtol=1e-5)
    np.testing.assert_allclose([cosine(60), cosine(110)], [0.5, 0.0], atol=1e-6)
    np.testing.assert_allclose([constant(10), constant(110)], 1.0)


@pytest.mark.parametrize('kind', ['class', 'text'])
def test_conditions_are_dropped_as_often_as_said(kind):
    keys = jax.random.split(jax.random.key(0), 4000)
    shape = (4000,) if kind == 'class' else (4000, 5)
    out = losses.drop_condition(keys, jnp.full(shape, 3), jnp.full(shape, 10), 0.1)
    assert set(np.unique(out)) == {3, 10}
    whole = (out == 10).reshape(4000, -1)
    assert (whole.all(1) == whole.any(1)).all(), 'text is dropped whole'
    assert float(whole.mean()) == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / 4000))


def test_statistics_normalise_the_motion():
    """Mean 0 and deviation 1 per channel on the clips that they were measured on."""
    config = tiny.config()
    model = make_autoencoder(config, nnx.Rngs(0))
    source = parts.make_source(config, 'train')
    read = functools.partial(pipeline.Batches, source, 8, seed=0, shuffle=True, repeat=True)
    mesh = meshes.make_mesh()
    statistics = frozen.measure_statistics({'autoencoder': model}, read(), 16, 1, mesh)
    batches = read()
    video = np.concatenate([next(batches)['video'] for _ in range(2)])
    motion = model.encode(to_float(jnp.asarray(video)))[1]
    z = sampling.normalize(motion, statistics)
    np.testing.assert_allclose(z.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(z.std((0, 1, 2)), 1, atol=2e-3)
    np.testing.assert_allclose(sampling.denormalize(z, statistics), motion, atol=1e-6)


def test_dropped_labels_tell_nothing_of_the_noise():
    """Guidance would otherwise steer by what the null class happened to be trained on."""
    config, seen = tiny.config().content, {}

    def network(x_t, t, labels):
        seen.update(x_t=x_t, t=t, labels=labels)
        return x_t

    n = 4000
    keys = jax.random.split(jax.random.key(0), n)
    losses.diffusion_loss(
        network,
        make_process(config.process),
        config.loss,
        keys,
        jnp.zeros((n, 2)),
        jnp.zeros(n, jnp.int32),
        jnp.full(n, 10, jnp.int32),
        discretized=False,
    )
    dropped = np.asarray(seen['labels']) == 10
    assert 0.05 < dropped.mean() < 0.15
    for value in (seen['x_t'][:, 0], seen['x_t'][:, 1], seen['t'], seen['t'] % 7):
        assert abs(np.corrcoef(dropped, value)[0, 1]) < 4 / np.sqrt(n)


@pytest.mark.parametrize('drop', [0.0, 1.0])
def test_text_trains_the_motion_network(drop):
    """Dropped text leaves its map's bias alone, the learned null condition."""
    config = tiny.config()
    section = config.motion
    model = cmd_jax.MotionDiT(
        frames=4,
        tokens=8,
        channels=4,
        content_size=(16, 16, 3),
        text_dim=6,
        **dict(dim=16, depth=1, heads=2, learn_sigma=False),
        rngs=nnx.Rngs(0),
    )
    graphdef, params = nnx.split(model, nnx.Param)
    # Zero-initialised layers would hide what is behind them.
    params = jax.tree.map(lambda p: p + 0.1, params)
    frozen = {'autoencoder': make_autoencoder(config, nnx.Rngs(0))}
    frozen['statistics'] = {'mean': jnp.zeros(4), 'std': jnp.ones(4)}
    options = dataclasses.replace(section.loss, label_drop=drop)
    loss = losses.motion_loss(make_process(section.process), options)
    features = jax.random.normal(jax.random.key(1), (3, 6))
    frozen['text'] = texts.Table(features, features[0])
    batch = {'video': jnp.zeros((2, 4, 16, 16, 3), jnp.uint8), 'text': jnp.array([2, 1])}
    keys = jax.random.split(jax.random.key(0), 2)

    @jax.jit
    @jax.grad
    def grad(params):
        return loss(nnx.merge(graphdef, params), frozen, batch, keys)[0]

    grads = nnx.to_pure_dict(grad(params))['text_embed']
    assert grads['bias'].any()
    assert grads['kernel'].any() == (drop == 0)


def test_model_flops_count_the_frozen_encoder_once():
    mesh = meshes.make_mesh(devices=jax.devices()[:1])
    config = tiny.config()
    autoencoder = make_autoencoder(config, nnx.Rngs(0))
    made = program.make(stages.make('content', config, 10, mesh))
    batch = {
        'video': jnp.zeros((8, 4, 16, 16, 3), jnp.uint8),
        'label': jnp.zeros(8, jnp.int32),
        'place': jnp.arange(8),
    }

    def forward(params, *args):
        return nnx.merge(made.stacks.graphdef, params)(*args)

    x, t = (
        jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.float32),
        jax.ShapeDtypeStruct((8,), jnp.float32),
    )
    network = flops.count(forward, made.stacks.params, x, t, batch['label']).flops
    clip = jax.ShapeDtypeStruct(batch['video'].shape, jnp.float32)
    encoder = flops.count(autoencoder.encode, clip).flops
    counted = made.flops({'autoencoder': autoencoder}, batch)
    assert counted == 3 * network + encoder
