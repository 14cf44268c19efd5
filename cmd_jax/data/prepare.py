"""Videos of any size -> small ones in ArrayRecord shards (`records`), by Apache Beam.

    pip install -r requirements-beam.txt
    python -m cmd_jax.data.prepare --data=folder:DIR --out=OUT --height=64 --width=64 --workers=8

Videos come from a folder:, ucf101: or manifest:. Without more the work is done on this machine, in
as many processes as --workers says. Flags that are not known here are Beam's:

    python -m cmd_jax.data.prepare --data=folder:gs://BUCKET/videos --out=gs://BUCKET/prepared \\
        --height=64 --width=64 --runner=DataflowRunner --project=PROJECT --region=REGION \\
        --temp_location=gs://BUCKET/tmp --sdk_container_image=IMAGE

A record is a clip of --frames frames or, with --clips=whole, a whole video. A shard has the records
of a range of a split's videos. A command that was stopped goes on when it is given again, with the
shards that are missing. OUT holds settings.json from the beginning, parts/ with what became of the
videos of each shard, and in the end skipped.csv and header.json: with that it is complete.
"""

import collections
import contextlib
import csv
import dataclasses
import io
import json
import os
import re
import sys
import threading
from collections.abc import Sequence
from concurrent import futures

from absl import app, flags, logging

from cmd_jax import atomic, cli
from cmd_jax.data import clips, files, records, shards
from cmd_jax.data.clip_options import SHORT
from cmd_jax.data.shards import Settings, Videos
from cmd_jax.data.sources import FILES, SPLITS
from cmd_jax.data.videos import FIRST, LISTED_CAPTIONS
from cmd_jax.errors import UserError, writable

SKIPPED = 'skipped.csv'
MAX_SHARDS = 99_999  # their names have five digits
PROGRESS = 30.0  # seconds between two lines in the log


def prepare(
    settings: Settings,
    out: str,
    *,
    max_bad: float = 0.5,
    workers: int = 1,
    beam_flags: Sequence[str] = (),
):
    """Makes or completes a folder.

    Args:
      settings: what decides its content.
      out: folder or URL.
      max_bad: share of the videos that may be unreadable.
      workers: processes on this machine.
      beam_flags: for Beam's `PipelineOptions`; a --runner among them decides where to run.

    Raises:
      UserError: the folder was begun with other settings, or for something else; a flag that Beam
        does not know; no files, or too many that are unreadable.
    """
    options = parse_beam(beam_flags, workers)
    if not files.is_url(out):
        writable('--out', out)
    path, header = files.join(out, records.SETTINGS), files.join(out, records.HEADER)
    now = dataclasses.asdict(settings)
    before = json.loads(files.read(path)) if files.exists(path) else None
    if before is not None:
        compare(out, before, now)
    elif files.exists(header) or files.names(out, '.array_record'):
        raise UserError(f'--out={out} has records that were not made here: give another folder')
    if files.exists(header):
        logging.info('%s is complete: nothing to do', out)
        return
    videos = shards.open_videos(settings)
    counts = {split: source.videos for split, source in videos.splits.items()}
    now |= {'videos': counts, 'listing': videos.digest}
    if before is not None:
        compare(out, before, now)
    numbers = {split: videos.shards(settings, split) for split in SPLITS}
    if max(numbers.values()) > MAX_SHARDS:
        raise UserError(
            f'--videos_per_shard={settings.videos_per_shard}: {max(counts.values())} videos would '
            f'be {max(numbers.values())} shards, more than {MAX_SHARDS}: raise it'
        )
    if before is None:
        files.write(path, in_lines(now))
    missing = missing_shards(out, numbers)
    if missing:
        total = sum(numbers.values())
        logging.info('%s: %d shards, %d of them to make', out, total, len(missing))
        with progress(out, total):
            run_pipeline(options, missing, settings, out, videos.digest)
    finish(settings, out, videos, numbers, max_bad)


def compare(out: str, before: dict, now: dict):
    """Raises UserError if a folder was begun otherwise than it is to go on."""
    differ = [f'{k}={before.get(k)!r} (now {v!r})' for k, v in now.items() if before.get(k) != v]
    if differ:
        raise UserError(
            f'--out={out} was begun with {", ".join(differ)}: give the same again, or another --out'
        )


def missing_shards(out: str, numbers: dict[str, int]) -> list[tuple[str, int]]:
    """(split, number) of the shards that are still to be made; `numbers`: of shards, by split."""
    there = {
        *files.names(out, '.array_record'),
        *files.names(files.join(out, records.PARTS), '.json'),
    }
    missing = []
    for split, number in numbers.items():
        for i in range(number):
            part = os.path.basename(records.part(out, split, i))
            if not {records.shard_name(split, i, number), part} <= there:
                missing.append((split, i))
    return missing


