import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cmd_jax
from cmd_jax.models import dit, flops
from cmd_jax.models.layers import REMAT, patchify, rotary, stack, unpatchify
from cmd_jax.models.rngs import make_rngs


def small(**kwargs):
    settings = dict(frames=4, height=16, width=24, patch=4, dim=32, depth=2, heads=2)
    return cmd_jax.VideoAutoencoder(**settings | kwargs, rngs=nnx.Rngs(0))


def randomize(model, seed=0):
    """Zero-initialised layers would hide what a test looks for."""
    graphdef, params = nnx.split(model, nnx.Param)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))


def clip(seed=0, shape=(2, 4, 16, 24, 3)):
    return jax.random.uniform(jax.random.key(seed), shape, minval=-1.0)


def shapes_of(make):
    return nnx.to_pure_dict(nnx.split(nnx.eval_shape(make), nnx.Param)[1])


def parameters(make):
    return sum(x.size for x in jax.tree.leaves(shapes_of(make)))


@pytest.mark.parametrize('traced', [False, True])
def test_rngs_are_those_of_flax(traced):
    """One by one, in stacks, and behind stacks."""

    def parameters(make, seed):
        rngs, key = make(seed), jax.random.key(seed)
        layers = [nnx.Linear(2, 3, rngs=rngs) for _ in range(2)]
        layers.append(stack(lambda rngs: nnx.Linear(2, 3, rngs=rngs), 3, rngs))
        layers += [nnx.Linear(2, 3, rngs=rngs), nnx.Linear(2, 3, rngs=make(key))]
        return [layer.kernel.get_value() for layer in layers]

    run = jax.jit(parameters, static_argnums=(0, 1)) if traced else parameters
    found, expected = run(make_rngs, 3), run(nnx.Rngs, 3)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert len({float(x.sum()) for x in found[:4]}) == 4


# --- Parameter counts of the paper -------------------------------------------------------------


def test_autoencoder_has_the_papers_parameters():
    def make():
        return cmd_jax.VideoAutoencoder(frames=16, height=64, width=64, rngs=nnx.Rngs(0))

    assert round(parameters(make) / 1e6, 2) == 47.36


def test_content_dit_has_the_papers_parameters():
    def make():
        return cmd_jax.ContentDiT(
            height=64, width=64, num_classes=101, **dit.SIZES['L'], rngs=nnx.Rngs(0)
        )

    assert round(parameters(make) / 1e6, 1) == 458.0


def test_motion_dit_has_the_papers_parameters():
    def make():
        return cmd_jax.MotionDiT(
            frames=16,
            tokens=64,
            channels=8,
            content_size=(64, 64, 4),
            **dit.SIZES['XL'],
            rngs=nnx.Rngs(0),
        )

    assert round(parameters(make) / 1e6) == 674


# --- FLOPs of the paper (16 x 512 x 512: latents of 64 x 64 x 4), multiply-adds without attention


def test_autoencoder_has_the_papers_flops():
    def make():
        return cmd_jax.VideoAutoencoder(
            frames=16, height=64, width=64, channels=4, output='linear', rngs=nnx.Rngs(0)
        )

    graphdef, params = nnx.split(nnx.eval_shape(make), nnx.Param)
    video = jax.ShapeDtypeStruct((1, 16, 64, 64, 4), jnp.float32)
    count = flops.count(lambda p, x: nnx.merge(graphdef, p)(x), params, video)
    assert round((count.linear + count.convolution) / 1e12, 2) == 0.77
    # The truth: both attentions of 8 + 8 blocks, 2 products of n^2 k each.
    assert count.attention == 16 * 2 * 384 * (16 * 1024**2 + 1024 * 16**2)


def test_motion_dit_has_the_papers_flops():
    def make():
        return cmd_jax.MotionDiT(
            frames=16,
            tokens=64,
            channels=8,
            content_size=(64, 64, 4),
            content_patch=8,
            text_dim=1024,
            **dit.SIZES['XL'],
            rngs=nnx.Rngs(0),
        )

    graphdef, params = nnx.split(nnx.eval_shape(make), nnx.Param)
    args = [(1, 16, 64, 8), (1,), (1, 64, 64, 4), (1, 1024)]
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in args]
    count = flops.count(lambda p, *args: nnx.merge(graphdef, p)(*args), params, *args)
    assert round((count.linear + count.convolution) / 1e12, 2) == 0.14


# --- The autoencoder ---------------------------------------------------------------------------


