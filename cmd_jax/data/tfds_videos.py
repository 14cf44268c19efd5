"""Clips of data sets prepared by TensorFlow Datasets (TFDS), read by random access.

TFDS says what a data set has and where its records lie. The records are read with ArrayRecord and
taken apart here: TFDS itself decodes all frames of a video or none, and its `SkipDecoding` fails on
videos where TensorFlow does not read them. So only the frames of a clip are decoded, and workers
never import TensorFlow; opening does, because `tfds.features.Video` needs it.
"""

import difflib
import glob
import io
import os
import re

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from PIL import Image

from cmd_jax.data import clips, files
from cmd_jax.data.clip_options import ClipOptions, VideoInfo
from cmd_jax.data.listings import in_words
from cmd_jax.data.videos import log_once
from cmd_jax.errors import UserError

INFO = 'dataset_info.json'  # TFDS writes it when a data set is complete
FORMAT = 'array_record'
# TFDS does not declare all that its command imports.
TOOLS = 'where it does not start: pip install mlcroissant apache-beam importlib_resources'
NO_RATE = 1.0  # frames per second of videos without time stamps; only strides are counted
CAPTIONS = ('caption', 'text')
CHANNELS = (1, 3, 4)


class TfdsVideos:
    """Clips of a data set of TFDS: of its one video feature, with its one class label and caption.

    Attributes:
      name: 'tfds'.
      class_names: of the class label; empty where there is none.
      captions: what clips can have, sorted, each once: of a set with text None (not listed), of one
        with classes alone their names in words, else [''].
    """

    name = 'tfds'

    def __init__(self, where: str, split: str, options: ClipOptions):
        """Opens a split; where the data set is not split, its last tenth is for testing.

        Args:
          where: a name of TFDS, such as 'ucf101/ucf101_1:2.0.0', or the folder of a prepared data
            set. Nothing is downloaded.
          split: 'train', or 'test', where nothing is drawn by chance.
          options: of the clips.

        Raises:
          UserError: unknown, not prepared on this machine, without random access, without one
            video feature; or the clips asked for cannot be had of it.
        """
        import tensorflow_datasets as tfds

        if options.fps:
            raise UserError(
                f'data.fps={options.fps}: tfds data has no time stamps: use data.stride'
            )
        builder = open_builder(where)
        features = dict(builder.info.features.items())
        self._video, self._encoded = video_feature(where, features)
        self._label, notes = label_feature(features)
        self._caption = caption_feature(features)
        self.class_names = list(features[self._label].names) if self._label else []
        self.captions = None if self._caption else sorted({in_words(n) for n in self.class_names})
        if self.captions == []:
            self.captions = ['']
        self._options = options if split == 'train' else options.fixed()
        self._where = where
        self._whole = None
        if not self._encoded:
            self._whole = tfds.features.FeaturesDict({self._video: features[self._video]})
        self._clips = self._clips_of_each(features[self._video].shape[0])
        part = choose_part(
            where, {n: s.num_examples for n, s in builder.info.splits.items()}, split
        )
        self._records = ArrayRecordDataSource(shards(where, builder, part))
        log_once(
            f'tfds: {len(self)} clips of {len(self._records)} videos to {split}: '
            f'{builder.info.full_name}, split {part!r}, videos {self._video!r}, '
            f'labels {self._label!r}, captions {self._caption!r}{notes}'
        )

    def __len__(self) -> int:
        return len(self._records) * self._clips

    def __getitem__(self, i: int, rng: np.random.Generator | None = None) -> dict | clips.Skipped:
        """Clip i; see `sources`."""
        i = int(i)
        record = self._records[i // self._clips]
        values = parse(record)
        if self._encoded:
            frames = values[self._video].bytes_list.value
        else:
            frames = self._whole.deserialize_example_np(record)[self._video]
        info = VideoInfo(frames=len(frames), fps=NO_RATE)
        if not self._options.count(info):
            detail = f'frames={info.frames}, clips need {self._options.least(NO_RATE)}'
            return self._skipped(i, clips.TOO_SHORT, detail)
        label, caption = 0, ''
        if self._label:
            label = values[self._label].int64_list.value[0]
            if label < 0:  # TFDS's sign for an unknown one
                return self._skipped(i, 'no label')
            caption = in_words(self.class_names[label])
        if self._caption:
            caption = values[self._caption].bytes_list.value[0].decode(errors='replace')
        choice = self._options.choose(info, i % self._clips, rng)
        numbers, order = np.unique(choice.numbers(NO_RATE), return_inverse=True)
        size = self._options.height, self._options.width
        try:
            chosen = (rgb(frames[n]) for n in numbers)
            video = clips.fit(chosen, *size, choice.crop, choice.flip)[order]
        except (OSError, SyntaxError, ValueError) as e:  # Pillow's for broken images
            return self._skipped(i, clips.UNREADABLE, str(e))
        return {
            'video': video,
            'label': np.int32(label),
            'caption': caption,
            'index': np.int64(i),
        }

    def _skipped(self, i, reason, detail=''):
        return clips.Skipped(f'{self._where}[{i}]', reason, detail)

    def _clips_of_each(self, frames):
        """Clips of a video; `frames` of every one, or None where they differ."""
        options = self._options
        if frames is None:
            if options.clips == 'all':
                raise UserError(
                    f"tfds:{self._where}: its videos differ in length, so data.clips='all' cannot "
                    "number their clips: use data.clips='random'"
                )
            return 1
        count = options.count(VideoInfo(frames=frames, fps=NO_RATE))
        if not count:
            raise UserError(
                f'tfds:{self._where}: its videos have {frames} frames, fewer than a clip '
                f'(data.frames={options.frames}, data.stride={options.stride}): lower these, or '
                "loop short ones (data.short='loop')"
            )
        return count


def parse(record: bytes):
    """{feature: values} of a record, which is a tf.train.Example."""
    # The same protocol buffer as TensorFlow's, without TensorFlow.
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(record).features.feature


def rgb(frame: bytes | np.ndarray) -> np.ndarray:
    """A frame uint8 [h w 3] of an image file, or of an array [h w c]; alpha is left out."""
    if isinstance(frame, bytes):
        return np.asarray(Image.open(io.BytesIO(frame)).convert('RGB'))
    return np.repeat(frame, 3, axis=-1) if frame.shape[-1] == 1 else frame[..., :3]


def open_builder(where: str):
    """The tfds.core.DatasetBuilder of a name or folder, prepared and with random access.

    Raises:
      UserError: there is none.
    """
    import tensorflow_datasets as tfds

    folder = os.path.expanduser(where)
    if files.is_url(where):
        raise UserError(f'tfds:{where} is not on this machine: copy the folder, and give its path')
    if os.path.exists(os.path.join(folder, INFO)):
        try:
            builder = tfds.builder_from_directory(folder)
        except (OSError, ValueError) as e:
            raise UserError(f'tfds:{where} cannot be opened: {one_line(e)}') from e
    elif os.path.isabs(folder) or where.startswith('.'):
        what = f'has no {INFO}' if os.path.exists(folder) else 'does not exist'
        raise UserError(
            f'tfds:{where} {what}: give the folder of a version of a prepared data set'
            f'{among(prepared(folder))}'
        )
    else:
        builder = named(where)
    formats = {f.value for f in builder.info.available_file_formats()}
    if FORMAT not in formats:
        raise UserError(
            f'tfds:{where} is stored as {", ".join(sorted(formats))}, which is not read by random '
            f'access: run `tfds convert_format --dataset_version_dir={builder.data_dir} '
            f'--out_file_format={FORMAT}` ({TOOLS})'
        )
    if builder.info.file_format.value != FORMAT:
        builder.info.set_file_format(FORMAT, override=True, override_if_initialized=True)
    return builder


def named(where: str):
    """The builder of a name of TFDS."""
    import tensorflow_datasets as tfds

    # Of other people's collections TFDS would download the code.
    if re.match(r'[\w-]+:[^\d*]', where):
        raise UserError(
            f'tfds:{where} is of a community collection: prepare it, and give its folder'
        )
    try:
        builder = tfds.builder(where)
    except tfds.core.DatasetNotFoundError as e:
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(re.split('[/:]', where)[0].lower(), known)
        raise UserError(
            f'tfds:{where}: TFDS has no data set of that name, and it is no folder with {INFO}'
            f'{among(near or prepared(where))}'
        ) from e
    except (AssertionError, TypeError, ValueError) as e:  # of version, arguments, config
        raise UserError(f'tfds:{where} is not a name of TFDS: {one_line(e)}') from e
    if not os.path.exists(os.path.join(builder.data_dir, INFO)):
        root = builder.data_dir.removesuffix(builder.info.full_name)
        raise UserError(
            f'tfds:{where} is not prepared on this machine, {builder.data_dir} is missing'
            f'{among(prepared(os.path.join(root, builder.name)))}; run `tfds build {where} '
            f'--file_format={FORMAT}` ({TOOLS}), or say in TFDS_DATA_DIR where it is'
        )
    return builder


def prepared(folder: str) -> list[str]:
    """Folders of prepared data sets below a folder."""
    folder = glob.escape(folder)
    found = glob.glob(os.path.join(folder, '*', INFO))
    found += glob.glob(os.path.join(folder, '*', '*', INFO))
    return sorted(os.path.dirname(path) for path in found)


def among(choices: list[str]) -> str:
    """The end of a message that names what could be meant."""
    return f' (did you mean {" or ".join(choices[:3])}?)' if choices else ''


def one_line(error: Exception) -> str:
    """What an error says, shortened."""
    text = ' '.join(str(error).split())
    return text if len(text) <= 300 else text[:297] + '...'


def choose_part(where: str, counts: dict[str, int], split: str) -> str:
    """The part of a data set for 'train' or 'test', in TFDS's notation.

    Args:
      where: the data set, for messages.
      counts: records of each of its splits.
      split: 'train' or 'test'.

    Raises:
      UserError: there is no such part.
    """
    counts = {name: count for name, count in counts.items() if count}
    tests = [name for name in ('test', 'validation') if name in counts]
    if 'train' in counts and tests:
        return {'train': 'train', 'test': tests[0]}[split]
    whole = 'train' if 'train' in counts else next(iter(counts), '')
    if not whole or (whole != 'train' and len(counts) > 1):
        raise UserError(
            f'tfds:{where}: its splits are {", ".join(counts) or "empty"}, none of them train: '
            'give another data set'
        )
    if counts[whole] < 5:  # a tenth of it is rounded to nothing
        raise UserError(
            f'tfds:{where}: of the {counts[whole]} videos of its only split {whole!r} a tenth '
            'cannot be set aside for testing: prepare more, or a split test'
        )
    return {'train': f'{whole}[:90%]', 'test': f'{whole}[90%:]'}[split]


def shards(where: str, builder, part: str) -> list:
    """Which records of which files make a part of a data set."""
    instructions = builder.info.splits[part].file_instructions
    missing = [f.filename for f in instructions if not os.path.exists(f.filename)]
    if missing:
        raise UserError(
            f'tfds:{where}: {len(missing)} of the {len(instructions)} files of {part!r} are '
            f'missing (first: {missing[0]}): prepare it again'
        )
    return instructions


def video_feature(where: str, features: dict) -> tuple[str, bool]:
    """The name of the feature that holds the video, and whether its frames are image files.

    Raises:
      UserError: there is none, or more than one.
    """
    import tensorflow_datasets as tfds

    def is_video(feature):
        if not isinstance(feature, tfds.features.Sequence | tfds.features.Tensor):
            return False
        if isinstance(feature, tfds.features.Dataset) or not isinstance(feature.shape, tuple):
            return False  # records in a record, or several features in a sequence
        frames = len(feature.shape) == 4 and feature.shape[-1] in CHANNELS
        return frames and feature.np_dtype == np.uint8

    found = [name for name, feature in features.items() if is_video(feature)]
    # Arrays beside a video are masks, flow and the like.
    found = [n for n in found if isinstance(features[n], tfds.features.Video)] or found
    if len(found) != 1:
        what = f'{len(found)} features are videos: {", ".join(sorted(found))}'
        if not found:
            kinds = ', '.join(f'{n} ({type(f).__name__})' for n, f in sorted(features.items()))
            what = f'no feature is a video of uint8 frames; it has {kinds}'
        raise UserError(f'tfds:{where}: {what}; give a data set with one video')
    feature = features[found[0]]
    encoded = isinstance(feature, tfds.features.Sequence) and isinstance(
        feature.feature, tfds.features.Image
    )
    return found[0], encoded


def label_feature(features: dict) -> tuple[str | None, str]:
    """The name of the one class label, and a note for the log where there are several."""
    import tensorflow_datasets as tfds

    labels = [
        name
        for name, feature in sorted(features.items())
        if isinstance(feature, tfds.features.ClassLabel) and feature.num_classes
    ]
    if len(labels) < 2:
        return (labels[0] if labels else None), ''
    note = f'; of the class labels {", ".join(labels)} only one named label is taken'
    return ('label' if 'label' in labels else None), note


def caption_feature(features: dict) -> str | None:
    """The name of the text that describes the video."""
    import tensorflow_datasets as tfds

    def is_text(feature):
        plain = isinstance(feature, tfds.features.Tensor) and feature.shape == ()
        return plain and np.dtype(feature.np_dtype).kind in 'OSU'

    return next((n for n in CAPTIONS if n in features and is_text(features[n])), None)
