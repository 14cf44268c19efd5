"""Clips per second: decoding against a bare PyAV loop, prepared records, memory, latent caches.

    python -m benchmarks.data [--out=benchmarks/results/data_cpu.json]

The videos are made here: textures that drift, 10 s of 320 x 240 at 25 frames a second, H.264 with a
keyframe every 10 s or sooner where the encoder wants one. Clips are 16 frames at random places,
resized to 64 x 64. The rows of one table are measured in turns, several times; the median counts.
"""

import functools
import gc
import json
import os
import pathlib
import shutil
import tempfile
import time
from concurrent import futures

import av
import numpy as np
from absl import flags
from PIL import Image

from benchmarks.timing import machine, median
from cmd_jax import atomic, cli
from cmd_jax.data import pipeline, prepare, shards, sources
from cmd_jax.data.clip_options import ClipOptions
from cmd_jax.data.clips import fit
from cmd_jax.errors import UserError, parse_json, writable

VIDEOS, SECONDS, RATE = 16, 10, 25
HEIGHT, WIDTH, FRAMES, SIZE = 240, 320, 16, 64
OPTIONS = ClipOptions(frames=FRAMES, height=SIZE, width=SIZE)

CLIPS = flags.DEFINE_integer('clips', 250, 'Clips of a measurement of decoding.', 10)
LONG = flags.DEFINE_integer('long', 20_000, 'Clips of the measurement of memory.', 200)
TURNS = flags.DEFINE_integer('turns', 5, 'Measurements of each row.', 1)
STEPS = flags.DEFINE_integer('steps', 150, 'Training steps of the motion stage.', 50)
ONLY = flags.DEFINE_multi_enum('only', [], ('decoding', 'memory', 'latents'), 'Tables to measure.')
OUT = flags.DEFINE_string('out', None, 'Where to write the tables as JSON; others there stay.')


