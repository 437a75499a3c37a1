"""The same data with other tensors."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from resq.numerics.device import changed


@dataclass(frozen=True)
class Pair:
    """Something that holds tensors."""

    first: Tensor
    rest: dict[str, Any]


def pair() -> Pair:
    shared = torch.arange(3.0)
    return Pair(shared, {"again": [shared, (torch.ones(2), "a word")], "none": None})


def test_every_tensor_is_changed_once_and_what_holds_none_is_the_same() -> None:
    given = pair()
    found = changed(given, lambda tensor: tensor + 1)
    assert torch.equal(found.first, torch.arange(3.0) + 1)
    assert found.rest["again"][0] is found.first
    assert torch.equal(found.rest["again"][1][0], torch.full((2,), 2.0))
    assert found.rest["again"][1][1] == "a word"
    assert changed(given, lambda tensor: tensor) is given


@pytest.fixture
def no_collection() -> Any:
    gc.disable()
    yield
    gc.enable()


def test_tensors_leave_memory_with_their_last_reference(no_collection: None) -> None:
    given = pair()
    found = changed(given, lambda tensor: tensor + 1)
    seen = [weakref.ref(each.first) for each in (given, found)]
    del given, found
    assert [each() for each in seen] == [None, None]
