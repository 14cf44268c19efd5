"""Tiny data sets of TFDS for tests, written by its own tools."""

import contextlib
import io

import numpy as np

from tests.tiny_videos import numbered

# TFDS is imported in functions: spawned workers import this module, and tell what they import.

LENGTHS = {'train': [20, 21, 22, 5], 'test': [20, 23]}  # of the videos of ucf101


def digit(video, size=64):
    """[20 size size 1]: the left half tells the frame's number, the right one the video's."""
    frames = np.full((20, size, size, 1), 20 * video + 5, np.uint8)
    frames[:, :, : size // 2] = 10 * np.arange(20, dtype=np.uint8)[:, None, None, None]
    return frames


def noise(count=5, channels=3):
    """Videos of which no two pixels are alike but by chance, each longer than the last."""
    rng = np.random.default_rng(0)
    return [rng.integers(256, size=(6 + v, 8, 8, channels), dtype=np.uint8) for v in range(count)]


def prepare(data_dir, name, features, splits, file_format='array_record', **options):
    """Writes a data set as `tfds build` does; returns its folder."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.dataset_builders.AdhocBuilder, skip_registration=True):
        code_path = None  # to look for it takes a package that TFDS does not declare

    builder = Tiny(
        name=name,
        version=options.pop('version', '1.0.0'),
        features=tfds.features.FeaturesDict(features),
        split_datasets={split: list(enumerate(rows)) for split, rows in splits.items()},
        data_dir=data_dir,
        file_format=file_format,
        disable_shuffling=True,
        **options,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare()
    return builder.data_dir


def write_stand_ins(path):
    """Stand-ins for two data sets of TFDS, under their names."""
    from tensorflow_datasets import features as kinds

    prepare(
        path,
        'ucf101',
        {
            'video': kinds.Video((None, 24, 40, 3), encoding_format='jpeg'),
            'label': kinds.ClassLabel(names=['FlyingBird', 'cat']),
        },
        {
            split: [{'video': numbered(n, 24, 40), 'label': i % 2} for i, n in enumerate(lengths)]
            for split, lengths in LENGTHS.items()
        },
        version='2.0.0',
        config='ucf101_1',
    )
    prepare(
        path,
        'moving_mnist',
        {'image_sequence': kinds.Video((20, 64, 64, 1))},
        {'test': [{'image_sequence': digit(v)} for v in range(10)]},
    )
