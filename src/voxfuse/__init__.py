"""voxfuse: fused overlap losses and patch fusion for 3D medical image segmentation."""

from voxfuse import _library

_library.load()

from voxfuse._backends import Backend, backends  # noqa: E402
from voxfuse.ops.soft_confusion import soft_confusion  # noqa: E402

__version__ = "0.1.0"

__all__ = ["Backend", "backends", "soft_confusion"]
