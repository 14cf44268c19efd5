"""Your own videos: a folder of files, with a sub-folder per class or without classes.

    python train.py --config=configs/folder.py:all --workdir=runs/mine \\
        --config.data.source=folder:DIR
    python sample.py --workdir=runs/mine --num_videos=8

16 frames of 64 x 64, every second frame of the file; diffusion networks of size B.
For another size set data.height and data.width (multiples of 8) and data.frames (even).
On four TPU v5e chips all three stages, 100,000 steps each, would take four hours together at 40 %
of their peak, and at most 2.6 GiB of a chip's memory (--compile_for=v5e:2x2).
`:tiny` runs all stages on a CPU in about a minute, to see that the videos are read.
"""

from configs import common


def get_config(arg: str = 'all'):
    config = common.base()
    config['data'].update(stride=2, flip=True, short='loop', workers=4)
    config['autoencoder']['model'].update(dim=256, depth=6, patch=4)
    config['autoencoder']['train'].update(
        learning_rate=1e-4, b1=0.9, b2=0.99, clip_norm=1.0, warmup_steps=1000, ema_decay=0.999
    )
    for stage in ('content', 'motion'):
        config[stage]['model'].update(common.SIZES['B'])
        config[stage]['train'].update(batch_size=64, warmup_steps=1000, clip_norm=1.0)
    config['content']['model']['patch'] = 4
    return common.finish(config, arg)
