"""Videos to batches: files (clips), data sets (sources, moving_digits), batches (pipeline)."""
