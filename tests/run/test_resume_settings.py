"""What counts if a run is resumed with a changed script: each row of docs/resume.md has its test.

All runs are stopped in the middle of an epoch, after STOP of their EPOCHS * BATCHES iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    MultiStepLR,
    ReduceLROnPlateau,
    StepLR,
)

from tests.small_hooks import On
from tests.small_runs import ROOT, CountingHook, differences, raised_by
from tests.small_scripts import (
    BATCHES,
    EPOCHS,
    STOP,
    MakeOptimizer,
    MakeScheduler,
    Script,
    around,
    by_hand,
    loader,
    sgd,
    warned,
)
from torch_frame import CheckpointerHook, CheckpointError, EarlyStoppingHook, EvalHook, Trainer
from torch_frame.checkpoint import io
from torch_frame.hooks import caller

# ---------------------------------------------------------------- each row of docs/resume.md

Row = Callable[[Path, pytest.LogCaptureFixture], None]
ROWS: dict[str, Row] = {}


def row(name: str) -> Callable[[Row], Row]:
    """The test of a row, by its first column."""

    def add(test: Row) -> Row:
        assert name not in ROWS
        ROWS[name] = test
        return test

    return add


CHOICES = (None, "checkpoint", "script")


def all_choices(
    folder: Path, saved: Script, changed: Script, by_default: str, by_checkpoint: str, by_script: str
) -> None:
    """By each choice the rates are those of the saved script or the changed one, or the run is refused with some words."""
    for choice, expected in zip(CHOICES, (by_default, by_checkpoint, by_script), strict=True):
        place = folder / str(choice)
        saved.stopped(place)
        if expected in ("saved", "script"):
            resumed = changed.resumed(place, resume_settings=choice)
            whole = (saved if expected == "saved" else changed).whole(folder / f"whole {choice}")
            assert resumed.rates == whole.rates[STOP:]
        else:
            trainer = changed.trainer(place, resume="auto", resume_settings=choice)
            assert expected in str(raised_by(trainer.train, CheckpointError))


def always_the_scripts(folder: Path, caplog: pytest.LogCaptureFixture, words: str | None, **change: Any) -> None:
    """A setting that is the script's by each choice, told in one warning; None: not told."""
    for choice in CHOICES:
        caplog.clear()
        Script().stopped(folder / str(choice))
        Script(settings=change).resumed(folder / str(choice), resume_settings=choice)
        assert warned(caplog) == ([] if words is None else [f"Continued with the script's settings: {words}."])


def always_refused(folder: Path, words: str, saved: Script, changed: Script) -> None:
    for choice in CHOICES:
        saved.stopped(folder / str(choice))
        trainer = changed.trainer(folder / str(choice), resume="auto", resume_settings=choice)
        error = str(raised_by(trainer.train, CheckpointError))
        assert words in error
        assert "load the weights alone: load_checkpoint(checkpoint=...)" in error


def told_if_saved_elsewhere(folder: Path, caplog: pytest.LogCaptureFixture, **saved: Any) -> None:
    """Of a state that says it comes from another environment."""
    Script().stopped(folder)
    path = folder / "checkpoints" / "latest.pth"
    state = io.read(path)
    io.write(path, {**state, "environment": {**state["environment"], **saved}})
    Script().resumed(folder)
    (told,) = warned(caplog)
    ((name, value),) = saved.items()
    assert f"{name} was {value}, now it is " in told
    assert "last bits may differ" in told


def of_the_optimizer(folder: Path, caplog: pytest.LogCaptureFixture, make: MakeOptimizer, words: str) -> None:
    """By each choice the weights are those of the plain loop, with the saved momentum."""
    for choice in CHOICES:
        caplog.clear()
        Script().stopped(folder / str(choice))
        resumed = Script(make).resumed(folder / str(choice), resume_settings=choice)
        expected = by_hand(Script(), Script(make) if choice == "script" else Script())
        assert differences(expected, resumed.weights) == []
        (told,) = warned(caplog)
        assert words in told


@row("lr")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    of_the_optimizer(folder, caplog, sgd(lr=0.02), "lr (saved 0.1, the script's 0.02)")


