"""Jobs of boxes: the bits of one process, whatever is cut, interrupted, repeated or changed."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import operator
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import voxfuse
from tests.fusion.test_region import BY_BATCH, Array, network, random_call
from tests.scale import killed
from voxfuse.scale import Job, ManifestError, create_destination, open_destination, open_source
from voxfuse.scale.intensities import Lifted
from voxfuse.scale.manifest import Folder, digest_of_model, packed, unpacked


def options_of_job(options):
    kept = dict(options)
    return kept, {"skip": kept.pop("skip", None)}


@pytest.mark.parametrize("seed", range(100, 124))
def test_boxes_in_any_order_and_stopped_anywhere_make_the_bits_of_one(seed, tmp_path):
    draw, image, roi, predictor, options = random_call(seed)
    options, skips = options_of_job(options)
    whole = voxfuse.sliding_window_inference(
        image, roi, 3, predictor, pad_batches=True, **options, **skips
    )[0]
    shape = tuple(whole.shape)
    unit = tuple(draw.randint(1, 4) for _ in shape)
    out = Array(np.full(shape, 99, torch.empty(0, dtype=whole.dtype).numpy().dtype), unit)
    box = [draw.randint(2, 12) for _ in roi] if draw.random() < 0.7 else None
    source = Array(image[0].numpy())
    each = Job(source, out, roi, predictor, 3, box=box, shards=2, **options)
    plan = each.prepare(tmp_path, **skips)
    assert plan.patches == each.plan(tmp_path).patches
    # Some boxes, then a stop in the middle of one, then all that is left in shards.
    count = draw.randint(1, 4)
    each.run(tmp_path, (draw.randrange(count), count))
    calls = iter(range(draw.randint(0, 9)))

    def failing(patches):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return network(1.0)(patches)

    broken = Job(source, out, roi, failing, 3, models={}, box=box, shards=2, **options)
    with contextlib.suppress(KeyboardInterrupt, ManifestError):
        broken.run(tmp_path)
    again = draw.choice(each.remaining(tmp_path) or [0])
    for index in draw.sample(range(count), count):
        each.run(tmp_path, (index, count))
    assert each.remaining(tmp_path) == []
    assert each.run(tmp_path) == 0
    Folder(tmp_path).marker(again).unlink()
    assert each.run(tmp_path) == 1
    assert each.run(tmp_path, (0, len(plan)), resume=False) == len(plan.shard(0, len(plan)))
    result = out.array.view(np.uint8)
    assert np.array_equal(result, whole.numpy().view(np.uint8))


@pytest.mark.parametrize("kind", ["file", "zarr"])
def test_a_job_that_is_killed_again_and_again_ends_with_the_same_bits(kind, tmp_path):
    if kind == "zarr":
        pytest.importorskip("zarr", reason="zarr is not installed")
    expected = killed.result_of_one_box(tmp_path / "whole")
    killed.job(tmp_path, kind, 0.0).prepare(tmp_path)
    seen = killed.interrupted(tmp_path, kind, 5, 0.004, 0.36, 7, expected)
    assert seen, "nothing was interrupted"
    done = [each["done"] for each in seen]
    assert done == sorted(done)
    assert not any(each["wrong"] for each in seen), seen
    assert np.array_equal(killed.result_of(tmp_path, kind), expected)


def small(**changes):
    """A job of four boxes in a millisecond."""
    image = np.arange(32 * 8, dtype=np.uint8).reshape(32, 8)
    arguments = {
        "source": image,
        "out": np.zeros((32, 8), np.uint8),
        "roi_size": (8, 8),
        "predictor": network(1.0),
        "box": (8, 8),
        "output": "labels",
        "models": {"network": "first"},
    }
    return Job(**{**arguments, **changes})


CHANGES = {
    "models.network": ({"models": {"network": "second"}}, 'was "first", is "second"'),
    "volume.fingerprint": ({"source": np.ones((32, 8), np.uint8)}, "was "),
    "volume.dtype": ({"source": np.ones((32, 8), np.int16)}, 'was "uint8", is "int16"'),
    "options.window": ({"window": "hann"}, 'was null, is "hann"'),
    "grid.starts": ({"overlap": 0.25}, "was "),
    "options.output": ({"output": "mask", "activation": "sigmoid", "channels": [1]}, "was "),
    "result.dtype": ({"out": np.zeros((32, 8), np.int16)}, 'was "uint8", is "int16"'),
    "batch.given": ({"sw_batch_size": 3}, "was 4, is 3"),
    "probe": ({"predictor": network(0.5)}, "was "),
    "volume.normalisation": ({"normalisation": ([0], [2])}, "was null, is "),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_is_refused_by_its_name(name, tmp_path):
    first = small()
    first.prepare(tmp_path)
    assert first.run(tmp_path, (0, 2)) == 2
    changes, message = CHANGES[name]
    changed = small(**changes)
    with pytest.raises(ManifestError, match=re.escape(f"{name}: {message}")):
        changed.run(tmp_path)
    with pytest.raises(ManifestError, match=re.escape(f"{name}: {message}")):
        changed.prepare(tmp_path)
    # Nothing is lost: the job itself goes on.
    assert first.run(tmp_path) == 2


@pytest.mark.parametrize("kind", ["another array", "a file emptied", "a store made again"])
def test_boxes_of_which_the_result_has_nothing_are_done_again(kind, tmp_path):
    """A marker is of what was written then: it says nothing of an array that is new or emptied."""

    def result():
        if kind == "another array":
            return np.zeros((32, 8), np.uint8)
        if kind == "a file emptied":
            return np.memmap(tmp_path / "labels", np.uint8, "w+", shape=(32, 8))
        pytest.importorskip("zarr", reason="zarr is not installed")
        shutil.rmtree(tmp_path / "labels", ignore_errors=True)
        return create_destination(tmp_path / "labels", (32, 8), np.uint8, chunks=8, shards=8)

    def labels(each):
        return each._out[0:32, 0:8]

    # The first box has no label but 0.
    image = np.repeat(np.arange(32, dtype=np.uint8), 8).reshape(32, 8)

    def predictor(x):
        return torch.cat([x * 0 + 20, x], 1)

    jobs = [small(source=image, predictor=predictor, out=result())]
    jobs[0].prepare(tmp_path / "job")
    assert jobs[0].run(tmp_path / "job") == 4
    assert jobs[0].remaining(tmp_path / "job") == []
    expected = np.array(labels(jobs[0]))
    assert not expected[:8].any()
    assert expected[24:].all()
    jobs.append(small(source=image, predictor=predictor, out=result()))
    gone = jobs[1].remaining(tmp_path / "job")
    assert set(gone) >= {2, 3}
    assert (0 in gone) == (kind == "a store made again")  # there nothing was written, not even 0
    assert jobs[1].run(tmp_path / "job") == len(gone)
    assert np.array_equal(labels(jobs[1]), expected)
    assert jobs[1].remaining(tmp_path / "job") == []
    if kind == "a store made again":
        jobs[1]._out.check()
        (tmp_path / "labels/c/3/0").write_bytes(b"torn")
        assert jobs[1].remaining(tmp_path / "job") == [3]


def test_another_machine_is_refused(tmp_path, monkeypatch):
    small().prepare(tmp_path)
    monkeypatch.setattr("voxfuse._library.cpu_capability", lambda: "VSX")
    with pytest.raises(ManifestError, match=r'machine\.cpu: was .* is \["?.*VSX'):
        small().run(tmp_path)


def test_a_damaged_manifest_or_marker_is_said(tmp_path):
    with pytest.raises(ManifestError, match="has no manifest; prepare the job first"):
        small().run(tmp_path)
    each = small()
    each.prepare(tmp_path)
    each.run(tmp_path, (0, 2))
    marker = Folder(tmp_path).marker(1)
    whole = marker.read_text()
    for text in ("", whole[:-5], whole.replace('"box": 1', '"box": 2')):
        marker.write_text(text)
        with pytest.raises(ManifestError, match=r"000001\.json: is damaged; remove it, and the"):
            small().run(tmp_path)
    marker.unlink()
    assert each.run(tmp_path) == 3
    # A marker of another job in the same place.
    other = small(box=(16, 8))
    other.prepare(tmp_path / "other")
    other.run(tmp_path / "other")
    marker.write_text(Folder(tmp_path / "other").marker(1).read_text())
    with pytest.raises(ManifestError, match=r"is of another job \(high: was"):
        small().remaining(tmp_path)
    manifest = tmp_path / "manifest.json"
    text = manifest.read_text()
    for changed in (text[:100], text.replace('"given": 4', '"given": 5')):
        manifest.write_text(changed)
        for use in (each.run, each.prepare):
            with pytest.raises(ManifestError, match=r"(is no manifest|was changed).*; remove it"):
                use(tmp_path)
    # What the error says is a way out, and nothing is done twice.
    manifest.unlink()
    marker.unlink()
    each.prepare(tmp_path)
    assert each.run(tmp_path) == 1
    content = {"format": "voxfuse boxes 0"}
    manifest.unlink()
    Folder(tmp_path).write(content)
    with pytest.raises(ManifestError, match="is 'voxfuse boxes 0', expected 'voxfuse boxes 1'"):
        small().run(tmp_path)


@pytest.mark.parametrize("links", [True, False])
def test_of_two_that_prepare_at_once_the_first_one_stays(links, tmp_path, monkeypatch):
    def no_links(*paths):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    first, other, same = small(), small(window="hann"), small()
    for late in (other, same):

        def settle(known, late=late):
            """Statistics are looked for after the manifest was."""
            first.prepare(tmp_path)

        monkeypatch.setattr(late._lifted, "settle", settle)
    with pytest.raises(ManifestError, match='options.window: was null, is "hann"'):
        other.prepare(tmp_path)
    (tmp_path / "manifest.json").unlink()
    same.prepare(tmp_path)
    assert first.run(tmp_path) == 4


def test_what_a_destination_or_source_raises_leaves_no_marker(tmp_path):
    class Full(Array):
        left = 2

        def __setitem__(self, key, value):
            if self.left == 0:
                raise OSError(28, "No space left on device")
            self.left -= 1
            super().__setitem__(key, value)

    out = Full(np.zeros((32, 8), np.uint8), (8, 8))
    full = small(out=out)
    full.prepare(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        full.run(tmp_path)
    assert full.remaining(tmp_path) == [2, 3]
    out.left = 9
    assert full.run(tmp_path) == 2
    expected = small()
    expected.prepare(tmp_path / "whole")
    expected.run(tmp_path / "whole")
    assert np.array_equal(out.array, expected._out)


def test_a_disk_that_is_full_at_any_moment_loses_nothing(tmp_path, monkeypatch):
    pytest.importorskip("zarr", reason="zarr is not installed")
    expected, fsync = np.zeros((32, 8), np.uint8), os.fsync
    small(out=expected).prepare(tmp_path / "whole")
    small(out=expected).run(tmp_path / "whole")
    # Files and names of four shards and four markers, and of their six folders.
    for moment in range(4 * 2 + 4 * 2 + 6):
        place, calls = tmp_path / str(moment), itertools.count(1)

        def full(file, calls=calls, moment=moment):
            if next(calls) > moment:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(file)

        create_destination(place / "labels", (32, 8), np.uint8, chunks=8, shards=8)
        each = small(out=open_destination(place / "labels"))
        each.prepare(place / "job")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left") as failed:
                each.run(place / "job")
        assert failed.value.errno == errno.ENOSPC
        assert str(place) in str(failed.value)
        left = len(each.remaining(place / "job"))
        assert each.run(place / "job") == left
        each._out.check()
        assert np.array_equal(each._out[0:32, 0:8], expected)


def test_a_box_is_on_the_disk_before_its_marker(tmp_path):
    events = []

    class Flushed(Array):
        def __setitem__(self, key, value):
            events.append("written")
            super().__setitem__(key, value)

        def flush(self):
            events.append(f"flushed with {len(list(tmp_path.glob('done/*')))} markers")

    each = small(out=Flushed(np.zeros((32, 8), np.uint8), (8, 8)))
    each.prepare(tmp_path)
    each.run(tmp_path)
    expected = [["written", f"flushed with {k} markers"] for k in range(4)]
    assert events == functools.reduce(operator.iadd, expected, [])


def test_statistics_are_of_the_whole_volume(tmp_path, monkeypatch):
    monkeypatch.setattr("voxfuse.scale.intensities._BLOCK", 7)
    image = np.random.default_rng(0).normal(1e4, 3, (2, 20, 9)).astype(np.float32)
    each = Job(
        image, np.zeros((20, 9), np.uint8), (8, 8), lambda x: x, output="labels",
        normalisation="zscore",
    )  # fmt: skip
    each.prepare(tmp_path)
    found = json.loads((tmp_path / "manifest.json").read_text())["volume"]["normalisation"]
    exact = image.astype(np.float64).reshape(2, -1)
    np.testing.assert_allclose(found["mean"], exact.mean(1), rtol=1e-13)
    np.testing.assert_allclose(found["std"], exact.std(1), rtol=1e-11)


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "f4"])
def test_every_type_is_normalised_alike(dtype):
    values = np.random.default_rng(0).integers(0, 255, (2, 6, 5)).astype(dtype)
    lifted = Lifted(values, 2, ([10, 100], [3, 0.7]))
    found = lifted[(slice(0, 1), slice(1, 2), slice(1, 6), slice(0, 4))]
    exact = (values[1:2, 1:6, :4].astype(np.float64) - 100) / 0.7
    assert found.dtype == np.float32
    assert np.array_equal(found, exact.astype(np.float32)[None])


@pytest.mark.parametrize("kind", BY_BATCH)
def test_batches_of_one_are_said_and_kept(kind, tmp_path):
    def predictor(patches):
        x = torch.stack([BY_BATCH[kind](each) for each in patches.unbind(-1)], -1)
        return torch.cat([x, 9 - x], 1)

    each = small(predictor=predictor)
    with pytest.warns(UserWarning, match="predicted one by one"):
        each.prepare(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text())["batch"] == {"given": 4, "size": 1}
    assert each.run(tmp_path) == 4


def test_a_network_whose_bits_are_not_its_patch_s_is_refused(tmp_path):
    for layer in (torch.nn.Dropout(0.5), torch.nn.BatchNorm2d(1)):
        net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.Sequential(layer))
        name = type(layer).__name__
        with pytest.raises(ValueError, match=rf"predictor: its layer 1.0 \({name}\) is in train"):
            small(predictor=net)
        small(predictor=net.eval())
    small(predictor=torch.nn.InstanceNorm2d(1))  # of each patch alone
    random = small(predictor=lambda x: torch.rand_like(x.expand(-1, 2, -1, -1)))
    with (
        pytest.warns(UserWarning, match="predicted one by one"),
        pytest.raises(ValueError, match="predictor: gives one patch other bits each time"),
    ):
        random.prepare(tmp_path)


def test_a_function_that_has_changed_in_the_same_process_is_noticed(tmp_path):
    factor = [1.0]
    each = small(predictor=lambda x: torch.cat([x * factor[0], 9 - x], 1))
    each.prepare(tmp_path)
    assert each.run(tmp_path, (0, 2)) == 2
    factor[0] = 2.0
    with pytest.raises(ManifestError, match="probe: was "):
        each.run(tmp_path)


def test_boxes_that_are_given_one_by_one_cost_no_batch_each(tmp_path):
    calls = []

    def counted(patches):
        calls.append(len(patches))
        return torch.cat([patches, 9 - patches], 1)

    each, whole = small(predictor=counted), small(predictor=counted)
    plan = each.prepare(tmp_path / "boxes", skipping="none")
    run = each.begun(tmp_path / "boxes")
    calls.clear()
    for index in reversed(range(len(plan))):
        assert not run.is_done(index)
        run.predict(index)
        assert run.is_done(index)
    assert len(plan) > 1
    assert len(calls) == sum(-(-patches // calls[0]) for patches in plan.patches)
    whole.prepare(tmp_path / "whole")
    whole.run(tmp_path / "whole")
    assert each._out.any()
    assert np.array_equal(each._out, whole._out)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"out": [1]}, TypeError, "out: got list, expected an array that boxes can be assigned"),
        ({"out": np.zeros((32, 9))}, ValueError, r"out: got shape \(32, 9\), expected \(32, 8\)"),
        ({"source": np.zeros((1, 1, 32, 8))}, ValueError, "source: got shape .* expected 2 spat"),
        ({"outputs": "mask"}, TypeError, "outputs: is no option of a job: expected overlap"),
        ({"process_fn": len}, TypeError, "process_fn: is no option of a job: what it makes of"),
        ({"resample_to": (9, 9)}, TypeError, "resample_to: .* have the volume's own voxels"),
        ({"skip": len}, TypeError, "skip: is no option of a job: it is an argument of prepare"),
        ({"roi_weight_map": torch.rand(2, 8, 8)}, ValueError, r"roi_weight_map: got shape \(2, 8"),
        (
            {"source": np.zeros((8,) * 4), "out": np.zeros((8,) * 4), "roi_size": (4,) * 4},
            ValueError,
            "roi_size: got 4 spatial axes, expected 1 to 3",
        ),
        ({"normalisation": "robust"}, ValueError, "normalisation: got 'robust', expected None"),
        ({"normalisation": ([1, 2], [1, 2])}, ValueError, "expected 1 means and as many standard"),
        ({"box": (8,)}, ValueError, r"box: got \(8,\), expected 2 integers >= 1"),
        ({"box": 8}, ValueError, "box: got 8, expected 2 integers >= 1"),
        ({"box": (8.0, 8)}, ValueError, r"box: got \(8.0, 8\), expected 2 integers >= 1"),
        ({"source": "image.zarr"}, TypeError, "source: got str, .*open_source opens paths"),
        ({"roi_size": 8}, ValueError, r"roi_size: got 8 for source and out of shape \(32, 8\)"),
        ({"sw_batch_size": 0}, ValueError, "sw_batch_size: got 0, expected an integer >= 1"),
        ({"normalisation": 3}, ValueError, "normalisation: got 3, expected 1 means and as many"),
        ({"normalisation": ([0], [1], [2])}, ValueError, "expected 1 means and as many"),
        ({"normalisation": ([np.nan], [1])}, ValueError, "all of them finite"),
        ({"models": {"n": Path("modle.pt")}}, FileNotFoundError, "there is no such file: 'modle"),
        ({"models": {"n": 3}}, TypeError, "models: got int, expected a module, a path of a file"),
        # What the first box would find.
        ({"out": np.zeros((5, 32, 8), "u1")}, ValueError, r"out: got shape \(5, 32, 8\), expected"),
        ({"out": np.zeros((32, 8), "f4")}, TypeError, r"out: got float32 of shape \(32, 8\), exp"),
        (
            {"predictor": lambda x: x[..., ::2, ::2]},
            ValueError,
            r"predictor: returned patches of \(4, 4\) voxels for those of \(8, 8\)",
        ),
        ({"box": None, "memory": 10}, ValueError, "memory: got 10, but a box of .* takes"),
        (
            {"predictor": lambda x: (x, x)},
            ValueError,
            "predictor: returned 2 outputs, exp",
        ),
    ],
)
def test_bad_input(changes, error, message, tmp_path):
    with pytest.raises(error, match=message):
        small(**changes).prepare(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_a_result_over_the_source_is_an_error(tmp_path):
    image = np.zeros((2, 32, 8), np.uint8)
    stored = [image, torch.from_numpy(image), open_source(image, axes="cyx")]
    outs = [image[0], torch.from_numpy(image)[0]]
    zarr = pytest.importorskip("zarr", reason="zarr is not installed")
    array = zarr.create_array(tmp_path / "x.zarr", data=image[0], chunks=(8, 8))
    for source, out in [
        *itertools.product(stored, outs),
        (open_source(tmp_path / "x.zarr"), open_destination(tmp_path / "x.zarr")),
        (array, zarr.open_array(tmp_path / "x.zarr")),
    ]:
        with pytest.raises(ValueError, match="out: shares memory with source"):
            small(source=source, out=out)
    small(source=torch.ones(32, 8).bfloat16(), roi_size=[8, 8]).plan()


def test_models_are_known_by_all_of_their_state(tmp_path):
    class Extra(torch.nn.Linear):
        extra = (torch.qint8, {"scale": 1})

        def get_extra_state(self):
            return self.extra

        def set_extra_state(self, state):
            self.extra = state

    first = Extra(2, 2)
    before = digest_of_model(first)
    first.extra = (torch.qint8, {"scale": 2})
    assert len({before, digest_of_model(first)}) == 2
    (tmp_path / "m.pt").write_bytes(b"1")
    before = digest_of_model(tmp_path / "m.pt")
    assert before == digest_of_model(str(tmp_path / "m.pt"))
    (tmp_path / "m.pt").write_bytes(b"2")
    assert digest_of_model(tmp_path / "m.pt") != before
    assert digest_of_model("a text\n" * 1000) == "a text\n" * 1000


def test_the_reference_activates_no_boxes():
    with pytest.raises(RuntimeError, match="backend: activation 'softmax' would be computed by"):
        small(backend="reference", activation="softmax")
    small(backend="reference")


def test_bad_shards(tmp_path):
    each = small()
    each.prepare(tmp_path)
    for shard in [(2, 2), (-1, 2), (0, 0), (0, 1, 2), (0.0, 2), 1]:
        with pytest.raises(ValueError, match=r"shard: got .* expected \(i, n\) with 0 <= i < n"):
            each.run(tmp_path, shard)
    with pytest.raises(TypeError, match="skip: got int, expected a function"):
        each.prepare(tmp_path / "other", skip=3)
    with pytest.raises(ValueError, match="skip: is true for every patch"):
        each.prepare(tmp_path / "other", skip=lambda patch: True)


def test_zarr_to_zarr_in_whole_shards(tmp_path):
    zarr = pytest.importorskip("zarr", reason="zarr is not installed")
    image = np.random.default_rng(0).integers(0, 255, (40, 22, 20)).astype(np.uint8)
    array = zarr.create_array(tmp_path / "image.zarr", data=image, chunks=(8, 8, 8))
    assert array.shape == image.shape
    results = []
    for number, box in enumerate([(40, 22, 20), (16, 16, 20), (9, 22, 9)]):
        place = tmp_path / f"labels{number}.zarr"
        out = create_destination(place, image.shape, np.uint8, chunks=4, shards=8)
        each = Job(
            open_source(tmp_path / "image.zarr"), out, (12, 10, 8), network(0.01), 4, box=box,
            output="labels",
        )  # fmt: skip
        folder = tmp_path / f"job{number}"
        each.prepare(folder)
        # Every process opens the destination anew.
        for index in (1, 0):
            again = Job(
                open_source(tmp_path / "image.zarr"), open_destination(place), (12, 10, 8),
                network(0.01), 4, box=box, output="labels",
            )  # fmt: skip
            again.run(folder, (index, 2))
        assert each.remaining(folder) == []
        out.check()
        results.append(zarr.open_array(place, mode="r")[:])
    assert all(np.array_equal(result, results[0]) for result in results[1:])


def test_skipped_patches_survive_the_text():
    kept = np.random.default_rng(0).random(1001) < 0.2
    assert np.array_equal(unpacked(packed(kept), 1001), kept)
    assert unpacked(packed(None), 3) is None
