"""A run that torch-frame 1.7.5 saved goes on here as it went on there; the files are real ones (golden_17/make.py)."""

from __future__ import annotations

import json
import os
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.golden_17.make import EPOCH_LEN, EPOCHS, RUNS, Rates
from tests.small_runs import differences, make_trainer
from torch_frame import CheckpointError, MetricStorage, Trainer
from torch_frame.checkpoint import convert, inert, io

GOLDEN = Path(__file__).parent / "golden_17"
EPOCHS_DONE = {"multistep": 2, "cosine_ema": 3, "step": 3, "step_legacy": 3, "inside": 2}


def golden(name: str) -> dict[str, Any]:
    """What 1.7.5 went on to do."""
    record: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
    return record


def old_state(name: str = "multistep") -> Any:
    return convert._read(GOLDEN / f"{name}.pth")


def converted_file(name: str, folder: Path, **kwargs: Any) -> Path:
    new = folder / f"{name}.pth"
    convert.convert(GOLDEN / f"{name}.pth", new, **kwargs)
    return new


def save_as_17(old: Any, path: Path) -> None:
    """Write a state that `inert` has read, changed perhaps, under the names of 1.7's classes."""
    torch.save(old, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    record = f"c{inert.__name__}\nRecord\n".encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part.replace(record, b"ctorch_frame.utils.history_buffer\nHistoryBuffer\n"))


def flat(weights: Any) -> dict[str, Any]:
    return {name: torch.as_tensor(value, dtype=torch.float64).flatten().tolist() for name, value in weights.items()}


@pytest.mark.parametrize("name", EPOCHS_DONE)
def test_a_run_goes_on_as_it_did_in_1_7(name: str, tmp_path: Path) -> None:
    run_name = name.removesuffix("_legacy")
    run, record, rates = RUNS[run_name], golden(run_name), Rates()
    ema = GOLDEN / f"{name}_best.pth" if "ema" in record else None
    new = converted_file(name, tmp_path, ema=ema)
    hooks = [] if name == "inside" else run.hooks()
    trainer = run.trainer(tmp_path / "run", [rates, *hooks])
    trainer.load_checkpoint(new)
    assert trainer.lr == pytest.approx(record["lrs"][EPOCHS_DONE[name] * EPOCH_LEN][0], rel=1e-12)
    if (
        name == "inside"
    ):  # its epoch begins anew, from weights that have seen a part of it: only the rates are comparable
        trainer.train()
        assert flat({"lrs": rates.lrs})["lrs"] == pytest.approx(flat({"lrs": record["lrs"][6:]})["lrs"], rel=1e-12)
        return
    trainer.train()
    remaining = record["lrs"][EPOCHS_DONE[name] * EPOCH_LEN :]
    assert len(rates.lrs) == len(remaining) == (EPOCHS - EPOCHS_DONE[name]) * EPOCH_LEN
    for own, theirs in zip(rates.lrs, remaining, strict=True):
        assert own == pytest.approx(theirs, rel=1e-12)
    weights = flat(trainer.model.state_dict())
    for key, values in flat(record["weights"]).items():
        assert weights[key] == pytest.approx(values, rel=1e-5, abs=1e-6), key
    if trainer.model_ema is not None:
        average = flat(dict(trainer.model_ema.model.named_parameters()))
        for key, values in flat(record["ema"]).items():
            assert average[key] == pytest.approx(values, rel=1e-5, abs=1e-6), key
    best = getattr(hooks[0], "cur_best", None)
    assert best == pytest.approx(record["best"], rel=1e-3)  # 1.7 averaged batch norm's statistics too
    assert trainer.progress.iter == trainer.progress.num_updates == EPOCHS * EPOCH_LEN


@pytest.mark.parametrize("name", EPOCHS_DONE)
def test_the_state_has_todays_keys_and_plain_types(name: str, tmp_path: Path) -> None:
    made = torch.load(converted_file(name, tmp_path), weights_only=True)
    trainer = make_trainer(tmp_path / "run", hooks=None)
    trainer.save_checkpoint("latest.pth", save_single_model=False)
    today = torch.load(tmp_path / "run" / "checkpoints" / "latest.pth", weights_only=True)
    assert list(today) == [key for key in made if key in today], "run.table and convert.converted differ"
    assert set(made) - set(today) == {"converted_from", "unknown"}
    for key in ("progress", "lr_schedulers", "hooks"):
        assert set(made[key]) <= set(today[key]) | {"EvalHook"}, key
    done = EPOCHS_DONE[name]
    assert (made["progress"]["epoch"], made["progress"]["iter"]) == (done, done * EPOCH_LEN)
    assert made["progress"]["num_updates"] == (8 if name == "inside" else done * EPOCH_LEN)
    assert all(made[key] is None for key in made["unknown"])