@row("weight decay")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    of_the_optimizer(folder, caplog, sgd(weight_decay=0.3), "weight_decay (saved 0, the script's 0.3)")


@row("momentum")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    of_the_optimizer(folder, caplog, sgd(momentum=0.5), "momentum (saved 0.9, the script's 0.5)")


def scheduled(make: MakeScheduler, epochs: int = EPOCHS, **settings: Any) -> Script:
    return Script(scheduler=make, settings=settings, epochs=epochs)


@row("T_max")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved, changed = (scheduled(lambda o, length=length: CosineAnnealingLR(o, length)) for length in (4, 8))
    all_choices(folder, saved, changed, "T_max was 4, now it is 8", "saved", "script")


@row("milestones")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved, changed = (scheduled(lambda o, places=places: MultiStepLR(o, places)) for places in ([2, 3], [3]))
    all_choices(folder / "same", saved, changed, "saved", "saved", "script")
    longer = replace(changed, epochs=8)
    saved.stopped(folder / "longer")
    trainer = longer.trainer(folder / "longer", resume="auto")
    assert "milestones was [2, 3], now it is [3]" in str(raised_by(trainer.train, CheckpointError))


@row("gamma")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved, changed = (scheduled(lambda o, gamma=gamma: ExponentialLR(o, gamma)) for gamma in (0.9, 0.5))
    all_choices(folder, saved, changed, "saved", "saved", "script")


@row("a lambda")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved, changed = scheduled(around(0.9)), scheduled(around(0.5))
    saved.stopped(folder / "kept")
    resumed = changed.resumed(folder / "kept", resume_settings="checkpoint")
    assert resumed.rates == [*[[0.1 * 0.9**2]] * 2, *[[0.1 * 0.5**3]] * BATCHES]
    saved.stopped(folder / "default")
    trainer = changed.trainer(folder / "default", resume="auto")
    assert "function gives 0.025 after 2 steps, where the saved rate is 0.081" in str(
        raised_by(trainer.train, CheckpointError)
    )
    assert changed.resumed(folder / "default", resume_settings="script").rates[0] == [0.1 * 0.5**2]


@row("class of the scheduler")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = "the lr_scheduler was ExponentialLR, now it is StepLR"
    all_choices(
        folder, scheduled(lambda o: ExponentialLR(o, 0.9)), scheduled(lambda o: StepLR(o, 1)), words, words, "script"
    )


@row("warm-up")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved, changed = (Script(settings={"warmup_method": "linear", "warmup_iters": iters}) for iters in (14, 40))
    all_choices(folder, saved, changed, "saved", "saved", "script")


@row("lr_scheduler_interval")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved, changed = (
        scheduled(lambda o: ExponentialLR(o, 0.9), lr_scheduler_interval=interval) for interval in ("epoch", "iter")
    )
    saved.stopped(folder / "default")
    resumed = changed.resumed(folder / "default")
    assert resumed.rates[0] == pytest.approx([0.1 * 0.9**2])
    assert resumed.rates[-1] == pytest.approx([0.1 * 0.9**7])
    assert warned(caplog) == ["Continued with the script's settings: lr_scheduler_interval was epoch, now it is iter."]
    saved.stopped(folder / "script")
    whole = changed.whole(folder / "whole")
    assert changed.resumed(folder / "script", resume_settings="script").rates == whole.rates[STOP:]


@row("lr_scheduler_metric")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = On(after_epoch=lambda trainer: trainer.log(trainer.epoch, other=1.0, window_size=1))
    script = scheduled(lambda o: ReduceLROnPlateau(o, patience=5), lr_scheduler_metric="total_loss")
    script.stopped(folder)
    script.but(lr_scheduler_metric="other").resumed(folder, other)
    assert warned(caplog) == [
        "Continued with the script's settings: lr_scheduler_metric was total_loss, now it is other."
    ]


@row("max_epochs")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    short, long = (scheduled(lambda o: ExponentialLR(o, 0.9), epochs) for epochs in (3, 5))
    short.stopped(folder / "free")
    assert differences(long.resumed(folder / "free").weights, long.whole(folder / "whole").weights) == []
    assert warned(caplog) == []
    scheduled(lambda o: CosineAnnealingLR(o, 3), 3).stopped(folder / "bound")
    scheduled(lambda o: CosineAnnealingLR(o, 3), 5).resumed(folder / "bound")
    assert warned(caplog) == ["max_epochs was 3, now it is 5, but the schedule is made for 3 steps."]


