import base64
import io
import re

import av
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cmd_jax import video as video_lib
from cmd_jax.errors import UserError


def ramp(frames=6, height=24, width=32):
    """Smooth, coloured, different in every frame."""
    t, y, x = np.mgrid[:frames, :height, :width]
    return np.stack([20 * t + x, 200 - 4 * y - 5 * t, 3 * x + 2 * y], axis=-1).astype(np.uint8)


@pytest.mark.parametrize('asarray', [np.asarray, jnp.asarray])
def test_to_uint8_inverts_to_float(asarray):
    levels = np.arange(256, dtype=np.uint8)
    inside = video_lib.to_float(asarray(levels))
    assert inside.dtype == np.float32
    assert inside[0] == -1 and inside[255] == 1
    assert type(inside) is type(asarray(levels))
    np.testing.assert_array_equal(video_lib.to_uint8(inside), levels)
    assert video_lib.to_uint8(inside).dtype == np.uint8


def test_to_uint8_clips_and_rounds():
    outside = np.array([-3, 3, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1], np.float32)
    np.testing.assert_array_equal(video_lib.to_uint8(outside), [0, 255, 0, 1])


@pytest.mark.parametrize('suffix, tolerance', [('.mp4', 3), ('.gif', 8), ('.webp', 6), ('.MP4', 3)])
def test_write_then_read(tmp_path, suffix, tolerance):
    video = ramp()
    path = tmp_path / 'new' / 'folder' / f'clip{suffix}'
    video_lib.write(path, video, fps=8)
    back = video_lib.read(path)
    assert back.dtype == np.uint8 and back.shape == video.shape
    # Mean over each frame: the frames are in order, the colours in place and in range.
    assert np.abs(back.astype(int) - video).mean(axis=(1, 2)).max() < tolerance
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize('colour', [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)])
def test_mp4_keeps_saturated_colours(tmp_path, colour):
    video_lib.write(tmp_path / 'x.mp4', np.full((3, 16, 16, 3), colour, np.uint8))
    assert np.abs(video_lib.read(tmp_path / 'x.mp4').astype(int) - colour).max() <= 4


def test_odd_sizes_are_padded_by_the_edge(tmp_path):
    video = ramp(3, 15, 17)
    video_lib.write(tmp_path / 'x.mp4', video)
    back = video_lib.read(tmp_path / 'x.mp4').astype(int)
    assert back.shape == (3, 16, 18, 3)
    assert np.abs(back[:, :15, :17] - video).mean() < 4
    assert np.abs(back[:, 15] - back[:, 14]).mean() < 6


def test_scale_enlarges_by_nearest_neighbour(tmp_path):
    image = ramp(1)[0]
    video_lib.write_image(tmp_path / 'x.png', image, scale=3)
    back = np.asarray(Image.open(tmp_path / 'x.png'))
    np.testing.assert_array_equal(back[1::3, 2::3], image)
    np.testing.assert_array_equal(back[::3, ::3], image)
    video_lib.write(tmp_path / 'x.mp4', ramp(), scale=2)
    assert video_lib.read(tmp_path / 'x.mp4').shape == (6, 48, 64, 3)


