"""Makes a Stable Diffusion folder with random weights, in diffusers' layout.

    python -m cmd_jax.stable_diffusion.make --out=.cache/sd_tiny --family=tiny

  tiny  for trying out on moving digits, 32 x 32, on a CPU. Its VAE is trained (a minute on two
        cores), its text encoder is random and frozen but tells captions apart, its U-Net is at the
        start of a training.
  sd15, sd21  the sizes of Stable Diffusion 1.5 and 2.1-base, for measuring time and memory: 4.3
        and 5.2 GB of files in float32, 7 GB of memory while they are made.

diffusers and transformers load what is written here, as does `stable_diffusion.load`. The tokenizer
has the words of the moving digits' captions, and spells all others by letters.
"""

import copy
import json
import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import flags, logging
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from cmd_jax import cli
from cmd_jax.data.moving_digits import MovingDigits
from cmd_jax.errors import UserError, writable
from cmd_jax.stable_diffusion import make_vae, options, weights
from cmd_jax.stable_diffusion.families import FAMILIES, INDEX, SCHEDULER
from cmd_jax.stable_diffusion.folder import PARTS

START, END = '<|startoftext|>', '<|endoftext|>'
DTYPES = ('float32', 'float16', 'bfloat16')
CLIPS_READ = 200  # for the words of their captions: a digit is missing once in 10^8


# Standard deviations by a parameter's path and its number of inputs (or of tokens); the first match
# holds.
Rules = tuple[tuple[str, Callable[[int], float | np.ndarray]], ...]
RULES: Rules = (
    (r'.*/embedding', lambda inputs: 0.02),
    (r'.*/kernel', lambda inputs: inputs**-0.5),
)
TINY_RULES: dict[str, Rules] = {
    # Every residual branch, and the output, begin at zero.
    'unet': ((r'(.*/)?(conv2|proj_out|conv_out)/kernel', lambda inputs: 0.0),),
    'vae': (),
    # A caption is known by its words: they outweigh their places, and the padding (the last token)
    # is so faint that its hidden states are what it attends to.
    'text_encoder': (
        (
            r'.*/token_embedding/embedding',
            lambda tokens: np.where(np.arange(tokens) < tokens - 1, 1.0, 0.3)[:, None],
        ),
        (r'.*/position_embedding/embedding', lambda inputs: 0.1),
    ),
}


def make(
    folder: str | Path,
    family: str,
    *,
    seed: int = 0,
    dtype: str = 'float32',
    vae_steps: int = make_vae.STEPS,
):
    """Writes a whole pipeline; the folder is filled only when all of it is made.

    Args:
      folder: where to; it must not hold a pipeline yet.
      family: one of FAMILIES.
      seed: of all weights.
      dtype: of the files: one of DTYPES.
      vae_steps: of the training of the tiny VAE.

    Raises:
      UserError: for an unknown family or dtype, and a folder that holds a pipeline or cannot be
        written.
    """
    for name, value, known in (('family', family, FAMILIES), ('dtype', dtype, DTYPES)):
        if value not in known:
            raise UserError(f'--{name}={value!r} is unknown: choose from {", ".join(known)}')
    folder = writable('--out', folder)
    found = [name for name in (*PARTS, 'tokenizer', 'model_index.json') if (folder / name).exists()]
    if found:
        raise UserError(
            f'--out={str(folder)!r} holds {found[0]} already: remove it or choose another folder'
        )
    with tempfile.TemporaryDirectory(dir=folder, prefix='.making_') as place:
        place = Path(place)
        tree = copy.deepcopy(FAMILIES[family])
        config = tree['text_encoder']
        size = write_tokenizer(place / 'tokenizer', config.get('vocab_size'))
        if family == 'tiny':
            ids = dict(bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1)
            config |= dict(ids, vocab_size=size)
        config['torch_dtype'] = dtype
        rules = TINY_RULES if family == 'tiny' else {}
        for i, (part, config) in enumerate(tree.items()):
            rng = np.random.default_rng((seed, i))
            arguments = getattr(options, part)(f'{part}/config.json', config)
            module = draw(PARTS[part].module, arguments, rules.get(part, ()) + RULES, rng)
            if family == 'tiny' and part == 'vae':
                module = make_vae.train(module, vae_steps, seed)
            write_json(place / part / 'config.json', config)
            module = cast(module, dtype)
            weights.save(module, place / part / f'{PARTS[part].stems[0]}.safetensors')
            logging.info('%s: %.1f million parameters', part, count(module) / 1e6)
            del module
        # In a short training v is learned better than epsilon.
        predicted = {'prediction_type': 'v_prediction'} if family == 'tiny' else {}
        write_json(place / 'scheduler/scheduler_config.json', SCHEDULER | predicted)
        write_json(place / 'model_index.json', INDEX)
        for path in sorted(place.iterdir()):
            path.rename(folder / path.name)


