"""Tensors are compared by one call of torch's, and each by itself where that cannot be."""

import pytest
import torch
from torch import nn

from everstep.client import forms

from . import test_recollecting


@pytest.fixture
def without_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that has no such thing."""
    monkeypatch.setattr(forms, "_guards", lambda *_: None)


@pytest.mark.usefixtures("without_guards")
@pytest.mark.parametrize("name", test_recollecting.CHANGES)
def test_each_change_is_seen_by_looking_at_each_tensor(name: str) -> None:
    test_recollecting.test_each_change_is_seen(name, "adam")


@pytest.mark.usefixtures("without_guards")
@pytest.mark.parametrize("seed", range(10))
def test_any_changes_are_seen_by_looking_at_each_tensor(seed: int) -> None:
    test_recollecting.test_any_changes_are_seen(seed)


def test_torch_compares_all_tensors_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.ones(3, 4), nn.Parameter(torch.ones(5)), torch.empty(0), torch.ones(8)[::2]]
    sources = forms.Sources(tensors, gradients=False)
    with monkeypatch.context() as patched:
        patched.setattr(forms.Sources, "_look", lambda *_: pytest.fail("looked at each"))
        assert sources.unchanged()
    # Nothing that matters here, but for torch: each is looked at then.
    tensors[1].requires_grad_(False)
    assert sources.unchanged()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sources.unchanged()
    tensors[0].data = torch.ones(3, 4)
    assert not sources.unchanged()
