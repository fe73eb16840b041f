"""Labels of one optimizer, a list and a dict, and the form in which they are given back."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from torch_frame.training.several import in_form_of, labelled, labelled_schedulers, schedule_label

A, B = (SGD([torch.zeros(1, requires_grad=True)], lr=0.1) for _ in range(2))
FORMS: dict[str, tuple[Any, list[str], Any]] = {
    "one": (A, ["optimizer"], A),
    "a list": ([A, B], ["optimizer[0]", "optimizer[1]"], (A, B)),
    "a tuple of one": ((A,), ["optimizer[0]"], (A,)),
    "a dict": ({"d": A, "it's": B}, ["optimizer['d']", 'optimizer["it\'s"]'], MappingProxyType({"d": A, "it's": B})),
}


@pytest.mark.parametrize("name", FORMS)
def test_each_form_has_its_labels_and_comes_back_read_only(name: str) -> None:
    given, labels, back = FORMS[name]
    found = labelled(given)
    assert list(found) == labels
    returned = in_form_of(given, found)
    assert type(returned) is type(back)
    assert (dict(returned) == dict(back)) if isinstance(back, MappingProxyType) else returned == back


@pytest.mark.parametrize("name", FORMS)
def test_none_is_a_constant_rate_for_each(name: str) -> None:
    given, labels, _ = FORMS[name]
    assert labelled_schedulers(None, given) == dict.fromkeys(labels)


def test_schedules_go_by_the_names_not_by_the_order_of_a_dict() -> None:
    a, b = StepLR(A, 1), StepLR(B, 1)
    found = labelled_schedulers({"b": b, "a": a}, {"a": A, "b": B})
    assert list(found.items()) == [("optimizer['a']", a), ("optimizer['b']", b)]
    assert schedule_label("optimizer['a']") == "lr_scheduler['a']"