def test_the_old_file_stays_as_it_is(tmp_path: Path) -> None:
    old, before = tmp_path / "latest.pth", (GOLDEN / "multistep.pth").read_bytes()
    old.write_bytes(before)
    convert.convert(old, tmp_path / "new.pth")
    with pytest.raises(CheckpointError, match="is the file to be converted"):
        convert.convert(old, old, force=True)
    assert old.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["latest.pth", "new.pth"]


def test_a_file_that_is_there_is_written_over_only_by_force(tmp_path: Path) -> None:
    new = tmp_path / "new.pth"
    new.write_text("precious")
    with pytest.raises(CheckpointError, match=r"exists already.*--force"):
        convert.convert(GOLDEN / "step.pth", new)
    assert new.read_text() == "precious"
    convert.convert(GOLDEN / "step.pth", new, force=True)
    assert io.read(new)["progress"]["epoch"] == 3


def test_the_metrics_are_those_that_were_recorded() -> None:
    old = old_state("cosine_ema")
    storage = MetricStorage()
    storage.load_state_dict(convert.converted(old).state["metric_storage"])
    assert list(storage) == ["data_time", "iter_time", "lr", "total_loss", "eval_error"]
    for name, buffer in storage.items():
        theirs = vars(old["metric_storage"][name])
        assert buffer.latest == theirs["_history"][-1]
        assert buffer.avg == pytest.approx(sum(theirs["_history"]) / len(theirs["_history"]))
        assert (buffer.global_sum, buffer.global_avg) == (theirs["_sum"], theirs["_sum"] / theirs["_count"])
    assert storage.latest_iters() == {"data_time": 8, "iter_time": 8, "lr": 8, "total_loss": 8, "eval_error": 2}
    assert storage.values_maybe_smooth["lr"] == (8, 0.005)
    storage.update(iter=3, eval_error=1.0, smooth=False)
    storage.update(iter=9, lr=0.1, smooth=False)


def test_values_of_an_epoch_that_begins_anew_do_not_stand_in_its_way() -> None:
    conversion = convert.converted(old_state("inside"))
    assert conversion.saved_inside
    assert {values["latest_iter"] for values in conversion.state["metric_storage"].values()} == {5}


def test_weights_and_optimizer_are_taken_over_bitwise() -> None:
    old = old_state("cosine_ema")
    made = convert.converted(old).state
    assert differences(made["model"], dict(old["model"])) == []
    assert differences(made["optimizers"]["optimizer"], old["optimizer"]) == []


def test_without_its_file_the_average_is_unknown() -> None:
    conversion = convert.converted(old_state("cosine_ema"))
    assert conversion.state["ema"] is None
    assert "ema" in conversion.unknown


def test_with_its_file_the_average_is_known(tmp_path: Path) -> None:
    best = GOLDEN / "cosine_ema_best.pth"
    made = io.read(converted_file("cosine_ema", tmp_path, ema=best))
    assert made["ema"]["updates"] == 9
    assert differences(made["ema"]["model"], dict(torch.load(best))) == []
    assert "ema" not in made["unknown"]


def test_an_average_of_another_model_is_refused(tmp_path: Path) -> None:
    for weights, message in (
        ({"layers.0.weight": torch.ones(1), "more": torch.ones(1)}, "average are of another model: .*more"),
        ({"model": {}}, "does not hold weights alone"),
        ([1], "does not hold weights alone"),
    ):
        torch.save(weights, tmp_path / "best.pth")
        with pytest.raises(CheckpointError, match=message):
            convert.convert(GOLDEN / "step.pth", tmp_path / "new.pth", ema=tmp_path / "best.pth")
    with pytest.raises(CheckpointError, match="There is no file"):
        convert.convert(GOLDEN / "step.pth", tmp_path / "new.pth", ema=tmp_path / "nowhere.pth")
    assert not (tmp_path / "new.pth").exists()


def test_names_of_torch_compile_are_made_bare() -> None:
    old = old_state()
    old["model"] = {f"_orig_mod.{name}": value for name, value in old["model"].items()}
    assert list(convert.converted(old).state["model"]) == list(old_state()["model"])


