"""Slabs on their way to the host: order, buffers, faults; a transfer that arrives when told."""

from __future__ import annotations

import pytest
import torch

import voxfuse
from voxfuse.fusion.delivery import BUFFERS, Delivery
from voxfuse.fusion.sink import Sink


class Late:
    """A transfer whose copies take place only when somebody waits, or after :meth:`arrive`."""

    def __init__(self):
        self.allocated, self.arrived, self.waits = [], 0, 0
        self.started = []

    def allocate(self, size):
        self.allocated.append(size)
        return torch.full((size,), 255, dtype=torch.uint8)

    def start(self, slab, staging):
        number = len(self.started)
        self.started.append(slab)
        transfer = self

        class Ticket:
            def query(self):
                if transfer.arrived > number:
                    staging.copy_(slab)
                    return True
                return False

            def synchronize(self):
                transfer.waits += not self.query()
                staging.copy_(slab)

        return Ticket()

    def arrive(self, count):
        self.arrived = count


def test_slabs_arrive_in_order_in_two_buffers():
    transfer = Late()
    delivery = Delivery(transfer)
    result = torch.zeros(5, 3)
    slabs = [torch.full((1, 3), float(i + 1)) for i in range(5)]
    for i, slab in enumerate(slabs):
        delivery.send(slab, result[i : i + 1])
        assert len(delivery) == min(i + 1, BUFFERS)
        # A third slab needs a buffer: the oldest is waited for, and no other.
        assert (result[:, 0] != 0).sum() == max(i + 1 - BUFFERS, 0)
    assert transfer.allocated == [12] * BUFFERS
    assert transfer.waits == 3
    delivery.flush()
    assert torch.equal(result, torch.cat(slabs))
    assert len(delivery) == 0


def test_what_has_arrived_is_written_without_waiting():
    transfer = Late()
    delivery = Delivery(transfer)
    result = torch.zeros(2)
    delivery.send(torch.tensor([1.0]), result[:1])
    delivery.send(torch.tensor([2.0]), result[1:])
    delivery.collect()
    assert result.tolist() == [0, 0]
    transfer.arrive(1)
    delivery.collect()
    assert result.tolist() == [1, 0]
    assert transfer.waits == 0


def test_a_larger_slab_gets_a_larger_buffer():
    transfer = Late()
    delivery = Delivery(transfer)
    result = torch.zeros(2, 6, dtype=torch.uint16)
    for i, width in ((0, 3), (1, 6)):
        delivery.send(torch.full((width,), 7, dtype=torch.uint16), result[i, :width])
        delivery.flush()
    assert transfer.allocated == [6, 12]
    assert result.tolist() == [[7, 7, 7, 0, 0, 0], [7] * 6]


def test_slabs_on_the_host_are_copied_at_once():
    delivery = Delivery()
    place = torch.zeros(2, dtype=torch.uint8)
    delivery.send(torch.tensor([1, 2], dtype=torch.uint8), place)
    assert place.tolist() == [1, 2]
    assert len(delivery) == 0


@pytest.fixture
def late(monkeypatch):
    """Every fuser delivers late, as if its ring were on another device than the result."""
    transfers = []

    class LateDelivery(Delivery):
        def __init__(self):
            transfers.append(Late())
            super().__init__(transfers[-1])

    monkeypatch.setattr("voxfuse.fusion.sink.Delivery", LateDelivery)
    monkeypatch.setattr(Sink, "_is_direct", lambda self, place, device: False)
    return transfers


def test_a_fuser_delivers_everything(late, monkeypatch):
    options = {"output": "labels", "stream_axis": 0}
    fuser = voxfuse.PatchFuser((32, 8, 8), 8, 2, **options)
    patches = torch.randn(len(fuser), 2, 8, 8, 8)
    for index in range(len(fuser)):
        fuser.add(patches[index : index + 1])
    assert len(late[0].started) > BUFFERS
    result = fuser.result()
    direct = voxfuse.PatchFuser(
        (32, 8, 8), 8, 2, output="labels", stream_axis=0, backend="reference"
    )
    direct.add(patches)
    assert torch.equal(result, direct.result())


def test_finished_slices_are_written_when_it_says_so(late):
    out = torch.full((32, 8, 8), 200, dtype=torch.uint8)
    fuser = voxfuse.PatchFuser((32, 8, 8), 8, 2, output="labels", stream_axis=0, out=out)
    fuser.add(torch.randn(2, 2, 8, 8, 8))
    assert (out == 200).all()
    assert fuser.finished == 8
    assert (out[:8] < 2).all()
    assert (out[8:] == 200).all()


def test_a_fault_in_the_predictor_leaves_finished_slices(late):
    out = torch.full((40, 8, 8), 200, dtype=torch.uint8)
    calls = iter(range(4))

    def predictor(patch):
        if next(calls, None) is None:
            raise RuntimeError("out of order")
        return torch.cat([torch.zeros_like(patch), torch.ones_like(patch)], 1)

    with pytest.raises(RuntimeError, match="out of order"):
        voxfuse.sliding_window_inference(
            torch.rand(1, 1, 40, 8, 8), 8, 1, predictor, output="labels", out=out
        )
    assert late[-1].waits > 0
    assert (out[:16] == 1).all()
    assert (out[16:] == 200).all()


@pytest.mark.gpu
def test_from_a_gpu_through_pinned_memory():
    volume = torch.rand(1, 1, 64, 40, 40, device="cuda")

    def predictor(patch):
        return torch.cat([patch, 1 - patch, (9 * patch).sin()], 1)

    expected = voxfuse.sliding_window_inference(volume, 16, 2, predictor, output="labels")
    out = torch.empty(64, 40, 40, dtype=torch.uint8)
    voxfuse.sliding_window_inference(volume, 16, 2, predictor, output="labels", out=out)
    assert torch.equal(out, expected[0, 0].cpu())
