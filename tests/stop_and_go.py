"""One process of the resume test: `python -m tests.stop_and_go WORKDIR STAGE STOP`.

Trains a stage (or 'all') of the tiny run. With STOP > 0, Ctrl-C comes during that step.
"""

import itertools
import os
import signal
import sys

from cmd_jax.errors import Interrupted
from cmd_jax.parallel.preemption import Deferred
from cmd_jax.training import loop
from tests import tiny


def main(workdir: str, stage: str, stop: str):
    reached, steps = Deferred.reached, itertools.count(1)

    def interrupt(deferred):  # asked once a step
        if next(steps) == int(stop):
            os.kill(os.getpid(), signal.SIGINT)
        return reached(deferred)

    Deferred.reached = interrupt
    try:
        loop.train(tiny.config(stage), workdir)
    except Interrupted as e:
        print(e)


if __name__ == '__main__':
    main(*sys.argv[1:])
