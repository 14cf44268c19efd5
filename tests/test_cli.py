"""Flags of scripts, and those of XLA."""

import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
from absl import flags

from cmd_jax import cli
from cmd_jax.parallel import xla_flags


def test_home_folders(monkeypatch):
    values = flags.FlagValues()
    for name in ('out', 'data', 'prompt'):
        flags.DEFINE_string(name, None, '', flag_values=values)
    monkeypatch.setattr(flags, 'FLAGS', values)
    monkeypatch.setenv('HOME', '/home/ada')
    rest = cli.parse(['x', '--out=~', '--data=folder:~/videos', '--prompt=~5 dogs', '~/this'])
    assert (values.out, values.data) == ('/home/ada', 'folder:/home/ada/videos')
    assert values.prompt == '~5 dogs' and rest == ['x', '~/this']


def test_help_tells_all_flags():
    """Those that scripts share too, which are defined elsewhere."""
    root = pathlib.Path(__file__).parents[1]
    command = [sys.executable, 'train.py', '--help']
    told = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100).stdout
    for name in ('workdir', 'distributed', 'coordinator_address', 'compilation_cache'):
        assert f'  --{name}:' in told, told


def test_options_of_xla_are_added_unless_the_user_has_some():
    added = xla_flags.add('--xla_dump_to=x')
    assert added.startswith('--xla_dump_to=x --xla_backend_extra_options=xla_cpu_')
    assert xla_flags.add(added) == added
    theirs = '--xla_backend_extra_options=xla_cpu_enable_xprof_traceme'
    assert xla_flags.add(theirs) == theirs


def test_results_of_the_same_arrays_are_one_kernel():
    """XLA ignores options that it does not know: one that it renames would go unnoticed."""
    update = jax.jit(lambda x, g: (x - g, 0.9 * x + g))
    x = jnp.ones([64, 64])
    entry = update.lower(x, x).compile().as_text().split('ENTRY')[1]
    assert len(re.findall(r'\bfusion\(', entry)) == 1