@contextlib.contextmanager
def progress(out: str, total: int):
    """Tells from time to time how many shards there are."""
    stop = threading.Event()

    def tell():
        while not stop.wait(PROGRESS):
            done = len(files.names(files.join(out, records.PARTS), '.json'))
            logging.info('%d of %d shards', done, total)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


# Beam


def parse_beam(beam_flags: Sequence[str], workers: int):
    """Beam's `PipelineOptions`.

    Raises:
      UserError: Beam is not installed, or does not know a flag.
    """
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as e:
        raise UserError(
            f'Apache Beam cannot be imported ({e}): pip install -r requirements-beam.txt'
        ) from e
    beam_flags = [flag for flag in beam_flags if flag != '--runner=DirectRunner']
    if any(flag.startswith('--runner=') for flag in beam_flags):
        if workers > 1:
            raise UserError(f'--workers={workers} is for this machine: leave it with a --runner')
    else:
        # What DirectRunner stands for, without the download that it would try first.
        local = ['--runner=FnApiRunner']
        if workers > 1:
            local += [f'--direct_num_workers={workers}', '--direct_running_mode=multi_processing']
        beam_flags = local + beam_flags
    options, parsers, complaint = PipelineOptions(beam_flags), [], io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            options.get_all_options(add_extra_args_fn=parsers.append)
    except SystemExit as e:
        raise UserError(f"Beam's flags: {complaint.getvalue().strip().split('error: ')[-1]}") from e
    unknown = parsers[0].parse_known_args(beam_flags)[1]
    if unknown:
        raise UserError(
            f'{" ".join(unknown)} is neither a flag of this command nor of Beam: see --help'
        )
    return options


def run_pipeline(options, missing: list[tuple[str, int]], *arguments):
    """Makes the missing shards, in Beam's processes; `arguments`: of `shards.make_shard`."""
    import apache_beam as beam

    try:
        pipeline = beam.Pipeline(options=options)
    except (ImportError, ValueError) as e:  # a runner that is not there, or misses a flag
        raise UserError(f"Beam's flags: {' '.join(str(e).split())}") from e
    try:
        with pipeline:
            elements = pipeline | 'shards' >> beam.Create(missing) | beam.Reshuffle()
            _ = elements | 'make' >> beam.Map(shards.make_shard, *arguments)
    except Exception as e:
        # Errors of other processes come as text.
        text = f'{type(e).__name__}: {e}'
        mistakes = re.findall(r"UserError: (.+?) \[while running '", text)
        if not mistakes:
            raise
        raise UserError(mistakes[-1]) from e


# The sum of all shards


def finish(settings: Settings, out: str, videos: Videos, numbers: dict[str, int], max_bad: float):
    """Writes skipped.csv, and at last header.json.

    Raises:
      UserError: too many videos are unreadable, or there are no records.
    """
    skipped = [['', file, reason, ''] for file, reason in videos.listing.skipped.items()]
    splits, spans, captions = {}, {'frames': [], 'fps': []}, set()
    for split, number in numbers.items():
        total, reasons = collections.Counter(videos=0, records=0, bytes=0), collections.Counter()
        paths = [records.part(out, split, i) for i in range(number)]
        with futures.ThreadPoolExecutor(32) as pool:
            for about in map(json.loads, pool.map(files.read, paths)):
                total.update({name: about[name] for name in total})
                reasons.update(about['reasons'])
                skipped += [[split, *row] for row in about['skipped']]
                for name, span in spans.items():
                    span += about[name] or []
                if captions is not None:
                    captions.update(about['captions'])
                    captions = None if len(captions) > LISTED_CAPTIONS else captions
        splits[split] = {'shards': number, **total, 'skipped': dict(reasons.most_common())}
        logging.info(
            '%s: %d records of %d videos, %.3f GB; skipped: %s',
            *(split, total['records'], total['videos'], total['bytes'] / 1e9),
            ', '.join(f'{n} {reason}' for reason, n in reasons.most_common()) or 'none',
        )
    table = io.StringIO(newline='')
    writer = csv.writer(table, lineterminator='\n')
    writer.writerows([['split', 'file', 'reason', 'detail'], *skipped])
    files.write(files.join(out, SKIPPED), table.getvalue().encode())
    check(settings, skipped, splits, max_bad)
    if not files.is_url(out):
        for folder in (out, files.join(out, records.PARTS)):
            atomic.clear(folder)
    frames, fps = spans['frames'], spans['fps']
    header = {
        'format': records.VIDEOS,
        'source': settings.data,
        'options': dataclasses.asdict(settings),
        'class_names': videos.listing.class_names,
        'captions': None if captions is None else sorted(captions),
        'frames': min(frames) if min(frames) == max(frames) else None,
        'fps': min(fps) if max(fps) - min(fps) <= 1e-3 else None,
        'encoding': settings.encoding,
        'splits': splits,
    }
    files.write(files.join(out, records.HEADER), in_lines(header))
    logging.info('%s is complete', out)


