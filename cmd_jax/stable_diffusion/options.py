"""What the config.json files of a diffusers folder mean for our modules.

A field is read, or has to have the one value that Stable Diffusion 1.x and 2.x have (other values
mean another model), or says nothing about the network (its file, its size in training).
"""

from cmd_jax.errors import UserError
from cmd_jax.stable_diffusion.text import ACTIVATIONS
from cmd_jax.stable_diffusion.unet import DOWN_BLOCKS, UP_BLOCKS

UNET_FIXED = {
    'center_input_sample': False,
    'flip_sin_to_cos': True,
    'freq_shift': 0,
    'mid_block_type': 'UNetMidBlock2DCrossAttn',
    'only_cross_attention': False,
    'downsample_padding': 1,
    'mid_block_scale_factor': 1,
    'dropout': 0.0,
    'act_fn': 'silu',
    'norm_eps': 1e-5,
    'transformer_layers_per_block': 1,
    'reverse_transformer_layers_per_block': None,
    'encoder_hid_dim': None,
    'encoder_hid_dim_type': None,
    'num_attention_heads': None,
    'dual_cross_attention': False,
    'class_embed_type': None,
    'addition_embed_type': None,
    'addition_time_embed_dim': None,
    'num_class_embeds': None,
    'resnet_time_scale_shift': 'default',
    'resnet_skip_time_act': False,
    'resnet_out_scale_factor': 1.0,
    'time_embedding_type': 'positional',
    'time_embedding_dim': None,
    'time_embedding_act_fn': None,
    'timestep_post_act': None,
    'time_cond_proj_dim': None,
    'conv_in_kernel': 3,
    'conv_out_kernel': 3,
    'projection_class_embeddings_input_dim': None,
    'attention_type': 'default',
    'class_embeddings_concat': False,
    'mid_block_only_cross_attention': None,
    'cross_attention_norm': None,
    'addition_embed_type_num_heads': 64,
}
VAE_FIXED = {
    'act_fn': 'silu',
    'shift_factor': None,
    'latents_mean': None,
    'latents_std': None,
    'use_quant_conv': True,
    'use_post_quant_conv': True,
    'mid_block_add_attention': True,
}
TEXT_FIXED = {
    'model_type': 'clip_text_model',
    'layer_norm_eps': 1e-5,
    'add_cross_attention': False,
    'cross_attention_hidden_size': None,
    'is_decoder': False,
    'is_encoder_decoder': False,
    'pruned_heads': {},
}
# What transformers takes where the text_config of a whole CLIP model leaves a field out.
TEXT_DEFAULTS = {
    'vocab_size': 49408,
    'hidden_size': 512,
    'intermediate_size': 2048,
    'num_hidden_layers': 12,
    'num_attention_heads': 8,
    'max_position_embeddings': 77,
    'hidden_act': 'quick_gelu',
    'layer_norm_eps': 1e-5,
    'eos_token_id': 49407,
}
# The same of its vision_config.
IMAGE_DEFAULTS = {
    'hidden_size': 768,
    'intermediate_size': 3072,
    'num_hidden_layers': 12,
    'num_attention_heads': 12,
    'image_size': 224,
    'patch_size': 32,
    'hidden_act': 'quick_gelu',
}
IMAGE_FIXED = TEXT_FIXED | {'model_type': 'clip_vision_model', 'num_channels': 3}
# Attention is computed in float32 where it has to be, whatever upcast_attention says.
UNET_IGNORED = {'sample_size', 'upcast_attention'}
VAE_IGNORED = {'sample_size', 'force_upcast'}
TEXT_IGNORED = {
    'architectures',
    'attention_dropout',
    'bos_token_id',
    'dropout',
    'dtype',
    'initializer_factor',
    'initializer_range',
    'pad_token_id',
    'projection_dim',
    'torch_dtype',
    'transformers_version',
    # Older versions of transformers wrote what they knew of any model, above all of generation.
    *'bad_words_ids begin_suppress_tokens chunk_size_feed_forward decoder_start_token_id'.split(),
    *'diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size'.split(),
    *'exponential_decay_length_penalty finetuning_task forced_bos_token_id'.split(),
    *'forced_eos_token_id id2label label2id length_penalty max_length min_length'.split(),
    *'no_repeat_ngram_size num_beam_groups num_beams num_return_sequences'.split(),
    *'output_attentions output_hidden_states output_scores prefix problem_type'.split(),
    *'remove_invalid_values repetition_penalty return_dict return_dict_in_generate'.split(),
    *'sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss'.split(),
    *'tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torchscript'.split(),
    *'typical_p use_bfloat16'.split(),
}
# Of a whole CLIP model: its encoders, which have fields of their own, and a scale of its logits.
CLIP_FIXED = TEXT_FIXED | {'model_type': 'clip'}
CLIP_IGNORED = TEXT_IGNORED | {'logit_scale_init_value'}
CLIP_IGNORED |= {f'{part}_config{old}' for part in ('text', 'vision') for old in ('', '_dict')}


class Fields:
    """A config.json that is read field by field, so that what nobody has read can be named."""

    def __init__(self, where: str, tree: dict, fixed: dict, ignored: set[str]):
        self.where, self.tree = where, dict(tree)
        for name, value in fixed.items():
            given = self.tree.pop(name, value)
            if given != value:
                raise UserError(
                    f'{where}: {name}={given!r} is not supported (Stable Diffusion 1.x and 2.x '
                    f'have {value!r})'
                )
        for name in [name for name in self.tree if name in ignored or name.startswith('_')]:
            del self.tree[name]

    def take(self, name: str, *default):
        if name not in self.tree and not default:
            raise UserError(f'{self.where}: {name} is missing')
        return self.tree.pop(name, *default)

    def done(self):
        if self.tree:
            name, value = next(iter(self.tree.items()))
            raise UserError(f'{self.where}: {name}={value!r} is unknown: is this another model?')


