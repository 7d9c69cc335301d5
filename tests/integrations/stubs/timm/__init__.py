"""What of timm nnU-Net's modules import, for transformers that no test builds.

timm itself would bring torchvision. nnU-Net's lookup of a trainer imports all its networks.
"""

__version__ = "1.0.22"  # 1.0.23 is too new for nnU-Net
