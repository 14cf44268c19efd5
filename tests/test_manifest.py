import json
import pickle
import tracemalloc

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from cmd_jax import video as video_lib
from cmd_jax.data import captions, manifest, videos
from cmd_jax.data.clip_options import ClipOptions
from tests.manifests import SUFFIXES, file, write
from tests.tiny_videos import numbered, numbers

FPS = 8


@pytest.fixture
def remote():
    """A folder of a store, in this process's memory."""
    system = fsspec.filesystem('memory')
    yield 'memory://manifests'
    if system.exists('/manifests'):
        system.rm('/manifests', recursive=True)


def content(listing):
    """{column: values}, NaN as None."""
    columns = listing.table.to_pydict()
    return {
        name: [None if value != value else value for value in values]
        for name, values in columns.items()
    }


# What is read


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_formats_give_the_same_listing(tmp_path, suffix):
    columns = {
        'id': [7, 8, 9, 10],
        'path': ['a.mp4', 'b/c, d.mp4', '/abs/e.mp4', 'gs://x/f.mp4'],
        'caption': ['a "cat", asleep', ' un\n chat\u3000\u00e9 ', None, 'NA'],
        'label': ['RunFast', 'dog', 'RunFast', '001'],
        'start': [0.5, None, None, 1e1],
        'end': [2.25, 3.0, None, None],
        'split': ['train', 'test', 'train', 'test'],
    }
    listing = manifest.read(write(tmp_path / f'm{suffix}', columns))
    assert content(listing) == {
        'file': columns['path'],
        'caption': ['a "cat", asleep', 'un chat \u00e9', '', 'NA'],
        'label': [1, 2, 1, 0],
        'start': columns['start'],
        'end': columns['end'],
        'split': columns['split'],
    }
    assert listing.class_names == ['001', 'RunFast', 'dog']
    assert listing.name == 'manifest' and listing.root == str(tmp_path) and not listing.skipped
    types = {field.name: field.type for field in listing.table.schema}
    assert types['label'] == pa.int32() and types['caption'] == pa.string() == types['file']
    assert types['start'] == types['end'] == pa.float64()
    assert list(listing.notes) == [
        'columns path, caption, label, start, end, split (ignored: id)',
        '1 of 4 rows without a caption',
    ]


@pytest.mark.parametrize('suffix', SUFFIXES)
@pytest.mark.parametrize('kind', [int, str])
def test_whole_numbers_are_the_labels(tmp_path, suffix, kind):
    columns = {'path': ['a', 'b', 'c'], 'label': [kind(3), kind(0), kind(12)]}
    listing = manifest.read(write(tmp_path / f'm{suffix}', columns))
    assert content(listing) == {'file': ['a', 'b', 'c'], 'label': [3, 0, 12]}
    assert listing.class_names == [str(i) for i in range(13)]


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_class_name_in_words_is_the_caption(tmp_path, suffix):
    columns = {'path': ['a', 'b', 'c'], 'label': ['run_fast', 'ApplyLipstick', 'run_fast']}
    listing = manifest.read(write(tmp_path / f'm{suffix}', columns))
    assert content(listing)['caption'] == ['run fast', 'apply lipstick', 'run fast']
    assert content(listing)['label'] == [1, 0, 1]


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_path_is_enough_and_empty_times_are_no_columns(tmp_path, suffix):
    columns = {'path': ['a', 'b'], 'start': [None, None], 'end': [None, None]}
    listing = manifest.read(write(tmp_path / f'm{suffix}', columns))
    assert content(listing) == {'file': ['a', 'b']} and listing.class_names == []


def test_csv_text_is_text(tmp_path):
    text = (
        '\ufeff\r\n path , caption,split,start,extra,extra,\r\n'
        '001,null, train ,,"unquoted 5"" pipe, and\nlines",,\r\n'
        '\r\n'
        '1e5,"two\r\nlines, ""x""",test, 1.5 ,NaN,,\r\n'
        'c,7,test,"",,,'
    )
    listing = manifest.read(file(tmp_path, text))
    assert content(listing) == {
        'file': ['001', '1e5', 'c'],
        'caption': ['null', 'two lines, "x"', '7'],
        'split': ['train', 'test', 'test'],
        'start': [None, 1.5, None],
    }
    assert listing.notes == ["columns path, caption, split, start (ignored: extra, extra, '')"]
    # Nothing in the columns speaks against numbers and times.
    listing = manifest.read(file(tmp_path, 'path,caption\n001,2020-01-01\n1e5,2021-02-03\n'))
    assert content(listing) == {'file': ['001', '1e5'], 'caption': ['2020-01-01', '2021-02-03']}


