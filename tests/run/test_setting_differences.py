"""What two records of settings disagree on, by the names of parameters and of settings."""

from __future__ import annotations

import time
from typing import Any

import pytest

from torch_frame.run.setting_differences import as_set, derived, differing, shown


def record(*groups: dict[str, Any], schedule: Any = None, warmup: tuple[Any, ...] = (None, 0, 0.001)) -> dict[str, Any]:
    return {"groups": list(groups), "schedule": schedule, "warmup": list(warmup)}


def schedule(name: str | None, *inside: Any, functions: Any = (), **settings: Any) -> dict[str, Any]:
    return {"class": name, "settings": settings, "functions": list(functions), "schedulers": list(inside)}


def texts(saved: Any, script: Any) -> list[str]:
    return [str(one) for one in differing(saved, script)]


def test_groups_are_compared_by_the_names_of_their_parameters_else_by_place() -> None:
    a, b = {"params": ["a"], "lr": 0.1}, {"params": ["b"], "lr": 0.2}
    assert texts(record(a, b), record(b, a)) == []
    numbered = [{"params": [0], "lr": 0.1}, {"params": [1], "lr": 0.3}]
    assert texts(record(*numbered), record(a, b)) == ["lr (saved 0.3, the script's 0.2)"]
    outside = [{"params": [None], "lr": 0.1}, {"params": [None], "lr": 0.3}]
    assert texts(record(*outside), record(a, b)) == ["lr (saved 0.3, the script's 0.2)"]


def test_many_groups_are_compared_in_time_that_grows_with_their_number() -> None:
    groups = [{"params": [f"layers.{i}.weight"], "lr": float(i)} for i in range(20_000)]
    begun = time.process_time()
    assert texts(record(*groups), record(*reversed(groups))) == []
    assert time.process_time() - begun < 2.0  # 0.1 s; 5 s if each is looked for among all


def test_settings_that_only_one_has_are_left_out() -> None:
    assert texts(record({"params": ["a"], "lr": 1.0, "x": 1}), record({"params": ["a"], "lr": 1.0, "y": 2})) == []


def test_schedules_are_compared_with_those_inside() -> None:
    saved = schedule("SequentialLR", schedule("StepLR", gamma=0.1), schedule("StepLR", gamma=0.1), milestones=[3])
    script = schedule("SequentialLR", schedule("StepLR", gamma=0.1), schedule("StepLR", gamma=0.2), milestones=[4])
    assert texts(record(schedule=saved), record(schedule=script)) == [
        "milestones (saved [3], the script's [4])",
        "schedulers[1].gamma (saved 0.1, the script's 0.2)",
    ]
    other = schedule("SequentialLR", schedule("StepLR", gamma=0.1), schedule("LinearLR"), milestones=[3])
    ((one,)) = differing(record(schedule=saved), record(schedule=other))
    assert (one.kind, one.name, one.saved, one.script) == ("class", "schedulers[1]", "StepLR", "LinearLR")
    fewer = schedule("SequentialLR", schedule("StepLR", gamma=0.1), milestones=[3])
    assert texts(record(schedule=saved), record(schedule=fewer)) == ["schedulers (saved 2, the script's 1)"]


@pytest.mark.parametrize(("saved", "script"), [(None, schedule("StepLR")), (schedule("StepLR"), None)])
def test_a_schedule_that_comes_or_goes_is_another_class(saved: Any, script: Any) -> None:
    (one,) = differing(record(schedule=saved), record(schedule=script))
    assert (one.kind, one.name) == ("class", "lr_scheduler")
    assert {one.saved, one.script} == {None, "StepLR"}


def test_a_class_that_is_not_known_is_compared_by_its_settings() -> None:
    assert texts(record(schedule=schedule(None, gamma=0.1)), record(schedule=schedule("StepLR", gamma=0.2))) == [
        "gamma (saved 0.1, the script's 0.2)"
    ]


def test_values_of_functions_are_told_from_attributes_of_objects() -> None:
    def one(is_stateful: bool, value: int) -> Any:
        return schedule("LambdaLR", functions=[{"is_stateful": is_stateful, "values": {"total": value}}])

    for is_stateful, kind in ((False, "function"), (True, "schedule")):
        (found,) = differing(record(schedule=one(is_stateful, 1)), record(schedule=one(is_stateful, 2)))
        assert (found.kind, found.name) == (kind, "total")


def test_a_warm_up_that_is_off_has_no_other_settings() -> None:
    assert texts(record(warmup=(None, 0, 0.1)), record(warmup=(None, 0, 0.5))) == []
    assert texts(record(warmup=(None, 0, 0.1)), record(warmup=("exp", 9, 0.5))) == [
        "warmup_method (saved None, the script's exp)"
    ]
    assert texts(record(warmup=("exp", 8, 0.1)), record(warmup=("exp", 9, 0.5))) == [
        "warmup_iters (saved 8, the script's 9)",
        "warmup_factor (saved 0.1, the script's 0.5)",
    ]


def test_numbers_are_the_same_up_to_the_digits_of_float32() -> None:
    group = {"params": ["a"], "lr": 0.1, "nan": float("nan"), "betas": [0.9, 0.99]}
    near = {"params": ["a"], "lr": 0.10000000149, "nan": float("nan"), "betas": (0.9, 0.99)}
    assert texts(record(group), record(near)) == []


def test_the_rate_that_was_set_is_the_one_before_the_schedule() -> None:
    assert as_set({"params": [], "lr": 0.01, "initial_lr": 0.1, "object": object()}) == {"lr": 0.1}
    cycled = {"lr": 0.1, "max_momentum": 0.95, "momentum": 0.87, "betas": (0.87, 0.99)}
    assert as_set(cycled) == {"lr": 0.1, "max_momentum": 0.95, "betas": [0.99]}


def test_a_state_without_a_record_shows_what_is_in_force() -> None:
    counts = {"scheduler": None, "regular_lrs": [0.1], "warmup": ["linear", 9, 0.1]}
    assert derived([{"params": [0], "lr": 0.02}], counts, {}) == {
        "groups": [{"params": [0], "lr": 0.1}],
        "schedule": None,
        "warmup": ["linear", 9, 0.1],
    }


def test_values_are_shown_without_the_noise_of_floats() -> None:
    assert [shown(value) for value in (0.1 + 0.2, 1e-8, [0.1 + 0.2, None], "exp")] == [
        *("0.3", "1e-08", "[0.3, None]", "exp")
    ]
