"""Measures of how good videos are, and the pretrained networks they look through."""