def test_json_strings_are_text_and_keys_may_come_late(tmp_path):
    lines = [{'path': f'{i}.mp4', 'id': [i]} for i in range(300)]
    lines[-1] |= {'caption': '2020-01-01 00:00:00'}
    lines[-2] |= {'caption': '17', 'id': 'mixed'}
    text = '\ufeff' + '\n\n'.join(map(json.dumps, lines))
    listing = manifest.read(file(tmp_path, text, 'm.jsonl'))
    assert listing.table['file'].to_pylist() == [line['path'] for line in lines]
    assert content(listing)['caption'] == [''] * 298 + ['17', '2020-01-01 00:00:00']
    assert listing.notes[0] == 'columns path, caption (ignored: id)'


def test_parquet_of_other_types(tmp_path):
    table = pa.table(
        {
            'path': pa.array(['a', 'b'], pa.large_string()),
            'caption': pa.array(['x', 'y']).dictionary_encode(),
            'label': pa.array([1.0, 0.0]),  # pandas, after a gap was filled
            'start': pa.array([0, 1], pa.int8()),
            'end': pa.array([np.nan, 2.5], pa.float32()),
        }
    )
    path = str(tmp_path / 'm.parquet')
    pq.write_table(table, path)
    assert content(manifest.read(path)) == {
        'file': ['a', 'b'],
        'caption': ['x', 'y'],
        'label': [1, 0],
        'start': [0, 1],
        'end': [None, 2.5],
    }
    categories = pa.array(['dog', 'cat']).dictionary_encode()
    pq.write_table(pa.table({'path': ['a', 'b'], 'label': categories}), path)
    assert manifest.read(path).class_names == ['cat', 'dog']
    assert content(manifest.read(path))['label'] == [1, 0]


def test_white_space_is_that_of_text_files(tmp_path):
    white = [chr(i) for i in range(1, 0x3100) if chr(i).isspace()]
    assert len(white) > 20
    texts = [f'{w}a{w}{w}\n b{w}' for w in white] + ['a\u200bb', 'a\x01b']
    path = write(tmp_path / 'm.parquet', {'path': ['a'] * len(texts), 'caption': texts})
    assert content(manifest.read(path))['caption'] == [captions.in_one_line(t) for t in texts]


# Where files are


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_a_remote_manifest(remote, suffix):
    columns = {'path': ['a.mp4', '/abs/b.mp4', 'memory://other/c.mp4'], 'caption': ['x', '', 'z']}
    listing = manifest.read(write(f'{remote}/sub/m{suffix}', columns))
    assert listing.root == f'{remote}/sub'
    source = videos.VideoFiles(
        listing, 'train', ClipOptions(frames=2, height=8, width=8), probe=False, test_fraction=1e-9
    )
    paths = {source.path(v) for v in range(source.videos)}
    assert paths <= {f'{remote}/sub/a.mp4', '/abs/b.mp4', 'memory://other/c.mp4'}
    assert len(paths) == 2  # one is kept for testing


@pytest.mark.parametrize(
    'path, folder',
    [
        ('m.csv', '.'),
        ('/m.csv', '/'),
        ('a/b/m.csv', 'a/b'),
        ('gs://bucket/m.csv', 'gs://bucket'),
        ('memory://m.csv', 'memory://'),
        ('file:///m.csv', 'file:///'),
    ],
)
def test_folder_of(path, folder):
    assert manifest.folder_of(path) == folder


def test_a_bare_name_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file(tmp_path, 'path\na.mp4\n')
    assert manifest.read('m.csv').root == '.'


# Clips