def check(settings: Settings, skipped: list[list[str]], splits: dict, max_bad: float):
    """Raises UserError if too many videos are unreadable, or there are no records."""
    total = sum(split['videos'] for split in splits.values())
    bad = [row for row in skipped if row[0] and row[2] != clips.TOO_SHORT]
    if len(bad) > max_bad * total:
        raise UserError(
            f'--data={settings.data}: {len(bad)} of {total} videos are unreadable, more than '
            f'--max_bad={max_bad} allows: {told(bad)}'
        )
    empty = [name for name, split in splits.items() if not split['records']]
    if len(empty) == len(splits):
        raise UserError(
            f'--data={settings.data}: none of {total} videos gives a record: {told(skipped)}; give '
            'others, or another --out and lower --frames or --stride, or --short=loop'
        )
    if empty:
        logging.warning('the split %r has no records: it cannot be read', empty[0])


def told(skipped: list[list[str]]) -> str:
    """The first reasons, in one line."""
    return '; '.join(str(clips.Skipped(*row[1:])) for row in skipped[:FIRST])


def in_lines(tree: dict) -> bytes:
    return json.dumps(tree, indent=2).encode() + b'\n'


def divide(argv: list[str]) -> tuple[list[str], list[str]]:
    """The arguments of this command, and those of Beam as --name=value."""
    ours, theirs = argv[:1], []
    rest = collections.deque(argv[1:])
    while rest:
        arg = rest.popleft()
        name = arg.lstrip('-').split('=')[0]
        if not arg.startswith('--') or {name, name.removeprefix('no')} & set(flags.FLAGS):
            ours.append(arg)
            continue
        if '=' not in arg and rest and not rest[0].startswith('-'):
            arg += f'={rest.popleft()}'
        theirs.append(arg)
    return ours, theirs


def main():
    # Defined here, so that other scripts can import `prepare` beside flags of their own.
    define = {
        'data': flags.DEFINE_string('data', None, f'KIND:WHERE, a {": or ".join(FILES)}:'),
        'height': flags.DEFINE_integer('height', None, 'Of stored frames, pixels', lower_bound=1),
        'width': flags.DEFINE_integer('width', None, 'Of stored frames, pixels', lower_bound=1),
        'clips': flags.DEFINE_string('clips', 'all', f'Of a video: {", ".join(shards.CLIPS)}'),
        'frames': flags.DEFINE_integer(
            'frames', None, f'In a clip; default {shards.FRAMES}', lower_bound=1
        ),
        'stride': flags.DEFINE_integer(
            'stride', 1, 'Frames of the video per stored frame', lower_bound=1
        ),
        'fps': flags.DEFINE_float(
            'fps', 0.0, 'Stored frames per second, instead of --stride', lower_bound=0.0
        ),
        'crop': flags.DEFINE_string(
            'crop',
            None,
            f'{" or ".join(shards.CROPS)}; default none for whole videos, center for clips',
        ),
        'encoding': flags.DEFINE_string('encoding', 'raw', ' or '.join(shards.ENCODINGS)),
        'short': flags.DEFINE_string('short', 'skip', f'Videos too short: {", ".join(SHORT)}'),
        'per_video': flags.DEFINE_integer('per_video', 1, 'Random clips of a video', lower_bound=1),
        'fold': flags.DEFINE_integer('fold', 1, 'Of ucf101', lower_bound=1, upper_bound=3),
        'test_fraction': flags.DEFINE_float('test_fraction', 0.1, 'Where the data tell no split'),
        'timeout': flags.DEFINE_float(
            'timeout', clips.TIMEOUT, 'Seconds for a clip, or a whole video', lower_bound=0.0
        ),
        'videos_per_shard': flags.DEFINE_integer(
            'videos_per_shard', 256, 'Those that are skipped count', lower_bound=1
        ),
        'seed': flags.DEFINE_integer('seed', 0, 'Of random clips', lower_bound=0),
    }
    out = flags.DEFINE_string('out', None, 'Folder or URL to write')
    max_bad = flags.DEFINE_float('max_bad', 0.5, 'Share of the videos that may be unreadable')
    workers = flags.DEFINE_integer('workers', 1, 'Processes on this machine', lower_bound=1)
    app.define_help_flags()
    sys.argv, beam_flags = divide(sys.argv)

    def run():
        for flag in (define['data'], out, define['height'], define['width']):
            if flag.value in (None, ''):
                raise UserError(
                    f'--{flag.name} is missing: for example --data=folder:DIR --out=OUT '
                    '--height=64 --width=64'
                )
        settings = Settings(**{name: flag.value for name, flag in define.items()})
        arguments = {'max_bad': max_bad.value, 'workers': workers.value}
        prepare(settings, out.value, **arguments, beam_flags=beam_flags)

    cli.run(run)


if __name__ == '__main__':
    main()
