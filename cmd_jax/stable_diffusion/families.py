"""What the config.json files of Stable Diffusion 1.5 and 2.1-base say, and of a tiny one.

So that a run can be checked, and compiled for machines elsewhere, before anything is downloaded,
and that folders like theirs can be made (`make`).
"""

VERSION = '0.40.0'  # of diffusers, whose fields these are


def unet(widths: tuple[int, ...], **fields) -> dict:
    """unet/config.json; the coarsest of four levels does not attend to the text."""
    cross = [True] * min(len(widths), 3) + [False] * (len(widths) - 3)
    return dict(
        _class_name='UNet2DConditionModel',
        _diffusers_version=VERSION,
        act_fn='silu',
        block_out_channels=list(widths),
        center_input_sample=False,
        down_block_types=[f'{"CrossAttn" * c}DownBlock2D' for c in cross],
        downsample_padding=1,
        flip_sin_to_cos=True,
        freq_shift=0,
        in_channels=4,
        mid_block_scale_factor=1,
        norm_eps=1e-5,
        out_channels=4,
        up_block_types=[f'{"CrossAttn" * c}UpBlock2D' for c in reversed(cross)],
        **fields,
    )


def vae(widths: tuple[int, ...], **fields) -> dict:
    """vae/config.json."""
    return dict(
        _class_name='AutoencoderKL',
        _diffusers_version=VERSION,
        act_fn='silu',
        block_out_channels=list(widths),
        down_block_types=['DownEncoderBlock2D'] * len(widths),
        in_channels=3,
        latent_channels=4,
        out_channels=3,
        up_block_types=['UpDecoderBlock2D'] * len(widths),
        **fields,
    )


def text(dim: int, depth: int, heads: int, **fields) -> dict:
    """text_encoder/config.json. The last two tokens of the vocabulary are START and END."""
    return dict(
        architectures=['CLIPTextModel'],
        attention_dropout=0.0,
        hidden_size=dim,
        initializer_factor=1.0,
        initializer_range=0.02,
        intermediate_size=4 * dim,
        layer_norm_eps=1e-5,
        max_position_embeddings=77,
        model_type='clip_text_model',
        num_attention_heads=heads,
        num_hidden_layers=depth,
        **fields,
    )


# The ids of 1.x and 2.x are those of their files; 2 has come to mean the last token.
OLD_IDS = dict(bos_token_id=0, eos_token_id=2, pad_token_id=1, vocab_size=49408)
FULL_UNET = dict(layers_per_block=2, norm_num_groups=32, sample_size=64)
SCALE = dict(scaling_factor=0.18215)
FULL_VAE = dict(layers_per_block=2, norm_num_groups=32, **SCALE)
FAMILIES = {
    'tiny': dict(
        unet=unet(
            (64, 96),
            layers_per_block=1,
            norm_num_groups=16,
            attention_head_dim=4,
            cross_attention_dim=64,
            use_linear_projection=True,
            sample_size=8,
        ),
        vae=vae((16, 32, 32), layers_per_block=1, norm_num_groups=8, sample_size=32, **SCALE),
        text_encoder=text(64, 2, 2, hidden_act='gelu', projection_dim=64),
    ),
    'sd15': dict(
        unet=unet(
            (320, 640, 1280, 1280), attention_head_dim=8, cross_attention_dim=768, **FULL_UNET
        ),
        vae=vae((128, 256, 512, 512), sample_size=512, **FULL_VAE),
        text_encoder=text(768, 12, 12, hidden_act='quick_gelu', projection_dim=768, **OLD_IDS),
    ),
    'sd21': dict(
        unet=unet(
            (320, 640, 1280, 1280),
            attention_head_dim=[5, 10, 20, 20],
            cross_attention_dim=1024,
            use_linear_projection=True,
            **FULL_UNET,
        ),
        vae=vae((128, 256, 512, 512), sample_size=768, **FULL_VAE),
        text_encoder=text(1024, 23, 16, hidden_act='gelu', projection_dim=512, **OLD_IDS),
    ),
}
SCHEDULER = dict(
    _class_name='DDIMScheduler',
    _diffusers_version=VERSION,
    beta_end=0.012,
    beta_schedule='scaled_linear',
    beta_start=0.00085,
    clip_sample=False,
    num_train_timesteps=1000,
    prediction_type='epsilon',
    set_alpha_to_one=False,
    steps_offset=1,
    trained_betas=None,
)
INDEX = dict(
    _class_name='StableDiffusionPipeline',
    _diffusers_version=VERSION,
    feature_extractor=[None, None],
    image_encoder=[None, None],
    requires_safety_checker=False,
    safety_checker=[None, None],
    scheduler=['diffusers', 'DDIMScheduler'],
    text_encoder=['transformers', 'CLIPTextModel'],
    tokenizer=['transformers', 'CLIPTokenizer'],
    unet=['diffusers', 'UNet2DConditionModel'],
    vae=['diffusers', 'AutoencoderKL'],
)
