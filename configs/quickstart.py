"""Moving handwritten digits, 8 x 32 x 32: all three stages on two CPU cores in 8 to 13 minutes.

    make quickstart

trains with this config and measures; docs/quickstart.md has the numbers: 27.5 to 27.8 dB PSNR, 98 %
of the generated videos show the digit asked for, and they move 0.78 times as far as real ones.

Departs from the paper where a short training on a CPU needs it: v-prediction on a cosine schedule
without learned sigma, rotary positions in the transformers, noise on the motion stage's content
frames, l2 loss, larger learning rates.
"""

from configs import common


def train(**kwargs):
    return (
        common.train(
            batch_size=16,
            learning_rate=2e-3,
            schedule='cosine',
            warmup_steps=100,
            b2=0.99,
            clip_norm=1.0,
            ema_decay=0.995,
            save_every=1000,
            preview_every=0,
        )
        | kwargs
    )


def get_config(arg: str = 'all'):
    config = common.base()
    config['tensorboard'] = False
    config['data'].update(source='moving_digits', frames=8, height=32, width=32, workers=0)
    config['autoencoder'].update(
        model=config['autoencoder']['model']
        | dict(patch=8, dim=128, depth=2, heads=4, motion_channels=4, remat='none'),
        loss=dict(l1_weight=0.0, l2_weight=1.0, lpips_weight=0.0),
        train=train(steps=550),
    )
    process = dict(schedule='cosine', prediction='v', learn_sigma=False)
    network = dict(dim=128, depth=4, heads=4, rotary=True, remat='none')
    config['content'].update(
        model=dict(patch=4) | network,
        process=process,
        sampling=common.sampling(guidance=4.0),
        train=train(steps=4300),
    )
    config['motion'].update(
        model=dict(patch=1, content_patch=8) | network,
        process=process,
        sampling=common.sampling(guidance=1.5),
        content_noise=0.5,
        statistics_clips=512,
        train=train(steps=1700),
    )
    return common.finish(config, arg)