def describe(folder: Path, family: str):
    """Writes what says the sizes of a family's networks, and no weights: enough for shapes."""
    for part, tree in FAMILIES[family].items():
        write_json(folder / part / 'config.json', tree)
    write_json(folder / 'scheduler/scheduler_config.json', SCHEDULER)


def write_json(path: Path, tree: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=2, sort_keys=True) + '\n')


def draw(module: type, arguments: dict, rules: Rules, rng: np.random.Generator) -> nnx.Module:
    """A network with normal weights as the rules say; scales are one, biases zero.

    Drawn by NumPy: the initialisers of flax compile a program for each shape.
    """
    graphdef, params = nnx.split(weights.abstract(module, **arguments), nnx.Param)

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        for pattern, deviation in rules:
            if re.fullmatch(pattern, name):
                x = rng.standard_normal(leaf.shape, np.float32)
                x *= np.asarray(deviation(math.prod(leaf.shape[:-1])), np.float32)
                return x
        return np.full(leaf.shape, name.endswith('/scale'), np.float32)

    params = jax.tree_util.tree_map_with_path(one, nnx.to_pure_dict(params))
    return nnx.merge(graphdef, params)


def cast(module: nnx.Module, dtype: str) -> nnx.Module:
    graphdef, params = nnx.split(module, nnx.Param)
    params = jax.tree.map(lambda x: np.asarray(x).astype(dtype, copy=False), params)
    return nnx.merge(graphdef, params)


def count(module: nnx.Module) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(module, nnx.Param)))


def write_tokenizer(folder: Path, size: int | None) -> int:
    """Byte-level pair encoding in which each word of a moving digits' caption is one token.

    START and END are the last two of `size` tokens (what lies before them is never drawn), or
    follow the others where it is None. Returns the size.
    """
    source = MovingDigits('train', frames=1)
    captions = {source[i]['caption'] for i in range(CLIPS_READ)}
    learnt = Tokenizer(models.BPE(end_of_word_suffix='</w>'))
    learnt.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=10**6, min_frequency=1, end_of_word_suffix='</w>', show_progress=False
    )
    learnt.train_from_iterator(sorted(captions), trainer)
    merges = json.loads(learnt.to_str())['model']['merges']
    letters = byte_letters()
    words = [*letters, *(f'{letter}</w>' for letter in letters), *map(''.join, merges)]
    size = size or len(words) + 2
    ids = {word: i for i, word in enumerate(words)} | {START: size - 2, END: size - 1}
    write_json(
        folder / 'tokenizer_config.json',
        dict(
            tokenizer_class='CLIPTokenizer',
            model_max_length=77,
            bos_token=START,
            eos_token=END,
            pad_token=END,
            unk_token=END,
        ),
    )
    (folder / 'vocab.json').write_text(json.dumps(ids))
    lines = ['#version: 0.2', *map(' '.join, merges)]
    (folder / 'merges.txt').write_text('\n'.join(lines) + '\n')
    return size


def byte_letters() -> list[str]:
    """The letters that CLIP's vocabulary writes the 256 bytes with: themselves where they print."""
    printing = [*range(ord('!'), ord('~') + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printing] + [chr(256 + i) for i in range(256 - len(printing))]


def main():
    # Defined here, so that other scripts can import `make` beside flags of their own.
    out = flags.DEFINE_string('out', None, 'Folder to write')
    family = flags.DEFINE_string('family', None, f'One of: {", ".join(FAMILIES)}')
    seed = flags.DEFINE_integer('seed', 0, 'Of all weights')
    dtype = flags.DEFINE_string('dtype', 'float32', f'Of the files: {", ".join(DTYPES)}')

    def run():
        for flag in (out, family):
            if not flag.value:
                raise UserError(f'--{flag.name} is missing: for example --out=DIR --family=tiny')
        make(out.value, family.value, seed=seed.value, dtype=dtype.value)
        logging.info('%s: %s is ready', family.value, out.value)

    cli.run(run)


if __name__ == '__main__':
    main()
