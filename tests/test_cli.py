"""Flags of scripts."""

from absl import flags

from cmd_jax import cli


def test_home_folders(monkeypatch):
    values = flags.FlagValues()
    for name in ('out', 'data', 'prompt'):
        flags.DEFINE_string(name, None, '', flag_values=values)
    monkeypatch.setattr(flags, 'FLAGS', values)
    monkeypatch.setenv('HOME', '/home/ada')
    rest = cli.parse(['x', '--out=~', '--data=folder:~/videos', '--prompt=~5 dogs', '~/this'])
    assert (values.out, values.data) == ('/home/ada', 'folder:/home/ada/videos')
    assert values.prompt == '~5 dogs' and rest == ['x', '~/this']
