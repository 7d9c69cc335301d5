"""Training on patches of small lesions, and prediction by fusion: the system of the papers.

Hashemi et al. 2018 (arXiv 1803.11078) and Salehi et al. 2017 (arXiv 1706.05721), on a folder of
one's own. What runs is said by a configuration in TOML; ``voxfuse train`` and ``voxfuse predict``
are its command line. Each section of the configuration belongs to one module, and each module owns
one thing:

==================  ==================  =========================================================
section             module              owns
==================  ==================  =========================================================
``[data]``          ``dataset``         which files are which subject's, groups, and who is trained
                                        on, validated and tested
                    ``volumes``         a subject's arrays: checked, in one orientation and spacing,
                                        normalised; and predictions put back on the scan's own grid
``[sampling]``      ``sampling``        which patches a step has: a function of (seed, step)
``[augmentation]``  ``augmentation``    what is changed in a patch: a function of (seed, step)
``[network]``       ``networks``        names, options and parameters
``[loss]``          ``objective``       any loss of voxfuse by name with its options; depths
``[optimiser]``     ``optimisers``      the optimiser, the learning rate of a step
``[training]``      ``trainer``         the loop, validation, early stopping, log and checkpoints
                    ``checkpoints``     files that are whole whenever the process dies
``[prediction]``    ``predict``         a trained run as a function of a subject's scans
                    ``evaluation``      RUN/test.csv
(all)               ``config``          defaults, their comments, the checks of what was written
==================  ==================  =========================================================

A run is a folder: ``config.toml`` (what was asked for, with every default), ``log.csv``,
``checkpoint.pt`` (to go on from), ``model.pt`` (to predict with) and ``test.csv``.

Needs voxfuse[training]: nibabel, scipy, tqdm. MONAI's transforms are used by name where it is
installed; nothing here needs it.
"""
