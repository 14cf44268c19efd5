"""CLIP against transformers, under random weights."""

import jax
import numpy as np
import pytest
from PIL import Image

from cmd_jax.evaluation import features
from cmd_jax.evaluation.networks import clip
from cmd_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.parity

PROMPTS = ['a seven moving up', '', 'the th\u00e9 & ' * 40]
SIZE = 32


@pytest.fixture(scope='module', params=['quick_gelu', 'gelu'])
def both(request, tmp_path_factory):
    """(transformers' CLIP, its folder, ours)."""
    import torch
    import transformers

    from tests import make_stable_diffusion

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('clip') / 'clip'
    vocabulary = make_stable_diffusion.tokenizer(folder)
    common = dict(num_hidden_layers=2, hidden_act=request.param, intermediate_size=40)
    config = transformers.CLIPConfig(
        text_config=common
        | dict(
            vocab_size=vocabulary,
            hidden_size=16,
            num_attention_heads=2,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
        ),
        vision_config=common
        | dict(hidden_size=24, num_attention_heads=4, image_size=SIZE, patch_size=8),
        projection_dim=12,
    )
    model = transformers.CLIPModel(config).eval()
    for parameter in model.parameters():  # zeros and ones would hide what is not read
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    ours = clip.load(folder, make_mesh(devices=jax.devices()[:2]))
    return model, folder, ours


def videos():
    return np.random.default_rng(0).integers(0, 256, (3, 2, 45, 70, 3)).astype(np.uint8)


def their_images(model, frames):
    """Embeddings by transformers, of frames as its image processor prepares them."""
    import torch
    import transformers

    processor = transformers.CLIPImageProcessorPil(
        size={'shortest_edge': SIZE}, crop_size={'height': SIZE, 'width': SIZE}
    )
    pixels = processor([Image.fromarray(x) for x in frames], return_tensors='np').pixel_values
    with torch.no_grad():
        found = model.visual_projection(model.vision_model(torch.tensor(pixels)).pooler_output)
    return np.asarray(found / found.norm(dim=-1, keepdim=True))


def their_texts(model, folder, prompts):
    import torch
    import transformers

    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    given = tokenizer(prompts, padding='max_length', truncation=True, return_tensors='pt')
    with torch.no_grad():
        found = model.text_projection(model.text_model(given.input_ids).pooler_output)
    return np.asarray(found / found.norm(dim=-1, keepdim=True))


def test_embeddings_of_images(both):
    model, _, ours = both
    wanted = their_images(model, np.concatenate(videos())).reshape(3, 2, -1)
    np.testing.assert_allclose(ours.embed_videos(videos(), batch_size=4), wanted, atol=1e-4)


def test_embeddings_of_texts(both):
    model, folder, ours = both
    np.testing.assert_allclose(
        ours.embed_texts(PROMPTS), their_texts(model, folder, PROMPTS), atol=1e-4
    )


def test_clipsim_is_the_mean_cosine(both):
    model, folder, ours = both
    frames = their_images(model, np.concatenate(videos())).reshape(3, 2, -1)
    wanted = np.einsum('ntk,nk->', frames, their_texts(model, folder, PROMPTS)) / 6
    assert features.clipsim(videos(), PROMPTS, ours) == pytest.approx(wanted, abs=1e-4)
    each = features.clipsim(videos(), PROMPTS, folder, mean=False)
    assert each.shape == (3,) and each.mean() == pytest.approx(wanted, abs=1e-4)
