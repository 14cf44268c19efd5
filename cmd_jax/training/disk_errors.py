"""What Orbax and TensorStore say of a disk that refuses, in a few words and once."""

import functools
import logging as python_logging
import os
import re
import sys

# TensorStore's errors have no type of their own: "OUT_OF_RANGE: Error writing "x" in OCDBT database
# at local file "/run/...": File too large [os_error_code='27']".
OS_CODE = re.compile(r"os_error_code='(\d+)'|OS error (\d+)")
STATUS = re.compile(r'([A-Z]+(?:_[A-Z]+)*): (?=.*local file)', re.DOTALL)


def reason(error: BaseException) -> str | None:
    """In a few words, why the disk refused; None: it is not the disk's."""
    if match := OS_CODE.search(str(error)):
        return os.strerror(int(match[1] or match[2]))
    if match := STATUS.match(str(error)):
        return match[1].lower().replace('_', ' ')
    if isinstance(error, OSError):
        return error.strerror or (str(error).splitlines() or [type(error).__name__])[0]
    return None


@functools.cache
def hush():
    """No more tracebacks of failures that Orbax and TensorStore print and raise, too.

    For the rest of the process: their threads go on, and go on to fail, after a save has failed.
    """

    def is_news(record: python_logging.LogRecord) -> bool:
        if not record.exc_info:
            return True
        error = record.exc_info[1]
        of_orbax = f'{os.sep}orbax{os.sep}' in record.pathname
        of_its_loop = record.name == 'asyncio' and isinstance(error, OSError)
        told = OS_CODE.search(str(error)) or STATUS.match(str(error))
        return not (of_orbax or of_its_loop or told)

    def hook(unraisable):
        # TensorStore's threads, after another one's write has failed.
        if str(unraisable.exc_value) != 'Event loop is closed':
            before(unraisable)

    before, sys.unraisablehook = sys.unraisablehook, hook
    for name in ('absl', 'asyncio'):
        python_logging.getLogger(name).addFilter(is_news)
