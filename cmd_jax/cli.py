"""What the scripts share: flags, and how errors reach the user.

A mistake of the user's is one line on stderr and exit code 2; Ctrl-C is exit code 130, SIGTERM and
a preemption notice 75 (the same command goes on); anything else keeps its traceback. Of several
processes, one that fails ends the others.
"""

import contextlib
import difflib
import logging as stdlogging
import os
import re
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Callable

from absl import app, flags, logging

from cmd_jax.errors import Interrupted, UserError
from cmd_jax.parallel import coordination, distributed, preemption, xla_flags

# The flags below are the scripts': their --help tells them.
flags.disclaim_key_flags()


def run(main: Callable[[], None]):
    """Runs a script's `main()` with parsed flags."""

    def guarded(argv):
        if argv[1:]:
            fail(f'unexpected argument {argv[1]!r}: flags begin with --')
        logging.set_verbosity(logging.INFO)
        # Orbax tells of every file that it writes.
        logging.get_absl_logger().addFilter(
            lambda r: 'orbax' not in r.pathname or r.levelno > stdlogging.WARNING
        )
        preemption.install()
        try:
            # To compile for other machines is the work of one process.
            if not getattr(flags.FLAGS, 'compile_for', None):
                _start()
            main()
            coordination.finish()
        except UserError as e:
            fail(str(e))
        except (KeyboardInterrupt, Interrupted) as e:
            if threading.current_thread() is threading.main_thread():
                # Another one would break what follows, which takes seconds.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            _say(f'interrupted: {e}' if str(e) else 'interrupted')
            if isinstance(e, Interrupted):
                # All processes have agreed to stop.
                coordination.finish()
                sys.exit(e.code)
            _end(130, 'interrupted')
        except Exception as e:
            if coordination.watch() is None:
                raise
            # Leaving as usual would wait for the others, which wait for this one.
            with contextlib.suppress(OSError):  # nobody listens any more
                traceback.print_exc()
            _end(1, traceback.format_exception_only(e)[-1].strip().splitlines()[0][:300])

    app.run(guarded, flags_parser=parse)


def only_with(name: str, *others: str):
    """Raises UserError where others of the script's flags are given without this one, or this one
    without a value."""
    flag = flags.FLAGS[name]
    if flag.present and not flag.value:
        raise UserError(f'--{name} is empty: name something, or leave it out')
    given = [other for other in others if flags.FLAGS[other].present]
    if given and not flag.present:
        raise UserError(f'--{given[0]} needs --{name}: give it, or leave --{given[0]} out')


def distributed_flags():
    """Defines the flags of scripts that can run in several processes; `run` starts these.

    To be called before `run`.
    """
    flags.DEFINE_enum(
        'distributed',
        'auto',
        distributed.MODES,
        'Several processes: off, on, or auto: on where the environment shows more than one (srun, '
        'mpirun, a Cloud TPU pod) or --coordinator_address, --process_count or --process_id is '
        'given',
    )
    flags.DEFINE_string('coordinator_address', None, 'HOST:PORT of process 0')
    flags.DEFINE_integer('process_count', None, 'Processes in all')
    flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0')
    flags.DEFINE_float('startup_timeout', 300.0, 'Seconds that all processes have to appear')
    compilation_cache_flag()


def compilation_cache_flag():
    """Defines the flag of scripts that compile; to be called before `run`."""
    flags.DEFINE_string(
        'compilation_cache',
        None,
        'Folder of compiled programs; none if empty (default: ~/.cache/cmd_jax/compiled)',
    )


def _start():
    f = flags.FLAGS
    xla_flags.set_options()
    if 'distributed' in f:
        distributed.start(
            *(f.distributed, f.coordinator_address, f.process_count, f.process_id),
            f.startup_timeout,
        )
    elif sign := distributed.launched():
        raise UserError(
            f'{sign}: {os.path.basename(sys.argv[0])} runs in one process, on all devices of its '
            'host, and others would do the same work: start one'
        )
    if 'compilation_cache' in f:
        distributed.cache_compiled(f.compilation_cache)


def parse(argv: list[str]) -> list[str]:
    """absl's flag parser, with the errors of flags and config files in one line."""
    # Shells expand ~ at the beginning of a word only.
    home = os.path.expanduser('~')
    argv = [re.sub(r'^(--[\w.]+=(?:\w+:)?)~(?=/|$)', lambda m: m[1] + home, a) for a in argv]
    try:
        rest = flags.FLAGS(argv)
        # A config file that is not there is told of only when the config is looked at.
        if 'config' in flags.FLAGS and flags.FLAGS.config is not None:
            flags.FLAGS.config.to_dict()
        return rest
    except flags.Error as e:
        # An error inside a config file comes with its traceback: its last line says what is wrong.
        message = str(e).strip()
        if 'whilst parsing config file' in message:
            message = message.splitlines()[-1].split(': ', 1)[-1]
        fail(message)
    except UserError as e:
        fail(str(e))
    except OSError as e:
        name = e.filename or str(e).split(': ')[-1]
        fail(f'--config: {e.strerror or "no such file"}: {name}')
    except (AttributeError, KeyError):
        # ml_collections names only the part of the path that it missed.
        unknown = unknown_field(argv)
        if unknown is None:
            raise
        fail(unknown)


def unknown_field(argv: list[str]) -> str | None:
    """Which --config.FIELD of the command line does not exist, and the nearest that does."""
    # absl takes one dash for two.
    argv = [f'--{a.lstrip("-")}' if a.startswith('-') else a for a in argv]
    words = [part for a in argv for part in a.split('=', 1)]
    path, _, arg = words[words.index('--config') + 1].partition(':')
    config = runpy.run_path(path)['get_config'](*([arg] if arg else []))
    fields = list(flat(config.to_dict()))
    for a in argv:
        name = a.partition('=')[0].removeprefix('--config.')
        if a.startswith('--config.') and name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)[0]
            return f'unknown config field {name}: did you mean {near}?'
    return None


def flat(tree: dict, path: str = ''):
    """Paths of a nested dict's leaves."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f'{path}{name}.')
        else:
            yield f'{path}{name}'


def fail(message: str):
    _say(f'error: {message}')
    _end(2, message)


def _say(line: str):
    index = coordination.place()[0]
    with contextlib.suppress(OSError):  # nobody listens any more
        print(f'[process {index}] {line}' if index else line, file=sys.stderr, flush=True)


def _end(code: int, reason: str):
    if coordination.watch() is not None:
        coordination.end(code, reason)
    sys.exit(code)
