"""nnU-Net's trainer with the losses of voxfuse.

nnU-Net finds these classes through the environment variable ``nnUNet_extTrainer``, which names this
folder (``voxfuse nnunet-trainer-path`` prints it). It imports every module here, with the folder
first on ``sys.path``: so there is no other. voxfuse is imported when a loss is built, so that a
checkpoint's network can be made from this file where voxfuse is not installed.
"""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerVoxfuse(nnUNetTrainer):
    """nnU-Net's losses and pseudo Dice, to rounding, in one pass over the voxels each."""

    #: What the Dice term becomes: alpha, beta, gamma of voxfuse.integrations.nnunet.fused.
    tversky: dict[str, float] = {}

    def _build_loss(self):
        from voxfuse.integrations.nnunet import fused

        return fused(super()._build_loss(), **self.tversky)

    def validation_step(self, batch):
        from voxfuse.integrations.nnunet import validation_step

        return validation_step(self, batch)


class nnUNetTrainerVoxfuseTversky(nnUNetTrainerVoxfuse):
    """False negatives cost more than false positives (Salehi et al. 2017)."""

    tversky = {"alpha": 0.3, "beta": 0.7}


class nnUNetTrainerVoxfuseFocalTversky(nnUNetTrainerVoxfuse):
    """The focal Tversky term of Abraham and Khan 2018."""

    tversky = {"alpha": 0.3, "beta": 0.7, "gamma": 0.75}


class nnUNetTrainerVoxfuseFBeta(nnUNetTrainerVoxfuse):
    """F_1.5, the best of Hashemi et al. 2018: alpha = 1/(1 + 1.5^2), beta = 1.5^2/(1 + 1.5^2)."""

    tversky = {"alpha": 1 / 3.25, "beta": 2.25 / 3.25}
