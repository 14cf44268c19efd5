"""`python -m tests.chaos.child PIPE [flags of train.py]`: train.py, telling a pipe what it does.

A line is `TIME +PHASE`, `TIME -PHASE`, `TIME step N`, `TIME sealed N` or `TIME restored N`.
"""

import functools
import os
import runpy
import sys
import time


def main():
    pipe = int(sys.argv.pop(1))
    os.set_inheritable(pipe, False)  # it closes with this process, whatever lives on

    def tell(what: str):
        os.write(pipe, f'{time.monotonic():.6f} {what}\n'.encode())

    def hook(owner, name: str, before=None, after=None):
        """Tells `before(*args)` and, of what comes back, `after(result, *args)`."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def call(*args, **kwargs):
            if before:
                tell(before(*args))
            result = original(*args, **kwargs)
            if after:
                tell(after(result, *args))
            return result

        setattr(owner, name, call)

    def phase(owner, name: str, phase: str):
        hook(owner, name, lambda *_: f'+{phase}', lambda *_: f'-{phase}')

    from cmd_jax.training import integrity, loop, metrics, previews
    from cmd_jax.training.checkpoint import Checkpoints

    phase(loop, 'train_stage', 'stage')
    phase(integrity, 'fault', 'verify')
    phase(Checkpoints, 'restore', 'restore')
    hook(Checkpoints, 'restore', after=lambda out, *_: f'restored {int(out[0].step)}')
    hook(metrics.Metrics, '__init__', after=lambda *_: '+train')
    hook(metrics.Metrics, 'write', after=lambda out, self, step, *_: f'step {step}')
    phase(previews, 'write', 'preview')
    hook(integrity, 'begin', before=lambda *_: '+save')
    hook(integrity, 'seal', before=lambda *_: '-save')
    phase(integrity, 'seal', 'seal')
    hook(integrity, 'end', after=lambda out, folder: f'sealed {folder.name}')
    phase(Checkpoints, '_delete_old', 'delete')
    sys.argv[0] = 'train.py'
    runpy.run_path('train.py', run_name='__main__')


if __name__ == '__main__':
    main()
