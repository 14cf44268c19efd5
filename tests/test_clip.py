"""CLIP: what it is given, and what it refuses. test_clip_parity.py compares its numbers."""

import dataclasses

import numpy as np
import pytest
import safetensors.numpy

from cmd_jax.errors import UserError
from cmd_jax.evaluation import features
from cmd_jax.evaluation.networks import clip


def test_clipsim_is_of_frames_and_their_own_text(clip_folder):
    model = clip.load(clip_folder)
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


def test_missing_and_unknown_parameters(clip_folder, tmp_path):
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = safetensors.numpy.load_file(clip_folder / 'model.safetensors')
    tensors['vision_model.more'] = tensors.pop('vision_model.embeddings.class_embedding')
    safetensors.numpy.save_file(tensors, tmp_path / 'model.safetensors')
    with pytest.raises(UserError, match='1 missing parameters: vision_model.embeddings.class_emb'):
        clip.load(tmp_path)


def test_a_folder_without_clip_and_a_repository_out_of_reach(tmp_path, monkeypatch):
    with pytest.raises(UserError, match='has no config.json: give --clip=FOLDER'):
        clip.load(tmp_path)

    def unreachable(*_, **__):
        raise UserError('some/where cannot be had (OSError): give another diffusion model')

    monkeypatch.setattr(clip.stable_diffusion, 'load', unreachable)
    with pytest.raises(UserError) as error:
        clip.load('some/where')
    assert 'some/where cannot be had (OSError): give --clip=FOLDER' in str(error.value)
    assert 'diffusion' not in str(error.value)


def test_other_activations_are_another_network(clip_folder, monkeypatch):
    model = clip.load(clip_folder)
    assert not model.is_vit_b32
    monkeypatch.setattr(clip, 'VIT_B32', model.arguments)
    assert not model.is_vit_b32  # the text encoder's width differs
    width = model.texts.text_encoder.dim
    monkeypatch.setattr(clip, 'VIT_B32', model.arguments | {'projected': width})
    assert not model.is_vit_b32
    same = dataclasses.replace(model, arguments=model.arguments | {'projected': width})
    assert same.is_vit_b32
    other = dataclasses.replace(same, arguments=same.arguments | {'activation': 'gelu'})
    assert not other.is_vit_b32
