"""Patches: where they lie, how often, and that a step's are a function of (seed, step)."""

from __future__ import annotations

import numpy as np
import pytest

from voxfuse.training.augmentation import ROTATIONS, Flips, Intensity, steps_of
from voxfuse.training.config import AugmentationOptions, SamplingOptions
from voxfuse.training.sampling import Patch, Sampler, generator
from voxfuse.training.volumes import Volume


def volume(name="a", shape=(48, 40, 44), boxes=(), inside=None):
    """A volume whose label has class c in the c-th box (origin, extent)."""
    label = np.zeros(shape, np.uint8)
    for c, (origin, extent) in enumerate(boxes, 1):
        label[tuple(slice(o, o + n) for o, n in zip(origin, extent, strict=True))] = c
    mask = np.zeros(shape, bool)
    mask[inside or tuple(slice(2, -2) for _ in shape)] = True
    image = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32) * mask
    return Volume(name, image, mask, label, None)


def options(**given):
    return SamplingOptions(**{"patch": [16, 16, 16], "batch": 4, **given})


def places(sampler, steps):
    return [place for step in range(steps) for place in sampler.places(step)]


@pytest.mark.parametrize("method", ["balanced", "lesions", "uniform"])
def test_patches_are_a_function_of_seed_and_step(method):
    given = {"a": volume(boxes=[((20, 20, 20), (5, 6, 7))])}
    one, two = (Sampler(given, options(method=method), seed=3) for _ in range(2))
    forwards = [one.places(step) for step in range(20)]
    backwards = [two.places(step) for step in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert forwards != [Sampler(given, options(method=method), seed=4).places(s) for s in range(20)]
    assert len({place.origin for step in forwards for place in step}) > 40


def test_balanced_has_its_share_about_each_class():
    """Classes 1 (2 voxels) and 2 (thousands) alike; the others about any voxel of the mask."""
    boxes = [((10, 10, 10), (1, 1, 2)), ((30, 20, 20), (12, 12, 12))]
    sampler = Sampler({"a": volume(boxes=boxes)}, options(foreground=0.5, jitter=0.0))
    label = sampler.volumes["a"].label
    centres = [label[tuple(o + 8 for o in place.origin)] for place in places(sampler, 300)]
    about = np.array(centres).reshape(-1, 2)  # every second patch is about a class
    assert (about[:, 1] > 0).all()
    assert abs((about[:, 1] == 1).mean() - 0.5) < 0.06  # 600 draws: 3 deviations
    share = (label[sampler.volumes["a"].mask] > 0).mean()
    assert abs((about[:, 0] > 0).mean() - share) < 3 * np.sqrt(share / 600)


def test_uniform_reaches_every_place_alike():
    sampler = Sampler({"a": volume(shape=(64, 20, 20))}, options(method="uniform", jitter=0.0))
    first = np.array([place.origin[0] for place in places(sampler, 500)])
    inside = first[(first > 0) & (first < 48)]
    counts = np.histogram(inside, 4, (1, 48))[0]
    assert (np.abs(counts - inside.size / 4) < 4 * np.sqrt(inside.size / 4)).all()


def test_jitter_keeps_the_voxel_in_the_patch():
    """20 of 64: of 16 voxels 5 to each side."""
    sampler = Sampler({"a": volume(boxes=[((24, 20, 20), (1, 1, 1))])}, options(foreground=1.0))
    offsets = np.array([place.origin for place in places(sampler, 200)]) - [16, 12, 12]
    assert offsets.min() == -5
    assert offsets.max() == 5


def test_the_greatest_jitter_keeps_the_voxel_in_the_patch():
    given = {"a": volume(boxes=[((24, 20, 20), (1, 1, 1))])}
    for patch in (8, 7):
        sampler = Sampler(given, options(foreground=1.0, jitter=0.5, patch=[patch] * 3))
        within = [24, 20, 20] - np.array([place.origin for place in places(sampler, 60)])
        assert (within.min(), within.max()) == (0, patch - 1)


def test_the_papers_patches_have_their_lesion_voxels():
    """50 in the central half of 8^3, of a lesion of 5^3; from step 10 on 5."""
    given = {"a": volume(boxes=[((20, 18, 20), (5, 5, 5))])}
    sampler = Sampler(given, options(method="lesions", relax_after=10))
    label = given["a"].label

    def central(place):
        return np.count_nonzero(label[tuple(slice(o + 4, o + 12) for o in place.origin)])

    early, late = places(sampler, 10), [p for s in range(10, 60) for p in sampler.places(s)]
    assert min(map(central, early)) >= 50
    assert 5 <= min(map(central, late)) < 50
    assert not any(place.relaxed for place in early + late)


def test_draws_are_bounded_and_the_best_is_taken_and_counted():
    """A lesion of 8 voxels never has 50: after `draws` the patch with most is called relaxed."""
    given = {"a": volume(boxes=[((20, 18, 20), (2, 2, 2))])}
    least = dict(minimum_subject_voxels=1, relaxed_subject_voxels=1)
    sampler = Sampler(given, options(method="lesions", draws=30, **least))
    found = places(sampler, 10)
    assert all(place.relaxed for place in found)
    label = given["a"].label
    for place in found:
        part = label[tuple(slice(o + 4, o + 12) for o in place.origin)]
        assert np.count_nonzero(part) == 8


def test_subjects_with_few_lesion_voxels_join_late_and_those_without_are_uniform():
    few, many = ((10, 10, 10), (3, 3, 3)), ((10, 10, 10), (6, 6, 6))
    given = {
        "few": volume("few", boxes=[few]),
        "many": volume("many", boxes=[many]),
        "none": volume("none"),
    }
    sampler = Sampler(given, options(method="lesions", relax_subjects_after=50))
    early = [place.subject for place in places(sampler, 50)]
    late = [p for s in range(50, 100) for p in sampler.places(s)]
    assert set(early) == {"many", "none"}
    assert {place.subject for place in late} == {"few", "many", "none"}
    without = [place.origin for place in late if place.subject == "none"]
    assert np.std(without, axis=0).min() > 4
    with pytest.raises(ValueError, match="no training subject has 100 lesion voxels"):
        Sampler({"few": given["few"]}, options(method="lesions"))
    with pytest.raises(ValueError, match="no training subject has a voxel of a lesion"):
        Sampler({"none": given["none"]}, options())


def test_patients_are_drawn_alike_however_many_scans_they_have():
    box = [((10, 10, 10), (6, 6, 6))]
    names = {"p1": "p", "p2": "p", "p3": "p", "q": "q"}
    sampler = Sampler({name: volume(name, boxes=box) for name in names}, options(), names)
    drawn = [names[place.subject] for place in places(sampler, 200)]
    assert abs(drawn.count("p") / 800 - 0.5) < 0.06


def test_small_volumes_are_padded_with_background():
    given = {"a": volume(shape=(10, 40, 13), boxes=[((4, 20, 6), (2, 2, 2))])}
    for _, patch in Sampler(given, options()).patches(0):
        assert patch.image.shape == (2, 16, 16, 16)
        assert not patch.image[:, ~patch.mask].any()
        assert not patch.mask[:3].any()


# --- Augmentation ---------------------------------------------------------------------------------


def patch_of(values):
    """A patch whose label and mask follow from its image."""
    return Patch(np.stack([values, -values]), (values > 0).astype(np.uint8), values > -1)


def test_flips_have_their_probabilities_and_keep_image_label_and_mask_together():
    values = np.random.default_rng(0).standard_normal((4, 5, 6)).astype(np.float32)
    looks = {values[tuple(slice(None, None, -1 if a in axes else 1) for a in range(3))].tobytes(): k
             for k, axes in enumerate(ROTATIONS)}  # fmt: skip
    for kind, shares in {"rotations": [0.25] * 4, "released": [0.42, 0.25, 0.19, 0.14]}.items():
        counts = np.zeros(4)
        for step in range(2000):
            made = Flips(kind)(patch_of(values), generator(0, step, 1))
            counts[looks[np.ascontiguousarray(made.image[0]).tobytes()]] += 1
            np.testing.assert_array_equal(made.label, made.image[0] > 0)
            np.testing.assert_array_equal(made.mask, made.image[1] < 1)
        assert np.abs(counts / 2000 - shares).max() < 0.035
    mirror = Flips("mirror")
    mirrored = {mirror(patch_of(values), generator(0, s, 1)).image.tobytes() for s in range(200)}
    assert len(mirrored) == 8


def test_intensity_changes_each_modality_inside_the_mask():
    patch = patch_of(np.random.default_rng(0).standard_normal((4, 5, 6)).astype(np.float32))
    before = patch.image.copy()
    fits = []
    for step in range(300):
        made = Intensity(0.1, 0.2)(patch, generator(0, step, 1))
        for c in range(2):
            slope, shift = np.polyfit(before[c][patch.mask], made.image[c][patch.mask], 1)
            fits.append((slope - 1, shift))
            outside = ~patch.mask
            np.testing.assert_allclose(
                made.image[c][outside], before[c][outside] * slope, rtol=1e-4
            )
    fits = np.abs(fits)
    assert 0.09 < fits[:, 0].max() <= 0.1001
    assert 0.18 < fits[:, 1].max() <= 0.2001
    np.testing.assert_array_equal(patch.image, before)


def test_monais_transforms_by_name():
    pytest.importorskip("monai", reason="MONAI's transforms by name")
    patch = patch_of(np.random.default_rng(0).standard_normal((8, 8, 8)).astype(np.float32))
    steps = steps_of(
        AugmentationOptions(
            flips="none", scale=0, shift=0,
            monai=[{"name": "RandGaussianNoised", "prob": 1.0, "std": 0.5},
                   {"name": "RandRotate90d", "prob": 1.0}],
        )
    )  # fmt: skip
    noise, turn = steps
    one, two = (noise(patch, generator(5, 7, 1)) for _ in range(2))
    np.testing.assert_array_equal(one.image, two.image)
    assert 0.1 < np.std(one.image - patch.image) < 0.6
    np.testing.assert_array_equal(one.label, patch.label)
    turned = turn(patch, generator(0, 0, 1))
    np.testing.assert_array_equal(turned.label, turned.image[0] > 0)
    with pytest.raises(
        ValueError, match="no dictionary transform 'RandGausianNoised'; did you mean"
    ):
        steps_of(AugmentationOptions(monai=[{"name": "RandGausianNoised"}]))
    with pytest.raises(ValueError, match="RandGaussianNoised: .*unexpected keyword"):
        steps_of(AugmentationOptions(monai=[{"name": "RandGaussianNoised", "stdd": 1}]))


def test_no_transform_writes_into_the_volumes():
    """Neither where a patch is the volume, nor where it is whole rows of one modality."""
    pytest.importorskip("monai", reason="MONAI's transforms by name")
    holes = {"prob": 1.0, "holes": 4, "spatial_size": [6, 6, 6]}
    transforms = [
        {"name": "RandCoarseDropoutd", **holes, "fill_value": 0},
        {"name": "RandCoarseShuffled", **holes},
        {"name": "RandStdShiftIntensityd", "prob": 1.0, "factors": [1, 2]},
        {"name": "NormalizeIntensityd"},
        {"name": "KeepLargestConnectedComponentd", "keys": ["label"]},
        {"name": "KeepLargestConnectedComponentd", "keys": ["mask"]},
        {"name": "FillHolesd", "keys": ["label"]},
    ]
    boxes = [((2, 2, 2), (5, 5, 5)), ((10, 10, 10), (2, 2, 2)), ((4, 4, 4), (1, 1, 1))]
    for shape in ((14, 15, 13), (40, 16, 16)):
        given = volume(shape=shape, boxes=boxes)
        given.label[given.label == 2] = 1
        given.label[4, 4, 4] = 0
        given.mask[0, 0, 0] = True
        one = Volume("a", given.image[:1].copy(), given.mask, given.label, None)
        sampler = Sampler({"a": one}, options())
        kept = sampler.volumes["a"]
        before = [array.copy() for array in (kept.image, kept.label, kept.mask)]
        changed = set()
        for step in steps_of(AugmentationOptions("none", 0, 0, transforms)):
            for _, patch in sampler.patches(0):
                made = step(patch, generator(0, 0, 1))
                pairs = zip(vars(made).items(), vars(patch).values(), strict=True)
                changed |= {name for (name, one), two in pairs if not np.array_equal(one, two)}
            for array, was in zip((kept.image, kept.label, kept.mask), before, strict=True):
                np.testing.assert_array_equal(array, was)
        assert changed == {"image", "label", "mask"}
        with pytest.raises(ValueError, match="read-only"):
            patch.image[:] = 0


def test_monais_transforms_move_the_mask_and_invent_no_class():
    pytest.importorskip("monai", reason="MONAI's transforms by name")
    values = np.random.default_rng(0).standard_normal((8, 8, 8)).astype(np.float32)
    patch = Patch(np.stack([values, -values]), 2 * (values > 0).astype(np.uint8), values > -1)

    def made(**transform):
        (step,) = steps_of(AugmentationOptions("none", 0, 0, [transform]))
        return step(patch, generator(0, 0, 1))

    for keys in ({}, {"keys": ["image", "label"]}):
        turned = made(name="RandRotate90d", prob=1.0, **keys)
        assert (turned.mask != patch.mask).any()
        np.testing.assert_array_equal(turned.mask, turned.image[0] > -1)
    turned = made(name="RandAffined", prob=1.0, rotate_range=[0.4] * 3, padding_mode="zeros",
                  mode=["bilinear", "nearest"])  # fmt: skip
    assert (turned.mask != patch.mask).any()
    assert not (turned.label[~turned.mask]).any()  # what is padded is neither
    smooth = {"spatial_size": [8] * 3, "rand_size": [3] * 3, "prob": 1.0}
    made(name="RandSmoothDeformd", **smooth, pad=0, def_range=0.3)
    for name, options in {
        "RandSimulateLowResolutiond": {"prob": 1.0, "zoom_range": [0.3, 0.4]},
        "RandSmoothFieldAdjustContrastd": smooth,
        "RandSmoothFieldAdjustIntensityd": smooth,
    }.items():
        changed = made(name=name, **options)
        assert (changed.image != patch.image).any()
        np.testing.assert_array_equal(changed.label, patch.label)
        np.testing.assert_array_equal(changed.mask, patch.mask)
    blurred = {"name": "RandSimulateLowResolutiond", "prob": 1.0, "zoom_range": [0.3, 0.4]}
    with pytest.raises(ValueError, match=r"RandSimulateLowResolutiond made .* classes \[0, 2\]"):
        made(**blurred, keys=["label"], upsample_mode="trilinear")
    with pytest.raises(ValueError, match="monai: RandSpatialCropd made image"):
        made(name="RandSpatialCropd", roi_size=[4, 4, 4], random_size=False)
    with pytest.raises(ValueError, match="augmentation.monai: RandWeightedCropd: "):
        made(name="RandWeightedCropd", w_key="weights", spatial_size=[4, 4, 4])
