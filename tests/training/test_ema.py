"""EMA follows its closed form, copies buffers, and survives checkpoints and wrappers."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

from tests.small_hooks import On, at_iter
from tests.small_runs import Net, copied, differences, make_batches, make_trainer, weights_of
from torch_frame import EMA, CheckpointerHook, EvalHook, SettingError, Trainer


def ramped(decay: float, n: int) -> float:
    return decay * (1 - math.exp(-n / 2000))


def follow(model: nn.Module, ema: EMA, updates: int) -> list[dict[str, Tensor]]:
    """Change the weights at random and follow them; returns the weights after each update."""
    generator = torch.Generator().manual_seed(1)
    seen = []
    for _ in range(updates):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        ema.update(model)
        seen.append(weights_of(model))
    return seen


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999])
@pytest.mark.parametrize("begin", [0, 1999, 10**6])
def test_parameters_follow_the_closed_form(decay: float, begin: int) -> None:
    """ema_n = sum_k w_k (1 - d_k) prod_{j > k} d_j, with d_n = decay (1 - exp(-n / 2000))."""
    model = Net().double()
    first = weights_of(model)
    ema = EMA(model, decay, begin)
    seen = [first, *follow(model, ema, 20)]
    decays = [0.0, *(ramped(decay, begin + n) for n in range(1, 21))]
    for name, value in ema.model.state_dict().items():
        expected = sum(
            weights[name] * ((1 - d) * math.prod(decays[k + 1 :]))
            for k, (weights, d) in enumerate(zip(seen, decays, strict=True))
        )
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    assert ema.updates == begin + 20


@pytest.mark.parametrize("bad", [-0.1, 1.0, 1.5, math.nan])
def test_a_decay_outside_its_range_is_told(bad: float) -> None:
    with pytest.raises(SettingError, match="ema_decay"):
        EMA(Net(), bad)


def test_the_average_is_a_model_of_its_own_with_the_modes_of_the_model_and_without_gradients() -> None:
    model = Net(norm=True, dropout=True).train()
    model.layers[1].eval()
    ema = EMA(model)
    assert [module.training for module in ema.model.modules()] == [module.training for module in model.modules()]
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training
    assert {p.data_ptr() for p in model.parameters()}.isdisjoint(p.data_ptr() for p in ema.model.parameters())


def test_buffers_are_copied_not_averaged(tmp_path: Path) -> None:
    model = Net(norm=True)
    trainer = make_trainer(tmp_path, model, use_ema=True)
    trainer.train()
    buffers = dict(trainer.model_evaluate.named_buffers())
    assert set(buffers) == set(dict(model.named_buffers())) != set()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffers[name], buffer), name
        assert buffers[name] is not buffer
    assert model.layers[1].num_batches_tracked == 10


class Reassigning(Net):
    """Puts another tensor in place of its buffer, as codebooks and caches do."""

    def __init__(self, *, grows: bool = False) -> None:
        super().__init__()
        self.grows = grows
        self.register_buffer("count", torch.zeros(1))

    def forward(self, batch: Any) -> Any:
        self.count = torch.cat([self.count, self.count[-1:] + 1]) if self.grows else self.count + 1
        return super().forward(batch)


@pytest.mark.parametrize("grows", [False, True], ids=["same_shape", "another_shape"])
def test_a_buffer_that_the_module_assigns_anew_is_followed(grows: bool, tmp_path: Path) -> None:
    model = Reassigning(grows=grows)
    trainer = make_trainer(tmp_path, model, use_ema=True)
    trainer.train()
    assert model.count[-1] == 10
    assert torch.equal(trainer.model_evaluate.count, model.count)


class Rotary(nn.Module):
    """Layers that share one table, as language models share rotary frequencies."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.arange(3.0)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        for layer in self.layers:
            layer.register_buffer("table", table)

    def forward(self, batch: Any) -> Tensor:
        x = batch[0]
        for layer in self.layers:
            x = layer(x) + layer.table
        return x.square().mean()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, batch: Any) -> Tensor:
        return self.second(self.first(batch[0])).square().mean()


