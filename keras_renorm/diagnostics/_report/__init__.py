"""Differences of training and inference, measured and explained."""
