"""Real patients (marker data): what is found in the folder, and that it passes the checks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from voxfuse.training.config import load
from voxfuse.training.dataset import find_dataset
from voxfuse.training.initial import initial_config
from voxfuse.training.sampling import Sampler
from voxfuse.training.split import split_dataset
from voxfuse.training.volumes import check_subjects

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.data


def test_the_first_configuration_knows_the_folder(ms_lesions):
    data = initial_config(ms_lesions).data
    assert (data.images, data.label, data.groups) == (["flair", "t1"], "lesions", "subjects.csv")
    assert data.labels == {"background": 0, "lesion": 1}
    assert len(find_dataset(ms_lesions, data).subjects) == 8


def test_the_trials_patients_are_apart_and_pass_the_checks(ms_lesions):
    config = load(ROOT / "examples/ms_lesions.toml")
    dataset = find_dataset(ms_lesions, config.data)
    split = split_dataset(dataset, config.data)
    assert split.unused == ("mslessegP14-2", "mslessegP14-3")
    config.data.test.append("mslessegP14-2")
    with pytest.raises(ValueError, match="mslessegP14-2 is of patient mslessegP14, who"):
        split_dataset(dataset, config.data)
    names = [*split.training, *split.test]
    subjects = [dataset.subjects[name] for name in names]
    volumes = check_subjects(subjects, config.data, dataset.labels, names)
    lesion_ml = {name: volume.label.sum() / 1000 for name, volume in volumes.items()}
    assert lesion_ml["lesjak19"] == pytest.approx(49.769, abs=0.001)
    assert lesion_ml["mslessegP18-1"] == pytest.approx(0.77, abs=0.001)
    sampler = Sampler({name: volumes[name] for name in split.training}, config.sampling)
    patches = [patch for step in range(20) for _, patch in sampler.patches(step)]
    with_lesion = np.mean([patch.label.any() for patch in patches])
    assert 0.5 <= with_lesion < 1
