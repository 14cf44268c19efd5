"""Videos to batches.

sources         the source that 'KIND:WHERE' names
listings        lists of video files: folders, UCF-101
manifest        the same from tables (read by tables)
captions        of the files in a folder
videos          clips of the files of a list
clip_options    which frames make a clip
clips           decoding and resizing
tfds_videos     TensorFlow Datasets
moving_digits   made here
records         prepared videos, made by prepare (its work: shards)
latent_records  content frames and motion latents, made by latents
pipeline        order, workers, batches
files           paths and URLs
"""
