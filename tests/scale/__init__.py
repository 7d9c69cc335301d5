"""Volumes larger than memory."""
