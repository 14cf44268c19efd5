import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import fsspec
import pytest

from cmd_jax import video as video_lib
from cmd_jax.data import files, prepare, records, shards
from cmd_jax.data.clip_options import ClipOptions
from cmd_jax.errors import UserError
from tests.prepared import content, header, numbered, settings, write_folder
from tests.tiny_videos import numbers


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp('videos'))


def test_a_split_without_records_is_warned_of(folder, tmp_path, log):
    (tmp_path / 'UCF-101').symlink_to(folder)
    lists = tmp_path / 'ucfTrainTestlist'
    lists.mkdir()
    (lists / 'classInd.txt').write_text('1 cat\n')
    (lists / 'trainlist01.txt').write_text('cat/2.mp4 1\n')
    (lists / 'testlist01.txt').write_text('cat/0.mp4\n')  # 20 frames
    given = shards.Settings(data=f'ucf101:{tmp_path}', height=8, width=8, frames=22)
    prepare.prepare(given, str(tmp_path / 'out'))
    assert "the split 'test' has no records: it cannot be read" in log.messages
    options = ClipOptions(frames=22, height=8, width=8)
    assert len(records.RecordVideos(str(tmp_path / 'out'), 'train', options)) == 1
    with pytest.raises(UserError, match="'test' is empty"):
        records.RecordVideos(str(tmp_path / 'out'), 'test', options)


def test_captions_are_those_of_the_records(folder, tmp_path, monkeypatch):
    for i in range(4):
        video_lib.write(tmp_path / 'in' / f'{i}.mp4', numbered(3 if i == 2 else 20))
        (tmp_path / 'in' / f'{i}.txt').write_text(f'number {i}')
    prepare.prepare(settings(tmp_path / 'in'), str(tmp_path / 'out'))
    assert header(tmp_path / 'out')['captions'] == ['number 0', 'number 1', 'number 3']
    monkeypatch.setattr(prepare, 'LISTED_CAPTIONS', 2)
    (tmp_path / 'out' / 'header.json').unlink()
    prepare.prepare(settings(tmp_path / 'in'), str(tmp_path / 'out'))
    assert header(tmp_path / 'out')['captions'] is None


def test_stores_are_written_to(folder, tmp_path, monkeypatch):
    monkeypatch.setenv('CMD_JAX_CACHE', str(tmp_path / 'cache'))
    files.cache.cache_clear()
    given = dataclasses.replace(settings(folder), data=f'folder:file://{folder}')
    out = 'memory://test_prepare/out'
    try:
        prepare.prepare(given, out)
        options = ClipOptions(frames=16, height=16, width=16)
        made = records.RecordVideos(out, 'train', options)
        assert len(made) + len(records.RecordVideos(out, 'test', options)) == 6
        assert numbers(made[0]['video']) == list(range(16))
    finally:
        fsspec.filesystem('memory').rm('/test_prepare', recursive=True)
        files.cache.cache_clear()


# Beginning again


def test_other_settings_or_files_are_refused(folder, tmp_path):
    out, videos = tmp_path / 'out', tmp_path / 'in'
    for i in range(3):
        video_lib.write(videos / f'{i}.mp4', numbered(20))
    given = settings(videos)
    with pytest.raises(UserError, match='unreadable'):
        prepare.prepare(given, str(out), max_bad=-1.0)
    other = dataclasses.replace(given, frames=4, seed=3)
    with pytest.raises(UserError, match=r'was begun with frames=16 \(now 4\), seed=0 \(now 3\): '):
        prepare.prepare(other, str(out))
    video_lib.write(videos / '3.mp4', numbered(20))
    with pytest.raises(UserError, match="begun with videos={'train': 2, 'test': 1} .now"):
        prepare.prepare(given, str(out))
    (videos / '3.mp4').unlink()
    (videos / '2.mp4').rename(videos / '4.mp4')
    with pytest.raises(UserError, match='listing='):
        prepare.prepare(given, str(out))
    (videos / '4.mp4').rename(videos / '2.mp4')
    prepare.prepare(given, str(out))
    before = content(out)
    for path in videos.iterdir():  # no longer asked for
        path.unlink()
    prepare.prepare(given, str(out))
    assert content(out) == before
    with pytest.raises(UserError, match='was begun with frames=16'):
        prepare.prepare(other, str(out))


def test_other_records_are_left_alone(folder, tmp_path):
    (tmp_path / 'train-00000-of-00001.array_record').touch()
    with pytest.raises(UserError, match='not made here'):
        prepare.prepare(settings(folder), str(tmp_path))


def test_files_that_change_meanwhile_are_told_of(folder, tmp_path):
    options = prepare.parse_beam([], 1)
    with pytest.raises(UserError, match='has changed since the start.*another --out$'):
        prepare.run_pipeline(options, [('train', 0)], settings(folder), str(tmp_path), 'another')


def test_shards_are_made_once(folder, tmp_path):
    given, out = settings(folder), str(tmp_path)
    prepare.prepare(given, out)
    before = content(tmp_path)
    digest = json.loads(before['settings.json'])['listing']
    shard = tmp_path / 'train-00000-of-00002.array_record'
    part = tmp_path / 'parts' / 'train-00000.json'
    for missing, again in [(None, False), (part, True), (shard, True)]:
        changed = shard.stat().st_mtime_ns
        if missing:
            missing.unlink()
        shards.make_shard(('train', 0), given, out, digest)
        assert (shard.stat().st_mtime_ns > changed) == again
        assert content(tmp_path) == before


