"""Reading and swapping activations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from escd import Trace


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_reads_what_the_module_put_out(net):
    x = torch.randn(5, 3)
    with Trace(net, ["0", "1"]) as trace:
        net(x)
    assert torch.equal(trace["0"], net[0](x))
    assert torch.equal(trace["1"], net[0](x).relu())


def test_keeps_the_last_of_several_calls(net):
    with Trace(net, "0") as trace:
        net(torch.zeros(1, 3))
        net(torch.ones(1, 3))
    assert torch.equal(trace["0"], net[0](torch.ones(1, 3)))


def test_edit_takes_the_outputs_place(net):
    seen = []

    def double(output, name):
        seen.append(name)
        return 2 * output

    x = torch.randn(5, 3)
    with Trace(net, "1", edit=double) as trace:
        y = net(x)
    assert seen == ["1"]
    assert torch.equal(y, net[2](2 * net[0](x).relu()))
    assert torch.equal(trace["1"], 2 * net[0](x).relu())
    assert not torch.equal(y, net(x))  # nothing is left behind


def test_unknown_name_is_refused_before_anything_runs(net):
    with pytest.raises(KeyError, match="no submodule '7'"), Trace(net, ["0", "7"]):
        pytest.fail("the block ran")
    assert not net[0]._forward_hooks


def test_a_module_that_was_not_met_is_an_error(net):
    with pytest.raises(RuntimeError, match=r"never called: 2$"), Trace(net, ["0", "2"]):
        net[0](torch.zeros(1, 3))
    assert not net[0]._forward_hooks and not net[2]._forward_hooks


def test_an_exception_inside_is_not_hidden_and_hooks_go(net):
    with pytest.raises(ZeroDivisionError), Trace(net, "0"):
        raise ZeroDivisionError
    assert not net[0]._forward_hooks


def test_blocks_of_a_unet(backbone):
    names = ["down_blocks.0", "mid_block", "up_blocks.2"]
    with Trace(backbone.unet, names) as trace:
        backbone.unet(torch.randn(1, 4, 8, 8), 5, backbone.encode_prompt("a red star"))
    hidden, skips = trace["down_blocks.0"]
    assert hidden.shape == (1, 16, 4, 4) and len(skips) == 2
    assert trace["mid_block"].shape == (1, 32, 2, 2)
    assert trace["up_blocks.2"].shape == (1, 16, 8, 8)
