"""Text encoders in a folder's root against transformers."""

import json

import jax
import numpy as np
import pytest

from cmd_jax import stable_diffusion
from cmd_jax.parallel.mesh import make_mesh
from cmd_jax.stable_diffusion import options

pytestmark = pytest.mark.parity

PROMPTS = [
    'a seven moving up',
    '',
    'a seven moving up',
    'the th\u00e9 & ' * 40,
    'A SEVEN moving up',
]


@pytest.fixture(scope='module', params=['whole', 'whole, few fields', 'text', 'with projection'])
def both(request, tmp_path_factory):
    """(transformers' text encoder, tokenizer, our pipeline)."""
    import torch
    import transformers

    from tests import make_stable_diffusion

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('text') / 'encoder'
    vocabulary = make_stable_diffusion.tokenizer(folder)
    text = dict(
        vocab_size=vocabulary,
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        projection_dim=8,
    )
    if request.param.startswith('whole'):
        small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8)
        config = transformers.CLIPConfig(
            text_config=text, vision_config=small | dict(patch_size=4), projection_dim=8
        )
        model = transformers.CLIPModel(config)
    else:
        suffix = 'WithProjection' if request.param == 'with projection' else ''
        model = getattr(transformers, f'CLIPTextModel{suffix}')(transformers.CLIPTextConfig(**text))
    for parameter in model.parameters():  # zeros and ones would hide what is not read
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    if request.param == 'whole, few fields':
        path = folder / 'config.json'
        tree = json.loads(path.read_text())
        assert tree['text_config'].keys() > text.keys()
        path.write_text(json.dumps(tree | dict(text_config=text)))
    ours = stable_diffusion.load(
        folder, parts=('text_encoder',), mesh=make_mesh(devices=jax.devices()[:2])
    )
    return getattr(model, 'text_model', model), folder, ours


def test_hidden_states_and_their_mean(both):
    import torch
    import transformers

    theirs, folder, ours = both
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    given = tokenizer(PROMPTS, padding='max_length', truncation=True, return_tensors='pt')
    np.testing.assert_array_equal(ours.tokenize(PROMPTS), given.input_ids)
    with torch.no_grad():
        wanted = theirs(given.input_ids)
    hidden, mean = ours.encode(PROMPTS)
    np.testing.assert_allclose(hidden, wanted.last_hidden_state, atol=1e-4)
    _, pooled = jax.jit(ours.text_encoder)(given.input_ids.numpy())
    np.testing.assert_allclose(pooled, wanted.pooler_output, atol=1e-4)
    # The tokenizer's mask is one from the start token through the first end token.
    mask = given.attention_mask[..., None]
    assert mask.sum(1).min() == 2 and mask.sum(1).max() == 77
    expected = (wanted.last_hidden_state * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(mean, expected, atol=1e-4)


def test_defaults_are_transformers():
    import transformers

    theirs = transformers.CLIPTextConfig()
    for name, value in options.TEXT_DEFAULTS.items():
        assert getattr(theirs, name) == value, name
