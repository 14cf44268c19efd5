"""Generators that only play real training clips: what the protocols must find faultless."""

import dataclasses
import functools
import types

import jax
import numpy as np

from cmd_jax.diffusion import Sampling
from cmd_jax.evaluation import digit_judge
from cmd_jax.parallel.mesh import make_mesh

SIZES = {'frames': 8, 'height': 32, 'width': 32}


def record(**values):
    return types.SimpleNamespace(**values)


train_clips = functools.cache(functools.partial(digit_judge.real_clips, 'train', seed=3, **SIZES))


class Player:
    """What the protocols read of a Generator, but how it is called.

    Attributes:
      videos, labels, directions: the clips it plays.
    """

    condition = 'label'
    steps = {'autoencoder': 30, 'content': 20, 'motion': 10}
    cost = {
        'autoencoder': {'seconds': 100.0, 'memory_gb': 0.5},
        'content': {'seconds': 20.0, 'memory_gb': 900.0},
        'motion': {'seconds': 3.0, 'memory_gb': 0.1},
    }

    def __init__(self, clips: int = 400, source: str = 'moving_digits'):
        content, motion = (
            record(sampling=Sampling(sampler='ddim', steps=steps, guidance=guidance))
            for steps, guidance in ((25, 3.0), (35, 2.0))
        )
        config = record(
            data=record(source=source, **SIZES),
            content=content,
            motion=motion,
            condition=self.condition,
        )
        self.config = dict.fromkeys(self.steps, config)
        self.mesh = make_mesh(devices=jax.devices()[:1])
        self.videos, self.labels, self.directions = train_clips(clips)

    def options(self, steps=None, guidance=None):
        asked = {k: v for k, v in dict(steps=steps, guidance=guidance).items() if v is not None}
        return {
            stage: {
                'sampling': dataclasses.replace(
                    getattr(self.config[stage], stage).sampling, **asked
                )
            }
            for stage in ('content', 'motion')
        }

    def reconstruct(self, video):
        return np.where(video < 250, video + 5, video - 5).astype(np.uint8)

    def predict_motion(self, video, labels, **settings):
        # Further from real clips than `reconstruct`, nearer than other clips.
        return np.where(video < 245, video + 8, video - 8).astype(np.uint8)

    def content_frames(self, video):
        return video[:, 0]
