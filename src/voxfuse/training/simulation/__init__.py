"""MS-like lesions put into real heads, for training with more of them than patients have.

A :class:`Host` is a head that was looked at once; :func:`simulate` puts lesions into it, each time
others: a function of a seed. The host's own lesions stay as they are, in the mask too, and no new
one touches them. Lesions lie in white matter and at the ventricles' wall (``hosts``), have shapes
and volumes of :class:`MaskShapes` or :class:`RandomShapes` (``shapes``), fill what is free
(``placement``), and get the contrast, texture and soft edge of ``appearance``.

What is measured, and where from. "Masks" are the consensus masks of the 30 patients of Lesjak et
al. (Neuroinformatics 2017, doi 10.1007/s12021-017-9348-7) at 1 mm: 18-connected components of
3 mm3 and more, 2,892 of them.

===================  ================================================  ===========================
what                 measured                                          here
===================  ================================================  ===========================
lesions of a head    ln N ~ N(4.16, 0.93^2)                            drawn so, 400 at most
ln v (mm3)           mean 3.22, deviation 1.40                         a mixture: 1 to 3 lesions of
v < 10 mm3           26 % of the lesions                               1 to 47 ml (Pareto), the
v > 1 ml             1.9 % of the lesions, 71 % of the volume          others log-normal, cut at
                                                                       2.5 mm3 and 1 ml
FLAIR / white        10, 50, 90 % of the voxels: 1.15, 1.355, 1.6      drawn so, a half normal
T1 / white           0.46, 0.755, 0.955                                either side of the median
T2 / white           1.25, 1.75, 2.50
===================  ================================================  ===========================

Volumes of masks are scaled by the host's brain volume over that of the heads they are of (1.12 l),
and lengths by its cube root. The bundled head, 1.74 l in the frame of MNI, gets lesions 1.55 times
as large: as large a part of the brain. The random model's are as measured, in mm3.

Contrasts are a lesion's voxels over the median of white matter: those of FLAIR, and the medians of
T1 and T2 (the middle of 0.68 to 0.82 and of 1.5 to 2.0, the medians of three patients), are as
published with the masks; 10 and 90 % of T1 and T2 are the means over the same three patients (T1
0.56, 0.29, 0.52 and 0.96, 0.94, 0.97; T2 1.15, 1.29, 1.30 and 2.29, 2.76, 2.45), white matter
being the voxels about the upper mode of T1 that are more than a voxel inside and no lesion.

Over 2,000 lesions the share of the volume above 1 ml differs from seed to seed by 0.06 (deviation):
it hangs on some 40 lesions, in a simulation as in patients. The quantiles of contrast differ by
less than 0.02, because confluent lesions, which have most voxels, differ little (``appearance``).
``tests/training/test_simulation.py`` measures all of these.

A simulation takes about a third of a second at 1 mm with the random model, and about one with
masks: too much for every patch, little once a subject. So it changes whole volumes, before patches
are taken of them: ahead by ``voxfuse simulate``, or in training every so many steps (``renewal``).
"""

from voxfuse.training.simulation.appearance import CONTRASTS, Contrast
from voxfuse.training.simulation.hosts import Host
from voxfuse.training.simulation.placement import Simulated, SimulationOptions, simulate
from voxfuse.training.simulation.shapes import MaskShapes, RandomShapes, Shapes

__all__ = [
    "CONTRASTS",
    "Contrast",
    "Host",
    "MaskShapes",
    "RandomShapes",
    "Shapes",
    "Simulated",
    "SimulationOptions",
    "simulate",
]
