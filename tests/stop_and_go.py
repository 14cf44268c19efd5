"""One process of the resume test: `python -m tests.stop_and_go WORKDIR STAGE STOP`.

Trains a stage (or 'all') of the tiny run. With STOP > 0, Ctrl-C comes during that step.
"""

import os
import signal
import sys

from cmd_jax.errors import Interrupted
from cmd_jax.training import loop
from tests import tiny


def main(workdir: str, stage: str, stop: str):
    check = loop.check_finite

    def interrupt(name, settings, step, scalars):
        check(name, settings, step, scalars)
        if step == int(stop) - 1:  # the loop checks a step while the next one runs
            os.kill(os.getpid(), signal.SIGINT)

    loop.check_finite = interrupt
    try:
        loop.train(tiny.config(stage), workdir)
    except Interrupted as e:
        print(e)


if __name__ == '__main__':
    main(*sys.argv[1:])
