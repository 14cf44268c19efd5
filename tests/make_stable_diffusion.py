"""Small Stable Diffusion folders with random weights, written by diffusers and transformers.

For the parity tests: torch is imported here.
"""

import json
from pathlib import Path

import diffusers
import torch
import transformers

TEXT_DIM = 24
WIDTHS = (32, 64, 64)


def tokenizer(folder: Path):
    """CLIP's byte-level vocabulary with a few merges; <|startoftext|> and <|endoftext|> last."""
    letters = byte_letters()
    vocabulary = letters + [f'{letter}</w>' for letter in letters]
    merges = [('t', 'h'), ('th', 'e</w>'), ('i', 'n'), ('in', 'g</w>'), ('a', 'n</w>'), ('d', 'i')]
    merges += [('v', 'e'), ('s', 'e'), ('se', 've'), ('seve', 'n</w>'), ('\u00c3', '\u00a9</w>')]
    vocabulary += [''.join(pair) for pair in merges]
    vocabulary += ['<|startoftext|>', '<|endoftext|>']
    folder.mkdir(parents=True)
    ids = {token: i for i, token in enumerate(vocabulary)}
    (folder / 'vocab.json').write_text(json.dumps(ids))
    lines = ['#version: 0.2', *(' '.join(pair) for pair in merges)]
    (folder / 'merges.txt').write_text('\n'.join(lines) + '\n')
    settings = dict(
        tokenizer_class='CLIPTokenizer',
        model_max_length=77,
        bos_token='<|startoftext|>',
        eos_token='<|endoftext|>',
        unk_token='<|endoftext|>',
        pad_token='<|endoftext|>',
    )
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
    return len(vocabulary)


def byte_letters() -> list[str]:
    """The printable letters that byte-level BPE writes the 256 bytes with."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]


def write(folder: Path, family: str, *, seed: int = 0):
    """A whole pipeline of a family, 'sd1' or 'sd2', with random weights.

    1.x has 1x1 convolutions around its transformers, one number of heads and CLIP's activation;
    2.x linear layers, heads by level and the exact GELU.
    """
    torch.manual_seed(seed)
    two = family == 'sd2'
    vocabulary = tokenizer(folder / 'tokenizer')
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=WIDTHS,
        down_block_types=('CrossAttnDownBlock2D', 'CrossAttnDownBlock2D', 'DownBlock2D'),
        up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D', 'CrossAttnUpBlock2D'),
        layers_per_block=2,
        norm_num_groups=8,
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=[2, 4, 8] if two else 4,
        use_linear_projection=two,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=('DownEncoderBlock2D',) * 2,
        up_block_types=('UpDecoderBlock2D',) * 2,
        layers_per_block=2,
        norm_num_groups=8,
    )
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=TEXT_DIM,
            intermediate_size=3 * TEXT_DIM,
            num_hidden_layers=3,
            num_attention_heads=2,
            hidden_act='gelu' if two else 'quick_gelu',
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
        )
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule='scaled_linear',
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type='v_prediction' if two else 'epsilon',
    )
    for name, part in dict(unet=unet, vae=vae, text_encoder=text).items():
        for parameter in part.parameters():  # zeros and ones would hide what is not read
            parameter.data += 0.02 * torch.randn_like(parameter)
        part.save_pretrained(folder / name)
    scheduler.save_pretrained(folder / 'scheduler')
    index = dict(_class_name='StableDiffusionPipeline', _diffusers_version=diffusers.__version__)
    (folder / 'model_index.json').write_text(json.dumps(index))
    return dict(unet=unet, vae=vae, text_encoder=text, scheduler=scheduler)