class OddKinds(nn.Module):
    """Frozen, fp64 and bf16 parameters, an integer and an empty buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.wide = nn.Linear(3, 3).double()
        self.narrow = nn.Linear(3, 1).bfloat16()
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("nothing", torch.zeros(0))
        self.register_buffer("absent", None)

    def forward(self, batch: Any) -> Tensor:
        self.seen += 1
        return self.narrow(self.wide(self.frozen(batch[0]).double()).bfloat16()).float().square().mean()


@pytest.mark.parametrize("make", [Rotary, Tied, OddKinds])
def test_models_of_all_kinds_are_followed(make: Any, tmp_path: Path) -> None:
    model = make()
    trainer = make_trainer(tmp_path, model, use_ema=True, ema_decay=0.0)
    trainer.train()
    assert trainer.model_ema.updates == 10
    for name, value in trainer.model_evaluate.state_dict().items():  # a decay of 0 keeps the last weights
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-6, atol=1e-6)


def test_updates_are_counted_and_not_batches(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, use_ema=True, gradient_accumulation_steps=4)
    trainer.train()
    assert trainer.model_ema.updates == trainer.progress.num_updates == 4


def test_evaluation_and_best_weights_are_the_average(tmp_path: Path) -> None:
    model = Net()
    evaluated: list[nn.Module] = []

    def score(model: nn.Module, batch: Any) -> Any:
        evaluated.append(model)
        return {"acc": [1.0]}

    evaluation = EvalHook([0], score, save_metric="acc")
    trainer = make_trainer(tmp_path / "run", model, use_ema=True, max_epochs=1, hooks=[evaluation])
    trainer.train()
    assert all(model is trainer.model_ema.model for model in evaluated)
    best = torch.load(os.path.join(trainer.ckpt_dir, "best.pth"), weights_only=True)
    assert differences(copied(best), weights_of(trainer.model_ema.model)) == []
    assert differences(copied(best), weights_of(model))


def test_a_model_changed_afterwards_is_named() -> None:
    model = Net()
    ema = EMA(model)
    model.head = nn.Linear(2, 2)
    with pytest.raises(SettingError, match=r"head\.(weight|bias)"):
        ema.update(model)


@pytest.mark.parametrize(
    ("head", "match"),
    [
        (
            nn.Linear(8, 5),
            r"layers\.2\.weight was torch\.float32 of shape \[1, 8\]; now it is torch\.float32 of shape \[5, 8\]",
        ),
        (nn.Linear(8, 1).double(), r"now it is torch\.float64 of shape \[1, 8\]"),
    ],
    ids=["shape", "dtype"],
)
def test_a_layer_replaced_by_one_of_another_form_is_named(head: nn.Module, match: str) -> None:
    model = Net()
    ema = EMA(model)
    model.layers[2] = head
    with pytest.raises(SettingError, match=match):
        ema.update(model)


def fill(model: nn.Module) -> nn.Module:
    """As if pretrained weights were loaded into the model."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return model


