"""Every instance of every CUDA kernel that ships runs in the emulation, against the reference.

What ships is read from what was compiled: the instances from the symbols of the emulation programs
(the same dispatch, so the same instances as the library's, which is checked where it was built),
the types of target and weight from the enumeration in csrc/math, those of a result from the switch
in csrc/cuda. A kernel, an instance or a type that is added without a case below fails here.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sysconfig
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

import voxfuse
from tests.emulation import emulator
from tests.emulation.hard_confusion import HardConfusion
from tests.emulation.resample_argmax import ResampleArgmax
from tests.ops.finalize_slab import cases as finalize_cases
from tests.ops.finalize_slab.cases import SlabCase
from tests.ops.hard_confusion import cases as hard_cases
from tests.ops.hard_confusion.cases import HardCase
from tests.ops.overlap_add.cases import FLOATS, assert_fused, fusion_case
from tests.ops.ratio_loss.cases import check_ratio, with_absent_class
from tests.ops.resample_argmax import cases as resample_cases
from tests.ops.resample_argmax.cases import ResampleCase
from tests.ops.soft_confusion.cases import ConfusionCase, check
from voxfuse.contract import Resampled
from voxfuse.reference import overlap_add as fusion_reference

pytestmark = emulator.NEEDED

ELEMENT = tuple(
    re.search(  # type: ignore[union-attr]
        r"enum class Element : int \{ (.*?) \}", (emulator.ROOT / "csrc/math/layout.h").read_text()
    )[1].split(", ")
)
TYPES = tuple(emulator.ELEMENTS)
LABELS = tuple(dtype for dtype in TYPES if dtype != torch.bool)
WEIGHTS = (None, *TYPES)
LAYOUTS = ("contiguous", "permuted", "channels_last", "sliced")
SCALAR, PLANAR, INTERLEAVED = range(3)  # csrc/cuda/soft_confusion.h
NONE = -1


def handled(file: str, function: str, otherwise: str) -> set[int]:
    """Codes of the element types that the switch of a function in csrc/cuda tells apart."""
    source = (emulator.ROOT / "csrc" / "cuda" / file).read_text()
    body = source[re.search(rf"\b{function}\(const \w+& q", source).start() :]  # type: ignore[union-attr]
    names = re.findall(r"case Element::(\w+):", body[: body.index("\n}\n")])
    assert names, f"{function} in {file} has no switch over element types"
    return {ELEMENT.index(name) for name in (*names, otherwise)}


def confusion_cases() -> Iterable[ConfusionCase]:
    """Soft confusion: class paths, types, activations; kinds of targets, weights and layouts."""
    turn = itertools.count()

    def rotated() -> dict[str, object]:
        i = next(turn)
        return {
            "target_dtype": LABELS[i % len(LABELS)],
            "weight": WEIGHTS[i % len(WEIGHTS)],
            "layout": LAYOUTS[i % len(LAYOUTS)],
            "gamma": (0.0, 2.0)[i // 4 % 2],
        }

    # Multiples of 16 voxels, so that planes are aligned; the tile's end is not.
    for dtype, full in itertools.product(FLOATS, (False, True)):
        for classes in (*range(2, 17), 20, 140, 260):
            yield ConfusionCase(
                classes=classes, spatial=(5, 16), dtype=dtype, full=full, **rotated()
            )
        for activation in ("sigmoid", "none"):
            yield ConfusionCase(
                spatial=(5, 4, 16), dtype=dtype, full=full, activation=activation, **rotated()
            )
        yield ConfusionCase(
            spatial=(5, 4, 16), dtype=dtype, full=full, likelihood="sigmoid", **rotated()
        )
    paths = (
        dict(classes=2),
        dict(classes=4),
        dict(classes=20),
        dict(classes=2, activation="sigmoid"),
        dict(classes=2, likelihood="sigmoid"),
    )
    for path, full in itertools.product(paths, (False, True)):
        for dtype, layout in itertools.product(FLOATS[:3], LAYOUTS):
            options = {**rotated(), "layout": layout, "dtype": dtype}
            yield ConfusionCase(spatial=(5, 4, 16), full=full, **path, **options)
        for i, weight in enumerate(WEIGHTS):
            types = {"target_dtype": LABELS[i % len(LABELS)], "weight": weight}
            yield ConfusionCase(spatial=(4, 16), full=full, **path, **{**rotated(), **types})
        if path["classes"] == 2:  # bool labels
            yield ConfusionCase(spatial=(4, 16), **path, target_dtype=torch.bool)
    for dtype, unlabelled in itertools.product(FLOATS, ("exclude", "background")):
        yield ConfusionCase(spatial=(4, 16), dtype=dtype, unlabelled=unlabelled)
    yield ConfusionCase(batch=300, classes=2, spatial=(5,))  # more samples than there are counters
    for (i, dtype), activation in itertools.product(
        enumerate((*TYPES, *TYPES)), ("sigmoid", "none", "softmax")
    ):
        yield ConfusionCase(
            classes=1 if i < len(TYPES) else 3,
            spatial=(4, 16),
            target="dense",
            activation=activation,
            full=True,
            **{**rotated(), "target_dtype": dtype},
        )


def features_of_every_instance(operators, log):
    """The values that every feature of a launch had, by kernel; all kernels must have run."""
    met: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for name, features in operators.launched(log):
        for feature, value in features.items():
            met[name][feature].add(value)
    assert set(met) == set(operators.instances().values())
    return met


def test_every_instance_of_soft_confusion_runs(tmp_path):
    log = tmp_path / "launches"
    operators = emulator.SoftConfusion(EMULATION_LOG=str(log))
    for case in confusion_cases():
        check(case, operators)
    operators.close()
    launched = operators.launched(log)
    assert set(operators.instances().values()) - {name for name, _ in launched} == set()

    met: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    layouts = defaultdict(set)
    for name, features in launched:
        kernel = re.split("[<(]", name)[0]
        if kernel == "finish":
            continue
        kind = "dense" if features["dense"] else "labels"
        met[kernel][kind].add(features["target"])
        for feature in ("weight", "sums", "focal"):
            met[kernel][feature].add(features[feature])
        layouts[name.split(",")[0].rstrip(">"), "input"].add(features["layout"])
        layouts[name.split(",")[0].rstrip(">"), "gradient"].add(features["gradient"])
    every = set(range(len(ELEMENT)))
    boolean = {ELEMENT.index("boolean")}
    kernels = {name for name in emulator.kernel_names() if re.match("few|many|separate|gen", name)}
    assert set(met) == kernels
    for kernel, kinds in met.items():
        assert kinds["labels"] == (every - boolean if "many" in kernel else every), kernel
        assert kinds["weight"] == every | {NONE}, kernel
        assert kinds["focal"] == {0, 1}, kernel
        assert kinds["sums"] == ({4} if kernel.startswith("many") else {4, 8}), kernel
        if kernel.startswith(("separate", "general")):
            assert kinds["dense"] == every, kernel
    for (kernel, tensor), found in layouts.items():
        if kernel.startswith("general"):
            continue  # reads element by element
        expected = {SCALAR, PLANAR, INTERLEAVED} if kernel.startswith("few") else {SCALAR, PLANAR}
        if tensor == "gradient":
            expected = expected if "backward" in kernel else {NONE}
        assert found == expected, (kernel, tensor)


def test_every_instance_of_ratio_loss_runs(tmp_path):
    log = tmp_path / "launches"
    operators = emulator.RatioLoss(EMULATION_LOG=str(log))
    for pooling, reduction in itertools.product(range(4), range(3)):
        check_ratio(
            operators, with_absent_class(2, 3, 8), class_pooling=pooling, reduction=reduction
        )
    operators.close()
    launched = {name for name, _ in operators.launched(log)}
    assert launched == set(operators.instances().values())


def test_every_instance_of_overlap_add_runs(tmp_path):
    log = tmp_path / "launches"
    operators = emulator.OverlapAdd(EMULATION_LOG=str(log))
    for dtype, dense, divided in itertools.product(FLOATS, (False, True), (False, True)):
        for patch, volume in (((5,), (23,)), ((4, 8), (12, 16)), ((3, 4, 16), (9, 9, 40))):
            patches, origins, rows, tables, window = fusion_case(patch, volume, 9, 5, dtype)
            rows = torch.zeros_like(rows) if dense else rows
            weights = [window] if dense else tables
            total = None
            if divided:
                total = torch.zeros(volume, dtype=torch.float64)
                fusion_reference.overlap_weights_(total, origins, rows, weights, 0, 0, volume[0])
            accumulator = torch.promote_types(dtype, torch.float32)
            for axis in range(len(volume)):
                place = (axis, 0, volume[axis])
                ring = torch.zeros(5, *volume, dtype=accumulator)
                operators.overlap_add_(ring, patches, origins, rows, weights, total, *place)

                def added(p, ring=ring, place=place, o=origins, r=rows, w=weights, t=total):
                    result = torch.zeros_like(ring, dtype=p.dtype)
                    fusion_reference.overlap_add_(result, p, o, r, w, t, *place)
                    return result

                truth, plain, size = (
                    added(p)
                    for p in (patches.double(), patches.to(accumulator), patches.double().abs())
                )
                eps = torch.finfo(accumulator).eps
                assert bool(((ring.double() - truth).abs() <= 8 * eps * size).all())
                assert plain.dtype == ring.dtype
                sums = torch.zeros(volume, dtype=torch.float64)
                expected = sums.clone()
                operators.overlap_weights_(sums, origins, rows, weights, *place)
                fusion_reference.overlap_weights_(expected, origins, rows, weights, *place)
                torch.testing.assert_close(sums, expected, rtol=1e-14, atol=0)
            assert_fused(
                operators.overlap_add(patches, origins, rows, weights, total, volume),
                lambda p, o=origins, r=rows, w=weights, t=total, v=volume: (
                    fusion_reference.overlap_add(p, o, r, w, t, v)
                ),
                patches,
                dtype,
                "overlap_add",
            )
            grad = torch.randn(5, *volume, dtype=torch.float64).to(dtype)
            assert_fused(
                operators.overlap_add_backward(grad, origins, rows, weights, total),
                lambda g, o=origins, r=rows, w=weights, t=total: (
                    fusion_reference.overlap_add_backward(g, o, r, w, t)
                ),
                grad,
                dtype,
                "overlap_add_backward",
            )
    for dtype, activation, channels in itertools.product(FLOATS, (1, 2), (3, 9)):
        for dense, divided in itertools.product((False, True), (False, True)):
            for patch, volume in (((5,), (23,)), ((4, 8), (12, 16)), ((3, 4, 16), (4, 5, 40))):
                patches, origins, rows, tables, window = fusion_case(
                    patch, volume, 4, channels, dtype
                )
                rows = torch.zeros_like(rows) if dense else rows
                weights = (origins, rows, [window] if dense else tables)
                total = torch.full(volume, 2.0, dtype=torch.float64) if divided else None
                fused = operators.overlap_add(patches, *weights, total, volume, activation)
                truth = fusion_reference.overlap_add(
                    patches.double(), *weights, total, volume, activation
                )
                torch.testing.assert_close(
                    fused, truth.to(dtype), rtol=8 * torch.finfo(dtype).eps, atol=1e-6
                )
                grad = torch.randn(channels, *volume).to(dtype)
                torch.testing.assert_close(
                    operators.overlap_add_backward(grad, *weights, total, patches, activation),
                    fusion_reference.overlap_add_backward(
                        grad.double(), *weights, total, patches.double(), activation
                    ).to(dtype),
                    rtol=8 * torch.finfo(dtype).eps,
                    atol=1e-6 if dtype in (torch.float32, torch.float64) else 1e-2,
                )
                for axis in range(len(volume)):
                    ring = torch.zeros_like(truth).to(torch.promote_types(dtype, torch.float32))
                    place = (axis, 0, volume[axis], 0, 0.0, activation)
                    operators.overlap_add_(ring, patches, *weights, total, *place)
                    torch.testing.assert_close(ring.double(), truth, rtol=2e-6, atol=1e-6)
    operators.close()
    met: dict[str, set[tuple[tuple[str, int], ...]]] = defaultdict(set)
    for name, features in operators.launched(log):
        met[name].add(tuple(features.items()))
    assert set(met) == set(operators.instances().values())
    for name, found in met.items():
        values = defaultdict(set)
        for feature, value in itertools.chain.from_iterable(found):
            values[feature].add(value)
        assert values["axes"] == {1, 2, 3}, name
        assert values["separable"] == {0, 1}, name
        assert values["divided"] == ({0} if "Mode)2" in name else {0, 1}), name
        in_ring = "Mode)1" in name or "Mode)2" in name
        rings = {0, 1, 2} if in_ring else {NONE}
        # What a softmax of many channels keeps is worked out for both.
        rings = {NONE, 0, 1, 2} if name.startswith("normalise") else rings
        assert values["ring"] == rings, name
        kept, activations = {0}, {0}
        if name.startswith("normalise"):
            kept, activations = {1}, {2}
        elif name.endswith("true>"):
            kept, activations = {0, 1}, {1, 2}
        elif name.startswith("scatter_activated"):
            activations = {1, 2}
        assert (values["kept"], values["activation"]) == (kept, activations), name


def test_every_instance_of_finalize_slab_runs(tmp_path):
    log = tmp_path / "launches"
    operators = emulator.FinalizeSlab(EMULATION_LOG=str(log))
    for mode, real in itertools.product(finalize_cases.MODES, (torch.float32, torch.float64)):
        types = {"labels": finalize_cases.INTEGERS, "mask": (torch.bool, torch.uint8)}
        for i, dtype in enumerate(types.get(mode, finalize_cases.FLOATS)):
            for activation, applied in itertools.product(finalize_cases.ACTIVATIONS, (False, True)):
                case = SlabCase(mode, activation, real=real, dtype=dtype, applied=applied)
                finalize_cases.check(case, operators.finalize_slab)
            case = SlabCase(
                mode, "softmax", channels=9, real=real, dtype=dtype, total=True, clear=i % 2 == 0
            )
            finalize_cases.check(case, operators.finalize_slab)
        if mode != "entropy":
            case = SlabCase(mode, "softmax", channels=6, classes=9, real=real, clear=False)
        else:
            case = SlabCase(mode, "softmax", channels=9, real=real, clear=False)
        finalize_cases.check(case, operators.finalize_slab)
    operators.close()
    met = features_of_every_instance(operators, log)
    stored = handled("finalize_slab.cu", "store_run", "f32") | {ELEMENT.index("u8")}
    every = set().union(*(values["type"] for values in met.values()))
    assert every - {ELEMENT.index("boolean")} == stored
    for name, values in met.items():
        for feature in ("applied", "total", "clear"):
            assert values[feature] == {0, 1}, (name, feature)
        assert values["activation"] == {0, 1, 2}, name
        assert values["head"] == ({0} if "Finish)4" in name else {0, 1}), name


def test_every_instance_of_hard_confusion_runs(tmp_path):
    log = tmp_path / "launches"
    operators = HardConfusion(EMULATION_LOG=str(log))
    for decision, dtype in itertools.product(hard_cases.Decision.__members__, FLOATS):
        # The types of target and mask in turn, of labels and of values a class.
        for i, (target, mask) in enumerate(zip(hard_cases.LABELS, hard_cases.MASKS, strict=False)):
            case = HardCase(
                decision,
                classes=(3, 9)[i % 2],
                spatial=(16 - i % 2,),
                dtype=dtype,
                layout=LAYOUTS[i % len(LAYOUTS)],
                target="dense" if decision != "labels" and i % 3 == 0 else "labels",
                target_dtype=target,
                predicted_dtype=target,
                mask=None if i % 5 == 0 else mask,
                seed=i,
            )
            hard_cases.check(case, operators.hard_confusion)
    operators.close()
    met = features_of_every_instance(operators, log)
    every = {emulator.ELEMENTS[dtype] for dtype in hard_cases.LABELS}
    for name, values in met.items():
        of_labels = "Decision)2" in name
        assert values["target"] == every, name
        assert values["input"] == every if of_labels else len(values["input"]) == 1, name
        assert values["dense"] == ({0} if of_labels else {0, 1}), name
        assert values["vector"] == {0, 1}, name
        assert len(values["mask"]) > 8, name
        assert NONE in values["mask"], name


def test_every_instance_of_resample_argmax_runs(tmp_path):
    log = tmp_path / "launches"
    operators = ResampleArgmax(EMULATION_LOG=str(log))
    for i, (dtype, mode) in enumerate(itertools.product(TYPES, Resampled.__members__)):
        for half, out in itertools.product((False, True), resample_cases.LABELS):
            case = ResampleCase(
                mode,
                dtype=dtype,
                layout=LAYOUTS[i % len(LAYOUTS)],
                out_dtype=out,
                round_to_half=half,
                seed=i,
            )
            resample_cases.check(case, operators.resample_argmax)
    operators.close()
    met = features_of_every_instance(operators, log)
    assert set().union(*(values["type"] for values in met.values())) == set(range(len(ELEMENT)))
    labels = {emulator.ELEMENTS[dtype] for dtype in resample_cases.LABELS}
    for name, values in met.items():
        of_labels = name.endswith("true>")
        assert values["kept"] == ({0} if of_labels else {1, 2, 3}), name
        assert labels <= values["out"], name
        assert values["half"] == {0, 1}, name


def test_the_library_has_the_instances_of_the_emulation():
    library = Path(voxfuse.__file__).parent / "libvoxfuse_cuda.so"
    carried = Path(sysconfig.get_path("purelib")) / "triton/backends/nvidia/bin/cuobjdump"
    tool = str(carried) if carried.exists() else shutil.which("cuobjdump")
    if not library.exists():
        pytest.skip("libvoxfuse_cuda.so was not built")
    if tool is None or shutil.which("c++filt") is None:
        pytest.skip("cuobjdump (Triton's package has one) or c++filt is not installed")
    usage = subprocess.run(
        [tool, "--dump-resource-usage", str(library)], capture_output=True, text=True, check=True
    ).stdout
    symbols = "\n".join(sorted(set(re.findall(r"Function (\S+):", usage))))
    names = subprocess.run(
        ["c++filt"], input=symbols, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    programs = (
        emulator.SoftConfusion,
        emulator.RatioLoss,
        emulator.OverlapAdd,
        emulator.FinalizeSlab,
        HardConfusion,
        ResampleArgmax,
    )
    emulated = {name for program in programs for name in program.instances().values()}
    assert {emulator.readable(name) for name in names} == emulated
