"""Pretrained networks that judge images and videos; their weights come from installed packages."""