@pytest.mark.parametrize("when", ["", "before_train", "before_epoch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_a_script_loads_before_the_first_step_begin_the_average(
    when: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    data = [(x.to(dtype), y.to(dtype)) for x, y in make_batches()]
    settings: dict[str, Any] = {"data": data, "use_ema": True, "ema_ramp": 0, "max_epochs": 1}
    expected = make_trainer(tmp_path, fill(Net().to(dtype)), **settings)
    hooks = [On(**{when: lambda trainer: fill(trainer.model)})] if when else []
    trainer = make_trainer(tmp_path, Net(seed=1).to(dtype), hooks=hooks, **settings)
    if not when:
        fill(trainer.model)
    expected.train()
    trainer.train()
    assert differences(weights_of(expected.model_evaluate), weights_of(trainer.model_evaluate)) == []


def test_weights_that_a_script_loads_are_evaluated_and_saved_before_the_run(tmp_path: Path) -> None:
    hook = EvalHook([0], lambda model, batch: {"mean": [float(model.layers[0].weight.mean())]}, progress_bar=False)
    trainer = make_trainer(tmp_path / "run", Net(seed=1), use_ema=True, hooks=[hook])
    fill(trainer.model)
    assert trainer.evaluate()["eval_mean"] == 0.5
    trainer = make_trainer(tmp_path / "run", Net(seed=1), use_ema=True)
    fill(trainer.model)
    trainer.save_checkpoint("first.pth")
    saved = torch.load(f"{trainer.ckpt_dir}/first.pth", weights_only=True)
    assert differences(saved, weights_of(trainer.model)) == []


def test_weights_that_a_script_loads_into_the_average_stay(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, Net(seed=1), use_ema=True, ema_ramp=0, max_epochs=1)
    with torch.no_grad():
        for parameter in trainer.model_evaluate.parameters():
            parameter.fill_(7.0)
    trainer.train()
    assert trainer.model_evaluate.layers[0].weight.mean().item() == pytest.approx(7.0, abs=0.01)


def test_replaced_parameters_are_followed_from_train_on(tmp_path: Path) -> None:
    model = Net()
    trainer = make_trainer(tmp_path, model, use_ema=True, ema_decay=0.0)
    trainer.train()
    for layer in (model.layers[0], model.layers[2]):
        layer.weight = nn.Parameter(torch.zeros_like(layer.weight))
    trainer.optimizer.add_param_group({"params": [model.layers[0].weight, model.layers[2].weight]})
    trainer.max_epochs = 3
    trainer.train()
    torch.testing.assert_close(trainer.model_evaluate.layers[2].weight, model.layers[2].weight)


# ---------------------------------------------------------------- checkpoints


def ema_trainer(work_dir: Path, epochs: int, model: nn.Module | None = None, **kwargs: Any) -> Trainer:
    model = Net(norm=True, dropout=True) if model is None else model
    optimizer = AdamW(model.parameters(), lr=0.01)
    return make_trainer(
        work_dir,
        model,
        optimizer,
        max_epochs=epochs,
        **{"use_ema": True, "hooks": [CheckpointerHook()], "create_new_dir": None, **kwargs},
    )


def test_a_resumed_average_is_bitwise_the_one_of_the_whole_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = ema_trainer(tmp_path / "whole", 4)
    whole.train()
    torch.manual_seed(0)
    ema_trainer(tmp_path / "parts", 2).train()
    resumed = ema_trainer(tmp_path / "parts", 4)
    resumed.load_checkpoint("latest.pth")
    resumed.train()
    assert differences(weights_of(whole.model_evaluate), weights_of(resumed.model_evaluate)) == []
    assert resumed.model_ema.updates == whole.model_ema.updates == 20


def test_weights_alone_begin_the_average_anew(tmp_path: Path) -> None:
    weights = weights_of(Net(norm=True, dropout=True, seed=3))
    trainer = ema_trainer(tmp_path, 1)
    trainer.load_checkpoint(checkpoint=weights)
    assert differences(weights, weights_of(trainer.model_evaluate)) == []
    trainer.train()
    fresh = ema_trainer(tmp_path / "fresh", 1, Net(norm=True, dropout=True, seed=3))
    assert trainer.model_ema.updates == 5
    assert fresh.model_ema.updates == 0


def test_weights_loaded_in_mid_run_begin_the_average_anew(tmp_path: Path) -> None:
    trainer = ema_trainer(tmp_path, 1, Net())
    trainer.train()
    trainer.load_checkpoint(checkpoint=weights_of(Net(seed=3)))
    assert differences(weights_of(Net(seed=3)), weights_of(trainer.model_evaluate)) == []


# ---------------------------------------------------------------- DDP


@pytest.fixture
def _one_process_group() -> Iterator[None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process_group")
def test_a_model_in_ddp_has_the_average_of_the_bare_one(tmp_path: Path) -> None:
    bare, inner = Net(norm=True), Net(norm=True)
    model = DistributedDataParallel(inner)
    trainers = []
    for name, net in (("bare", bare), ("ddp", model)):
        trainer = make_trainer(
            tmp_path / name,
            net,
            SGD(net.parameters(), lr=0.05),
            use_ema=True,
            hooks=[CheckpointerHook()],
            create_new_dir=None,
        )
        trainer.train()
        trainers.append(trainer)
    assert differences(weights_of(bare), weights_of(inner)) == []
    assert differences(weights_of(trainers[0].model_evaluate), weights_of(trainers[1].model_evaluate)) == []
    best = torch.load(os.path.join(trainers[1].ckpt_dir, "best.pth"), weights_only=True)
    assert list(best) == list(bare.state_dict())
    resumed = make_trainer(tmp_path / "ddp", Net(norm=True), max_epochs=3, use_ema=True, create_new_dir=None)
    resumed.load_checkpoint("latest.pth")
    assert differences(weights_of(trainers[1].model_evaluate), weights_of(resumed.model_evaluate)) == []


def test_a_shared_parameter_is_left_alone_until_it_is_unshared() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.register_parameter("mask", nn.Parameter(torch.tensor([0.0, float("-inf")]), requires_grad=False))
    shared = [model[0].weight, model.get_parameter("mask")]
    ema = EMA(model, decay=0.5, updates=10_000, shared=shared)
    assert ema.model.get_parameter("0.weight") is model[0].weight
    assert ema.model.get_parameter("1.weight") is not model[1].weight
    ema.update(model)
    assert model.get_parameter("mask").tolist() == [0.0, float("-inf")]  # an average of infinities would be NaN
    ema.unshare([model[0].weight])
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight += 1
    ema.update(model)
    assert torch.allclose(ema.model.get_parameter("0.weight"), before + 0.5, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_parameters_that_cannot_be_averaged_are_copied(dtype: torch.dtype) -> None:
    """Quantised weights are parameters of integers."""
    model = Net()
    model.codes = nn.Parameter(torch.zeros(4).to(dtype), requires_grad=False)
    ema = EMA(model, 0.5, 10**6)
    with torch.no_grad():
        model.codes.copy_(torch.ones(4).to(dtype))
    ema.update(model)
    assert torch.equal(ema.model.codes.float(), torch.ones(4))


# ---------------------------------------------------------------- what is averaged, and what is copied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_16_bits_are_averaged_in_float32(dtype: torch.dtype) -> None:
    """A step of 1e-4 is less than the last bit of a bfloat16: the average would never move."""
    model, reference = nn.Linear(1, 1, bias=False).to(dtype), nn.Linear(1, 1, bias=False)
    for one in (model, reference):
        nn.init.ones_(one.weight)
    ema, exact = EMA(model, 0.9999, updates=20_000), EMA(reference, 0.9999, updates=20_000)
    for one in (model, reference):
        nn.init.constant_(one.weight, 1.5)
    for _ in range(300):
        ema.update(model)
        exact.update(reference)
    torch.testing.assert_close(ema.model.weight, exact.model.weight.to(dtype), rtol=0, atol=0)
    assert ema.wide_state()["weight"].item() == exact.model.weight.item() > 1.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_16_bits_go_on_in_float32_while_they_are_frozen(dtype: torch.dtype) -> None:
    def average(dtype: torch.dtype) -> EMA:
        model = nn.Linear(1, 1, bias=False).to(dtype)
        nn.init.ones_(model.weight)
        optimizer = SGD(model.parameters(), lr=0.1)
        ema = EMA(model, 0.9999, updates=20_000, optimizers=lambda: [optimizer])
        nn.init.constant_(model.weight, 1.5)
        for trained in (True, False, True):
            model.weight.requires_grad_(trained)
            ema.bind(model)
            for _ in range(300):
                ema.update(model)
        return ema

    narrow, exact = average(dtype), average(torch.float32)
    torch.testing.assert_close(narrow.model.weight, exact.model.weight.to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(narrow.wide_state()["weight"], exact.model.weight.detach(), rtol=1e-6, atol=0)


def test_the_average_of_16_bits_resumes_bitwise(tmp_path: Path) -> None:
    def run(folder: str, epochs: int, **settings: Any) -> Trainer:
        model = Net().bfloat16()
        data = [(x.bfloat16(), y.bfloat16()) for x, y in make_batches(5)]
        settings = {"use_ema": True, "ema_decay": 0.999, "hooks": [CheckpointerHook()], **settings}
        trainer = make_trainer(tmp_path / folder, model, data=data, max_epochs=epochs, create_new_dir=None, **settings)
        trainer.train()
        return trainer

    whole = run("whole", 6)
    run("parts", 3)
    parts = run("parts", 6, resume="auto")
    assert differences(whole.model_ema.wide_state(), parts.model_ema.wide_state()) == []
    assert differences(weights_of(whole.model_evaluate), weights_of(parts.model_evaluate)) == []
    rounded = EMA(parts.model).model.load_state_dict(parts.model_evaluate.state_dict())
    assert rounded.missing_keys == []
    assert parts.model_ema.wide_state()["layers.0.weight"].dtype == torch.float32


class Mixed(Net):
    """Parameters and buffers of many kinds beside the trained ones."""

    def __init__(self) -> None:
        super().__init__()
        mask = torch.full((3, 3), float("-inf")).triu(1)
        self.mask = nn.Parameter(mask.clone(), requires_grad=False)
        self.table = nn.Parameter(torch.arange(4, dtype=torch.int8), requires_grad=False)
        self.momentum = nn.Parameter(torch.ones(2), requires_grad=False)  # frozen, and changes
        self.register_buffer("mask_too", mask)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("flag", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("expanded", torch.ones(1, 3).expand(4, 3))
        self.register_buffer("sparse", torch.eye(3).to_sparse(), persistent=False)
        self.register_buffer("made_late", None)

    def forward(self, batch: Any) -> Any:
        self.count += 1
        self.flag[0] = True
        self.expanded = torch.full((1, 3), float(self.count)).expand(4, 3)
        self.sparse = (torch.eye(3) * self.count).to_sparse()
        if self.count > 3:
            self.made_late = torch.full((2,), float(self.count))
        self.momentum.data += 1
        return super().forward(batch)


@pytest.mark.parametrize("settings", [{}, {"on_nonfinite": "skip"}, {"precision": "fp16"}], ids=str)
def test_only_trained_parameters_are_averaged_and_all_else_is_copied(settings: dict[str, Any], tmp_path: Path) -> None:
    model = Mixed()
    optimizer = SGD(model.layers.parameters(), lr=0.05)
    hooks = [CheckpointerHook()]
    trainer = make_trainer(tmp_path, model, optimizer, use_ema=True, ema_decay=0.5, hooks=hooks, **settings)
    trainer.train()
    average = trainer.model_evaluate
    for name in ("mask", "table", "momentum", "mask_too", "count", "flag", "expanded", "made_late"):
        assert torch.equal(getattr(average, name), getattr(model, name)), name
    assert torch.equal(average.sparse.to_dense(), model.sparse.to_dense())
    assert average.count == trainer.progress.num_updates > 5
    assert not torch.equal(average.layers[0].weight, model.layers[0].weight)
    weights = torch.load(f"{trainer.ckpt_dir}/best.pth", weights_only=True)
    assert torch.equal(weights["mask"], model.mask)
    assert torch.equal(weights["expanded"], model.expanded)


def test_infinities_in_what_is_averaged_stay(tmp_path: Path) -> None:
    model = Mixed()  # the optimizer has the frozen mask, too
    model.wide_mask = nn.Parameter(model.mask.detach().half(), requires_grad=False)
    trainer = make_trainer(tmp_path, model, use_ema=True, ema_decay=0.5, ema_ramp=0, hooks=[CheckpointerHook()])
    trainer.train()
    average = trainer.model_evaluate
    assert torch.equal(average.mask, model.mask)
    assert torch.equal(average.wide_mask, model.wide_mask)
    assert model.momentum[0] == 11
    assert 9 < average.momentum[0] < 11  # an optimizer has it


def test_what_an_optimizer_has_is_averaged_though_it_is_frozen_later(tmp_path: Path) -> None:
    model = Net()
    freezes = On(after_epoch=lambda t: t.model.layers[0].requires_grad_(False))
    trainer = make_trainer(tmp_path, model, use_ema=True, ema_decay=0.9, ema_ramp=0, hooks=[freezes])
    trainer.train()
    assert not torch.equal(trainer.model_evaluate.layers[0].weight, model.layers[0].weight)


def test_a_group_that_is_added_inside_an_epoch_is_averaged_from_there_on(tmp_path: Path) -> None:
    model = Net()
    optimizer = SGD(model.layers[0].parameters(), lr=0.1)
    seen = []

    def add(trainer: Trainer) -> None:
        trainer.optimizer.add_param_group({"params": list(trainer.model.layers[2].parameters())})

    def look(trainer: Trainer) -> None:
        seen.append(torch.equal(trainer.model_evaluate.layers[2].weight, trainer.model.layers[2].weight))

    hooks = [On(after_iter=at_iter(2, add)), On(after_iter=look)]
    make_trainer(tmp_path, model, optimizer, use_ema=True, ema_ramp=0, hooks=hooks).train()
    assert seen == [True] * 3 + [False] * 7


@pytest.mark.parametrize("ramp", [0, 5, 2000])
def test_the_ramp_is_a_setting(ramp: float, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, expected = Net(), Net()
    by_hand = copied(dict(expected.named_parameters()))
    optimizer = SGD(expected.parameters(), lr=0.05)
    for n, batch in enumerate(make_batches() * 2, 1):
        optimizer.zero_grad()
        expected(batch).backward()
        optimizer.step()
        decay = 0.9 * (1 - math.exp(-n / ramp)) if ramp else 0.9
        for name, weight in expected.named_parameters():
            by_hand[name].lerp_(weight.detach(), 1 - decay)
    with caplog.at_level("INFO", "torch_frame"):
        trainer = make_trainer(tmp_path, model, use_ema=True, ema_decay=0.9, ema_ramp=ramp)
        trainer.train()
    assert differences(dict(trainer.model_evaluate.named_parameters()), by_hand) == []
    assert ("no ramp (ema_ramp=0)" if ramp == 0 else f"ramped up in {ramp} updates (ema_ramp)") in caplog.text


@pytest.mark.parametrize("bad", [-1, math.inf, math.nan, "long", None])
def test_a_ramp_outside_its_range_is_told(bad: Any, tmp_path: Path) -> None:
    with pytest.raises((SettingError, TypeError), match="ema_ramp"):
        make_trainer(tmp_path, use_ema=True, ema_ramp=bad)


def test_another_ramp_on_resume_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"use_ema": True, "create_new_dir": None}
    make_trainer(tmp_path, ema_ramp=5, hooks=[CheckpointerHook()], **settings).train()
    make_trainer(tmp_path, ema_ramp=0, max_epochs=3, resume="auto", hooks=[CheckpointerHook()], **settings).train()
    assert "ema_ramp was 5, now it is 0" in caplog.text


class Leaves(Net):
    """Keeps tensors of its last forward pass, in containers too, which copy.deepcopy refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Any = [{"loss": torch.ones(2, requires_grad=True) * 2}]

    def forward(self, batch: Any) -> Any:
        loss = super().forward(batch)
        self.last = [{"loss": loss}]
        return loss


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_model_with_computed_tensors_is_copied(tmp_path: Path) -> None:
    for model in (Leaves(), Net()):
        if not isinstance(model, Leaves):
            model.layers[0] = nn.utils.weight_norm(model.layers[0])
        make_trainer(tmp_path, model, use_ema=True).train()


class Uncopyable(Net):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("it holds a lock")


def test_a_model_that_cannot_be_copied_is_told(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"use_ema=True needs a copy .* it holds a lock"):
        make_trainer(tmp_path, Uncopyable(), use_ema=True)


class Cached(Net):
    """A grid that is made by the first forward pass."""

    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("grid", None, persistent=persistent)

    def forward(self, batch: Any) -> Any:
        if self.grid is None:
            self.grid = torch.ones(3)
        return super().forward((batch[0] * self.grid, batch[1]))


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("use_ema", [False, True])
def test_a_buffer_that_the_first_batch_makes_trains_on_and_resumes(
    persistent: bool, use_ema: bool, tmp_path: Path
) -> None:
    def build(folder: str, epochs: int, **settings: Any) -> Trainer:
        hooks = [CheckpointerHook()]
        model = Cached(persistent=persistent)
        settings = {"use_ema": use_ema, "create_new_dir": None, **settings}
        return make_trainer(tmp_path / folder, model, hooks=hooks, max_epochs=epochs, **settings)

    whole = build("whole", 4)
    whole.train()
    trainer = build("parts", 1)
    trainer.train()
    trainer.max_epochs = 2
    trainer.train()
    parts = build("parts", 4, resume="auto")
    parts.train()
    assert differences(weights_of(whole.model_evaluate), weights_of(parts.model_evaluate)) == []


class Registering(Net):
    """Running statistics that the first forward pass registers."""

    def __init__(self, *, persistent: bool) -> None:
        super().__init__()
        self._persistent = persistent

    def forward(self, batch: Any) -> Any:
        x, y = batch
        if not hasattr(self, "mean"):
            self.register_buffer("mean", x.mean(0), persistent=self._persistent)
        self.mean = 0.5 * self.mean + 0.5 * x.mean(0)
        return super().forward((x - self.mean, y))


@pytest.mark.parametrize("persistent", [False, True])
def test_a_buffer_that_a_forward_pass_registers_is_followed_from_the_first_epoch_on(
    persistent: bool, tmp_path: Path
) -> None:
    seen = []

    def look(trainer: Trainer) -> None:
        seen.append(differences(dict(trainer.model_evaluate.named_buffers()), dict(trainer.model.named_buffers())))

    model = Registering(persistent=persistent)
    trainer = make_trainer(tmp_path, model, use_ema=True, hooks=[On(after_epoch=look), CheckpointerHook()])
    trainer.train()
    assert seen == [[], []]
    assert "mean" in dict(model.named_buffers())
    best = torch.load(f"{trainer.ckpt_dir}/best.pth", weights_only=True)
    assert best.keys() == model.state_dict().keys()
