"""Trains one stage, or all, of a CMD video generator.

    python train.py --config=configs/quickstart.py:all --workdir=runs/quickstart
    python train.py --config=configs/folder.py:all --workdir=runs/mine \\
        --config.data.source=folder:DIR

Any field of the config can be set, as in the second command.
"""

from absl import flags
from ml_collections import config_flags

from cmd_jax import cli
from cmd_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file('config', None, 'configs/NAME.py:STAGE[,tiny]')
WORKDIR = flags.DEFINE_string('workdir', None, 'The run: configs, checkpoints, previews, metrics')
FORCE = flags.DEFINE_bool('force_config', False, 'Go on although the config has changed')
PROFILE = flags.DEFINE_bool('profile', False, 'Write a profiler trace of five steps of each stage')
DUMP_HLO = flags.DEFINE_bool('dump_hlo', False, 'Write the compiled step of each stage as text')

COMPILE_FOR = flags.DEFINE_list(
    'compile_for',
    None,
    'Only compile, for TPU slices such as v5e:8x8,v5p:4x4x4, and tell what training costs there',
)
LARGEST_BATCH = flags.DEFINE_bool(
    'largest_batch', False, 'With --compile_for: look for the largest batch that fits, too'
)
COMPILER_SEARCH = flags.DEFINE_bool(
    'compiler_search', False, 'With --compile_for: with the search for the fastest program'
)
COMPILE_REPORT = flags.DEFINE_string('compile_report', None, 'With --compile_for: a JSON file')

cli.distributed_flags()


def main():
    cli.only_with('compile_for', 'largest_batch', 'compiler_search', 'compile_report')
    if CONFIG.value is None:
        raise UserError('--config is missing: for example --config=configs/quickstart.py:all')
    from cmd_jax.training import config, loop

    if COMPILE_FOR.value:
        from cmd_jax.training import compile_for

        compile_for.run(
            config.parse(CONFIG.value.to_dict()),
            COMPILE_FOR.value,
            largest=LARGEST_BATCH.value,
            search=COMPILER_SEARCH.value,
            out=COMPILE_REPORT.value,
        )
        return
    if not WORKDIR.value:
        raise UserError('--workdir is missing: for example --workdir=runs/quickstart')
    loop.train(
        config.parse(CONFIG.value.to_dict()),
        WORKDIR.value,
        force_config=FORCE.value,
        profile=PROFILE.value,
        dump_hlo=DUMP_HLO.value,
    )


if __name__ == '__main__':
    cli.run(main)
