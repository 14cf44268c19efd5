"""What the configs share: the usual value of every field (cmd_jax/training/config.py says what
each means), and the parsing of their argument."""

import ml_collections

from cmd_jax.errors import UserError
from cmd_jax.models.dit import SIZES

STAGES = ('autoencoder', 'content', 'motion', 'all')


def sampling(**changes) -> dict:
    """How a stage is sampled, with the fields named changed."""
    return (
        dict(
            sampler='ddim',
            steps=50,
            spacing='',
            guidance=4.0,
            guidance_rescale=0.0,
            guidance_start=0.0,
            guidance_end=1.0,
        )
        | changes
    )


def train(**kwargs) -> dict:
    """Optimisation of one stage: Adam at a constant rate, the paper's habit."""
    return (
        dict(
            batch_size=256,
            steps=100_000,
            device_batch=0,
            learning_rate=1e-4,
            schedule='constant',
            warmup_steps=0,
            b1=0.9,
            b2=0.999,
            weight_decay=0.0,
            clip_norm=0.0,
            ema_decay=0.999,
            precision='auto',
            log_every=50,
            save_every=2_000,
            keep_checkpoints=2,
            keep_every=0,
            preview_every=5_000,
            test_clips=0,
            max_nonfinite=10,
        )
        | kwargs
    )


def base() -> dict:
    """The paper's UCF-101 setting; a config changes what differs."""
    return dict(
        stage='all',
        seed=0,
        tensorboard=True,
        condition='class',
        data=dict(
            source='folder:',
            frames=16,
            height=64,
            width=64,
            stride=1,
            fps=0.0,
            clips='random',
            crop='random',
            flip=False,
            short='skip',
            fold=1,
            test_fraction=0.1,
            probe=True,
            max_bad=0.5,
            timeout=30.0,
            workers=8,
        ),
        stable_diffusion=dict(source='', posterior='mean', frames_at_once=8),
        mesh=dict(data=-1, fsdp=-1, tensor=-1),
        autoencoder=dict(
            model=dict(
                patch=2,
                dim=384,
                depth=8,
                heads=8,
                head_dim=0,
                motion_channels=8,
                position='rotary',
                output='sigmoid',
                content_frame='weighted',
                remat='attention',
            ),
            loss=dict(l1_weight=4.0, l2_weight=0.0, lpips_weight=4.0),
            train=train(batch_size=24, learning_rate=1e-5, b1=0.5, b2=0.9),
        ),
        content=dict(
            start='',
            model=dict(patch=2, **SIZES['L'], rotary=False, remat='attention'),
            process=dict(schedule='linear', prediction='epsilon', learn_sigma=True),
            loss=dict(label_drop=0.1, min_snr=0.0),
            sampling=sampling(),
            train=train(),
        ),
        motion=dict(
            text_encoder='',
            model=dict(patch=2, content_patch=4, **SIZES['L'], rotary=False, remat='attention'),
            process=dict(schedule='linear', prediction='epsilon', learn_sigma=True),
            loss=dict(label_drop=0.1, min_snr=0.0),
            sampling=sampling(steps=100),
            content_noise=0.0,
            statistics_clips=4096,
            train=train(clip_norm=1.0),
        ),
    )


def tiny(config: dict):
    """Shrinks a config so that all stages run end to end on a CPU in about a minute."""
    config['tensorboard'] = False
    config['data'].update(frames=8, height=32, width=32, workers=0)
    config['autoencoder']['model'].update(patch=4, dim=64, depth=2, heads=2, head_dim=0)
    config['content']['model'].update(patch=4, dim=64, depth=2, heads=2)
    config['motion']['model'].update(patch=2, content_patch=8, dim=64, depth=2, heads=2)
    config['motion']['statistics_clips'] = 32
    for stage in ('content', 'motion'):
        config[stage]['sampling']['steps'] = 10
    config['autoencoder']['loss'].update(lpips_weight=0.0)
    for stage in ('autoencoder', 'content', 'motion'):
        config[stage]['model']['remat'] = 'none'
        config[stage]['train'].update(
            batch_size=8,
            steps=30,
            warmup_steps=5,
            learning_rate=1e-3,
            log_every=10,
            save_every=1000,
        )


def finish(config: dict, arg: str, shrink=tiny) -> ml_collections.ConfigDict:
    """The config for an argument 'STAGE[,tiny]', locked; `shrink` makes a config tiny."""
    stage, *options = arg.split(',')
    if stage not in STAGES:
        raise UserError(f'unknown stage {stage!r} in the config: choose one of {", ".join(STAGES)}')
    for option in options:
        if option != 'tiny':
            raise UserError(f'unknown option {option!r} in the config: the only one is tiny')
        shrink(config)
    config['stage'] = stage
    return ml_collections.ConfigDict(config).lock()
