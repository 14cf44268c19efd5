"""Text-to-video on Stable Diffusion: the paper's WebVid settings.

    python train.py --config=configs/text_to_video.py:sd21,autoencoder \\
        --config.data.source=folder:DIR --workdir=runs/t2v

`sd21` is 16 x 512 x 1024 with Stable Diffusion 2.1-base, `sd15` 16 x 512 x 512 with 1.5. DIR holds
videos and their captions: captions.csv with the columns path and caption, or a .txt beside each
video; docs/data.md tells of tables of videos, and of caches that spare the later stages much work.
With `autoencoder` done, `content` and `motion` can be trained at the same time on two
machines. The models are downloaded on first use; --config.stable_diffusion.source=FOLDER takes a
local one. All stages of `sd15` where none is named.

    stage        network                                        batch  Adam
    autoencoder  dim 384, depth 8 + 8, patch 2, D 8, on latents    24  1e-5, b 0.5 / 0.9; l2
    content      the U-Net, all of it (859.5 M, 865.9 M)          256  1e-4, EMA 0.999
    motion       DiT-XL/2, content patch 4 (sd21: 8)              256  1e-4, clip 1, EMA 0.999

The U-Net takes 4 images (sd21: 2) on a device at a time, `content.train.device_batch`; with more
memory, more are faster. Guidance 7.5, 50 and 100 DDIM steps. The paper trains the diffusion stages
for 3 epochs of WebVid-10M (125,000 steps) and does not give the autoencoder's steps; 500,000 are
our choice. Its results: FVD 238 and CLIPSIM 0.302 on WebVid-10M (sd21), FVD 504 zero-shot on
UCF-101 (sd15). WebVid is gone, and we have not trained this to the end; so many steps would take
the stages of sd21 33, 80 and 73 hours on 64 TPU v5e chips at 40 % of their peak (docs/pods.md). The
motion stage's text encoder is that of Stable Diffusion 2.1, OpenCLIP ViT-H/14 without its last
layer, where the paper has all of it: --config.motion.text_encoder=FOLDER.

    python -m cmd_jax.stable_diffusion.make --family=tiny --out=runs/tiny_sd
    python train.py --config=configs/text_to_video.py:all,tiny --workdir=runs/tiny_t2v
    python sample.py --workdir=runs/tiny_t2v --prompt="a three moving up and left"

`tiny` is all of it at 8 x 32 x 32 on a CPU: captioned moving digits, and a model of that family
with a random U-Net and a random text encoder.
"""

from configs import common

FAMILIES = ('sd15', 'sd21')


def get_config(arg: str = 'all'):
    words = arg.split(',')
    family = next((word for word in words if word in FAMILIES), 'sd15')
    words = [word for word in words if word not in FAMILIES] or ['all']
    config = common.base()
    config['condition'] = 'text'
    wide = family == 'sd21'
    config['data'].update(height=512, width=1024 if wide else 512, stride=2, short='loop')
    config['stable_diffusion']['source'] = family
    config['autoencoder']['model'].update(output='linear')
    config['autoencoder']['loss'].update(l1_weight=0.0, l2_weight=1.0, lpips_weight=0.0)
    config['autoencoder']['train']['steps'] = 500_000
    config['content'].update(
        model=config['content']['model'] | dict(remat='none'),
        process=dict(schedule='scaled_linear', prediction='epsilon', learn_sigma=False),
        sampling=common.sampling(guidance=7.5),
    )
    config['motion']['text_encoder'] = '' if wide else 'sd21'
    config['motion']['model'].update(common.SIZES['XL'], content_patch=8 if wide else 4)
    config['motion']['sampling'].update(guidance=7.5)
    for stage in ('content', 'motion'):
        config[stage]['train']['steps'] = 125_000
    # Without recomputation; few images at a time, that 16 GiB are enough.
    config['content']['train']['device_batch'] = 2 if wide else 4
    # Steps of seconds: no more than a part of an hour is to be done again.
    config['content']['train']['save_every'] = 250
    return common.finish(config, ','.join(words), tiny)


def tiny(config: dict):
    """Captioned moving digits on two CPU cores, in minutes."""

    def train(steps, **kwargs):
        usual = dict(batch_size=16, learning_rate=2e-3, schedule='cosine', warmup_steps=100)
        usual |= dict(b2=0.99, clip_norm=1.0, ema_decay=0.995, save_every=1000, preview_every=0)
        return common.train(steps=steps, **usual | kwargs)

    config['tensorboard'] = False
    config['data'].update(
        source='moving_digits', frames=8, height=32, width=32, stride=1, workers=0
    )
    config['stable_diffusion'].update(source='runs/tiny_sd', frames_at_once=128)
    config['autoencoder']['model'].update(dim=128, depth=2, heads=4, remat='none')
    config['autoencoder']['train'] = train(450)
    config['content']['process']['prediction'] = 'v'
    config['content']['model']['remat'] = 'none'
    config['content']['sampling']['guidance'] = 4.0
    config['content']['train'] = train(1500, learning_rate=1e-3)
    config['motion'].update(
        text_encoder='',
        model=config['motion']['model']
        | dict(patch=1, content_patch=2, dim=128, depth=4, heads=4, rotary=True, remat='none'),
        process=dict(schedule='cosine', prediction='v', learn_sigma=False),
        sampling=common.sampling(guidance=2.0),
        content_noise=0.5,
        statistics_clips=512,
        train=train(1200),
    )
