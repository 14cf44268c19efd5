"""Reading, writing and laying out videos: the uint8 border of the library.

Video is uint8 [t h w 3] in files and on screen, float [-1, 1] inside. Nothing here needs JAX.
"""

import base64
import fractions
import io
import itertools
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import av
import einops
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import Float, UInt8
from PIL import Image, ImageSequence

from cmd_jax import atomic
from cmd_jax.errors import UserError

Video = UInt8[np.ndarray, 't h w 3']
Frame = UInt8[np.ndarray, 'h w 3']

SUFFIXES = ('.mp4', '.gif', '.webp')
# What PyAV raises of broken files. IndexError: the streams turn out to be others than the header
# says; ArithmeticError: rates and sizes of zero, or beyond integers.
BROKEN = (av.FFmpegError, OSError, ValueError, MemoryError, IndexError, ArithmeticError)
# ffmpeg's numbers for the matrix, primaries and transfer of BT.709, and for luma in 16..235.
_BT709 = 1
_LIMITED_RANGE = 1


def to_float(video: UInt8[Any, '*s']) -> Float[Any, '*s']:
    """uint8 0..255 to float32 [-1, 1]; NumPy and JAX arrays alike."""
    return video.astype('float32') / 127.5 - 1.0


def to_uint8(video: Float[Any, '*s']) -> UInt8[Any, '*s']:
    """Float [-1, 1] to uint8: clipped and rounded, the exact inverse of `to_float`."""
    return ((video.astype('float32') + 1.0) * 127.5).clip(0, 255).round().astype('uint8')


def write(path: str | os.PathLike, video: Video, fps: float = 8, scale: int = 1):
    """Writes a video as .mp4 (h264), .gif or .webp (both animated, looping).

    mp4 is near lossless in luma; its sides are made even by repeating the last row or column. gif
    and webp merge frames equal to the one before into one of longer duration. The file appears
    under its name only when it is complete.

    Args:
      path: the file; its folder is made.
      video: uint8 [t h w 3].
      fps: frames per second.
      scale: integer factor of nearest-neighbour enlargement, to make small clips watchable.

    Raises:
      UserError: unknown suffix, or the file cannot be written.
    """
    path = pathlib.Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f'{path}: cannot write {path.suffix!r} video; use one of {SUFFIXES}')
    video = _enlarge(_checked(video, 4), scale)
    with atomic.replacing(path) as temporary:
        if path.suffix.lower() == '.mp4':
            _write_mp4(temporary, video, fps)
        else:
            _save_animation(temporary, video, fps, path.suffix[1:].lower())


def write_image(path: str | os.PathLike, image: Frame, scale: int = 1):
    """Writes one uint8 [h w 3] image in the format of the suffix; errors as in `write`."""
    path = pathlib.Path(path)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None:
        raise UserError(f'{path}: unknown image format {path.suffix!r}; use .png')
    image = Image.fromarray(_enlarge(_checked(image, 3), scale))
    with atomic.replacing(path) as temporary:
        image.save(temporary, format=kind)


def read(path: str | os.PathLike, count: int | None = None) -> Video:
    """The file, or its first `count` frames, as uint8 [t h w 3]. For clips of long files see
    `cmd_jax.data.clips`.

    Raises:
      UserError: it cannot be read, or holds no frame.
    """
    try:
        # ffmpeg does not decode animated webp.
        if pathlib.Path(path).suffix.lower() == '.webp':
            with Image.open(path) as image:
                pages = itertools.islice(ImageSequence.Iterator(image), count)
                return np.stack([np.asarray(page.convert('RGB')) for page in pages])
        with open_file(path) as container:
            stream = container.streams.best('video')
            found = itertools.islice(frames(container, stream), count) if stream else ()
            video = [upright(frame) for frame in found]
        if video:
            return np.stack(video)
    except BROKEN as e:
        raise UserError(f'{path}: cannot be read as a video ({e})') from e
    raise UserError(f'{path}: holds no video frame')


def open_file(
    source: str | os.PathLike | io.IOBase, timeout: float | None = None
) -> av.container.InputContainer:
    """`av.open` for reading: titles in foreign encodings do not make a good video unreadable.
    `timeout`: seconds that a call may wait for data."""
    lenient = {'metadata_errors': 'replace'} if int(av.__version__.split('.')[0]) < 19 else {}
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    return av.open(source, timeout=timeout, **lenient)


