"""Imports networks of the CMD authors, or a DiT for the content frames, into a run.

    python -m cmd_jax.interop --workdir=runs/imported --class_names=names.txt \\
        --autoencoder=autoenc.pt --content=content.pt --motion=motion.pt

Of files with the names of the authors' networks (.safetensors, or .pt where PyTorch is installed)
it makes a run that sample.py samples from. The command that trains a stage on is told at the end;
for that, --class_names must be the names of the classes of --config.data.
"""

import shlex
import sys

from absl import flags, logging
from ml_collections import config_flags

from cmd_jax import cli
from cmd_jax.errors import UserError

DEFAULT = 'configs/ucf101.py:all'

CONFIG = config_flags.DEFINE_config_file(
    'config', None, f"Of the run; the networks' own sizes replace its; default {DEFAULT}"
)
WORKDIR = flags.DEFINE_string('workdir', None, 'The run to write')
AUTOENCODER = flags.DEFINE_string('autoencoder', None, "The authors' autoencoder")
CONTENT = flags.DEFINE_string('content', None, "The authors' content network, or a DiT")
MOTION = flags.DEFINE_string('motion', None, "The authors' motion network")
CLASS_NAMES = flags.DEFINE_string('class_names', None, 'A text file: the name of a class a line')


def main():
    if not WORKDIR.value:
        raise UserError('--workdir is missing: for example --workdir=runs/imported')
    from cmd_jax.interop import runs

    tree = CONFIG.value.to_dict()
    files = {
        'autoencoder': AUTOENCODER.value,
        'content': CONTENT.value,
        'motion': MOTION.value,
    }
    config = runs.import_run(WORKDIR.value, tree, **files, class_names=CLASS_NAMES.value)
    path, _, options = config_flags.get_config_filename(flags.FLAGS['config']).partition(':')
    given = config_flags.get_override_values(flags.FLAGS['config'])
    for stage, file in files.items():
        if not file:
            continue
        # As the shell was told, but for another stage of the config.
        arg = runs.of_stage(options, stage)
        changed = given | runs.changes(stage, tree, config)
        command = [
            *('python', 'train.py', f'--config={path}:{arg}', f'--workdir={WORKDIR.value}'),
            *(f'--config.{field}={value}' for field, value in changed.items()),
            '--force_config',
        ]
        logging.info('to train on: %s', shlex.join(command))


if __name__ == '__main__':
    # Said on the command line, the default is told of in errors like any other config.
    if not any(arg.partition('=')[0] == '--config' for arg in sys.argv):
        sys.argv.insert(1, f'--config={DEFAULT}')
    cli.run(main)
