"""On CUDA: mixed precision equals torch's own loop, and a step waits for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset

from tests.small_runs import differences, weights_of
from torch_frame import CheckpointerHook, HookBase, Trainer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)).cuda()


def make_data() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator)) for _ in range(12)
    ]


def step(model: nn.Module, batch: Any) -> torch.Tensor:
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_mixed_precision_is_that_of_torchs_own_loop(precision: str, tmp_path: Path) -> None:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    expected = make_model()
    optimizer = AdamW(expected.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
    for images, labels in make_data() * 2:
        with torch.autocast("cuda", dtype=dtype):
            loss = step(expected, (images.cuda(), labels.cuda()))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
    model = make_model()
    settings: dict[str, Any] = {"precision": precision, "clip_grad_norm": 0.5, "step_fn": step, "hooks": []}
    Trainer(model, AdamW(model.parameters(), lr=0.01), None, make_data(), 2, tmp_path, **settings).train()
    assert not differences(weights_of(model), weights_of(expected))


class NoReads(HookBase):
    """From the second step on torch raises where the host waits for the device; an epoch's end may."""

    def after_iter(self) -> None:
        last = self.trainer.inner_iter == 11
        torch.cuda.set_sync_debug_mode("default" if last else "error")


@pytest.fixture
def _waiting_is_allowed_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("_waiting_is_allowed_again")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")  # said once a process
@pytest.mark.parametrize(
    "settings",
    [{}, {"clip_grad_norm": 0.5}, {"use_ema": True}, {"precision": "bf16"}, {"gradient_accumulation_steps": 5}],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_the_host_waits_for_no_step(settings: dict[str, Any], tmp_path: Path) -> None:
    model = make_model()
    data = [tuple(part.pin_memory() for part in batch) for batch in make_data()]
    optimizer = AdamW(model.parameters(), lr=0.01)
    trainer = Trainer(model, optimizer, None, data, 2, tmp_path, step_fn=step, hooks=[NoReads()], **settings)
    trainer.train()
    assert trainer.progress.iter == 24


class Interrupted(Exception):
    """The run ends here, inside an epoch."""


class EndsAt(HookBase):
    """Saves the state inside an epoch and, some steps later, lets the run fall over."""

    def after_iter(self) -> None:
        if self.trainer.cur_iter == 16:
            self.trainer.save_at_safe_point("inside.pth", save_single_model=False)
        if self.trainer.cur_iter == 19:
            raise Interrupted


@pytest.fixture
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "fp16", "clip_grad_norm": 0.5, "warmup_method": "linear", "warmup_iters": 20},
        {"precision": "bf16", "gradient_accumulation_steps": 2, "use_ema": True},
        {"compile": True},
        {"compile": True, "precision": "bf16", "use_ema": True},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_a_run_that_ends_inside_an_epoch_is_resumed_bitwise(settings: dict[str, Any], tmp_path: Path) -> None:
    """Dropout's numbers are drawn on the device; the data is shuffled and augmented on the host."""

    def run(folder: str, *hooks: HookBase, **more: Any) -> Trainer:
        torch.manual_seed(0)
        layers = nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 4)
        model = nn.Sequential(*layers).cuda()
        optimizer = AdamW(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
        data = DataLoader(Noisy(), batch_size=16, shuffle=True, num_workers=2, pin_memory=True)
        more = {"step_fn": step, "seed": 3, **settings, **more}
        trainer = Trainer(model, optimizer, schedule, data, 3, tmp_path / folder, hooks=list(hooks), **more)
        trainer.train()
        return trainer

    whole = run("whole")
    with pytest.raises(Interrupted):
        run("broken", EndsAt())
    torch.cuda.manual_seed(99)
    resumed = run("broken", resume=tmp_path / "broken" / "checkpoints" / "inside.pth")
    assert resumed.start_epoch == 1
    assert not differences(weights_of(whole.model), weights_of(resumed.model))
    assert not differences(whole.optimizer.state_dict(), resumed.optimizer.state_dict())
    if settings.get("use_ema"):
        assert not differences(weights_of(whole.model_evaluate), weights_of(resumed.model_evaluate))


class Noisy(Dataset[Any]):
    """Images with noise that is drawn anew each time."""

    def __len__(self) -> int:
        return 192

    def __getitem__(self, index: int) -> Any:
        image = torch.linspace(-1, 1, 8) * (index % 7) + 0.1 * torch.randn(8)
        return image, index % 4


def test_snapshots_are_taken_by_way_of_pinned_memory_while_training_goes_on(tmp_path: Path) -> None:
    """A save holds what the weights were when it was asked for, though the next steps change them meanwhile."""
    seen: dict[str, Any] = {}

    class Saves(HookBase):
        def after_iter(self) -> None:
            if self.trainer.cur_iter == 5:
                self.trainer.save_checkpoint("at_5.pth")
                seen.update(weights_of(self.trainer.model))

    model = nn.Sequential(nn.Linear(8, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 4)).cuda()
    optimizer = AdamW(model.parameters(), lr=0.01)
    trainer = Trainer(
        model, optimizer, None, make_data(), 1, tmp_path / "run", step_fn=step, hooks=[Saves(), CheckpointerHook()]
    )
    trainer.train()
    file = torch.load(tmp_path / "run" / "checkpoints" / "at_5.pth", weights_only=True)
    assert not differences({name: value.cpu() for name, value in seen.items()}, {k: v.cpu() for k, v in file.items()})
    last = torch.load(tmp_path / "run" / "checkpoints" / "latest.pth", weights_only=True)
    now = {name: value.cpu() for name, value in weights_of(trainer.model).items()}
    assert not differences(now, {name: value.cpu() for name, value in last["model"].items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"capturable": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("kind", ["AdamW", "NAdam", "RAdam", "Adamax", "ASGD", "Adadelta", "RMSprop", "Rprop", "SGD"])
def test_an_optimizers_state_comes_back_in_every_bit_and_place(
    kind: str, settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    def run(folder: str, epochs: int, **more: Any) -> Trainer:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to("cuda", dtype)
        try:
            optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01, **settings)
        except TypeError:
            pytest.skip(f"{kind} has no {settings}")
        data = [(images.to(dtype), labels) for images, labels in make_data()]
        more = {"step_fn": step, "create_new_dir": None, "hooks": [CheckpointerHook()], **more}
        trainer = Trainer(model, optimizer, None, data, epochs, tmp_path / folder, **more)
        trainer.train()
        return trainer

    whole = run("whole", 2)
    run("parts", 1)
    resumed = run("parts", 2, resume="auto")
    assert not differences(weights_of(resumed.model), weights_of(whole.model))
    for ours, theirs in zip(resumed.optimizer.state.values(), whole.optimizer.state.values(), strict=True):
        assert not differences(ours, theirs)
        assert [v.device for v in ours.values() if torch.is_tensor(v)] == [
            v.device for v in theirs.values() if torch.is_tensor(v)
        ]


@pytest.mark.parametrize(
    ("saved", "changed"),
    [({}, {"fused": True}), ({"fused": True}, {}), ({}, {"capturable": True}), ({"capturable": True}, {})],
)
def test_another_implementation_of_adam_continues_where_the_saved_one_was(
    saved: dict[str, Any], changed: dict[str, Any], tmp_path: Path
) -> None:
    """A fused or capturable one counts its steps on the device."""

    def run(folder: str, epochs: int, implementation: dict[str, Any], **more: Any) -> Trainer:
        torch.manual_seed(1)
        model = nn.Linear(8, 4).cuda()
        optimizer = AdamW(model.parameters(), lr=0.01, **implementation)
        more = {"step_fn": step, "seed": 3, "create_new_dir": None, "hooks": [CheckpointerHook()], **more}
        trainer = Trainer(model, optimizer, None, make_data(), epochs, tmp_path / folder, **more)
        trainer.train()
        return trainer

    whole = run("whole", 2, saved)
    run("parts", 1, saved)
    resumed = run("parts", 2, changed, resume="auto", resume_settings="script")
    assert torch.allclose(whole.model.weight, resumed.model.weight, rtol=1e-4, atol=1e-6)
    (count,) = {state["step"].item() for state in resumed.optimizer.state.values()}
    assert count == whole.progress.num_updates