def test_bad_paths_are_user_errors(tmp_path):
    (tmp_path / 'file').write_text('in the way')
    for write in (video_lib.write, lambda path, v: video_lib.write_image(path, v[0])):
        suffix = '.mp4' if write is video_lib.write else '.png'
        with pytest.raises(UserError, match='cannot be written'):
            write(tmp_path / 'file' / f'x{suffix}', ramp())
        with pytest.raises(UserError, match='.xyz'):
            write(tmp_path / 'x.xyz', ramp())
    (tmp_path / 'text.mp4').write_text('no video')
    # Parts of other sizes, as MPEG-TS may be joined.
    parts = []
    for size in (16, 32):
        with av.open(tmp_path / 'part.ts', 'w') as container:
            stream = container.add_stream('mpeg2video', rate=25, width=size, height=size)
            stream.pix_fmt = 'yuv420p'
            frame = av.VideoFrame.from_ndarray(np.zeros((size, size, 3), np.uint8))
            for _ in range(9):
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        parts.append((tmp_path / 'part.ts').read_bytes())
    (tmp_path / 'sizes.ts').write_bytes(b''.join(parts))
    assert video_lib.read(tmp_path / 'sizes.ts', count=1).shape == (1, 16, 16, 3)
    for path in ('text.mp4', 'absent.mp4', 'absent.webp', 'sizes.ts'):
        with pytest.raises(UserError, match=path):
            video_lib.read(tmp_path / path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'x.mp4'
    video_lib.write(path, ramp())
    before = path.read_bytes()

    def broken(path, *_):
        path.write_bytes(b'half')
        raise KeyboardInterrupt

    monkeypatch.setattr(video_lib, '_write_mp4', broken)
    with pytest.raises(KeyboardInterrupt):
        video_lib.write(path, ramp(2))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ['x.mp4']


@pytest.mark.parametrize('bad', [np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 8, 1), np.uint8)])
@pytest.mark.usefixtures('unchecked_types')
def test_write_wants_uint8_rgb(tmp_path, bad):
    with pytest.raises(ValueError, match='uint8'):
        video_lib.write(tmp_path / 'x.mp4', bad)
    assert not list(tmp_path.iterdir())


def test_grid_places_videos_row_by_row():
    videos = np.stack([np.full((2, 4, 6, 3), i, np.uint8) for i in range(1, 6)])
    out = video_lib.grid(videos, columns=2, pad=1, background=99)
    assert out.shape == (2, 3 * 5 + 1, 2 * 7 + 1, 3)
    centres = out[1, 2::5, 3::7, 0]
    np.testing.assert_array_equal(centres, [[1, 2], [3, 4], [5, 99]])
    assert (out[:, ::5] == 99).all() and (out[:, :, ::7] == 99).all()
    assert video_lib.grid(videos, pad=0).shape == (2, 2 * 4, 3 * 6, 3)  # as square as possible
    assert video_lib.grid(videos[:1], columns=4, pad=0).shape == (2, 4, 6, 3)


def test_filmstrip_has_a_row_per_video():
    videos = np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1, 1).repeat(4, 2).repeat(4, 3)
    strip = video_lib.filmstrip(videos.repeat(3, 4), pad=2)
    assert strip.shape == (2 * 6 + 2, 3 * 6 + 2, 3)
    np.testing.assert_array_equal(strip[3::6, 3::6, 0], [[0, 1, 2], [3, 4, 5]])


def test_data_uri_holds_the_picture():
    image = ramp(1)[0]
    kind, code = re.fullmatch('data:image/(.*);base64,(.*)', video_lib.data_uri(image)).groups()
    assert kind == 'png'
    back = np.asarray(Image.open(io.BytesIO(base64.b64decode(code))))
    np.testing.assert_array_equal(back, image)

    uri = video_lib.data_uri(ramp(), fps=10, scale=2)
    kind, code = re.fullmatch('data:image/(.*);base64,(.*)', uri).groups()
    assert kind == 'webp'
    animation = Image.open(io.BytesIO(base64.b64decode(code)))
    assert animation.n_frames == 6 and animation.size == (64, 48)
    animation.load()
    assert animation.info['duration'] == 100


def test_titles_in_foreign_encodings_do_not_matter(tmp_path):
    path = tmp_path / 'x.mp4'
    with av.open(str(path), 'w') as container:
        container.metadata['title'] = 'caf\u00e9!!'
        stream = container.add_stream('libx264', rate=8)
        stream.width = stream.height = 16
        stream.pix_fmt = 'yuv420p'
        for image in np.full((3, 16, 16, 3), 100, np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode())
    utf8, latin1 = 'caf\u00e9!!'.encode(), 'caf\u00e9!!!'.encode('latin1')
    whole = path.read_bytes()
    assert whole.count(utf8) == 1
    path.write_bytes(whole.replace(utf8, latin1))
    assert video_lib.read(path).shape == (3, 16, 16, 3)