def frames(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    before: Callable[[av.Packet], None] | None = None,
):
    """Yields the decoded frames from the present position of an open container; `before` is called
    with each packet before it is decoded."""
    for packet in container.demux(stream):
        if before is not None:
            before(packet)
        # Theora repeats a frame by an empty packet, which ffmpeg would take for the end. The packet
        # that does mean the end has no time stamp.
        if packet.size or packet.dts is None:
            yield from packet.decode()


def upright(frame: av.VideoFrame, reformatter: VideoReformatter | None = None) -> Frame:
    """A decoded frame as RGB, turned as the file's rotation metadata says. A `reformatter` that
    is kept from frame to frame is set up once."""
    rgb = (reformatter or VideoReformatter()).reformat(frame, format='rgb24')
    return np.rot90(rgb.to_ndarray(), round(frame.rotation / 90) % 4)


def grid(
    videos: UInt8[np.ndarray, 'n t h w 3'],
    columns: int | None = None,
    pad: int = 2,
    background: int = 64,
) -> UInt8[np.ndarray, 't H W 3']:
    """Videos side by side, row by row, `pad` pixels of grey `background` around each.

    Args:
      videos: uint8 [n t h w 3].
      columns: videos in a row; as near to a square as possible if None.
      pad: pixels between the videos and around them.
      background: grey level of the padding and of empty cells.
    """
    videos = _checked(videos, 5)
    n = len(videos)
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = -(-n // columns)
    # The padding of a cell is at its top and left; the last row and column get theirs below.
    cells = np.pad(videos, ((0, 0), (0, 0), (pad, 0), (pad, 0), (0, 0)), constant_values=background)
    empty = ((0, rows * columns - n),) + ((0, 0),) * 4
    cells = np.pad(cells, empty, constant_values=background)
    joined = einops.rearrange(cells, '(r c) t h w x -> t (r h) (c w) x', r=rows)
    return np.pad(joined, ((0, 0), (0, pad), (0, pad), (0, 0)), constant_values=background)


def filmstrip(
    videos: UInt8[np.ndarray, 'n t h w 3'], pad: int = 2, background: int = 64
) -> UInt8[np.ndarray, 'H W 3']:
    """One image: a row for every video, its frames from left to right."""
    frames = einops.rearrange(_checked(videos, 5), 'n t h w x -> (n t) 1 h w x')
    return grid(frames, columns=videos.shape[1], pad=pad, background=background)[0]


def data_uri(video_or_image: Video | Frame, fps: float = 8, scale: int = 1) -> str:
    """A `data:` address for self-contained HTML: animated webp of a video, png of an image."""
    buffer = io.BytesIO()
    array = _enlarge(_checked(video_or_image, 3, 4), scale)
    if array.ndim == 4:
        _save_animation(buffer, array, fps, 'webp')
    else:
        Image.fromarray(array).save(buffer, format='png')
    kind = 'webp' if array.ndim == 4 else 'png'
    return f'data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}'


def _checked(array, *ndims):
    array = np.asarray(array)
    if array.dtype != np.uint8 or array.ndim not in ndims or array.shape[-1] != 3 or not array.size:
        raise ValueError(
            f'expected non-empty uint8 of rank {ndims}, 3 channels; got {array.dtype} {array.shape}'
        )
    return array


def _enlarge(array, scale):
    return array if scale == 1 else array.repeat(scale, axis=-3).repeat(scale, axis=-2)


def _write_mp4(path, video, fps):
    height, width = video.shape[1:3]
    video = np.pad(video, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode='edge')
    rate = fractions.Fraction(fps).limit_denominator(1001)
    options = {'movflags': 'faststart'}
    with av.open(os.fspath(path), 'w', format='mp4', options=options) as container:
        stream = container.add_stream('libx264', rate=rate)
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = 'yuv420p'
        stream.options = {'crf': '12', 'preset': 'medium'}
        codec = stream.codec_context
        # Untagged files are read with a matrix that depends on their size and on the reader.
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _LIMITED_RANGE
        for image in video:
            frame = av.VideoFrame.from_ndarray(image, format='rgb24').reformat(
                format='yuv420p', dst_colorspace='ITU709', dst_color_range='MPEG'
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _save_animation(file, video, fps, kind):
    first, *rest = (Image.fromarray(frame) for frame in video)
    options = {'quality': 90, 'method': 4} if kind == 'webp' else {}
    first.save(
        file,
        format=kind,
        save_all=True,
        append_images=rest,
        duration=round(1000 / fps),
        loop=0,
        **options,
    )
