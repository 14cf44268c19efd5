import pickle

import numpy as np
import pyarrow as pa
import pytest

from cmd_jax import video as video_lib
from cmd_jax.data import listings, pipeline, sources, videos
from cmd_jax.data.clip_options import ClipOptions
from cmd_jax.data.clips import Skipped
from cmd_jax.errors import UserError
from tests.tiny_videos import hostile, numbered, numbers


def make(path, split='train', fields=(), **options):
    """The folder as a source; `fields` are of VideoFiles, `options` of the clips."""
    options = ClipOptions(**{'frames': 8, 'height': 16, 'width': 16} | options)
    return sources.make_source(f'folder:{path}', split, options, **dict(fields))


@pytest.fixture
def folder(tmp_path):
    for name in ('cat', 'FlyingBird'):
        for i in range(4):
            video_lib.write(tmp_path / name / f'{i}.mp4', numbered(20 + i, 24, 40))
    return tmp_path


def test_folder_gives_clips_with_classes(folder, log):
    (folder / 'notes.txt').write_text('x')
    (folder / '.hidden.mp4').write_text('x')
    splits = {s: make(folder, s) for s in sources.SPLITS}
    assert splits['train'].class_names == splits['test'].class_names == ['FlyingBird', 'cat']
    assert len(splits['train']) + len(splits['test']) == 8 and len(splits['test']) >= 1
    assert not splits['train'].skipped
    for split, source in splits.items():
        start = f'folder: {len(source)} clips of {len(source)} videos to {split} in 2 classes'
        assert log.messages.count(start) == 1
    for source in splits.values():
        for i in range(len(source)):
            sample = source[i]
            assert sample['video'].shape == (8, 16, 16, 3) and sample['index'] == i
            assert sample['caption'] == ['flying bird', 'cat'][sample['label']]


def test_folder_clips_are_random_in_training_only(folder):
    train = make(folder, frames=4, stride=3, height=24, width=40)
    test = make(folder, 'test', frames=4, stride=3, height=24, width=40)
    starts = set()
    for seed in range(30):
        got = numbers(train.__getitem__(0, np.random.default_rng(seed))['video'])
        assert np.diff(got).tolist() == [3, 3, 3]
        starts.add(got[0])
    longest = train.info(0).frames - 10
    assert len(starts) > 5 and min(starts) <= 1 and longest - 1 <= max(starts) <= longest
    fixed = numbers(test[0]['video'])
    assert fixed == numbers(test.__getitem__(0, np.random.default_rng(0))['video'])
    assert fixed[0] == (test.info(0).frames - 10) // 2


def test_folder_crops_and_flips_in_training(tmp_path):
    video = np.zeros((4, 16, 64, 3), np.uint8)
    video[:] = 3 * np.arange(64, dtype=np.uint8)[:, None]
    video_lib.write(tmp_path / 'x.mp4', video)
    places = {True: [], False: []}
    for flip in (True, False):
        source = make(tmp_path, frames=4, flip=flip)
        for seed in range(40):
            row = source.__getitem__(0, np.random.default_rng(seed))['video'][0, 8, :, 0].astype(
                int
            )
            places[flip].append((row.min() / 3, row[-1] > row[0]))
    assert {up for _, up in places[True]} == {True, False}
    assert {up for _, up in places[False]} == {True}
    assert min(places[False])[0] < 8 and max(places[False])[0] > 40


def test_folder_skips_and_counts_broken_files(folder, log):
    expected = hostile(folder / 'cat')
    video_lib.write(folder / 'cat' / 'short.mp4', numbered(5))
    video_lib.write(folder / 'cat' / 'still.mp4', numbered(1))
    (folder / 'cat' / 'folder.mp4').mkdir()
    video_lib.write(folder / 'stray.mp4', numbered())
    source = make(folder)
    reasons = {f.removeprefix('cat/'): r.split(' (')[0] for f, r in source.skipped.items()}
    expected |= {'short.mp4': 'too short', 'still.mp4': 'too short', 'folder.mp4': 'not a file'}
    assert reasons == expected | {'stray.mp4': 'beside the class folders'}
    line = next(m for m in log.messages if m.startswith('folder: '))
    assert 'skipped 9: 3 unreadable, 2 too short, ' in line
    assert '1 empty file' in line and '(first: stray.mp4: ' in line and '\n' not in line

    looped = make(folder, short='loop')
    assert 'cat/short.mp4' not in looped.skipped and 'cat/still.mp4' in looped.skipped