@row("max_iters")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    short, long = (Script(settings={"max_iters": count, "hooks": [CheckpointerHook()]}) for count in (STOP, STOP + 3))
    short.whole(folder / "free")
    resumed = long.resumed(folder / "free")
    whole = Script(settings={"max_iters": STOP + 3}).whole(folder / "whole")
    assert differences(resumed.weights, whole.weights) == []
    assert warned(caplog) == []


@row("limit_batches")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for choice in CHOICES:
        caplog.clear()
        Script().stopped(folder / str(choice))
        Script(settings={"limit_batches": 3}).resumed(folder / str(choice), resume_settings=choice)
        told, dry_run = warned(caplog)
        assert told == "Continued with the script's settings: limit_batches was None, now it is 3."
        assert "a dry run" in dry_run


@row("batch size")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[torch.Tensor] = []

    def note(trainer: Trainer, batch: Any) -> torch.Tensor:
        seen.append(batch[0])
        result: torch.Tensor = trainer(batch)
        return result

    Script(settings={"data": loader()}).stopped(folder)
    caplog.clear()
    Script(settings={"data": loader(size=2), "step_fn": note}, epochs=3).resumed(folder)
    assert [len(batch) for batch in seen] == [2, 2, 2, 2], "8 of the epoch's 16 samples are left"
    assert len(torch.unique(torch.cat(seen), dim=0)) == 8
    assert "Continued with the script's settings: batch_size was 4, now it is 2." in warned(caplog)


@row("gradient_accumulation_steps")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    Script().stopped(folder)
    resumed = Script(settings={"gradient_accumulation_steps": 2}).resumed(folder)
    expected = by_hand(Script(), Script(), window=2)
    assert all(torch.allclose(expected[name], value, rtol=1e-5) for name, value in resumed.weights.items())
    assert warned(caplog) == ["Continued with the script's settings: gradient_accumulation_steps was 1, now it is 2."]


@row("clip_grad_norm")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    Script().stopped(folder / "run")
    resumed = Script(settings={"clip_grad_norm": 0.1}).resumed(folder / "run")
    assert differences(by_hand(Script(), Script(), clip=0.1), resumed.weights) == []
    always_the_scripts(folder, caplog, "clip_grad_norm was 0.0, now it is 0.1", clip_grad_norm=0.1)


@row("loss_weight")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    always_the_scripts(
        folder, caplog, "loss_weight was False, now it is True", loss_weight=lambda batch: float(len(batch[0]))
    )


@row("on_nonfinite")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    always_the_scripts(folder, caplog, "on_nonfinite was raise, now it is skip", on_nonfinite="skip")


@row("use_ema")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with_ema = Script(settings={"use_ema": True})
    always_refused(folder / "on", "use_ema was False, now it is True", Script(), with_ema)
    always_refused(folder / "off", "use_ema was True, now it is False", with_ema, Script())


@row("ema_decay")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    script = Script(settings={"use_ema": True, "ema_decay": 0.5})
    script.stopped(folder)
    average: list[torch.Tensor] = []
    resumed = script.but(ema_decay=0.0).resumed(
        folder, On(before_train=lambda trainer: average.append(trainer.model_ema.model.layers[0].weight.clone()))
    )
    saved = io.read(folder / "checkpoints" / "latest.pth")["ema"]["model"]["layers.0.weight"]
    assert torch.equal(average[0], saved), "the saved average continues"
    ema = resumed.trainer.model_ema
    assert ema is not None
    assert torch.equal(ema.model.state_dict()["layers.0.weight"], resumed.weights["layers.0.weight"])
    assert warned(caplog) == ["Continued with the script's settings: ema_decay was 0.5, now it is 0.0."]


@row("num_workers")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    script = Script(settings={"data": loader()}, epochs=3)
    whole = script.whole(folder / "whole")
    script.stopped(folder / "parts")
    resumed = script.but(data=loader(num_workers=1)).resumed(folder / "parts")
    assert differences(whole.weights, resumed.weights) == []
    assert warned(caplog) == []