@pytest.mark.parametrize('probe', [True, False])
@pytest.mark.parametrize('rate', [{'stride': 2}, {'fps': 4.0}])
def test_parts_become_clips(tmp_path, probe, rate, log):
    video_lib.write(tmp_path / 'a.mp4', numbered(), fps=FPS)
    columns = {
        'path': ['a.mp4'] * 4 + [str(tmp_path / 'a.mp4')],
        'start': [1.0, 2.5, None, None, 0.0],
        'end': [2.0, None, 1.25, None, 1.0],
        'caption': ['one', 'two', 'three', 'four', 'five'],
        'label': [0, 1, 2, 3, 4],
        'split': ['train', 'train', 'train', 'test', 'test'],
    }
    path = write(tmp_path / 'm.csv', columns)
    options = ClipOptions(frames=3, height=16, width=16, **rate)
    # Frames of each part, at 8 a second: [start, end).
    parts = {'one': (8, 16), 'two': (20, 40), 'three': (0, 10), 'four': (0, 40), 'five': (0, 8)}
    seen = {}
    for split, own in [('train', ['one', 'two', 'three']), ('test', ['four', 'five'])]:
        # Nothing is left for a fraction to say.
        fields = dict(probe=probe, test_fraction=0.0)
        source = videos.VideoFiles(manifest.read(path), split, options, **fields)
        source = pickle.loads(pickle.dumps(source))
        assert len(source) == len(own) and source.class_names == list('01234')
        assert source.captions == sorted(own)
        for i, name in enumerate(own):
            for seed in range(6):
                clip = source.__getitem__(i, np.random.default_rng(seed))
                assert clip['caption'] == name and clip['label'] == list(parts).index(name)
                first, *rest = numbers(clip['video'])
                assert rest == [first + 2, first + 4]
                assert parts[name][0] <= first and first + 4 < parts[name][1]
                seen.setdefault(name, set()).add(first)
    assert all(len(seen[name]) > 1 for name in ('one', 'two', 'three'))
    assert seen['four'] == {17} and seen['five'] == {1}  # testing: the middle
    assert 'columns path, start, end, caption, label, split (ignored: none)' in log.text


def test_parts_too_short_or_behind_the_end_are_skipped(tmp_path):
    video_lib.write(tmp_path / 'a.mp4', numbered(16), fps=FPS)
    text = 'path,start,end\na.mp4,0,1\na.mp4,1,1.25\na.mp4,7,8\n'
    source = videos.VideoFiles(
        manifest.read(file(tmp_path, text)), 'train', ClipOptions(frames=4, height=16, width=16)
    )
    assert len(source) == 1 and numbers(source[0]['video'])[0] in range(5)


# Size


@pytest.mark.parametrize('suffix', ['.csv', '.parquet', '.jsonl'])
def test_rows_are_no_python_objects(tmp_path, suffix):
    rows = 300_000
    number = pa.array(np.arange(rows)).cast(pa.string())
    table = pa.table(
        {
            'path': pc.binary_join_element_wise('videos/', number, '.mp4', ''),
            'caption': pc.binary_join_element_wise(' a\nvideo with the number', number, ' '),
            'label': pc.binary_join_element_wise('c', pc.utf8_slice_codeunits(number, 0, 2), ''),
            'start': pc.divide(pa.array(np.arange(rows)), 8.0),
            'split': pa.array(np.where(np.arange(rows) % 10, 'train', 'test')),
            'other': number,
        }
    )
    path = str(tmp_path / f'm{suffix}')
    if suffix == '.csv':
        pyarrow.csv.write_csv(table, path)
    elif suffix == '.parquet':
        pq.write_table(table, path)
    else:
        keys = ['{"path":"', '","caption":"', '","label":"', '","split":"', '"}']
        columns = [table[name] for name in ('path', 'caption', 'label', 'split')]
        columns[1] = pc.replace_substring(columns[1], '\n', '\\n')
        parts = [part for pair in zip(keys, columns) for part in pair] + [keys[-1]]
        lines = pc.binary_join_element_wise(*parts, '')
        with open(path, 'wb') as f:
            f.write('\n'.join(lines.to_pylist()).encode())
    del number, table
    tracemalloc.start()
    try:
        listing = manifest.read(path)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(listing.table) == rows and listing.table.nbytes > 15e6
    last = listing.table.slice(rows - 1).to_pylist()[0]
    assert last['file'] == 'videos/299999.mp4' and last['split'] == 'train'
    assert last['caption'] == 'a video with the number 299999'
    assert listing.class_names[last['label']] == 'c29' and len(listing.class_names) == 100
    # A Python object is some 60 bytes: one for each row is more than this.
    assert peak < 18e6, f'peak {peak / 1e6:.1f} MB'
    numbers = sum(a.nbytes for a in (np.empty(rows, np.int32), np.empty(rows)))
    assert kept < numbers + 2e6, f'kept {kept / 1e6:.1f} MB'