@pytest.mark.parametrize(
    'short, expected', [('loop', [0, 2, 4, 1, 3, 0, 2, 4]), ('hold', [0, 2, 4, 4, 4, 4, 4, 4])]
)
def test_short_videos_are_made_long(tmp_path, short, expected):
    video_lib.write(tmp_path / 'x.mp4', numbered(5))
    source = make(tmp_path, stride=2, short=short)
    got = source.__getitem__(0, np.random.default_rng(0))
    assert numbers(got['video']) == expected
    assert source.class_names == [] and got['label'] == 0 and got['caption'] == ''


def split_files(names, fraction):
    rows = videos.split_rows(pa.chunked_array([names]), fraction)
    return {split: [names[i] for i in chosen] for split, chosen in rows.items()}


def test_split_is_stable_and_never_empty():
    names = [f'{i}.mp4' for i in range(1000)]
    split = split_files(names, 0.1)
    assert set(split['train']) | set(split['test']) == set(names)
    assert len(split['train']) + len(split['test']) == 1000 and 70 < len(split['test']) < 130
    fewer = split_files(names[::2], 0.1)
    assert set(fewer['test']) <= set(split['test'])
    for n in (2, 3, 5):
        small = split_files(names[:n], 0.001)
        assert len(small['test']) == 1 and len(small['train']) == n - 1
        assert len(split_files(names[:n], 0.999)['train']) == 1
    assert split_files(['x'], 0.1) == {'train': ['x'], 'test': ['x']}
    # Parts of one file are never in both splits.
    parts = split_files([name for name in names for _ in range(3)], 0.1)
    assert not set(parts['train']) & set(parts['test']) and len(parts['test']) % 3 == 0


def test_single_file_serves_both_splits(tmp_path, log):
    video_lib.write(tmp_path / 'x.mp4', numbered())
    lengths = [len(make(tmp_path, split)) for split in sources.SPLITS]
    assert lengths == [1, 1]
    assert any('the only file serves for training and testing' in m for m in log.messages)


def test_links_to_folders_are_followed_once(tmp_path, folder):
    (folder / 'cat' / 'up').symlink_to(folder)
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'link').symlink_to(folder / 'FlyingBird')
    assert len(listings.find_videos(str(folder / 'cat'))[0]) == 8
    assert len(listings.find_videos(str(tmp_path / 'other'))[0]) == 4


def test_unusable_folders_are_user_errors(tmp_path):
    with pytest.raises(UserError, match='absent.*does not exist'):
        make(tmp_path / 'absent')
    (tmp_path / 'notes.txt').write_text('x')
    with pytest.raises(UserError, match='is a file'):
        make(tmp_path / 'notes.txt')
    with pytest.raises(UserError, match='no video file in it .1 other'):
        make(tmp_path)
    hostile(tmp_path)
    with pytest.raises(UserError, match='none of its 5 video files.*3 unreadable') as error:
        make(tmp_path)
    assert '\n' not in str(error.value)
    video_lib.write(tmp_path / 'short.mp4', numbered(7))
    with pytest.raises(UserError, match="1 too short.*short='loop'"):
        make(tmp_path)


def test_too_many_bad_files_stop_a_run(folder):
    hostile(folder / 'cat')
    with pytest.raises(UserError) as error:
        make(folder, fields={'max_bad': 0.3})
    words = str(error.value)
    assert '5 of 13 videos are unreadable, more than data.max_bad=0.3' in words
    assert words.count('cat/') == 5 and 'cat/zero.mp4: empty file' in words
    make(folder, fields={'max_bad': 0.4})


