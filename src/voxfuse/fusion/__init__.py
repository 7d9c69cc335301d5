"""Fusion of overlapping patch predictions: windows, grids, the sliding window."""
