import html.parser
import json
import math
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from cmd_jax.errors import UserError
from cmd_jax.evaluation import report

PIXEL = 'data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=='


class Page(html.parser.HTMLParser):
    """Collects a page's tags and text, and checks that tags close in the order they opened."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.open, self.text = [], [], ''
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ('meta', 'link', 'img'):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def small_page(folder, name='psnr_of_x', **numbers):
    table = report.Table(
        columns=('a', 'b'), rows=[('<script>x</script>', 'ok'), ('y\nz<', 'MISSED')]
    )
    figures = [
        report.Figure(uri=PIXEL, caption='a "seven" & <b>more</b>'),
        report.Figure(uri=PIXEL, caption='short', alt='said at length'),
    ]
    sections = [
        report.Section(heading='First', text='some text', table=table),
        report.Section(heading='Second', figures=figures, width=123),
    ]
    return report.write(folder, name, sections, numbers)


def test_page_is_well_formed_and_says_what_it_was_given(tmp_path):
    path = small_page(tmp_path, psnr=25.5)
    page = Page(path.read_text(encoding='utf-8'))
    assert path == tmp_path / 'report.html'
    assert [tag for tag, _ in page.tags].count('script') == 0
    for text in (
        tmp_path.name,
        'psnr_of_x',
        'First',
        'some text',
        '<script>x</script>',
        'psnr',
        '25.5',
    ):
        assert text in page.text
    images = [attributes for tag, attributes in page.tags if tag == 'img']
    assert [image['alt'] for image in images] == ['a "seven" & <b>more</b>', 'said at length']
    assert '--width:123px' in path.read_text()
    assert '<td>y<small>z&lt;</small></td><td class="missed">' in path.read_text()


def test_page_shows_all_protocols_of_a_run(tmp_path):
    small_page(tmp_path, 'one', psnr=1.0)
    small_page(tmp_path, 'two', psnr=2.0)
    small_page(tmp_path, 'one', psnr=math.inf)  # in the place of the first
    source = (tmp_path / 'report.html').read_text(encoding='utf-8')
    page = Page(source)
    assert [a['id'] for tag, a in page.tags if tag == 'article'] == ['one', 'two']
    assert [a['href'] for tag, a in page.tags if tag == 'a'] == ['#one', '#two']
    assert source.count('<h2>First</h2>') == 2 and '<td>inf</td>' in source
    numbers, sections = report.read(tmp_path, 'two')
    assert numbers == {'psnr': 2.0} and [s.heading for s in sections] == ['First', 'Second']
    assert sections[0].table.rows[1][1] == 'MISSED' and sections[1].figures[1].alt


def test_evaluation_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match='has no evaluation by fvd_2048: python evaluate.py'):
        report.read(tmp_path, 'fvd_2048')
    small_page(tmp_path, 'fvd_2048')
    (tmp_path / 'evaluation/fvd_2048.page.json').write_text('{"sections"')
    with pytest.raises(UserError, match='the files of fvd_2048 cannot be read'):
        report.read(tmp_path, 'fvd_2048')


def test_page_needs_no_network(tmp_path):
    source = small_page(tmp_path).read_text(encoding='utf-8')
    for tag, attributes in Page(source).tags:
        for name in ('src', 'href'):
            assert attributes.get(name, 'data:').startswith(('data:', '#')), tag
    assert 'http' not in source and 'url(' not in source and '@import' not in source


def test_figures_from_elsewhere_are_refused():
    with pytest.raises(ValueError, match='data URI'):
        report.Figure(uri='https://example.org/x.png')


def test_rows_must_fit_their_table():
    with pytest.raises(ValueError, match='3 cells in a table of 2'):
        report.Table(columns=('a', 'b'), rows=[('1', '2', '3')])


def test_json_has_the_numbers_in_plain_types(tmp_path):
    numbers = {
        'psnr': math.inf,
        'ratio': math.nan,
        'accuracy': np.float32(0.5),
        'steps': np.int64(50),
        'device': 'cpu',
        'seed': 0,
    }
    small_page(tmp_path, **numbers)
    read = json.loads(
        (tmp_path / 'evaluation/psnr_of_x.json').read_text(), parse_constant=pytest.fail
    )
    expected = {'psnr': None, 'ratio': None, 'accuracy': 0.5, 'steps': 50, 'device': 'cpu'}
    assert read == {**expected, 'seed': 0}


def test_environment_can_be_reported(tmp_path):
    small_page(tmp_path, **report.environment())
    read = json.loads((tmp_path / 'evaluation/psnr_of_x.json').read_text())
    assert read['device'] and read['device_count'] >= 1 and read['version_jax'] == jax.__version__


@pytest.mark.parametrize(
    ('value', 'target', 'expected'),
    [
        (24.0, (24, None), ('>= 24', 'ok')),
        (23.99, (24, None), ('>= 24', 'MISSED')),
        (720.0, (None, 720), ('<= 720', 'ok')),
        (721.0, (None, 720), ('<= 720', 'MISSED')),
        (0.7, (0.7, 1.3), ('0.7 to 1.3', 'ok')),
        (1.31, (0.7, 1.3), ('0.7 to 1.3', 'MISSED')),
        (0.69, (0.7, 1.3), ('0.7 to 1.3', 'MISSED')),
        (math.inf, (24, None), ('>= 24', 'ok')),
        (math.nan, (24, None), ('>= 24', 'MISSED')),
        (math.nan, (None, 720), ('<= 720', 'MISSED')),
        (None, (24, None), ('>= 24', 'MISSED')),
    ],
)
def test_check_is_honest(value, target, expected):
    (row,) = report.check({'x': value}, {'x': target}).rows
    assert row[2:] == expected


def test_check_misses_what_was_not_measured():
    table = report.check({'psnr': 30.0}, {'psnr': (24, None), 'seconds': (None, 720)})
    assert [row[1] for row in table.rows] == ['30', 'not measured']
    assert report.verdict(table) == '1 of 2 targets met. Missed: seconds.'
    assert report.verdict(report.check({'a': 1.0}, {'a': (0, None)})) == '1 of 1 targets met.'


def test_lines_align():
    table = report.Table(columns=('name', 'x'), rows=[('a', '1.25'), ('longer', '3')])
    assert report.lines(table) == 'name    x\na       1.25\nlonger  3'


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        (None, 'not measured'),
        (24.123456, '24.12'),
        (0.98, '0.98'),
        (12345.6, '12346'),
        (3000, '3000'),
        (True, 'True'),
        (math.inf, 'inf'),
        ('cpu', 'cpu'),
    ],
)
def test_text(value, expected):
    assert report.text(value) == expected


def test_unwritable_folder_is_a_user_error(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match="out='.*file/inside' cannot be written") as caught:
        small_page(tmp_path / 'file' / 'inside')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('flags', 'said'),
    [
        (['--workdir=x', '--protocol=fvd'], "protocol='fvd' is unknown: did you mean 'fvd_2048'?"),
        ([], 'workdir'),
    ],
)
def test_script_says_what_is_wrong_in_one_line(flags, said):
    script = pathlib.Path(__file__).parents[1] / 'evaluate.py'
    done = subprocess.run(
        [sys.executable, script, *flags], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1 and said in errors[0] and 'Traceback' not in done.stderr