@row("a hook is added")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = Script().whole(folder / "whole")
    Script().stopped(folder / "parts")
    counter = CountingHook()
    assert differences(whole.weights, Script().resumed(folder / "parts", counter).weights) == []
    assert counter.count == 2, "it begins anew"
    assert warned(caplog) == []


@row("a hook is removed")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = Script().whole(folder / "whole")
    Script(settings={"hooks": [CountingHook()]}).stopped(folder / "parts")
    assert differences(whole.weights, Script().resumed(folder / "parts").weights) == []
    (told,) = warned(caplog)
    assert "CountingHook" in told


@row("hooks are reordered")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def hooks() -> list[Any]:
        return [CountingHook(), EarlyStoppingHook("total_loss", patience=9), EvalHook([0], score, save_metric="a")]

    def score(model: nn.Module, batch: int) -> dict[str, list[float]]:
        return {"a": [7.0]}

    Script(settings={"hooks": hooks()}).stopped(folder)
    turned = hooks()[::-1]
    Script(settings={"hooks": turned}).resumed(folder, max_epochs=3)
    assert [hook.count for hook in turned if isinstance(hook, CountingHook)] == [3]
    assert warned(caplog) == []


@row("a hook follows another metric")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    if not hasattr(caller, "IDENTITIES"):
        pytest.skip("hooks do not go by identity yet")

    def evaluation(metric: str) -> EvalHook:
        return EvalHook([0], lambda model, batch: {"a": [7.0], "b": [1.0]}, save_metric=metric)

    Script(settings={"hooks": [evaluation("a")]}).stopped(folder)
    hook = evaluation("b")
    Script(settings={"hooks": [hook]}).resumed(folder, max_epochs=3)
    assert hook.cur_best == 1.0
    assert "the best value begins anew" in caplog.text


@row("period of a hook")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    Script(settings={"hooks": [CheckpointerHook(max_to_keep=9)]}).stopped(folder)
    Script(settings={"hooks": [CheckpointerHook(2, max_to_keep=9)]}).resumed(folder)
    assert sorted(path.name for path in (folder / "checkpoints").glob("epoch_*")) == [
        "epoch_0.pth",
        "epoch_1.pth",
        "epoch_3.pth",
    ]
    assert warned(caplog) == []


@row("optimizer class")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    changed = Script(lambda model: Adam(model.parameters()))
    always_refused(folder, "the optimizer was SGD, now it is Adam", Script(), changed)


@row("precision")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    always_refused(folder, "precision was fp32, now it is bf16", Script(), Script(settings={"precision": "bf16"}))


@row("data length")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = "an epoch's data was 16 samples, now it is 24 samples"
    always_refused(folder, words, Script(settings={"data": loader()}), Script(settings={"data": loader(24)}))


@row("seed")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    script = Script(settings={"data": loader()}, epochs=3)
    always_refused(folder, "seed was 3, now it is 4", script, script.but(seed=4))
    script.stopped(folder / "unnamed")
    assert script.but(seed=None).resumed(folder / "unnamed").trainer.seed == 3
    assert warned(caplog) == []


@row("take_over")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours, torchs = (Script(settings={"data": loader(), "take_over": take_over}) for take_over in (True, False))
    always_refused(folder / "off", "take_over", ours, torchs)
    always_refused(folder / "on", "take_over", torchs, ours)


@row("device")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    told_if_saved_elsewhere(folder, caplog, device="NVIDIA H100")


@row("world size")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    told_if_saved_elsewhere(folder, caplog, world_size=4)


@row("torch version")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    told_if_saved_elsewhere(folder, caplog, torch="2.8.0")


@row("library version")
def _(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    told_if_saved_elsewhere(folder, caplog, numpy="1.0.0")


@pytest.mark.parametrize("name", ROWS)
def test_each_row_of_the_document(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ROWS[name](tmp_path, caplog)


def test_the_document_and_the_tests_have_the_same_rows() -> None:
    text = (ROOT / "docs" / "resume.md").read_text(encoding="utf-8")
    table = text[text.index("| changed |") :].splitlines()[2:]
    assert [line.split("|")[1].strip() for line in table] == list(ROWS)
