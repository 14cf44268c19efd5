import shutil

import pytest

from cmd_jax import video
from cmd_jax.data import sources
from cmd_jax.data.clip_options import ClipOptions
from cmd_jax.errors import UserError
from tests.tiny_videos import numbered

# In the official order, which is not everybody's alphabet: 'TaiChi' is after 'TableTennisShot'.
CLASSES = ['ApplyEyeMakeup', 'BaseballPitch', 'YoYo']
OPTIONS = ClipOptions(frames=4, height=16, width=16)


@pytest.fixture
def tree(tmp_path):
    """A miniature of the original layout: three classes, three groups, two clips each."""
    files = [f'{c}/v_{c}_g{g:02d}_c{k:02d}.avi' for c in CLASSES for g in (1, 2, 3) for k in (1, 2)]
    first = tmp_path / 'UCF-101' / files[0]
    first.parent.mkdir(parents=True)
    video.write(tmp_path / 'x.mp4', numbered(6))
    (tmp_path / 'x.mp4').rename(first)
    for file in files[1:]:
        path = tmp_path / 'UCF-101' / file
        path.parent.mkdir(exist_ok=True)
        shutil.copy(first, path)
    lists = tmp_path / 'ucfTrainTestlist'
    lists.mkdir()
    lines = [f'{i} {name}' for i, name in enumerate(CLASSES, 1)]
    (lists / 'classInd.txt').write_text('\r\n'.join(lines) + '\r\n')
    for fold in (1, 2, 3):
        test = [f for f in files if f'_g{fold:02d}_' in f]
        train = [f'{f} {CLASSES.index(f.split("/")[0]) + 1}' for f in files if f not in test]
        (lists / f'trainlist{fold:02d}.txt').write_text('\r\n'.join(train) + '\r\n')
        (lists / f'testlist{fold:02d}.txt').write_text('\n'.join(test) + '\n')
    return tmp_path


@pytest.mark.parametrize('fold', [1, 2, 3])
def test_official_splits(tree, fold):
    for split, groups in (('train', {1, 2, 3} - {fold}), ('test', {fold})):
        source = sources.make_source(f'ucf101:{tree}', split, OPTIONS, fold=fold)
        assert source.class_names == CLASSES and len(source) == 6 * len(groups)
        found = [source.file(i) for i in range(len(source))]
        assert {int(f.split('_g')[1][:2]) for f in found} == groups
        for i, file in enumerate(found):
            sample = source[i]
            assert CLASSES[sample['label']] == file.split('/')[0]
            words = {'ApplyEyeMakeup': 'apply eye makeup', 'YoYo': 'yo yo'}
            assert sample['caption'] == words.get(file.split('/')[0], 'baseball pitch')


def test_the_lists_may_lie_beside_or_in_the_videos(tree):
    inside = sources.make_source(f'ucf101:{tree / "UCF-101"}', 'test', OPTIONS)
    shutil.move(tree / 'ucfTrainTestlist', tree / 'UCF-101')
    moved = sources.make_source(f'ucf101:{tree / "UCF-101"}', 'test', OPTIONS)
    names = [[s.file(i) for i in range(len(s))] for s in (inside, moved)]
    assert names[0] == names[1] and len(names[0]) == 6


def test_what_is_not_there_is_told(tree):
    absent = sorted((tree / 'UCF-101' / 'YoYo').iterdir()) + sorted(
        (tree / 'UCF-101' / 'BaseballPitch').iterdir()
    )
    for path in absent:
        path.unlink()
    with pytest.raises(UserError, match='12 of the 18 videos') as error:
        sources.make_source(f'ucf101:{tree}', 'train', OPTIONS)
    assert str(error.value).count('.avi') == 10
    (tree / 'ucfTrainTestlist' / 'classInd.txt').write_text('1 ApplyEyeMakeup\n3 YoYo\n')
    with pytest.raises(UserError, match="classInd.txt: a line is '3 YoYo'"):
        sources.make_source(f'ucf101:{tree}', 'train', OPTIONS)
    (tree / 'ucfTrainTestlist' / 'classInd.txt').write_text('1 ApplyEyeMakeup\n')
    with pytest.raises(UserError, match='is of no class of classInd.txt'):
        sources.make_source(f'ucf101:{tree}', 'train', OPTIONS)
    shutil.rmtree(tree / 'ucfTrainTestlist')
    with pytest.raises(UserError, match='neither in it nor beside it'):
        sources.make_source(f'ucf101:{tree}', 'train', OPTIONS)