def test_content_frame_lies_in_the_range_of_the_frames():
    video = clip()
    content, motion = small().encode(video)
    assert content.shape == (2, 16, 24, 3)
    assert motion.shape == (2, 4, 6 + 4, 8)
    slack = 1e-6
    assert bool((content >= video.min(1) - slack).all() & (content <= video.max(1) + slack).all())
    assert float(jnp.abs(motion).max()) < 1


def test_content_frame_of_a_still_video_is_its_frame():
    frame = clip()[:, :1]
    content, _ = small().encode(jnp.repeat(frame, 4, axis=1))
    np.testing.assert_allclose(content, frame[:, 0], atol=1e-6)


def test_importance_sums_to_one_over_the_frames():
    weights = randomize(small()).importance(clip())
    np.testing.assert_allclose(weights.sum(1), 1.0, atol=1e-6)
    assert float(weights.std()) > 1e-3


def test_mean_content_frame_is_the_mean():
    video = clip()
    content, _ = small(content_frame='mean').encode(video)
    np.testing.assert_allclose(content, video.mean(1), atol=1e-6)


@pytest.mark.parametrize('position', ['rotary', 'none'])
def test_shuffling_frames(position):
    """Without positions a shuffle only shuffles; with them the content frame changes."""
    order = np.array([2, 0, 3, 1])
    video = clip()
    model = randomize(small(position=position))
    weights, shuffled = model.importance(video), model.importance(video[:, order])
    difference = float(jnp.abs(shuffled - weights[:, order]).max())
    assert difference < 1e-6 if position == 'none' else difference > 1e-3


def test_transposing_the_video_is_not_transposing_the_latent():
    """Rows and columns are told apart by position."""
    video = clip(shape=(1, 4, 16, 16, 3))
    model = randomize(small(width=16))
    content = model.encode(video)[0]
    other = model.encode(video.swapaxes(2, 3))[0].swapaxes(1, 2)
    assert float(jnp.abs(content - other).max()) > 1e-4


def test_width_part_of_the_motion_comes_first():
    """Without positions, a video of equal rows has no place in its height part, and one of equal
    columns none in its width part."""
    model = small(position='none')
    equal_rows = jnp.broadcast_to(clip()[:, :, :1], (2, 4, 16, 24, 3))
    motion = model.encode(equal_rows)[1]
    assert (model.columns, model.rows, model.motion_tokens) == (6, 4, 10)
    across, down = motion[:, :, :6], motion[:, :, 6:]
    np.testing.assert_allclose(down, jnp.broadcast_to(down[:, :, :1], down.shape), atol=1e-5)
    assert float(across.std(2).mean()) > 1e-3


def test_plain_mean_at_first():
    """Training begins with the plain mean of the frames."""
    video = clip()
    np.testing.assert_allclose(small().encode(video)[0], video.mean(1), atol=1e-6)


def test_outputs():
    video = 3 * clip()
    assert float(jnp.abs(small()(video)).max()) <= 1
    latent = small(output='linear', channels=4)
    out = latent(clip(shape=(2, 4, 16, 24, 4)))
    assert out.shape == (2, 4, 16, 24, 4)


def test_rotary_attention_depends_on_relative_positions_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    angles = jnp.outer(jnp.arange(10.0), jnp.array([1.0, 0.5, 0.2, 0.1]))

    def score(i, j):
        return float((rotary(q, angles[i : i + 1]) * rotary(k, angles[j : j + 1])).sum())

    assert score(2, 5) == pytest.approx(score(6, 9), abs=1e-5)
    assert score(2, 5) != pytest.approx(score(2, 6), abs=1e-3)


@functools.cache
def gradient(remat):
    """Of an autoencoder's loss, and its FLOPs, those of what is computed again included."""
    video = clip()
    graphdef, params = nnx.split(small(remat=remat), nnx.Param)

    def loss(params):
        return ((nnx.merge(graphdef, params)(video) - video) ** 2).mean()

    found = jax.jit(jax.grad(loss))(params)
    return nnx.to_pure_dict(found), flops.count(jax.grad(loss), params).total


@pytest.mark.parametrize('remat', [name for name in REMAT if name != 'none'])
def test_remat_changes_no_gradient(remat):
    same = jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
        gradient('none')[0],
        gradient(remat)[0],
    )
    assert jax.tree.leaves(same) == []


def test_remat_computes_again_what_it_does_not_keep():
    kept_less = ['none', 'wide', 'mlp', 'attention', 'full']
    assert set(kept_less) == set(REMAT)
    work = [gradient(remat)[1] for remat in kept_less]
    assert work == sorted(set(work)), 'each policy keeps less than the one before'


