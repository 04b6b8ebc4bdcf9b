"""Sampling images."""