def make_video(path: str, seed: int, height=HEIGHT, width=WIDTH, seconds=SECONDS):
    """A texture with detail at all scales that drifts, and a patch of another that crosses it."""
    rng = np.random.default_rng(seed)
    layers = []
    for size in (8, 32, 128):
        coarse = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((2 * width, 2 * height), Image.Resampling.BICUBIC)
        layers.append(np.asarray(image, np.float32))
    texture = (0.6 * layers[0] + 0.25 * layers[1] + 0.15 * layers[2]).astype(np.uint8)
    drift = rng.uniform(-2, 2, 2)
    with av.open(path, 'w') as container:
        stream = container.add_stream('libx264', rate=RATE)
        stream.height, stream.width, stream.pix_fmt = height, width, 'yuv420p'
        for t in range(seconds * RATE):
            y, x = (np.array([height, width]) / 2 + drift * t).astype(int) % (height, width)
            image = texture[y : y + height, x : x + width].copy()
            place = 2 * t % (width - width // 4)
            patch = texture[: height // 3, : width // 4]
            image[height // 3 : height // 3 + len(patch), place : place + width // 4] = patch[::-1]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format='rgb24')))
        container.mux(stream.encode())


def bare(path: str, start: int, resized: bool) -> np.ndarray:
    """What anybody would write: seek, decode, convert; and resize, if asked."""
    clip = []
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        target = int(start / stream.average_rate / stream.time_base)
        container.seek(target, stream=stream)
        for frame in container.decode(stream):
            if frame.pts >= target:
                clip.append(frame.to_ndarray(format='rgb24'))
                if len(clip) == FRAMES:
                    break
    return fit(clip, SIZE, SIZE) if resized else np.stack(clip)


def bare_loop(paths: list[str], resized: bool, clips: int) -> float:
    """Clips per second of the loop, in this process."""
    rng = np.random.default_rng(0)
    last = SECONDS * RATE - FRAMES
    work = [(paths[i % len(paths)], int(rng.integers(last + 1))) for i in range(clips)]
    started = time.perf_counter()
    for path, start in work:
        bare(path, start, resized)
    return clips / (time.perf_counter() - started)


def pipeline_loop(spec: str, workers: int, clips: int) -> float:
    """Clips per second of the pipeline, its workers warm."""
    source = sources.make_source(spec, 'train', OPTIONS, test_fraction=0.001)
    batches = pipeline.Batches(
        source, 10, seed=0, shuffle=True, repeat=True, workers=workers, prefetch=1
    )
    for _ in range(4):
        next(batches)
    started = time.perf_counter()
    for _ in range(clips // 10):
        next(batches)
    rate = clips / (time.perf_counter() - started)
    batches.close()
    return rate


def in_turns(rows: dict) -> dict[str, dict]:
    """{row: median and spread of clips_per_second} of functions that give one."""
    found = {name: [] for name in rows}
    for _ in range(TURNS.value):
        for name, measure in rows.items():
            found[name].append(measure())
    return {name: median(x, 'clips_per_second') for name, x in found.items()}


def prepared(folder: pathlib.Path, name: str, **options) -> str:
    """The videos in a folder as records, by `cmd_jax.data.prepare`."""
    settings = shards.Settings(
        data=f'folder:{folder}/videos', height=SIZE, width=SIZE, test_fraction=0.001, **options
    )
    prepare.prepare(settings, str(folder / name))
    return f'records:{folder / name}'


def decoding(folder: pathlib.Path) -> dict:
    """Point 1 of the data issue: workers against bare loops, records against videos."""
    (folder / 'videos').mkdir()
    paths = [str(folder / 'videos' / f'{i:02d}.mp4') for i in range(VIDEOS)]
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(make_video, paths, range(VIDEOS)))
    stored = {
        'clips, raw': prepared(folder, 'clips', frames=FRAMES),
        'whole videos, raw': prepared(folder, 'raw', clips='whole'),
        'whole videos, jpeg': prepared(folder, 'jpeg', clips='whole', encoding='jpeg'),
    }
    spec, clips = f'folder:{folder / "videos"}', CLIPS.value
    rows = in_turns(
        {
            'bare PyAV, RGB frames': lambda: bare_loop(paths, False, clips),
            'bare PyAV and resizing': lambda: bare_loop(paths, True, clips),
            'folder, 1 worker': lambda: pipeline_loop(spec, 1, clips),
            'folder, 2 workers': lambda: pipeline_loop(spec, 2, 2 * clips),
            **{
                f'records ({name}), 1 worker': functools.partial(pipeline_loop, spec, 1, 4000)
                for name, spec in stored.items()
            },
        }
    )
    rate = {name: row['clips_per_second'] for name, row in rows.items()}
    ratios = {
        '1 worker / bare PyAV and resizing (same work)': (
            rate['folder, 1 worker'] / rate['bare PyAV and resizing'],
            0.9,
        ),
        '1 worker, resizing / bare PyAV without': (
            rate['folder, 1 worker'] / rate['bare PyAV, RGB frames'],
            None,
        ),
        '2 workers / 1 worker': (rate['folder, 2 workers'] / rate['folder, 1 worker'], 1.7),
        **{
            f'records ({name}) / folder': (
                rate[f'records ({name}), 1 worker'] / rate['folder, 1 worker'],
                10.0 if 'clips' in name else None,
            )
            for name in stored
        },
    }
    return {'rows': rows, 'ratios': told(ratios)}


def told(ratios: dict) -> dict:
    return {name: {'value': value, 'target': target} for name, (value, target) in ratios.items()}


def tree_memory() -> float:
    """Resident memory, not counting what is shared, of this process and its children, in MB."""
    total = 0
    for pid in [os.getpid(), *children(os.getpid())]:
        try:
            text = pathlib.Path(f'/proc/{pid}/smaps_rollup').read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if 'Private' in line)
    return total / 1024


def children(pid: int) -> list[int]:
    found = []
    for task in pathlib.Path(f'/proc/{pid}/task').glob('*/children'):
        for child in task.read_text().split():
            found += [int(child), *children(int(child))]
    return found


def memory(folder: pathlib.Path) -> dict:
    """Memory of the pipeline with one worker over many clips of small videos."""
    (folder / 'small').mkdir()
    for i in range(200):
        make_video(str(folder / 'small' / f'{i}.mp4'), i, 64, 64, seconds=1)
    source = sources.make_source(f'folder:{folder / "small"}', 'train', OPTIONS)
    batches = pipeline.Batches(source, 20, seed=0, shuffle=True, repeat=True, workers=1)
    seen, held = 0, {}
    for seen in range(20, LONG.value + 1, 20):
        next(batches)
        if seen % (LONG.value // 10) == 0:
            gc.collect()
            held[seen] = round(tree_memory(), 1)
    batches.close()
    first, last = held[LONG.value // 10], held[seen]
    return {'megabytes_after_clips': held, 'ratios': told({'last / first': (last / first, 1.05)})}


def latents(folder: pathlib.Path) -> dict:
    """Steps per second of the quickstart's motion stage, by where its clips come from."""
    from cmd_jax.training import config as configs
    from cmd_jax.training import latent_cache, loop
    from configs import quickstart

    (folder / 'films').mkdir()
    for i in range(VIDEOS):
        make_video(str(folder / 'films' / f'{i}.mp4'), i)
    rows = {}
    for name, spec in (
        ('moving_digits', 'moving_digits:4000'),
        ('folder', f'folder:{folder}/films'),
    ):
        tree = quickstart.get_config('autoencoder').to_dict()
        tree['data'].update(source=spec, workers=0)
        tree['autoencoder']['train']['steps'] = 1
        run = folder / name
        loop.train(configs.parse(tree), run)
        cache = folder / f'{name}_latents'
        latent_cache.write(run, cache, {}, clips_per_video=1 if name == 'moving_digits' else 32)
        tree['stage'] = 'motion'
        tree['motion']['train'].update(steps=STEPS.value, log_every=10)
        tree['motion']['statistics_clips'] = 64
        for kind, source in (('encoding on the fly', spec), ('latents', f'latents:{cache}')):
            workdir = folder / f'{name}_{kind[:3]}'
            workdir.mkdir()
            shutil.copytree(run / 'autoencoder', workdir / 'autoencoder')
            tree['data']['source'] = source
            loop.train(configs.parse(tree), workdir)
            lines = (workdir / 'motion' / 'metrics.jsonl').read_text().splitlines()
            rates = [json.loads(line)['videos_per_second'] for line in lines[3:]]
            batch = tree['motion']['train']['batch_size']
            rows[f'{name}, {kind}'] = median((x / batch for x in rates), 'steps_per_second')
    ratios = {
        f'latents / on the fly, {name}': (
            rows[f'{name}, latents']['steps_per_second']
            / rows[f'{name}, encoding on the fly']['steps_per_second'],
            3.0,
        )
        for name in ('moving_digits', 'folder')
    }
    return {'rows': rows, 'ratios': told(ratios)}


def main():
    """Measures the tables; each is printed and written at once."""
    for flag, multiple in ((CLIPS, 10), (LONG, 200)):
        if flag.value % multiple:
            raise UserError(f'--{flag.name}={flag.value} must be a multiple of {multiple}')
    tables = {'decoding': decoding, 'memory': memory, 'latents': latents}
    found, out = {}, OUT.value and pathlib.Path(OUT.value)
    if out:
        writable('--out', out.parent)
        found = parse_json(out, out.read_text()) if ONLY.value and out.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ONLY.value or tables:
            found[name] = {'machine': machine()} | tables[name](pathlib.Path(folder))
            print(told_table(name, found[name]), flush=True)
            if out:
                atomic.write(out, json.dumps(found, indent=1) + '\n')


def told_table(name: str, table: dict) -> str:
    """For people."""
    lines = ['', name]
    for row, numbers in (table.get('rows', {}) | table.get('ratios', {})).items():
        told = '  '.join(f'{k} {v}' for k, v in rounded(numbers).items())
        lines.append(f'  {row:50} {told}')
    if 'megabytes_after_clips' in table:
        lines.append(f'  MB after clips: {table["megabytes_after_clips"]}')
    return '\n'.join(lines)


def rounded(numbers: dict) -> dict:
    def one(x):
        return [one(v) for v in x] if isinstance(x, list) else x if x is None else round(x, 2)

    return {name: one(x) for name, x in numbers.items()}


if __name__ == '__main__':
    cli.run(main)
