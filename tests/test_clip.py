"""CLIP: what it is given, and what it refuses. test_clip_parity.py compares its numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from cmd_jax.errors import UserError
from cmd_jax.evaluation import features
from cmd_jax.evaluation.networks import clip
from cmd_jax.stable_diffusion import weights

SIZES = dict(dim=24, depth=2, heads=4, hidden=40)


@pytest.fixture(scope='module')
def folder(small_pipeline, tmp_path_factory):
    """A whole CLIP model with random weights, made of the pipeline's text encoder."""
    path = tmp_path_factory.mktemp('clip')
    part = small_pipeline / 'text_encoder'
    text = json.loads((part / 'config.json').read_text())
    vision = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
    vision |= dict(image_size=32, patch_size=8)
    tree = dict(model_type='clip', text_config=text, vision_config=vision, projection_dim=12)
    (path / 'config.json').write_text(json.dumps(tree))
    for file in (small_pipeline / 'tokenizer').iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    network = weights.abstract(
        clip.ImageEncoder, size=32, patch=8, projected=12, text_dim=text['hidden_size'], **SIZES
    )
    network = jax.tree.map(
        lambda x: 0.2 * jax.random.normal(jax.random.key(x.size), x.shape, jnp.float32), network
    )
    weights.save(network, path / 'model.safetensors')
    tensors = safetensors.numpy.load_file(path / 'model.safetensors')
    tensors |= safetensors.numpy.load_file(part / 'model.safetensors')
    safetensors.numpy.save_file(tensors, path / 'model.safetensors')
    return path


def test_clipsim_is_of_frames_and_their_own_text(folder):
    model = clip.load(folder)
    videos = np.random.default_rng(0).integers(0, 256, (3, 2, 40, 50, 3)).astype(np.uint8)
    prompts = ['a seven moving up', 'a one moving left', '']
    texts, frames = model.embed_texts(prompts), model.embed_videos(videos)
    np.testing.assert_allclose(np.linalg.norm(frames, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(texts, axis=-1), 1, atol=1e-6)
    cosines = np.einsum('ntk,mk->nm', frames, texts) / 2
    assert np.ptp(cosines, axis=1).min() > 1e-5  # the texts tell apart
    for order in ([0, 1, 2], [2, 0, 1]):
        found = features.clipsim(videos, [prompts[i] for i in order], model, mean=False)
        np.testing.assert_allclose(found, cosines[np.arange(3), order], atol=1e-6)
    with pytest.raises(UserError, match='2 prompts for 3 videos'):
        features.clipsim(videos, prompts[:2], model)


def test_preprocess_scales_the_short_side_and_cuts_the_middle():
    frame = np.zeros((60, 100, 3), np.uint8)
    frame[:, 20:80] = 200
    seen = clip.preprocess(frame, 30)
    # The kernel reaches over the edge by a pixel or two.
    assert seen.shape == (30, 30, 3) and np.all(seen[:, 2:-2] == 200)
    np.testing.assert_array_equal(clip.preprocess(frame.swapaxes(0, 1), 30), seen.swapaxes(0, 1))
    whole = np.arange(30 * 30 * 3).reshape(30, 30, 3).astype(np.uint8)
    np.testing.assert_array_equal(clip.preprocess(whole, 30), whole)


def test_a_text_encoder_alone_is_refused(small_pipeline):
    with pytest.raises(UserError, match='give a whole CLIP model'):
        clip.load(small_pipeline / 'text_encoder')


def test_missing_and_unknown_parameters(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
    tensors['vision_model.more'] = tensors.pop('vision_model.embeddings.class_embedding')
    safetensors.numpy.save_file(tensors, tmp_path / 'model.safetensors')
    with pytest.raises(UserError, match='1 missing parameters: vision_model.embeddings.class_emb'):
        clip.load(tmp_path)
