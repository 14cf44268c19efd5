"""Encodes a data set once, for the content and motion stages to train on.

    python -m cmd_jax.data.latents --workdir=RUN --data=folder:DIR --out=DIR

encodes both splits of a data set with the trained autoencoder of a run (and, in latent mode and
with text, with Stable Diffusion's VAE and text encoders), on all devices. The content and motion
stages then train with --config.data.source=latents:DIR. Given again, the command goes on where it
stopped. Several processes (--distributed) write shards of their own: choose --shard_clips so that
each has some. `latent_records` describes what is written.
"""

from absl import flags

from cmd_jax import cli
from cmd_jax.data.clip_options import CROPS, PLACES, SHORT
from cmd_jax.data.latent_records import DTYPES
from cmd_jax.errors import UserError


def main():
    """Makes a cache."""
    from cmd_jax.training import latent_cache

    given = flags.FLAGS.flag_values_dict()
    for name in ('workdir', 'out'):
        if not given[name]:
            raise UserError(f'--{name} is missing: see --help')
    data = {
        name: given[flag] for name, flag in latent_cache.FIELDS.items() if given[flag] is not None
    }
    options = ('clips_per_video', 'limit', 'dtype', 'batch_size', 'shard_clips', 'seed')
    latent_cache.write(
        given['workdir'],
        given['out'],
        data,
        **{name: given[name] for name in options},
        stable_diffusion=given['stable_diffusion'],
        text_encoder=given['text_encoder'],
    )


def define_flags():
    usual = "the run's own if not given"
    flags.DEFINE_string('workdir', None, 'A run with a trained autoencoder.')
    flags.DEFINE_string('data', None, f'KIND:WHERE as in --config.data.source; {usual}.')
    flags.DEFINE_string('out', None, 'The folder to write.')
    flags.DEFINE_integer('stride', None, f'As --config.data.stride; {usual}.', 1)
    flags.DEFINE_float('fps', None, f'As --config.data.fps; {usual}.', 0)
    flags.DEFINE_enum('clips', None, PLACES, f'As --config.data.clips; {usual}.')
    flags.DEFINE_enum('crop', None, CROPS, f'As --config.data.crop; {usual}.')
    flags.DEFINE_bool('flip', None, f'As --config.data.flip; {usual}.')
    flags.DEFINE_enum('short', None, SHORT, f'As --config.data.short; {usual}.')
    flags.DEFINE_integer('fold', None, f'As --config.data.fold; {usual}.', 1, 3)
    flags.DEFINE_float('test_fraction', None, f'As --config.data.test_fraction; {usual}.', 0, 1)
    flags.DEFINE_bool('probe', None, f'As --config.data.probe; {usual}.')
    flags.DEFINE_float('max_bad', None, f'As --config.data.max_bad; {usual}.', 0, 1)
    flags.DEFINE_float('timeout', None, f'As --config.data.timeout; {usual}.', 0)
    flags.DEFINE_integer('workers', None, f'As --config.data.workers; {usual}.', 0)
    flags.DEFINE_integer(
        'clips_per_video', 1, 'Times that the training split is gone through, by chance.', 1
    )
    flags.DEFINE_integer('limit', 0, 'At most so many clips of a split; 0: all.', 0)
    flags.DEFINE_enum('dtype', 'float32', DTYPES, 'What arrays are stored in.')
    flags.DEFINE_integer('batch_size', 32, 'Clips at a time in a process.', 1)
    flags.DEFINE_integer('shard_clips', 1024, 'Clips in a file.', 1)
    flags.DEFINE_integer('seed', 0, 'Of random places, crops and flips.', 0)
    flags.DEFINE_string(
        'stable_diffusion', None, 'Where the pretrained image model is now, if it has moved.'
    )
    flags.DEFINE_string(
        'text_encoder', None, "Where the motion stage's own text encoder is now, if it has moved."
    )


if __name__ == '__main__':
    define_flags()
    cli.distributed_flags()
    cli.run(main)
