"""What a number may be called, and which videos it may be of."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from cmd_jax import video
from cmd_jax.data import clips, records
from cmd_jax.errors import UserError
from cmd_jax.evaluation import features, measure, pages, protocols, real_clips
from cmd_jax.evaluation.protocols import PROTOCOLS
from tests import tiny_videos
from tests.test_evaluation import FEW, carry_out

resize = features.resize


@pytest.fixture
def small_i3d(monkeypatch):
    """I3D sees 32 pixels a side. Its compiled program, which has the size in it, is for these
    tests alone."""
    features.i3d_program.clear_cache()
    monkeypatch.setattr(features, 'resize', lambda videos, size: resize(videos, 32))
    yield
    features.i3d_program.clear_cache()


def test_numbers_of_the_protocol_are_fvd(small_i3d, generator, tmp_path, monkeypatch):
    small = dataclasses.replace(
        PROTOCOLS['reconstruction'], num_real=5, paper={'reconstruction_fvd': ('7.72', 'x')}
    )
    monkeypatch.setitem(PROTOCOLS, 'reconstruction', small)
    numbers, _ = carry_out(generator, 'reconstruction', tmp_path, measure.Settings())
    assert numbers['comparable'] and numbers['reconstruction_fvd'] > 0
    assert numbers['i3d_size'] == 224
    assert numbers['not_comparable_for'] is None
    assert len(pages.headline(small, numbers).columns) == 3  # the paper's are of other data
    ours = dataclasses.replace(small, paper_data=('moving_digits', 16, 16))
    table = pages.headline(ours, numbers)
    assert table.columns[-2:] == ['CMD, published', 'best other']
    assert table.rows[0][0] == 'reconstruction_fvd' and table.rows[0][3] == '7.72'
    assert len(pages.headline(ours, numbers | {'real_height': 32}).columns) == 3
    assert len(pages.headline(ours, numbers | {'comparable': False}).columns) == 3


def test_published_numbers_stand_beside_their_own_kind_of_data():
    def beside(name, source, prepared_from=None):
        numbers = {'real_source': source, 'real_prepared_from': prepared_from, 'comparable': True}
        return protocols.published(PROTOCOLS[name], numbers | {'real_height': 64, 'real_width': 64})

    assert beside('fvd_2048', 'ucf101:x') and beside('fvd_2048', 'records:x', 'ucf101:x')
    assert not beside('fvd_2048', 'folder:x') and not beside('reconstruction', 'ucf101:x')
    assert beside('clipsim', 'manifest:x') and beside('zero_shot_ucf101', 'ucf101:x')


def test_weights_of_another_file_give_no_fvd(small_i3d, generator, tmp_path, monkeypatch):
    small = dataclasses.replace(PROTOCOLS['reconstruction'], num_real=5)
    monkeypatch.setitem(PROTOCOLS, 'reconstruction', small)
    monkeypatch.setattr(measure.pretrained, 'sha256', lambda _: 64 * '0')
    numbers, _ = carry_out(generator, 'reconstruction', tmp_path, measure.Settings())
    assert not numbers['comparable'] and 'reconstruction_fvd' not in numbers


def test_too_few_videos(generator, tmp_path):
    with pytest.raises(
        UserError, match='2000 videos in the split .test., and the protocol takes 2'
    ):
        carry_out(generator, 'generation', tmp_path, measure.Settings())
    with pytest.raises(UserError, match='--num_videos=2000'):
        carry_out(generator, 'generation', tmp_path, dataclasses.replace(FEW, num_videos=3000))
    with pytest.raises(UserError, match='--num_videos=2: 3 videos or more'):
        carry_out(generator, 'generation', tmp_path, dataclasses.replace(FEW, num_videos=2))


def test_too_few_videos_where_all_are_taken(generator, tmp_path, monkeypatch, not_decoded):
    every = dataclasses.replace(PROTOCOLS['generation'], num_real=None)
    monkeypatch.setitem(PROTOCOLS, 'generation', every)
    with pytest.raises(UserError, match='takes all, 2048 at least.*--num_videos=2000'):
        carry_out(generator, 'generation', tmp_path, measure.Settings())


def test_videos_without_a_clip_are_counted(generator, tmp_path):
    for i in range(4):
        video.write(tmp_path / 'videos' / f'{i}.mp4', tiny_videos.numbered())
    (tmp_path / 'videos/broken.mp4').write_bytes(b'no video')
    settings = dataclasses.replace(FEW, data=f'folder:{tmp_path}/videos', num_videos=3)
    protocol = dataclasses.replace(
        PROTOCOLS['reconstruction'], split='train', num_real=3, num_fake=None
    )
    for _ in range(2):  # decoded, and kept
        numbers, _ = measure.measure(
            generator, 'reconstruction', protocol, settings, tmp_path / 'kept'
        )
        assert numbers['real_missing'] == 1 and not numbers['comparable']
        assert 'videos that gave no clip: 1 unreadable' in numbers['not_comparable_for']


def test_videos_that_cannot_be_decoded_are_counted_once(generator, tmp_path, monkeypatch):
    """Whether features of real clips are kept or not, and of what was looked at alone."""
    for i in range(8):
        video.write(tmp_path / 'videos' / f'{i}.mp4', tiny_videos.numbered())
    read = clips.read

    def sometimes(path, *rest):
        if path.endswith(('0.mp4', '5.mp4')):
            raise clips.BadVideo(clips.UNREADABLE, 'torn')
        return read(path, *rest)

    monkeypatch.setattr(clips, 'read', sometimes)
    settings = dataclasses.replace(FEW, data=f'folder:{tmp_path}/videos', num_videos=5)
    protocol = dataclasses.replace(
        PROTOCOLS['reconstruction'], split='train', num_real=5, num_fake=None
    )
    found = []
    for _ in range(3):
        numbers, _ = measure.measure(
            generator, 'reconstruction', protocol, settings, tmp_path / 'kept'
        )
        found.append(numbers['real_missing'])
        assert 'unreadable' in numbers['not_comparable_for']
    assert found[0] > 0 and len(set(found)) == 1


def test_a_few_that_are_missing_are_told_and_no_fault(generator, tmp_path):
    for i in range(3):
        video.write(tmp_path / f'{i}.mp4', tiny_videos.numbered())
    protocol = dataclasses.replace(PROTOCOLS['reconstruction'], split='train')
    config = generator.config['autoencoder']
    found = real_clips.RealClips(config, protocol, f'folder:{tmp_path}', 2, 0, False)
    assert found.told_missing() == (None, False)
    found.count = 300
    found.missed['unreadable'] = 3
    assert found.told_missing() == ('videos that gave no clip: 3 unreadable', False)
    found.missed['too short'] = 1
    told, too_many = found.told_missing()
    assert told.endswith('3 unreadable, 1 too short') and too_many


def test_what_records_have_left_out(generator, tmp_path):
    folder = records_of(tmp_path, dict(clips='whole'))
    header = json.loads((folder / records.HEADER).read_text())
    header['splits'] = {'train': {'videos': 5, 'skipped': {'too short': 2}}}
    (folder / records.HEADER).write_text(json.dumps(header))
    protocol = dataclasses.replace(PROTOCOLS['reconstruction'], split='train')
    config = generator.config['autoencoder']
    found = real_clips.RealClips(config, protocol, f'records:{folder}', 3, 0, False)
    assert found.told_missing() == ('videos that gave no clip: 2 too short', True)


def records_of(folder, options, split='train'):
    header = {'format': records.VIDEOS, 'class_names': [], 'captions': [''], 'frames': 8, 'fps': 8}
    made = dict(encoding='jpeg', height=32, width=32, per_video=1) | options
    header |= {'source': 'ucf101:x', 'options': made}
    (folder / records.HEADER).write_text(json.dumps(header))
    clip = {'fps': np.float32(8), 'label': np.int32(0), 'caption': '', 'file': 'a'}
    record = records.pack(clip | records.jpeg(np.zeros((8, 32, 32, 3), np.uint8)))
    records.write_shard(str(folder / records.shard_name(split, 0, 1)), [record] * 3)
    return folder


def test_records_of_random_clips_in_a_test_split(generator, tmp_path):
    records_of(tmp_path, dict(clips='random'), 'test')
    config = generator.config['autoencoder']
    found = real_clips.RealClips(
        config, PROTOCOLS['reconstruction'], f'records:{tmp_path}', 3, 0, False
    )
    assert 'records of random clips' in found.faults[0]


@pytest.mark.parametrize(
    'options, told',
    [
        (dict(clips='whole'), None),
        (dict(clips='random'), None),
        (dict(clips='random', per_video=2), 'several clips of a video'),
        (dict(clips='all'), 'several clips of a video'),
        (dict(clips='center'), 'records of the middle clips'),
    ],
)
def test_records_of_other_clips_than_the_protocols(generator, tmp_path, options, told):
    records_of(tmp_path, options)
    protocol = dataclasses.replace(PROTOCOLS['reconstruction'], split='train')
    config = generator.config['autoencoder']
    found = real_clips.RealClips(config, protocol, f'records:{tmp_path}', 3, 0, False)
    assert bool(found.faults) == bool(told) and (not told or told in found.faults[0])
    assert any('JPEG' in x for x in found.warnings)
    assert any('32 x 32 for clips of 16 x 16' in x for x in found.warnings)
    assert found.settings['prepared_from'] == 'ucf101:x'


def test_options_that_would_change_nothing(generator, tmp_path, not_decoded):
    for name, option, what in (
        ('reconstruction', dict(steps=5), '--steps is for generated videos'),
        ('reconstruction', dict(clip='x'), '--clip is for CLIPSIM'),
        ('generation', dict(lpips='x'), '--lpips is for comparisons in pairs'),
    ):
        with pytest.raises(UserError, match=what):
            carry_out(generator, name, tmp_path, dataclasses.replace(FEW, **option))
    for option, what in (
        (dict(steps=2000), 'steps=2000 is out of range'),
        (dict(guidance=float('nan')), 'guidance=nan: choose a number'),
        (dict(sweep=(float('inf'),)), 'guidance=inf'),
    ):
        with pytest.raises(UserError, match=what):
            carry_out(generator, 'generation', tmp_path, dataclasses.replace(FEW, **option))


def test_several_processes_would_do_the_same_work():
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, 'evaluate.py', '--workdir=x', '--protocol=generation'],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {'OMPI_COMM_WORLD_SIZE': '4'},
    )
    assert done.returncode == 2 and 'evaluate.py runs in one process' in done.stderr


def test_clips_of_another_length_than_the_protocols(generator, tmp_path):
    with pytest.raises(UserError, match='protocol=fvd_2048 is of 16 frames, and this run of 4'):
        carry_out(generator, 'fvd_2048', tmp_path, measure.Settings())


def test_videos_that_were_resized_before_are_told(generator, tmp_path):
    rng = np.random.default_rng(0)
    for i, size in enumerate(((16, 16), (12, 16), (40, 60), (50, 50), (16, 22))):
        noise = rng.integers(0, 256, (10, *size, 3), dtype=np.uint8)
        video.write(tmp_path / 'videos' / f'{i}.mp4', noise)
    settings = dataclasses.replace(FEW, data=f'folder:{tmp_path}/videos', num_videos=3)
    with pytest.raises(UserError, match='its classes are not those of this run .zero, one, two'):
        carry_out(generator, 'fvd_2048', tmp_path, settings)
    protocol = dataclasses.replace(PROTOCOLS['reconstruction'], split='train')
    numbers, _ = measure.measure(generator, 'reconstruction', protocol, settings, tmp_path)
    assert 'resized before' in numbers['warnings'] and '12 x 16' in numbers['warnings']
    assert '16 x 22' in numbers['warnings'] and '40 x 60' not in numbers['warnings']
    # The clips do not depend on how they are read.
    config = generator.config['autoencoder']
    clips = real_clips.RealClips(config, protocol, settings.data, 3, 0, False)
    first, second = (np.stack([clip['video'] for clip in clips]) for _ in range(2))
    np.testing.assert_array_equal(first, second)
