"""The smallest run of all three stages, for tests."""

import importlib

from cmd_jax.training import config as configs


def shipped(name: str, arg: str = 'all') -> dict:
    """A config of configs/ as a nested dict."""
    return importlib.import_module(f'configs.{name}').get_config(arg).to_dict()


def tree(stage='all', name='quickstart', **data) -> dict:
    """The config of a run of seconds, as a nested dict."""
    tree = shipped(name, f'{stage},tiny')
    tree['data'].update(dict(frames=4, height=16, width=16) | data)
    tree['autoencoder']['model'].update(patch=4, dim=16, depth=1, heads=2)
    for part in ('content', 'motion'):
        tree[part]['model'].update(dim=16, depth=1, heads=2)
        tree[part]['sampling']['steps'] = 2
    for part in configs.STAGES:
        tree[part]['train'].update(steps=6, log_every=1, save_every=100, warmup_steps=2)
    return tree


def config(stage='all', name='quickstart', **data) -> configs.Config:
    """The same, parsed."""
    return configs.parse(tree(stage, name, **data))


def text_tree(folder, stage='all', **changes) -> dict:
    """The config of a run of seconds on 16 x 24 pixels, 4 x 6 latents, as a nested dict."""
    tree = shipped('text_to_video', f'{stage},tiny')
    tree['data'].update(frames=4, height=16, width=24)
    tree['stable_diffusion'].update(source=str(folder), frames_at_once=3)
    tree['autoencoder']['model'].update(dim=16, depth=1, heads=2)
    tree['motion']['model'].update(dim=16, depth=1, heads=2)
    tree['motion']['statistics_clips'] = 16
    for part in configs.STAGES:
        tree[part]['train'].update(batch_size=8, steps=4, log_every=1, warmup_steps=2)
    for part in ('content', 'motion'):
        tree[part]['sampling']['steps'] = 2
    return changed(tree, **changes)


def changed(tree: dict, **changes) -> dict:
    """With part__section__name=value set."""
    for path, value in changes.items():
        *sections, name = path.split('__')
        section = tree
        for word in sections:
            section = section[word]
        section[name] = value
    return tree