def test_without_probing_what_is_bad_is_found_on_the_way(folder, log):
    hostile(folder / 'cat')
    video_lib.write(folder / 'cat' / 'short.mp4', numbered(5))
    source = make(folder, fields={'probe': False})
    found = [source[i] for i in range(len(source))]
    bad = {s.file: s.reason for s in found if isinstance(s, Skipped)}
    probed = make(folder)
    mine = {source.file(i) for i in range(len(source))}
    expected = {f: r.split(' (')[0] for f, r in probed.skipped.items() if f in mine}
    assert bad == expected and len(bad) >= 4
    good = {source.file(i): s['video'] for i, s in enumerate(found) if isinstance(s, dict)}
    for i in range(len(probed)):
        np.testing.assert_array_equal(good[probed.file(i)], probed[i]['video'])


def test_all_clips_of_a_video(tmp_path):
    video_lib.write(tmp_path / 'a.mp4', numbered(25))
    video_lib.write(tmp_path / 'b.mp4', numbered(8))
    video_lib.write(tmp_path / 'c.mp4', numbered(17))
    source = make(tmp_path, clips='all', fields={'test_fraction': 0.001})
    files = [source.file(v) for v in range(source.videos)]
    clips_of = {'a.mp4': 3, 'b.mp4': 1, 'c.mp4': 2}
    assert len(source) == sum(clips_of[f] for f in files) and len(files) == 2
    got = [numbers(source[i]['video'])[0] for i in range(len(source))]
    assert got == [8 * k for f in files for k in range(clips_of[f])]


def test_a_long_list_of_files_lies_in_one_file_that_workers_map(folder, monkeypatch):
    plain = make(folder)
    whole = pickle.dumps(plain)
    monkeypatch.setattr(videos, 'MAPPED_BYTES', 0)
    source = make(folder)
    sent = pickle.dumps(source)
    assert b'.mp4' in whole and b'.mp4' not in sent
    for copy in (source, pickle.loads(sent)):
        assert [copy.file(i) for i in range(len(copy))] == [
            plain.file(i) for i in range(len(plain))
        ]
        np.testing.assert_array_equal(copy[1]['video'], plain[1]['video'])


def cut_in_half(path):
    """Damages a file whose header stays whole (the index comes first in our mp4)."""
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b'mdat') + 60])


def test_files_that_fail_later_are_passed_over(folder, log):
    source = make(folder, frames=20)
    bad = source.file(2)
    cut_in_half(folder / bad)
    assert source[2].file == bad and source[2].reason == 'unreadable'
    assert source[0]['video'].shape == (20, 16, 16, 3)
    options = {'seed': 0, 'shuffle': True}
    once = pipeline.Batches(source, 3, repeat=False, **options)
    batches = list(once)
    assert list(once.skipped) == [bad] and sum(bad in m for m in log.messages) == 1
    once.close()
    told = f'folder: of {len(source)} samples, 1 could not be had (unreadable: 1); by file: 1 '
    assert sum(m.startswith(told) for m in log.messages) == 1
    assert sorted(np.concatenate([b['index'] for b in batches])) == [0, 1, *range(3, len(source))]
    assert [len(b['index']) for b in batches[:-1]] == [3] * (len(batches) - 1)
    endless = pipeline.Batches(source, 3, repeat=True, **options)
    assert [next(endless)['video'].shape[0] for _ in range(6)] == [3] * 6

    for i in range(len(source)):
        cut_in_half(folder / source.file(i))
    with pytest.raises(UserError, match='more than data.max_bad=0.5, cannot be had') as error:
        next(pipeline.Batches(source, 3, repeat=True, **options))
    assert bad in str(error.value) and '\n' not in str(error.value)
    with pytest.raises(UserError, match='samples in a row cannot be had'):
        next(pipeline.Batches(source, 3, repeat=True, max_bad=1.0, **options))


def test_names_that_are_not_text_are_told_of(folder, log):
    name = b'caf\xe9.mp4'.decode('utf-8', 'surrogateescape')
    (folder / 'cat' / '0.mp4').rename(folder / 'cat' / name)
    source = make(folder)
    assert list(source.skipped.values()) == ['name is not UTF-8']
    assert source.videos + make(folder, 'test').videos == 7