def per_level(value, levels: int) -> tuple:
    """One value for all resolutions, or one for each."""
    return tuple(value) if isinstance(value, list | tuple) else (value,) * levels


def blocks(fields: Fields, name: str, known: tuple[str, ...], levels: int) -> tuple[str, ...]:
    found = tuple(fields.take(name))
    if len(found) != levels or set(found) - set(known):
        raise UserError(f'{fields.where}: {name}={found}: {levels} of {", ".join(known)} expected')
    return found


def unet(where: str, tree: dict) -> dict:
    """Arguments of `UNet` for a `unet/config.json`."""
    fields = Fields(where, tree, UNET_FIXED, UNET_IGNORED)
    widths = tuple(fields.take('block_out_channels'))
    down = blocks(fields, 'down_block_types', DOWN_BLOCKS, len(widths))
    up = blocks(fields, 'up_block_types', UP_BLOCKS, len(widths))
    cross = tuple(name.startswith('CrossAttn') for name in down)
    if cross != tuple(name.startswith('CrossAttn') for name in reversed(up)):
        raise UserError(f'{where}: up_block_types={up} do not mirror down_block_types={down}')
    channels, out = fields.take('in_channels'), fields.take('out_channels')
    if channels != out:
        raise UserError(f'{where}: in_channels={channels} differs from out_channels={out}')
    arguments = dict(
        channels=channels,
        block_channels=widths,
        cross_attention=cross,
        layers=fields.take('layers_per_block'),
        # By a historical naming this is the number of heads.
        heads=per_level(fields.take('attention_head_dim'), len(widths)),
        text_dim=fields.take('cross_attention_dim'),
        groups=fields.take('norm_num_groups', 32),
        linear_projection=fields.take('use_linear_projection', False),
    )
    fields.done()
    return arguments


def vae(where: str, tree: dict) -> dict:
    """Arguments of `VAE` for a `vae/config.json`."""
    fields = Fields(where, tree, VAE_FIXED, VAE_IGNORED)
    widths = tuple(fields.take('block_out_channels'))
    blocks(fields, 'down_block_types', ('DownEncoderBlock2D',), len(widths))
    blocks(fields, 'up_block_types', ('UpDecoderBlock2D',), len(widths))
    channels, out = fields.take('in_channels'), fields.take('out_channels')
    if channels != out:
        raise UserError(f'{where}: in_channels={channels} differs from out_channels={out}')
    arguments = dict(
        channels=channels,
        latent_channels=fields.take('latent_channels'),
        block_channels=widths,
        layers=fields.take('layers_per_block'),
        groups=fields.take('norm_num_groups', 32),
        scaling_factor=fields.take('scaling_factor', 0.18215),
    )
    fields.done()
    return arguments


def text_encoder(where: str, tree: dict) -> dict:
    """Arguments of `TextEncoder` for its config.json, or for that of a whole CLIP model."""
    kind = tree.get('model_type', 'clip_text_model')
    if kind not in ('clip_text_model', 'clip'):
        raise UserError(
            f"{where}: model_type={kind!r}: give a CLIP text encoder ('clip_text_model') or a "
            "whole CLIP model ('clip')"
        )
    if kind == 'clip':
        tree = of_whole(where, tree, 'text_config', TEXT_DEFAULTS)
    fields = Fields(where, tree, TEXT_FIXED, TEXT_IGNORED)
    end = fields.take('eos_token_id', 2)
    vocabulary = fields.take('vocab_size')
    arguments = dict(
        vocabulary=vocabulary,
        length=fields.take('max_position_embeddings'),
        **transformer(fields),
        # Old files say 2 and mean the last token of the vocabulary.
        end=vocabulary - 1 if end == 2 else end,
    )
    fields.done()
    return arguments


def image_encoder(where: str, tree: dict) -> dict:
    """Arguments of `evaluation.networks.clip.ImageEncoder` for the config.json of a CLIP model."""
    kind = tree.get('model_type')
    if kind != 'clip':
        raise UserError(f"{where}: model_type={kind!r}: give a whole CLIP model ('clip')")
    fields = Fields(
        where,
        of_whole(where, tree, 'vision_config', IMAGE_DEFAULTS),
        IMAGE_FIXED,
        TEXT_IGNORED,
    )
    arguments = dict(
        size=fields.take('image_size'),
        patch=fields.take('patch_size'),
        projected=tree.get('projection_dim', 512),
        **transformer(fields),
    )
    fields.done()
    return arguments


def of_whole(where: str, tree: dict, part: str, defaults: dict) -> dict:
    """The fields of an encoder in the config.json of a whole CLIP model."""
    fields = Fields(where, tree, CLIP_FIXED, CLIP_IGNORED)
    fields.done()
    # The second is a name of old files; transformers reads it first, with the same defaults.
    given, old = tree.get(part) or {}, tree.get(f'{part}_dict')
    return defaults | given if old is None else defaults | given | defaults | old


def transformer(fields: Fields) -> dict:
    """The arguments that both of CLIP's encoders have."""
    activation = fields.take('hidden_act')
    if activation not in ACTIVATIONS:
        raise UserError(
            f'{fields.where}: hidden_act={activation!r}: one of {", ".join(ACTIVATIONS)}'
        )
    return dict(
        dim=fields.take('hidden_size'),
        depth=fields.take('num_hidden_layers'),
        heads=fields.take('num_attention_heads'),
        hidden=fields.take('intermediate_size'),
        activation=activation,
    )
