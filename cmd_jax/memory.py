"""What this process takes of the machine."""

import resource
import sys


def peak_memory_gb() -> float:
    """Most memory that this process has held so far, on the host."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == 'darwin' else 1e9 / 1024)
