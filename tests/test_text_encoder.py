"""Text encoders by themselves; tests/test_text_encoder_parity.py compares with transformers."""

import json

import jax
import numpy as np
import pytest
from absl import logging
from flax import nnx
from huggingface_hub.utils import filter_repo_objects

from cmd_jax import stable_diffusion
from cmd_jax.errors import UserError
from cmd_jax.parallel.mesh import make_mesh
from cmd_jax.stable_diffusion import TextEncoder, folder, options, weights
from cmd_jax.stable_diffusion.text import mean_over_text

END = 30
SIZES = dict(vocabulary=31, length=9, dim=8, depth=1, heads=2, hidden=16)
CONFIG = dict(
    vocab_size=31,
    max_position_embeddings=9,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    eos_token_id=END,
)


def test_mean_leaves_padding_out():
    hidden = np.random.RandomState(0).standard_normal((4, 6, 3)).astype(np.float32)
    ids = np.array(
        [
            [28, 5, 6, END, END, END],  # padded with end tokens
            [28, END, 0, 0, END, 0],  # padded with others
            [28, 1, 2, 3, 4, END],
            [28, 1, 2, 3, 4, 5],  # no end: all is text
        ]
    )
    means = jax.jit(mean_over_text, static_argnames='end')(hidden, ids, end=END)
    expected = [row[:n].mean(0) for row, n in zip(hidden, (4, 2, 6, 6))]
    np.testing.assert_allclose(means, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def encoder(tmp_path):
    """A folder whose root is a text encoder, read; words are tokenised by their length."""
    module = TextEncoder(**SIZES, activation='quick_gelu', end=END, rngs=nnx.Rngs(0))
    weights.save(module, tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text(
        json.dumps(CONFIG | dict(model_type='clip_text_model', hidden_act='quick_gelu'))
    )
    found = stable_diffusion.load(tmp_path, parts=['text_encoder'])

    class Tokenizer:
        model_max_length = 77
        seen = []

        def __call__(self, prompts, max_length=None, **padding):
            rows = [[28, *map(len, prompt.split()), END] for prompt in prompts]
            if max_length:
                self.seen += prompts
                rows = [row[: max_length - 1] + [END] * (max_length - len(row)) for row in rows]
                rows = [row + [END] * (max_length - len(row)) for row in rows]
            return type('Encoding', (), {'input_ids': rows})

        def decode(self, ids):
            return str(ids)

    found.tokenizer = Tokenizer()
    return found


def test_a_prompt_is_encoded_once(encoder, monkeypatch):
    batches = []
    program = folder.encode_program

    def watch(text_encoder, ids, mesh):
        batches.append(ids)
        return program(text_encoder, ids, mesh)

    monkeypatch.setattr(folder, 'encode_program', watch)
    random = np.random.RandomState(0)
    distinct = [' '.join('x' * n for n in (1 + i % 9, 1 + i // 9)) for i in range(70)]
    prompts = [distinct[i] for i in random.permutation(np.arange(200) % 70)]
    compiled = program._cache_size()
    hidden, mean = encoder.encode(prompts)
    assert hidden.shape == (200, 9, 8) and mean.shape == (200, 8) and mean.dtype == np.float32
    assert sorted(encoder.tokenizer.seen) == sorted(distinct)
    assert [len(ids) for ids in batches] == [64, 64]
    rows = [tuple(row) for row in np.concatenate(batches)]
    assert len(set(rows)) == 70 and rows[70:] == [rows[69]] * 58
    assert program._cache_size() == compiled + 1
    ids = encoder.tokenize(prompts)
    expected = jax.jit(encoder.text_encoder)(ids)[0]
    np.testing.assert_allclose(hidden, expected, atol=1e-5)
    np.testing.assert_allclose(mean, hidden[:, :4].mean(1), atol=1e-5)
    # Few prompts take a small batch; they come out as they did among many.
    few, _ = encoder.encode(prompts[:3])
    assert len(batches[-1]) == 4
    np.testing.assert_allclose(few, hidden[:3], atol=1e-5)


def test_long_prompts_are_told(encoder, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, 'warning', lambda *args: warnings.append(args))
    encoder.encode(['x ' * 20, 'x', 'x ' * 20])
    assert [args[1] for args in warnings] == [9]


def test_only_parts_that_were_asked_for_are_needed(encoder, tmp_path):
    assert encoder.unet is None and encoder.vae is None
    assert stable_diffusion.arguments(tmp_path, 'text_encoder').items() > SIZES.items()
    with pytest.raises(UserError, match='no scheduler/scheduler_config.json'):
        _ = encoder.process
    del encoder.tokenizer
    with pytest.raises(UserError, match='has no tokenizer'):
        encoder.tokenize(['x'])
    (tmp_path / 'vocab.json').write_text('{}')  # no merges.txt
    with pytest.raises(UserError, match='has no tokenizer'):
        encoder.tokenize(['x'])
    with pytest.raises(UserError, match='no pipeline but a text encoder'):
        stable_diffusion.save(encoder, tmp_path / 'other')
    encoder.text_encoder = None
    with pytest.raises(UserError, match="'text_encoder'"):
        encoder.encode(['x'])
    with pytest.raises(UserError, match='no unet/config.json'):
        stable_diffusion.load(tmp_path, parts=['unet', 'text_encoder'])


def test_whole_models_config():
    text = {name: CONFIG[name] for name in ('vocab_size', 'hidden_size', 'num_attention_heads')}
    whole = dict(model_type='clip', projection_dim=4, logit_scale_init_value=2.6, text_config=text)

    def read(**changes):
        return options.text_encoder('config.json', whole | changes)

    found = read()
    assert found['vocabulary'] == 31 and found['dim'] == 8 and found['heads'] == 2
    assert found['hidden'] == 2048 and found['depth'] == 12 and found['length'] == 77
    assert found['activation'] == 'quick_gelu' and found['end'] == 49407
    assert read(text_config=text | dict(eos_token_id=2, top_k=50))['end'] == 30
    old = read(text_config_dict=dict(hidden_size=16))
    assert old['dim'] == 16 and old['vocabulary'] == 49408
    assert read(text_config_dict=None) == found
    assert read(text_config=None)['dim'] == 512
    for changes, message in (
        (dict(sparkle=1), 'sparkle=1 is unknown'),
        (dict(text_config=text | dict(sparkle=1)), 'sparkle=1 is unknown'),
        (dict(text_config=text | dict(hidden_act='relu')), "hidden_act='relu'"),
        (dict(text_config=text | dict(model_type='bert')), "model_type='bert'"),
        (dict(text_config=text | dict(is_decoder=True)), 'is_decoder=True is not supported'),
        (dict(model_type='bert'), "model_type='bert': give a CLIP text encoder"),
    ):
        with pytest.raises(UserError, match=message):
            read(**changes)


def test_what_is_downloaded(monkeypatch, tmp_path):
    """What the parts need; of a repository that is a text encoder, its files."""
    pipeline = [
        *('model_index.json', 'unet/config.json', 'vae/config.json', 'text_encoder/config.json'),
        *('unet/diffusion_pytorch_model.safetensors', 'vae/diffusion_pytorch_model.safetensors'),
        *('text_encoder/model.safetensors', 'text_encoder/model.fp16.safetensors'),
        *('tokenizer/vocab.json', 'tokenizer/merges.txt', 'scheduler/scheduler_config.json'),
        *(
            'v1-5-pruned.safetensors',
            'text_encoder/pytorch_model.bin',
            'safety_checker/model.fp16.bin',
        ),
    ]
    encoder = ['config.json', 'model.safetensors', 'vocab.json', 'merges.txt', 'tf_model.h5']
    kept = {}

    def download(repository, allow_patterns, ignore_patterns):
        files = pipeline if repository == 'a/pipeline' else encoder
        options = dict(allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        kept[repository] = set(filter_repo_objects(files, **options))
        return str(tmp_path)

    monkeypatch.setattr('huggingface_hub.snapshot_download', download)
    folder.find('a/pipeline', tuple(folder.PARTS))
    assert kept['a/pipeline'] == set(pipeline[:7] + pipeline[8:11])
    folder.find('a/pipeline', ['text_encoder'])
    assert kept['a/pipeline'] == {
        name for name in pipeline[:11] if name.endswith(('.json', '.txt')) or name == pipeline[6]
    }
    folder.find('an/encoder', ['text_encoder'])
    assert kept['an/encoder'] == set(encoder[:4])
    with pytest.raises(UserError, match='no unet/config.json'):
        stable_diffusion.arguments('an/encoder', 'unet')
    assert kept['an/encoder'] == {'config.json', 'vocab.json', 'merges.txt'}


def test_parts_that_were_not_downloaded_are_not_saved(tmp_path):
    (tmp_path / 'in' / 'vae').mkdir(parents=True)
    (tmp_path / 'in' / 'vae' / 'config.json').write_text('{}')
    pipeline = folder.StableDiffusion(
        unet=None, vae=None, text_encoder=None, folder=tmp_path / 'in', mesh=make_mesh()
    )
    with pytest.raises(UserError, match="vae was not downloaded: add 'vae' to parts"):
        stable_diffusion.save(pipeline, tmp_path / 'out')
