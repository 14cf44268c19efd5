"""Small video files for tests: what a frame shows says where it comes from."""

import av
import numpy as np


def numbered(frames=40, height=32, width=48):
    """Frame t is grey 5 t + 20: what was decoded says where it comes from."""
    grey = (5 * np.arange(frames) + 20).astype(np.uint8)
    return np.broadcast_to(grey[:, None, None, None], (frames, height, width, 3)).copy()


def numbers(video):
    return np.rint((video.mean(axis=(1, 2, 3)) - 20) / 5).astype(int).tolist()


def encode(path, video, codec, keyframes, pix_fmt=None):
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = pix_fmt or ('bgra' if codec == 'ffv1' else 'yuv420p')
        if keyframes:
            stream.codec_context.gop_size = keyframes
        for image in video:
            frame = av.VideoFrame.from_ndarray(image, format='rgb24')
            container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        container.mux(stream.encode())


def hostile(folder):
    """Broken files of every kind; {name: the reason expected}."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'zero.mp4').touch()
    (folder / 'text.mp4').write_text('this is no video\n' * 50)
    (folder / 'link.mp4').symlink_to(folder / 'absent.mp4')
    encode(folder / 'cut.mp4', numbered(), 'libx264', 7)  # its index is at the end
    data = (folder / 'cut.mp4').read_bytes()
    (folder / 'cut.mp4').write_bytes(data[: len(data) // 2])
    with av.open(str(folder / 'sound.mp4'), 'w') as container:
        stream = container.add_stream('aac', rate=44100)
        silence = np.zeros((1, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format='fltp', layout='mono')
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return {
        'zero.mp4': 'empty file',
        'text.mp4': 'unreadable',
        'link.mp4': 'unreadable',
        'cut.mp4': 'unreadable',
        'sound.mp4': 'no video stream',
    }
