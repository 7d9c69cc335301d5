"""Networks: the parameter counts and the work of the papers, shapes, and who may be given."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from voxfuse.training.networks import NETWORKS, UNet, check_patch, make_network


def parameters(network: nn.Module, kinds: tuple[type[nn.Module], ...]) -> int:
    modules = [module for module in network.modules() if isinstance(module, kinds)]
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "millions", "giga_flop"),
    [("fc_densenet", 3.18, 2512), ("fc_densenet_compact", 3.35, 403)],
)
def test_the_papers_network_has_its_parameters_and_its_work(name, millions, giga_flop):
    """Convolutions alone; FLOP of a forward pass of 128^3 voxels, two a multiplication."""
    with torch.device("meta"):
        network = make_network(name, 4, 2).eval()
        counter = FlopCounterMode(display=False)
        with counter:
            network(torch.zeros(1, 4, 128, 128, 128))
    convolutions = parameters(network, (nn.Conv3d, nn.ConvTranspose3d))
    assert round(convolutions / 1e6, 2) == millions
    assert abs(counter.get_total_flops() / 1e9 - giga_flop) < 1
    total = sum(p.numel() for p in network.parameters())
    assert total - convolutions == parameters(network, (nn.BatchNorm3d,)) == 27_778


def test_the_u_net_of_the_tversky_paper():
    with torch.device("meta"):
        network = make_network("unet_salehi2017", 4, 2)
    kinds = [type(module).__name__ for module in network.modules()]
    assert kinds.count("Conv3d") == 2 * 11 + 1  # six levels, five of them twice, and the head
    assert not {"GroupNorm", "BatchNorm3d"} & set(kinds)
    assert all(m.negative_slope == 0 for m in network.modules() if isinstance(m, nn.LeakyReLU))
    widths = [block[0].out_channels for block in network.down]
    assert widths == [8, 16, 32, 64, 128, 256]
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == 5.66


REDUCED = {
    "unet": {"features": [4, 8, 8]},
    "unet_salehi2017": {"features": [4, 8, 8]},
    "fc_densenet": {"levels": 2, "layers": 2, "growth": 4, "features": 8},
    "fc_densenet_compact": {"levels": 2, "layers": 2, "growth": 4, "features": 8},
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_logits_have_the_inputs_extent_and_every_parameter_a_gradient(name):
    network = make_network(name, 2, 3, REDUCED[name])
    n = 2 * network.factor
    logits = network(torch.randn(2, 2, n, n + network.factor, n))
    assert logits.shape == (2, 3, n, n + network.factor, n)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


def test_deep_supervision_is_for_training_only():
    network = UNet(1, 2, (4, 4, 8, 8), deep_supervision=True)
    outputs = network(torch.randn(1, 1, 16, 16, 16))
    assert [tuple(x.shape[2:]) for x in outputs] == [(16,) * 3, (8,) * 3, (4,) * 3]
    assert network.eval()(torch.randn(1, 1, 16, 16, 16)).shape == (1, 2, 16, 16, 16)


def test_instance_norm_is_pytorchs():
    """A group a channel, for the sake of the layout."""
    x = torch.randn(2, 4, 6, 5, 7)
    ours = UNet(4, 2, (4, 8)).down[0][1]
    torch.testing.assert_close(ours(x), nn.InstanceNorm3d(4, affine=True)(x))


def test_any_network_by_its_place():
    network = make_network("voxfuse.training.networks.unet:UNet", 1, 2, {"features": [4, 8]})
    assert type(network) is UNet
    pytest.importorskip("monai", reason="a network of MONAI's by name")
    options = {"spatial_dims": 3, "features": [4, 4, 4, 4, 4, 4]}
    network = make_network("monai.networks.nets:BasicUNet", 2, 3, options)
    assert network(torch.zeros(1, 2, 32, 16, 16)).shape == (1, 3, 32, 16, 16)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unett", {}, "network.name: got 'unett', expected one of unet, .*did you mean unet"),
        ("unet", {"feature": [8]}, "network.feature: not an option of unet.*did you mean features"),
        ("unet", {"classes": 3}, "network.classes: it follows from the data, got 3"),
        ("unet", {"norm": "layer"}, "network.norm: got 'layer', expected one of instance"),
        ("unet", {"features": [8]}, r"network.features: got \[8\], expected two"),
        ("torch.nn:NoSuchNet", {}, "torch.nn has nothing to call that is named NoSuchNet"),
        ("torch.nn:ReLU", {}, "torch.nn:ReLU takes inplace, expected channels and classes"),
    ],
)
def test_what_makes_no_network(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_network(name, 1, 2, options)


def test_patches_that_a_network_cannot_take():
    dense = make_network("fc_densenet", 1, 2, {**REDUCED["fc_densenet"], "levels": 5})
    with pytest.raises(ValueError, match="got 32 x 32 x 32 voxels, of which the network's coars"):
        check_patch(dense, (32, 32, 32), 1)
    check_patch(dense, (32, 32, 32), 2)
    check_patch(dense, (64, 32, 32), 1)
    with pytest.raises(ValueError, match="got 48 x 32 x 32 voxels, expected multiples of 32"):
        check_patch(dense, (48, 32, 32), 2)
    with pytest.raises(ValueError, match="which the network's coarsest level makes one"):
        check_patch(UNet(1, 2), (8, 8, 8), 4)
    check_patch(UNet(1, 2, norm="none"), (8, 8, 8), 4)
    check_patch(nn.Conv3d(1, 2, 3), (7, 7, 7), 1)