def test_a_gradient_scaler_means_fp16_and_is_restored(tmp_path: Path) -> None:
    old, scaler = old_state("step"), torch.amp.GradScaler("cpu", init_scale=512.0)
    old["grad_scaler"] = scaler.state_dict()
    save_as_17(old, tmp_path / "old.pth")
    convert.convert(tmp_path / "old.pth", tmp_path / "new.pth")
    trainer = RUNS["step"].trainer(tmp_path / "run", [])
    with pytest.raises(CheckpointError, match="precision was fp16, now it is fp32"):
        trainer.load_checkpoint(tmp_path / "new.pth")
    fitting = Trainer(
        trainer.model, trainer.optimizer, trainer.lr_scheduler.scheduler, [1], 6, tmp_path, hooks=[], precision="fp16"
    )
    fitting.load_checkpoint(tmp_path / "new.pth")
    assert fitting.precision.scaler is not None
    assert fitting.precision.scaler.get_scale() == 512.0


def test_hooks_keep_what_a_run_needs_and_lose_their_settings() -> None:
    conversion = convert.converted(old_state("cosine_ema"))
    kept = conversion.state["hooks"]["EvalHook"]
    assert list(kept) == ["cur_best", "recent_checkpoints"]
    assert type(kept["cur_best"]) is float
    assert kept["cur_best"] > 0
    assert "dataloader, eval_func" in conversion.left_out["EvalHook"]
    assert convert.converted(old_state("step")).state["hooks"]["CheckpointerHook"]["recent_checkpoints"] == [
        "epoch_0.pth",
        "epoch_1.pth",
    ]


class Setting:
    """A class that only the old script knows."""


def test_a_users_hook_keeps_what_is_plain(tmp_path: Path) -> None:
    old = old_state()
    old["hooks"]["CheckpointerHook"]["seen"] = [1, 2]
    old["hooks"]["CheckpointerHook"]["setting"] = Setting()
    old["hooks"]["Counting"] = {"count": 3, "values": torch.ones(2), "function": shutil.copy}
    old["hooks"]["Single"] = 7
    save_as_17(old, tmp_path / "old.pth")
    with pytest.raises(CheckpointError, match=r"asks for shutil\.copy"):
        convert.convert(tmp_path / "old.pth", tmp_path / "new.pth")
    old["hooks"]["Counting"]["function"] = random.random
    save_as_17(old, tmp_path / "old.pth")
    conversion = convert.convert(tmp_path / "old.pth", tmp_path / "new.pth")
    hooks = io.read(tmp_path / "new.pth")["hooks"]
    assert hooks["CheckpointerHook"]["seen"] == [1, 2]
    assert "setting" not in hooks["CheckpointerHook"]
    assert list(hooks["Counting"]) == ["count", "values"]
    assert hooks["Single"] == 7
    assert {"CheckpointerHook.setting", "Counting.function"} <= set(conversion.left_out)


@pytest.mark.parametrize(
    ("epoch", "updates", "logged", "expected"),
    [
        (-1, 0, 0, (0, 0, False)),  # saved before training
        (0, 3, 3, (1, 3, False)),
        (3, 12, 12, (4, 12, False)),
        (3, 12, 11, (4, 12, False)),  # by a hook, after the last batch
        (3, 9, 9, (3, 9, True)),  # before the epoch's first batch
        (3, 11, 10, (3, 9, True)),
        (3, 6, 12, (4, 12, False)),  # the schedule counts windows of gradient accumulation
        (3, 0, 12, (4, 12, False)),  # a train_one_iter that does not step the schedule
        (3, 24, 12, (4, 12, False)),  # the schedule counts each of two processes
        (3, 0, 0, (4, 12, False)),  # nothing was counted
    ],
)
def test_counters(epoch: int, updates: int, logged: int, expected: tuple[int, int, bool]) -> None:
    old = old_state()
    old["epoch"], old["lr_scheduler"]["last_epoch"] = epoch, updates
    vars(old["metric_storage"])["_latest_iter"]["lr"] = logged - 1
    conversion = convert.converted(old)
    progress = conversion.state["progress"]
    assert (progress["epoch"], progress["iter"], conversion.saved_inside) == expected
    assert progress["num_updates"] == conversion.state["lr_schedulers"]["lr_scheduler"]["num_updates"] == updates
    assert (progress["inner_iter"], progress["position"], progress["epoch_trained"]) == (0, 0, False)