def test_patches_are_rows_columns_channels():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    patches = patchify(x, 2)
    np.testing.assert_array_equal(patches[1, 1, 2], x[1, 2:4, 4:6].reshape(-1))
    np.testing.assert_array_equal(unpatchify(patches, 2), x)


# --- The diffusion transformers ----------------------------------------------------------------


def content_dit(**kwargs):
    settings = dict(height=8, width=12, patch=2, dim=32, depth=2, heads=2, num_classes=5)
    return cmd_jax.ContentDiT(**settings | kwargs, rngs=nnx.Rngs(0))


def motion_dit(**kwargs):
    settings = dict(frames=4, tokens=10, channels=8, content_size=(16, 24, 3))
    settings |= dict(dim=32, depth=2, heads=2)
    return cmd_jax.MotionDiT(**settings | kwargs, rngs=nnx.Rngs(0))


def test_content_dit_on_a_rectangle():
    x = clip(shape=(2, 8, 12, 3))
    t, label = jnp.array([3.0, 900.0]), jnp.array([1, 5])
    model = content_dit()
    assert not model(x, t, label).any(), 'adaLN-Zero: the network starts at zero'
    model = randomize(model)
    out = model(x, t, label)
    assert out.shape == (2, 8, 12, 6)
    assert float(jnp.abs(out - model(x, t, jnp.array([2, 5])))[0].max()) > 1e-4
    assert float(jnp.abs(out - model(x, t + 5, label)).max()) > 1e-5
    assert content_dit(learn_sigma=False)(x, t, label).shape == (2, 8, 12, 3)
    assert content_dit(num_classes=0)(x, t).shape == (2, 8, 12, 6)


@pytest.mark.parametrize('kind', ['class', 'text'])
def test_motion_dit_sees_content_and_condition(kind):
    z, content = clip(shape=(2, 4, 10, 8)), clip(1, shape=(2, 16, 24, 3))
    t = jnp.array([3.0, 900.0])
    if kind == 'class':
        model, c, null = motion_dit(num_classes=5), jnp.array([0, 4]), jnp.array([5, 5])
    else:
        model, c, null = motion_dit(text_dim=7), clip(2, shape=(2, 7)), jnp.zeros((2, 7))
    np.testing.assert_array_equal(model.null_condition(c), null)
    model = randomize(model)
    out = model(z, t, content, c)
    assert out.shape == (2, 4, 10, 16)
    assert float(jnp.abs(out - model(z, t, -content, c)).max()) > 1e-4
    assert float(jnp.abs(out - model(z, t, content, null)).max()) > 1e-4


def test_position_tables_stay_as_they_are():
    model = randomize(content_dit())
    graphdef, params = nnx.split(model, nnx.Param)
    x, t, label = clip(shape=(2, 8, 12, 3)), jnp.array([3.0, 9.0]), jnp.array([1, 2])
    grads = jax.grad(lambda p: (nnx.merge(graphdef, p)(x, t, label) ** 2).sum())(params)
    grads = nnx.to_pure_dict(grads)
    assert not grads['positions']['position'].any()
    assert grads['patch_embed']['kernel'].any()


# --- Bad sizes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'make, words',
    [
        (lambda: small(height=18), ['height=18', 'patch=4']),
        (lambda: small(heads=3), ['dim=32', 'heads=3']),
        (lambda: small(dim=36, heads=6), ['head_dim=6', 'divisible by 4']),
        (lambda: small(position='learned'), ["position='learned'", 'rotary']),
        (lambda: small(remat='some'), ["remat='some'", 'full']),
        (lambda: small()(clip(shape=(2, 5, 16, 24, 3))), ['(5, 16, 24, 3)', '(4, 16, 24, 3)']),
        (lambda: content_dit(width=13), ['width=13', 'patch=2']),
        (lambda: content_dit(heads=5), ['dim=32', 'heads=5']),
        (lambda: motion_dit(frames=5), ['frames=5', 'patch=2']),
        (lambda: motion_dit(content_patch=5), ['content height=16', 'content_patch=5']),
        (lambda: motion_dit(num_classes=2, text_dim=3), ['num_classes=2', 'text_dim=3']),
    ],
)
def test_bad_sizes_name_field_and_value(make, words):
    with pytest.raises(cmd_jax.UserError) as e:
        make()
    for word in words:
        assert word in str(e.value)
