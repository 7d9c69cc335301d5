"""Head-fused soft confusion: matrix products by PyTorch, each chunk of logits by our kernels."""

from functools import partial

from voxfuse.reference import head_confusion as reference
from voxfuse.triton_kernels.soft_confusion import soft_confusion, soft_confusion_backward

head_confusion = partial(reference.head_confusion, confusion=soft_confusion)
head_confusion_backward = partial(
    reference.head_confusion_backward, confusion_backward=soft_confusion_backward
)
