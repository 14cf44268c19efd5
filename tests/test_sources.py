import re

import pytest

from cmd_jax.data import sources
from cmd_jax.data.clip_options import ClipOptions
from cmd_jax.errors import UserError

SIZES = {'frames': 8, 'height': 16, 'width': 16}


@pytest.mark.parametrize(
    'spec, options, fields, message',
    [
        ('moving_digit', {}, {}, "data.source='moving_digit'.*did you mean 'moving_digits'"),
        ('webvid:x', {}, {}, 'Known: folder, ucf101, manifest, tfds, records, latents'),
        ('folder', {}, {}, "data.source='folder': write folder: and then a folder of videos"),
        ('records:', {}, {}, 'made by cmd_jax.data.prepare'),
        ('folder:.', {'short': 'loops'}, {}, "short='loops'.*'loop'"),
        ('folder:.', {'clips': 'every'}, {}, "clips='every'"),
        ('folder:.', {'crop': 'centre'}, {}, "crop='centre'.*'center'"),
        ('folder:.', {'fps': 8.0, 'stride': 2}, {}, 'fps=8.0 and stride=2'),
        ('folder:nowhere', {}, {}, 'nowhere.*does not exist'),
        ('records:nowhere', {}, {}, 'nowhere does not exist'),
        ('records:tests', {}, {}, 'tests has no header.json'),
        ('latents:tests', {}, {}, 'tests has no header.json'),
        ('moving_digits', {}, {'split': 'val'}, "data.split='val'"),
        ('moving_digits', {'stride': 2}, {}, 'data.stride=2'),
        ('moving_digits', {'fps': 4.0}, {}, 'data.fps=4.0'),
        ('moving_digits:x', {}, {}, 'number of training clips'),
        ('moving_digits:0', {}, {}, 'number of training clips'),
        ('folder:nokind://bucket/videos', {}, {}, 'nokind://bucket/videos.*nokind'),
    ],
)
def test_make_source_names_the_mistake(spec, options, fields, message):
    with pytest.raises(UserError, match=re.compile(message)) as error:
        fields = {'split': 'train'} | fields
        sources.make_source(spec, options=ClipOptions(**SIZES | options), **fields)
    assert '\n' not in str(error.value)


def test_a_spec_is_split_once():
    assert sources.parse('folder:gs://bucket/a:b') == ('folder', 'gs://bucket/a:b')
    assert sources.parse('moving_digits') == ('moving_digits', '')