def test_a_schedule_by_name_is_refused_with_a_way_out(tmp_path: Path) -> None:
    old = old_state()
    old["lr_scheduler"] = {"last_epoch": 6, "base_lrs": [0.1], "lr_lambdas": [None]}
    save_as_17(old, tmp_path / "old.pth")
    with pytest.raises(CheckpointError, match=r"old\.pth cannot be converted.*AccelerateTrainer.*checkpoint="):
        convert.convert(tmp_path / "old.pth", tmp_path / "new.pth")


class Unknown:
    """Content that is neither plain nor a hook's."""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", {"layers.0.weight": Unknown()}),
        ("model", [1]),
        ("optimizer", Unknown()),
        ("metric_storage", {}),
        ("metric_storage", {"lr": 1}),
        ("lr_scheduler", None),
        ("lr_scheduler", {"scheduler_state_dict": {}}),
        ("epoch", "x"),
        ("hooks", 1),
    ],
)
def test_content_that_1_7_does_not_write_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    save_as_17({**old_state(), key: value}, tmp_path / "old.pth")
    with pytest.raises(CheckpointError, match=r"old\.pth cannot be converted"):
        convert.convert(tmp_path / "old.pth", tmp_path / "new.pth")
    assert os.listdir(tmp_path) == ["old.pth"]


class Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, harm: Path) -> None:
        self.harm = harm

    def __reduce__(self) -> Any:
        return os.system, (f'echo harm > "{self.harm}"',)


@pytest.mark.parametrize("key", ["model", "optimizer", "metric_storage", "hooks", "work_dir", "more"])
def test_a_file_made_to_run_code_runs_none(key: str, tmp_path: Path) -> None:
    harm, old = tmp_path / "harm", old_state()
    if key == "metric_storage":
        vars(old["metric_storage"])["_smooth"] = Runs(harm)
    elif key == "hooks":
        old["hooks"]["CheckpointerHook"]["cur_best"] = Runs(harm)
    else:
        old[key] = Runs(harm)
    save_as_17(old, tmp_path / "old.pth")
    with pytest.raises(CheckpointError, match=r"made to run code.*Nothing of it was run"):
        convert.convert(tmp_path / "old.pth", tmp_path / "new.pth")
    assert os.listdir(tmp_path) == ["old.pth"]


def test_other_files_are_called_what_they_are(tmp_path: Path) -> None:
    today = make_trainer(tmp_path / "run")
    today.save_checkpoint(str(tmp_path / "today.pth"), save_single_model=False)
    torch.save(today.model, tmp_path / "model.pth")
    torch.save({"state_dict": {}, "global_step": 3}, tmp_path / "other.pth")
    torch.save({}, tmp_path / "empty.pth")
    for path, message in {
        "today.pth": "has today's format already: load_checkpoint",
        "model.pth": "holds a Net, not a state of torch-frame 1.7",
        "other.pth": "is no state of torch-frame 1.7: it has no epoch, model.* it holds state_dict, global_step",
        "empty.pth": "it holds nothing",
        str(
            GOLDEN / "cosine_ema_best.pth"
        ): r"holds weights alone, which need no conversion: load_checkpoint\(checkpoint=",
        "nowhere.pth": "There is no file",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            convert.convert(tmp_path / path, tmp_path / "new.pth")
    assert not (tmp_path / "new.pth").exists()


@pytest.mark.parametrize("name", ["multistep", "step_legacy"])
def test_a_file_cut_short_is_refused(name: str, tmp_path: Path) -> None:
    whole = (GOLDEN / f"{name}.pth").read_bytes()
    for part in (0.0, 0.1, 0.5, 0.9, 0.99):
        (tmp_path / "old.pth").write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(CheckpointError, match=r"old\.pth cannot be read: it is damaged"):
            convert.convert(tmp_path / "old.pth", tmp_path / "new.pth")


def central_directory(whole: bytes) -> range:
    """Where a zip file says what its parts are: torch reads some bits of it that Python ignores, and no checksum is of it."""
    return range(whole.index(b"PK\x01\x02"), len(whole))


def test_a_flipped_bit_is_refused_or_without_effect(tmp_path: Path) -> None:
    whole, expected = (GOLDEN / "multistep.pth").read_bytes(), convert.converted(old_state()).state
    choice, refused = random.Random(0), 0
    for place in [*(choice.randrange(len(whole)) for _ in range(150)), *central_directory(whole)[::3]]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (choice.randrange(8) if place < central_directory(whole).start else 4)
        (tmp_path / "old.pth").write_bytes(flipped)
        try:
            made = convert.converted(convert._read(tmp_path / "old.pth"))
        except CheckpointError:
            refused += 1
        else:
            assert differences(made.state, expected) == [], place
    assert refused > 200
