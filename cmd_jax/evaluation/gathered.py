"""What was measured of sets of videos, gathered batch by batch."""

import collections
import functools
import time
from collections.abc import Callable, Iterator

import numpy as np

from cmd_jax.evaluation import distances, features
from cmd_jax.evaluation.networks import clip
from cmd_jax.evaluation.settings import LPIPS_NET, Settings, pair_measures
from cmd_jax.parallel import batches

SHOWN = 16  # clips of each kind for the page


class Videos:
    """What was measured of a set of videos, gathered batch by batch.

    Attributes:
      shown: the first videos.
      values: {name: a value for each video}.
      seconds: that `stream` took.
    """

    def __init__(self, settings: Settings, distance: bool, mesh):
        self._settings, self._distance, self._mesh = settings, distance, mesh
        self._found, self.values = [], collections.defaultdict(list)
        self.shown, self.seconds = [], 0.0

    def show(self, videos, count: int):
        """Keeps the first for the page, `count` of these at most."""
        room = min(count, SHOWN - sum(map(len, self.shown)))
        if room > 0:
            self.shown.append(np.asarray(videos[:room]))

    def arrays(self, pictures: bool) -> dict[str, np.ndarray]:
        """What `take` takes, with the first videos themselves or without."""
        values = {f'values_{name}': np.asarray(x) for name, x in self.values.items()}
        features = {'features': self.features} if self._found else {}
        shown = {'shown': np.concatenate(self.shown)} if pictures else {}
        return {'seconds': np.array(self.seconds)} | shown | features | values

    def take(self, kept: dict[str, np.ndarray]):
        """Adds what was measured of other videos, and kept."""
        if 'shown' in kept:
            self.show(kept['shown'], len(kept['shown']))
        if 'features' in kept:
            self._found.append(kept['features'])
        self.seconds += float(kept.get('seconds', 0.0))
        for name, values in kept.items():
            if name.startswith('values_'):
                self.values[name.removeprefix('values_')].extend(values.tolist())

    def add(self, videos: np.ndarray, real: np.ndarray | None = None):
        """Videos on the host, and the real clips that they stand for, to compare in pairs."""
        self.show(videos, len(videos))
        if self._distance:
            settings = self._settings
            options = dict(size=settings.size, path=settings.i3d, mesh=self._mesh)
            self._found.append(features.i3d_logits(videos, **options))
        if real is not None:
            for name in pair_measures(*real.shape[2:4]):
                self.values[name].extend(self._of_pairs(name)(real, videos, mean=False))

    def stream(self, videos: Iterator, prompts: list[str] | None, scorer: clip.CLIP | None):
        """Batches on the devices, as `Generator.stream` gives them: what I3D says of one is
        computed behind the next one's sampling, and nothing waits for the host."""

        def looked_at():
            for batch, count in videos:
                found = None
                if self._distance:
                    network = features.load_i3d(self._settings.i3d, self._mesh)
                    found = features.i3d_program(network, batch, size=self._settings.size)
                yield batch, found, count

        done, started = 0, time.perf_counter()
        for batch, found, count in batches.ahead(looked_at()):
            self.show(batch, count)
            if found is not None:
                self._found.append(np.asarray(found)[:count])
            if scorer is not None:
                texts = prompts[done : done + count]
                similar = features.clipsim(np.asarray(batch)[:count], texts, scorer, mean=False)
                self.values['clipsim'].extend(similar)
            done += count
        self.seconds += time.perf_counter() - started

    @property
    def features(self) -> np.ndarray:
        return np.concatenate(self._found)

    def _of_pairs(self, name: str) -> Callable:
        own = {'net': LPIPS_NET, 'path': self._settings.lpips, 'mesh': self._mesh}
        return {
            'psnr': distances.psnr,
            'ssim': distances.ssim,
            'lpips': functools.partial(features.lpips, **own),
        }[name]
