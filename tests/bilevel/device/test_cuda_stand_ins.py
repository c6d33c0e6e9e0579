"""Faults that only CUDA showed, acted out on the CPU."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from bilevel.device.recording import device_waits
from bilevel.solvers import Fixed, delta_stn
from tests.support.device_waits import no_waiting_on_cuda
from tests.support.solver_cases import PROBLEMS, ready


def _flatten(layer):
    """Act as `nn.LSTM.flatten_parameters` on CUDA: read addresses, then move the weights."""
    weights = layer._flat_weights
    if len({w.data_ptr() for w in weights}) == len(weights):
        with torch.no_grad():
            for w in weights:
                w.set_(w.clone())


@pytest.mark.parametrize("make", [delta_stn, Fixed])
def test_a_recurrent_layer_does_not_rewrite_the_weights_for_cudnn(make, monkeypatch):
    """Per-example weights have no address, and a captured step must find w where it was."""
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", _flatten)
    solver = ready(PROBLEMS["lstm per example"](), make())
    places = [w.data_ptr() for w in solver.core.weights.leaves]
    solver.step()
    assert [w.data_ptr() for w in solver.core.weights.leaves] == places


class Mode:
    """CUDA's debug mode for waits, with PyTorch's warning at its first change in a process."""

    def __init__(self, monkeypatch):
        self.mode, self.warned = 0, False
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set)

    def set(self, mode):
        if not self.warned:
            self.warned = True
            warnings.warn(
                "Synchronization debug mode is a prototype feature and does not yet detect all "
                "synchronizing operations",
                stacklevel=1,
            )
        self.mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)


@pytest.mark.parametrize("context", [no_waiting_on_cuda, device_waits])
def test_the_debug_mode_is_restored_whatever_fails(context, monkeypatch):
    mode = Mode(monkeypatch)

    def fail():
        with context():
            assert mode.mode == (2 if context is no_waiting_on_cuda else 1)
            raise ValueError("inside")

    for before in (0, 1):
        mode.mode = before
        with pytest.raises(ValueError, match="inside"):
            fail()
        assert mode.mode == before


def test_solvers_import_where_torchscript_is_deprecated():
    """PyTorch's first dual of a process calls `torch.jit.script`, which warns on Python 3.12."""
    code = """
import warnings, torch
script, calls = torch.jit.script, []
def deprecated(*args, **kwargs):
    calls.append(args)
    warnings.warn("`torch.jit.script` is deprecated", DeprecationWarning)
    return script(*args, **kwargs)
torch.jit.script = deprecated
warnings.simplefilter("error")
import bilevel.solvers
print(len(calls))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, "the dual calls torch.jit.script no more; drop the filter"
