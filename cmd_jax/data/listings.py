"""The lists of video files that sources are made of: folders and UCF-101 (`manifest`: tables)."""

import os
import posixpath
import re

import pyarrow as pa

from cmd_jax.data import captions, files
from cmd_jax.data.videos import FIRST, Listing
from cmd_jax.errors import UserError

EXTENSIONS = frozenset(
    '.3g2 .3gp .asf .avi .f4v .flv .gif .m1v .m2ts .m2v .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv '
    '.rm .ts .vob .webm .wmv'.split()
)
UCF101_LISTS = 'ucfTrainTestlist'
UCF101_VIDEOS = 'UCF-101'


def folder(path: str) -> Listing:
    """The video files in a folder and its sub-folders.

    Where files lie in sub-folders, the sub-folder of the first level is the class; files beside
    the class folders are then skipped. Otherwise there are no classes.

    Captions come from captions.csv or a text file beside the video, see `captions.read`; a file
    with neither has its class name in words, or '' without classes.

    Raises:
      UserError: no such folder, or no video file in it; captions that cannot be read.
    """
    found, others = find_videos(path)
    classes = sorted({f.split('/')[0] for f in found if '/' in f})
    skipped = dict.fromkeys(
        (f for f in found if classes and '/' not in f), 'beside the class folders'
    )
    # Names that are not UTF-8 cannot be written to tables.
    skipped |= {repr(f): 'name is not UTF-8' for f in found if not is_utf8(f)}
    chosen = [f for f in found if f not in skipped and is_utf8(f)]
    own, absent = captions.read(path, found, others)
    columns = {
        'file': chosen,
        'caption': [own.get(f) or (in_words(f.split('/')[0]) if classes else '') for f in chosen],
    }
    if classes:
        number = {name: i for i, name in enumerate(classes)}
        columns['label'] = pa.array([number[f.split('/')[0]] for f in chosen], pa.int32())
    notes = []
    if own or absent:
        captioned = sum(f in own for f in chosen)
        notes.append(f'{captioned} with a caption of their own, {len(chosen) - captioned} without')
    if absent:
        notes.append(
            f'rows of {captions.CSV} that name no video: {len(absent)} (first: {absent[0]!r})'
        )
    odd = [f for f in others if posixpath.splitext(f)[1].lower() not in ('.txt', '.csv')]
    if odd:
        notes.append(f'{len(odd)} files are no videos by their extension (first: {odd[0]!r})')
    return Listing('folder', path, pa.table(columns), classes, skipped, notes)


def ucf101(path: str, fold: int = 1) -> Listing:
    """A local copy of UCF-101 in its original layout, with the official train and test lists.

    Args:
      path: the folder of the classes' folders (or the one around it, with UCF-101/ in it); beside
        or in it is ucfTrainTestlist/ with classInd.txt, trainlist0N.txt and testlist0N.txt.
      fold: N, 1 to 3.

    Raises:
      UserError: lists or videos are not there, or not as expected.
    """
    root = files.join(path, UCF101_VIDEOS)
    root = root if files.is_folder(root) else path
    places = [files.join(p, UCF101_LISTS) for p in (path, files.join(path, '..'))]
    lists = next((place for place in places if files.is_folder(place)), None)
    if lists is None:
        raise UserError(
            f'ucf101:{path}: {UCF101_LISTS}/ is neither in it nor beside it: unpack '
            'UCF101TrainTestSplits-RecognitionTask.zip there'
        )
    classes = read_classes(files.join(lists, 'classInd.txt'))
    number = {name: i for i, name in enumerate(classes)}
    rows, splits = [], []
    for split in ('train', 'test'):
        name = files.join(lists, f'{split}list{fold:02d}.txt')
        for line in read_lines(name):
            file = line.split()[0]
            if file.split('/')[0] not in number:
                raise UserError(f'{name}: {line!r} is of no class of classInd.txt')
            rows.append(file), splits.append(split)
    present = set(find_videos(root)[0])
    absent = [file for file in rows if file not in present]
    if absent:
        raise UserError(
            f'{root}: {len(absent)} of the {len(rows)} videos in {UCF101_LISTS} are not there: '
            f'{", ".join(absent[:FIRST])}'
        )
    names = [file.split('/')[0] for file in rows]
    columns = {
        'file': rows,
        'split': splits,
        'label': pa.array([number[name] for name in names], pa.int32()),
        'caption': [in_words(name) for name in names],
    }
    return Listing('ucf101', root, pa.table(columns), classes)


def read_classes(path: str) -> list[str]:
    """The names in classInd.txt: lines of number, from 1 on, and name."""
    words = [line.split() for line in read_lines(path)]
    wrong = [w for i, w in enumerate(words, 1) if len(w) != 2 or w[0] != str(i)]
    if wrong or not words:
        first = ' '.join(wrong[0]) if wrong else ''
        raise UserError(f'{path}: a line is {first!r}: expected number and name, from 1 on')
    return [w[1] for w in words]


def read_lines(path: str) -> list[str]:
    """The lines of a text file that are not blank."""
    lines = files.read(path).decode('utf-8', errors='replace').splitlines()
    return [line.strip() for line in lines if line.strip()]


def find_videos(path: str) -> tuple[list[str], list[str]]:
    """Video files under a folder, by extension.

    Returns sorted paths in the folder, '/' between parts, and those of the other files. A folder
    named like a video that has none in it counts as a video: it is told of when it is opened.
    """
    if not files.is_folder(path):
        what = 'is a file, not a folder' if files.exists(path) else 'does not exist'
        raise UserError(f'{path!r} {what}: give a folder of videos')
    found, others = [], []
    for file in files.walk(path) if files.is_url(path) else walk(path):
        name = posixpath.basename(file)
        if posixpath.splitext(name)[1].lower() not in EXTENSIONS:
            others.append(file)
        elif not name.startswith('.'):
            found.append(file)
    if not found:
        raise UserError(
            f'{path}: no video file in it ({len(others)} other files); known extensions: '
            f'{" ".join(sorted(EXTENSIONS))}'
        )
    return sorted(found), others


def walk(path: str):
    """Files under a local folder, links being followed once, without hidden folders; and folders
    that are named like files and empty."""
    seen = set()
    for root, folders, names in os.walk(path, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith('.')]
        real = os.path.realpath(root)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        if not folders and not names and root != path:
            yield os.path.relpath(root, path).replace(os.sep, '/')
        for name in names:
            yield os.path.relpath(os.path.join(root, name), path).replace(os.sep, '/')


def is_utf8(name: str) -> bool:
    """Whether a file's name can be written as text; Python keeps other bytes as surrogates."""
    return name.isascii() or not any('\ud800' <= letter <= '\udfff' for letter in name)


def in_words(name: str) -> str:
    """'ApplyEyeMakeup' and 'apply_eye_makeup' as 'apply eye makeup'."""
    return re.sub('(?<=[a-z])(?=[A-Z])', ' ', name).replace('_', ' ').lower()