def test_progress_is_told_of(folder, tmp_path, log, monkeypatch):
    prepare.prepare(settings(folder), str(tmp_path))
    monkeypatch.setattr(prepare, 'PROGRESS', 0.01)
    with prepare.progress(str(tmp_path), 7):
        time.sleep(0.2)
    parts = len(list(tmp_path.glob('parts/*.json')))
    assert log.messages.count(f'{parts} of 7 shards') >= 2


COMMAND = (sys.executable, '-m', 'cmd_jax.data.prepare')


def test_killed_and_begun_again_gives_the_same(tmp_path):
    for i in range(16):
        video_lib.write(tmp_path / 'in' / f'{i}.mp4', numbered(40))
    # Enlarged, so that there is time to kill.
    fields = {'height': 192, 'width': 192, 'clips': 'whole', 'encoding': 'jpeg'}
    given = settings(tmp_path / 'in', videos_per_shard=1, **fields)
    names = ('data', 'test_fraction', 'videos_per_shard', *fields)
    command = [*COMMAND, *(f'--{name}={getattr(given, name)}' for name in names), '--workers=2']
    out = tmp_path / 'out'
    command.append(f'--out={out}')
    log = tmp_path / 'log'
    with open(log, 'w') as f:
        first = subprocess.Popen(command, stderr=f, start_new_session=True)
    try:
        while len(list(out.glob('parts/*.json'))) < 3:
            assert first.poll() is None, log.read_text()
            time.sleep(0.01)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    assert not (out / 'header.json').exists()
    parts = {p.stem for p in out.glob('parts/*.json')}
    made = [p for p in out.glob('*.array_record') if p.name.split('-of-')[0] in parts]
    made = {p: p.stat().st_mtime_ns for p in made}
    assert 3 <= len(made) < 16
    # As if it had been killed in the middle of a file.
    (out / 'train-00007-of-00012.array_record.0123cdef.tmp').write_bytes(b'x')
    again = subprocess.run(command, timeout=100, stderr=subprocess.PIPE, text=True)
    assert again.returncode == 0, again.stderr
    assert f'{16 - len(made)} of them to make' in again.stderr
    assert made == {p: p.stat().st_mtime_ns for p in made}
    prepare.prepare(given, str(tmp_path / 'straight'))
    assert content(out) == content(tmp_path / 'straight')
    assert len(content(out)) == 16 + 16 + 3


# Flags


def test_flags_for_beam():
    options = prepare.parse_beam(['--job_name=x', '--direct_num_workers=3'], 2).get_all_options()
    assert options['runner'] == 'FnApiRunner' and options['job_name'] == 'x'
    assert options['direct_running_mode'] == 'multi_processing'
    assert options['direct_num_workers'] == 3
    options = prepare.parse_beam(['--runner=DataflowRunner', '--project=x'], 1).get_all_options()
    assert options['runner'] == 'DataflowRunner' and options['project'] == 'x'
    for wrong, message in [
        (['--jobname=x'], '--jobname=x is neither a flag of this command nor of Beam'),
        (['stray'], 'stray is neither a flag'),
        (['--direct_num_workers=many'], "Beam's flags: argument --direct_num_workers: invalid int"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            prepare.parse_beam(wrong, 1)
        assert '\n' not in str(error.value)
    with pytest.raises(UserError, match='--workers=2 is for this machine'):
        prepare.parse_beam(['--runner=DataflowRunner'], 2)


def test_arguments_are_divided():
    flags = ['prepare', '--v=1', '--job_name', 'x', '--verbosity', '2', '--runner=Y', '--noalso']
    ours, theirs = prepare.divide(flags)
    assert ours == ['prepare', '--v=1', '--verbosity', '2']
    assert theirs == ['--job_name=x', '--runner=Y', '--noalso']
    options = prepare.parse_beam(['--runner=DirectRunner'], 2).get_all_options()
    assert options['runner'] == 'FnApiRunner' and options['direct_num_workers'] == 2


def test_beam_refuses_before_anything_is_run(folder, tmp_path):
    with pytest.raises(UserError, match='Unexpected pipeline runner: Nix') as error:
        prepare.prepare(settings(folder), str(tmp_path), beam_flags=['--runner=Nix'])
    assert '\n' not in str(error.value)


def test_without_beam(monkeypatch):
    monkeypatch.setitem(sys.modules, 'apache_beam.options.pipeline_options', None)
    with pytest.raises(UserError, match='pip install -r requirements-beam.txt'):
        prepare.parse_beam([], 1)


def test_wrong_flags_exit_with_a_line(folder, tmp_path):
    good = [f'--data=folder:{folder}', f'--out={tmp_path / "out"}', '--height=16', '--width=16']
    cases = [
        ([*good, '--crops=none'], '--crops=none is neither a flag of this command nor of Beam'),
        ([*good, '--crop=left'], "--crop='left' is unknown"),
        (good[:3], '--width is missing'),
    ]
    started = [
        (subprocess.Popen([*COMMAND, *args], stderr=subprocess.PIPE, text=True), message)
        for args, message in cases
    ]
    try:
        errors = [process.communicate(timeout=100)[1] for process, _ in started]
    finally:
        for process, _ in started:
            process.kill()
    for (process, message), error in zip(started, errors, strict=True):
        assert process.returncode == 2 and 'Traceback' not in error
        assert error.splitlines()[-1].startswith('error: ') and message in error.splitlines()[-1]
    assert not (tmp_path / 'out').exists()
    shown = subprocess.run([*COMMAND, '--help'], capture_output=True, text=True, timeout=100)
    assert '--videos_per_shard' in shown.stdout and 'Traceback' not in shown.stderr
