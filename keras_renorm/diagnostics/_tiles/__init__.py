"""Predictions of images in tiles."""
