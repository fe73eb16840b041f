"""Groups of another order are matched by the names of their parameters."""

from __future__ import annotations

from typing import Any

import pytest

from torch_frame.run.by_name import by_name, by_position, moved, origins, regrouped_schedule


def saved(*groups: str, **settings: Any) -> dict[str, Any]:
    """A saved state whose parameters have names of one letter; each group has a rate of its own, but those in `settings`."""
    made = [{"params": list(names), "lr": settings.get(names, index)} for index, names in enumerate(groups)]
    return {"param_groups": made, "state": {}}


@pytest.mark.parametrize(
    ("was", "now", "origin", "names_moved"),
    [
        (["ab", "c"], ["ab", "c"], [0, 1], ""),
        (["ab", "c"], ["ba", "c"], [0, 1], ""),
        (["ab", "c"], ["c", "ab"], [1, 0], ""),
        (["abc", "d"], ["ab", "cd"], [0, 1], "c"),
        (["abc", "de"], ["dea", "bc"], [1, 0], "a"),
        (["ab", "cd"], ["ac", "bd"], [0, 1], "bc"),
        (["ab", "c"], ["a", "b", "c"], [0, 0, 1], ""),
        (["ab", "c"], ["abc"], None, ""),
        (["abc", "d"], ["abcd", ""], [0, 1], "d"),
        (["", "ab"], ["ab", ""], [1, 0], ""),
        (["", "ab", ""], ["ab", "", ""], [1, 0, 2], ""),
    ],
)
def test_a_group_continues_the_one_that_it_has_most_in_common_with(
    was: list[str], now: list[str], origin: list[int] | None, names_moved: str
) -> None:
    groups = [list(names) for names in now]
    found = origins(saved(*was), groups)
    assert found == origin
    if found is not None:
        assert sorted(moved([list(names) for names in was], groups, found)) == list(names_moved)


def test_groups_with_the_same_settings_may_be_put_together() -> None:
    assert origins(saved("ab", "c", "d", ab=1, c=1), [["a", "b", "c"], ["d"]]) == [0, 2]
    assert origins(saved("ab", "c", "d", ab=1, c=2), [["a", "b", "c"], ["d"]]) is None


def test_rates_of_a_schedule_follow_their_groups() -> None:
    inner = {"base_lrs": [1, 2], "milestones": [3, 4], "_schedulers": [{"_last_lr": [1, 2]}]}
    assert regrouped_schedule({"regular_lrs": [1.0, 2.0], "scheduler": inner}, 2, [1, 0]) == {
        "regular_lrs": [2.0, 1.0],
        "scheduler": {"base_lrs": [2, 1], "milestones": [3, 4], "_schedulers": [{"_last_lr": [2, 1]}]},
    }


def test_a_state_goes_to_names_and_back() -> None:
    torchs = {
        "state": {0: {"x": 1}, 2: {"x": 3}, "all": {"y": 1}},
        "param_groups": [{"lr": 1, "params": [0, 1]}, {"lr": 2, "params": [2]}],
        "more": 5,
    }
    named = by_name(torchs, [["a", "b"], ["c"]])
    assert named["state"] == {"a": {"x": 1}, "c": {"x": 3}}
    assert by_position(named) == torchs
    assert by_position({"param_groups": torchs["param_groups"], "state": {}})["param_groups"] == torchs["param_groups"]
