"""From files to segmentations, by any network: what ``voxfuse predict`` does.

===============  ==============================================================================
module           owns
===============  ==============================================================================
``request``      the options, checked together: a job of studies and their places
``models``       networks: exported programs, attributes of modules, their last layer
``dicom``        series as scans, segmentations as DICOM-SEG
``reading``      which files are a study's, and reading them
``segmenters``   a study's arrays to a segmentation on its own grid: a run, or any network
``plan``         patches, memory, output and time before anything begins
``volumes``      Zarr volumes in boxes, by voxfuse.scale
``results``      what these boxes become on the disk
``cluster``      those boxes on Dask distributed
``night``        one study after the other, none of which stops the others; statuses
===============  ==============================================================================

What is read, turned, resampled and undone is :mod:`voxfuse.training.volumes`'s to do, for any
network.
"""
