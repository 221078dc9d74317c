"""Passes over data with the layers watched."""
