"""An optimizer's state is saved by the names of its parameters, all of it, and is the same to the last bit when restored."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from tests.small_runs import copied, differences, make_batches, raised_by, weights_of
from torch_frame import CheckpointError, HookBase, Trainer
from torch_frame.distributed.strategy import SingleProcess
from torch_frame.run.optimizers import OptimizerPart

STEPS, SAVED_AT = 10, 6
"""Two epochs of 5 batches; the state is saved behind the second batch of the second one."""


class SaveInside(HookBase):
    """Saves the whole state inside an epoch."""

    def after_iter(self) -> None:
        if self.trainer.cur_iter == SAVED_AT:
            self.trainer.save_checkpoint("inside.pth", save_single_model=False)  # type: ignore[attr-defined]


class Sparse(nn.Module):
    """Looks rows up; its gradients are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(6, 3, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x.abs().mul(10).long() % 6).sum((1, 2))[:, None]


class ByClosure(Trainer):
    """LBFGS evaluates the loss several times a step."""

    def train_one_iter(self, batch: Any) -> dict[str, Tensor]:
        def closure() -> float:
            self.optimizer.zero_grad()
            loss = loss_of(self.model, batch)
            loss.backward()
            return loss.item()

        self.optimizer.step(closure)
        self.progress.num_updates += 1
        return {"total_loss": loss_of(self.model, batch).detach()}


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    parameter = next(model.parameters())
    return (model(x.to(parameter.dtype)).float() - y).square().mean()


def make_model(kind: str = "dense", dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "sparse":
            return Sparse().to(dtype)
        bias = kind != "matrices"
        return nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 1, bias=bias)).to(dtype)


def run(folder: Path, model: nn.Module, optimizer: Optimizer, *, resumed: bool = False, **settings: Any) -> Trainer:
    """Train; if resumed, from the state that another run has saved in this folder."""
    kind = settings.pop("kind", Trainer)
    hooks = [] if resumed else [SaveInside()]
    batches = make_batches()
    made: Trainer = kind(
        model,
        optimizer,
        None,
        batches,
        2,
        folder,
        **{"hooks": hooks, "step_fn": loss_of, "create_new_dir": None, **settings},
    )
    if resumed:
        made.load_checkpoint("inside.pth")
    made.train(5, 2)
    return made


def state_of(optimizer: Optimizer) -> Any:
    return copied(optimizer.state_dict())


# ---------------------------------------------------------------- every optimizer of torch

MAKERS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=0.01),
    "SGD momentum": lambda p: SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD fused": lambda p: SGD(p, lr=0.01, momentum=0.9, fused=True),
    "Adam": lambda p: Adam(p, lr=0.01),
    "Adam amsgrad": lambda p: Adam(p, lr=0.01, amsgrad=True),
    "Adam foreach": lambda p: Adam(p, lr=0.01, foreach=True),
    "Adam fused": lambda p: Adam(p, lr=0.01, fused=True),
    "Adam rate on a device": lambda p: Adam(p, lr=torch.tensor(0.01)),
    "AdamW": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW fused": lambda p: AdamW(p, lr=0.01, fused=True),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "Adamax foreach": lambda p: torch.optim.Adamax(p, lr=0.01, foreach=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "NAdam foreach": lambda p: torch.optim.NAdam(p, lr=0.01, foreach=True, decoupled_weight_decay=True),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "RAdam foreach": lambda p: torch.optim.RAdam(p, lr=0.01, foreach=True),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01, t0=3),
    "ASGD foreach": lambda p: torch.optim.ASGD(p, lr=0.01, t0=3, foreach=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, lr_decay=0.1),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.01, fused=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "Adadelta foreach": lambda p: torch.optim.Adadelta(p, lr=0.1, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.9),
    "RMSprop foreach": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, foreach=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "Rprop foreach": lambda p: torch.optim.Rprop(p, lr=0.01, foreach=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "Adafactor foreach": lambda p: torch.optim.Adafactor(p, lr=0.01, foreach=True),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.01),
    "SparseAdam": lambda p: torch.optim.SparseAdam(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4, line_search_fn="strong_wolfe"),
}
KINDS = {"Muon": "matrices", "SparseAdam": "sparse"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", MAKERS)
def test_a_run_resumed_inside_an_epoch_ends_with_the_same_bits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if name in ("Muon",) and not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    if dtype is torch.bfloat16 and name in ("SparseAdam", "LBFGS"):
        pytest.skip("not with bfloat16, says torch")
    settings: dict[str, Any] = {"kind": ByClosure} if name == "LBFGS" else {}
    ends = []
    for resumed, seed in ((False, 0), (True, 1)):
        model = make_model(KINDS.get(name, "dense"), dtype, seed)
        optimizer = MAKERS[name](model.parameters())
        run(tmp_path, model, optimizer, resumed=resumed, **settings)
        ends.append((weights_of(model), state_of(optimizer)))
    assert differences(ends[0], ends[1]) == []


def test_every_optimizer_of_torch_is_in_the_table() -> None:
    kinds = {name for name in dir(torch.optim) if isinstance(getattr(torch.optim, name), type)}
    optimizers = {name for name in kinds if issubclass(getattr(torch.optim, name), Optimizer)} - {"Optimizer"}
    assert optimizers <= {name.split()[0] for name in MAKERS}


# ---------------------------------------------------------------- state of any kind


class Odd(Optimizer):
    """Keeps all kinds of things beside its momentum."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "note": "x"})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.state["steps"] = self.state.get("steps", 0) + 1  # type: ignore[index]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {
                        "sum": torch.zeros_like(p, dtype=torch.float64),
                        "kind": "odd",
                        "none": None,
                        "flag": True,
                    }
                    state |= {
                        "nested": {"list": [torch.zeros(2, dtype=torch.float64), 0]},
                        "pair": (1, "two"),
                        "seen": {3},
                    }
                    state |= {"index": torch.zeros(1, dtype=torch.int64), "mask": torch.ones(1, dtype=torch.bool)}
                state["sum"] += p.grad.double() / 3
                state["nested"]["list"][0] += 1 / 3
                state["nested"]["list"][1] += 1
                state["index"] += 1
                p -= (group["lr"] * state["sum"] * self.state["steps"]).to(p.dtype)  # type: ignore[index]


def test_state_keeps_its_dtypes_and_values_whatever_they_are(tmp_path: Path) -> None:
    ends = []
    for resumed in (False, True):
        model = make_model(dtype=torch.bfloat16)
        optimizer = Odd(model.parameters())
        run(tmp_path, model, optimizer, resumed=resumed)
        ends.append((weights_of(model), state_of(optimizer)))
        assert optimizer.state[model[0].weight]["seen"] == {3}  # type: ignore[index]
    for _, state in ends:
        assert state["state"].pop("steps") == STEPS
    assert differences(ends[0], ends[1]) == []


def test_what_was_on_the_host_is_there_again() -> None:
    """torch's meta device stands for an accelerator."""
    parts = []
    for _ in range(2):
        model = nn.Linear(2, 2, device="meta")
        optimizer = torch.optim.NAdam(model.parameters(), lr=0.01)
        parts.append((optimizer, OptimizerPart(optimizer, model, SingleProcess())))
    (first, saved), (second, restored) = parts
    for parameter in first.param_groups[0]["params"]:
        moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        first.state[parameter] = {"step": torch.tensor(3.0), "mu_product": torch.tensor(0.5), **moments}
    state = saved.state_dict()
    assert state["on_host"] == ["mu_product"]
    restored.load_state_dict(state)
    for kept in second.state.values():
        assert kept["mu_product"].device.type == kept["step"].device.type == "cpu"
        assert (kept["mu_product"].item(), kept["exp_avg"].device.type) == (0.5, "meta")


# ---------------------------------------------------------------- order and groups


class Layers(nn.Module):
    """Three layers of one shape, made in any order; `tied` shares the first one's weight under another name."""

    def __init__(self, order: str = "abc", *, tied: bool = False, seed: int = 0) -> None:
        super().__init__()
        for name in order:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(ord(name) + seed)
                setattr(self, name, nn.Linear(3, 3, bias=False))
        if tied:
            self.last = nn.Linear(3, 3, bias=False)
            self.last.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return (self.last(x) if hasattr(self, "last") else x).sum(1, keepdim=True)


def ends_alike(folder: Path, make: Callable[[bool], tuple[nn.Module, Optimizer]], **settings: Any) -> bool:
    """Whether a resumed run ends as the whole one. `make(resumed)` makes the model and the optimizer."""
    ends = []
    for resumed in (False, True):
        model, optimizer = make(resumed)
        run(folder, model, optimizer, resumed=resumed, **settings)
        ends.append(dict(sorted(weights_of(model).items())))
    return differences(ends[0], ends[1]) == []


def test_parameters_in_another_order_get_their_own_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def make(resumed: bool) -> tuple[nn.Module, Optimizer]:
        model = Layers("cab" if resumed else "abc")
        return model, Adam(model.parameters(), lr=0.05)

    assert ends_alike(tmp_path, make)


def groups_of(model: Any, *groups: str, **settings: Any) -> list[dict[str, Any]]:
    rates = {"a": 0.05, "b": 0.02, "c": 0.01}
    return [
        {"params": [getattr(model, name).weight for name in names], "lr": rates[min(names)], **settings}
        for names in groups
    ]


@pytest.mark.parametrize("schedule", [False, True])
def test_groups_in_another_order_keep_their_settings_and_rates(schedule: bool, tmp_path: Path) -> None:
    for part, resumed in (("whole", False), ("parts", True)):
        model = Layers()
        optimizer = Adam(groups_of(model, "c", "ba") if resumed else groups_of(model, "ab", "c"))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.9**n) if schedule else None
        more = {"warmup_method": "linear", "warmup_iters": 8, "lr_scheduler_interval": "iter"} if schedule else {}
        trainer = Trainer(
            model,
            optimizer,
            scheduler,
            make_batches(),
            2,
            tmp_path,
            hooks=[] if resumed else [SaveInside()],
            step_fn=loss_of,
            create_new_dir=None,
            **more,  # type: ignore[arg-type]
        )
        if resumed:
            trainer.load_checkpoint("inside.pth")
        trainer.train(5, 2)
        names = ["c", "ab"] if resumed else ["ab", "c"]
        rates = {name: group["lr"] for name, group in zip(names, optimizer.param_groups, strict=True)}
        (tmp_path / f"{part}.txt").write_text(str(sorted(rates.items())))
        torch.save(model.state_dict(), tmp_path / f"{part}.pth")
    assert (tmp_path / "whole.txt").read_text() == (tmp_path / "parts.txt").read_text()
    whole, parts = (torch.load(tmp_path / f"{name}.pth") for name in ("whole", "parts"))
    assert differences(whole, parts) == []


def test_a_group_that_was_split_keeps_its_settings(tmp_path: Path) -> None:
    def make(resumed: bool) -> tuple[nn.Module, Optimizer]:
        model = Layers()
        split = groups_of(model, "a", "b", "c")
        split[1]["lr"] = 7.0
        return model, Adam(split if resumed else groups_of(model, "ab", "c"))

    assert ends_alike(tmp_path, make)


def test_a_parameter_in_another_group_is_told_and_gets_its_settings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Layers()
    run(tmp_path, model, Adam(groups_of(model, "ab", "c")))
    caplog.clear()
    model = Layers()
    optimizer = Adam(groups_of(model, "a", "cb"))
    trainer = run(tmp_path, model, optimizer, resumed=True)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.05, 0.01]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line for line in warnings if "b.weight" in line and "another group" in line]


def test_groups_that_cannot_be_matched_are_an_error(tmp_path: Path) -> None:
    model = Layers()
    run(tmp_path, model, Adam(groups_of(model, "ab", "c")))
    model = Layers()
    weights = weights_of(model)
    error = raised_by(lambda: run(tmp_path, model, Adam(groups_of(model, "abc")), resumed=True), CheckpointError)
    assert "a.weight, b.weight | c.weight" in str(error)
    assert differences(weights_of(model), weights) == []


@pytest.mark.parametrize("names", ["a", "ab"])
def test_another_set_of_parameters_is_an_error_that_names_them(names: str, tmp_path: Path) -> None:
    model = Layers()
    run(tmp_path, model, Adam(groups_of(model, names)))
    model = Layers()
    other = "abc" if names == "ab" else "bc"
    error = raised_by(lambda: run(tmp_path, model, Adam(groups_of(model, other)), resumed=True), CheckpointError)
    assert "c.weight" in str(error)
    assert ("a.weight" in str(error)) is (names == "a")


def test_many_parameters_are_compared_in_time_that_grows_with_their_number() -> None:
    model = nn.Module()
    model.parts = nn.ParameterList([nn.Parameter(torch.ones(())) for _ in range(20_000)])
    part = OptimizerPart(SGD([{"params": list(model.parameters())}], lr=0.1), model, SingleProcess())
    saved = part.state_dict()
    begun = time.process_time()
    assert part.differences(saved, ()) == []
    assert time.process_time() - begun < 3.0  # 0.1 s; 50 s if the set of names is made for each of them


def test_tied_weights_are_found_by_any_of_their_names(tmp_path: Path) -> None:
    class Other(Layers):
        """The tied weight's first name is the other one."""

        def __init__(self) -> None:
            super().__init__(tied=True)
            moved = self._modules.pop("a")
            self.a = moved

    def make(resumed: bool) -> tuple[nn.Module, Optimizer]:
        model = Other() if resumed else Layers(tied=True)
        return model, Adam([model.b.weight, model.c.weight, model.a.weight] if resumed else model.parameters(), lr=0.05)

    assert ends_alike(tmp_path, make)


def test_state_that_goes_by_order_is_not_put_in_another_one(tmp_path: Path) -> None:
    def make(p: Any) -> Optimizer:
        return torch.optim.LBFGS(p, lr=0.1, max_iter=4)

    model = Layers()
    run(tmp_path, model, make(model.parameters()), kind=ByClosure)
    model = Layers("cab")
    error = raised_by(
        lambda: run(tmp_path, model, make(model.parameters()), kind=ByClosure, resumed=True), CheckpointError
    )
    assert "another order, and the state of LBFGS goes by order" in str(error)


def test_a_compiled_model_and_a_bare_one_continue_each_other(tmp_path: Path) -> None:
    for compiled in (False, True):

        def make(resumed: bool, compiled: bool = compiled) -> tuple[nn.Module, Optimizer]:
            model: Any = Layers("cab" if resumed else "abc")
            made = torch.compile(model, backend="eager") if compiled is resumed else model
            return made, Adam(model.parameters(), lr=0.05)

        ends = []
        for resumed in (False, True):
            model, optimizer = make(resumed)
            run(tmp_path / str(compiled), model, optimizer, resumed=resumed, use_ema=True)
            bare = getattr(model, "_orig_mod", model)
            ends.append(dict(sorted(weights_of(bare).items())))
        assert differences(ends[0], ends[1]) == []


# ---------------------------------------------------------------- parameters that the model does not have


def test_weights_of_a_loss_are_saved_with_their_state(tmp_path: Path) -> None:
    balances = []
    for resumed in (False, True):
        model, balance = make_model(), nn.Parameter(torch.zeros(2))

        def step(model: nn.Module, batch: Any, balance: nn.Parameter = balance) -> Tensor:
            return (loss_of(model, batch) * torch.exp(-balance) + balance).sum()

        optimizer = Adam([balance, *model.parameters()] if resumed else [*model.parameters(), balance], lr=0.1)
        run(tmp_path, model, optimizer, resumed=resumed, step_fn=step)
        balances.append(copied([balance, weights_of(model), optimizer.state[balance]]))
    assert differences(balances[0], balances[1]) == []


def test_others_are_matched_by_the_names_that_the_optimizer_was_given(tmp_path: Path) -> None:
    ends = []
    for resumed in (False, True):
        model = make_model()
        losses = {name: nn.Parameter(torch.full((1,), value)) for name, value in (("first", 1.0), ("second", 2.0))}

        def step(model: nn.Module, batch: Any, losses: Any = losses) -> Tensor:
            return loss_of(model, batch) * losses["first"].square().sum() + losses["second"].square().sum()

        named = [*model.named_parameters(), *losses.items()]
        run(tmp_path, model, Adam(named[::-1] if resumed else named, lr=0.1), resumed=resumed, step_fn=step)
        ends.append(copied([weights_of(model), losses]))
    assert differences(ends[0], ends[1]) == []


def test_another_shape_of_a_loss_is_an_error_before_anything_changes(tmp_path: Path) -> None:
    model, other = make_model(), nn.Parameter(torch.zeros(2))
    run(tmp_path, model, SGD([*model.parameters(), other], lr=0.1))
    model, other = make_model(seed=3), nn.Parameter(torch.zeros(5))
    before = weights_of(model)
    optimizer = SGD([*model.parameters(), other], lr=0.1)
    error = raised_by(lambda: run(tmp_path, model, optimizer, resumed=True), CheckpointError)
    assert "(optimizer) 0 was [2], now it is [5]" in str(error)
    assert differences(weights_of(model), before) == []


# ---------------------------------------------------------------- optimizers with more than torch's layout


class Lookahead(Optimizer):
    """Slow weights behind another optimizer's, with a layout of its own (Zhang et al. 2019)."""

    def __init__(self, base: Optimizer, k: int = 3) -> None:
        self.base, self.k, self.count = base, k, 0
        self.slow = [p.detach().clone() for group in base.param_groups for p in group["params"]]
        self.param_groups, self.defaults = base.param_groups, base.defaults
        self.state = defaultdict(dict)

    def step(self, closure: Any = None) -> None:
        self.base.step()
        self.count += 1
        if self.count % self.k == 0:
            fast = [p for group in self.base.param_groups for p in group["params"]]
            with torch.no_grad():
                for p, slow in zip(fast, self.slow, strict=True):
                    p.copy_(slow.lerp_(p, 0.5))

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"fast": self.base.state_dict(), "slow": self.slow, "count": self.count}

    def load_state_dict(self, state_dict: Any) -> None:
        self.base.load_state_dict(state_dict["fast"])
        self.param_groups = self.base.param_groups
        self.slow = [slow.clone() for slow in state_dict["slow"]]
        self.count = state_dict["count"]


class Sam(Optimizer):
    """Steps through a base optimizer that shares its groups, as many copies of SAM do; the base has the momentum."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "rho": 0.05})
        self.base = SGD(self.param_groups, lr=lr, momentum=0.9)
        self.param_groups = self.base.param_groups

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["old"] = p.detach().clone()
        self.base.step()


class AdoptingSam(Sam):
    """As the original one: it gives the base its groups after loading."""

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.base.param_groups = self.param_groups


class Larc(Optimizer):
    """As apex's: saves and loads by the optimizer inside, whose groups it shares, and forgets to share the loaded ones (#766)."""

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        super().__init__(base.param_groups, {})
        self.param_groups, self.state = base.param_groups, base.state

    def step(self, closure: Any = None) -> None:
        self.base.step()

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.base.load_state_dict(state_dict)


class ScheduleFree(Optimizer):
    """Keeps counts and sums in its groups, as schedule-free optimizers do."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "k": 0, "weight_sum": 0.0, "train_mode": False})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["train_mode"] = True
            group["k"] += 1
            group["weight_sum"] += group["lr"] ** 2 * group["k"]
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.detach().clone())
                z.sub_(p.grad, alpha=group["lr"])
                p.lerp_(z, group["lr"] ** 2 * group["k"] / group["weight_sum"])


class WithMaster(Optimizer):
    """Steps float32 copies of the weights by an optimizer of its own, and rounds."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.masters = [nn.Parameter(p.detach().float()) for p in self.param_groups[0]["params"]]
        self.inner = Adam(self.masters, lr=lr)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p, master in zip(self.param_groups[0]["params"], self.masters, strict=True):
            master.grad = p.grad.float()
        self.inner.step()
        for p, master in zip(self.param_groups[0]["params"], self.masters, strict=True):
            p.copy_(master)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: Lookahead(Adam(p, lr=0.05)),
        lambda p: Lookahead(torch.optim.NAdam(p, lr=0.05)),
        lambda p: ScheduleFree(p, lr=0.05),
        lambda p: Sam(p, lr=0.05),
        lambda p: AdoptingSam(p, lr=0.05),
        lambda p: Larc(SGD(p, lr=0.05, momentum=0.9)),
        lambda p: WithMaster(p, lr=0.05),
    ],
    ids=["Lookahead", "Lookahead_bfloat16", "ScheduleFree", "Sam", "AdoptingSam", "Larc", "WithMaster"],
)
def test_nothing_of_a_wrapper_is_lost(
    make: Callable[[Any], Optimizer], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    is_low = any(name in request.node.name for name in ("bfloat16", "WithMaster"))

    def made(resumed: bool) -> tuple[nn.Module, Optimizer]:
        model = make_model(dtype=torch.bfloat16 if is_low else torch.float32)
        optimizer = make(model.parameters())
        kept.append(optimizer)
        return model, optimizer

    kept: list[Any] = []
    scheduled = {"warmup_method": "linear", "warmup_iters": 9}
    assert ends_alike(tmp_path, made, **scheduled)
    first, second = (copied(getattr(optimizer, "base", optimizer).state_dict()) for optimizer in kept)
    assert differences(first, second) == []
    for optimizer in kept:
        if isinstance(optimizer, Sam | Larc):
            assert optimizer.base.param_groups[0] is optimizer.param_groups[0]


def test_a_layout_of_its_own_in_another_order_is_refused(tmp_path: Path) -> None:
    model = Layers()
    run(tmp_path, model, Lookahead(Adam(model.parameters())))
    model = Layers("cab")
    error = raised_by(lambda: run(tmp_path, model, Lookahead(Adam(model.parameters())), resumed=True), CheckpointError)
    assert "state of Lookahead goes by order" in str(error)


class Refusing(Adam):
    """Finds fault with what it is given, when half of it is loaded."""

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        raise KeyError("half loaded")


def test_an_optimizer_that_refuses_its_state_leaves_all_as_it_was(tmp_path: Path) -> None:
    model = make_model()
    run(tmp_path, model, Refusing(model.parameters(), lr=0.01))
    model = make_model(seed=5)
    optimizer = Refusing(model.parameters(), lr=0.5)
    weights, state = weights_of(model), state_of(optimizer)
    settings: dict[str, Any] = {"use_ema": False}
    trainer = Trainer(model, optimizer, None, make_batches(), 2, tmp_path, hooks=[], create_new_dir=None, **settings)
    error = raised_by(lambda: trainer.load_checkpoint("inside.pth"), CheckpointError)
    assert "Refusing.load_state_dict refuses it: KeyError" in str(error)
    assert differences(weights_of(model), weights) == []
    assert differences(state_of(optimizer), state) == []
    assert trainer.progress.iter == 0


def test_an_optimizer_inside_another_one_is_left_as_it_was_too(tmp_path: Path) -> None:
    model = make_model()
    run(tmp_path, model, Lookahead(Adam(model.parameters(), lr=0.01)))
    for more in ({"precision": "bf16"}, {"on_nonfinite": "raise"}):
        model = make_model(seed=5)
        inside: type[Adam] = Adam if "precision" in more else Refusing
        optimizer = Lookahead(inside(model.parameters(), lr=0.5))
        before = copied([optimizer.base.state_dict(), optimizer.slow, optimizer.count])
        settings: dict[str, Any] = {"hooks": [], "create_new_dir": None, **more}
        trainer = Trainer(model, optimizer, None, make_batches(), 2, tmp_path, **settings)
        raised_by(lambda trainer=trainer: trainer.load_checkpoint("inside.pth"), CheckpointError)  # type: ignore[misc]
        assert differences(before, copied([optimizer.base.state_dict(), optimizer.slow, optimizer.count])) == []


# ---------------------------------------------------------------- values that steps put into the groups


class CountsInItsGroups(SGD):
    """As pytorch_optimizer's and prodigy-plus-schedule-free: a group has its count from the first step on."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["num_steps"] = group.get("num_steps", 0) + 1
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad, alpha=group["lr"] / group["num_steps"])


@pytest.mark.parametrize("has_stepped", [False, True])
def test_values_that_steps_put_into_groups_are_restored(has_stepped: bool, tmp_path: Path) -> None:
    def run(folder: Path, epochs: int, state: str | None = None) -> Trainer:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = CountsInItsGroups(model.parameters(), lr=0.1)
        settings: dict[str, Any] = {"hooks": [], "step_fn": loss_of, "create_new_dir": None}
        trainer = Trainer(model, optimizer, None, make_batches(), 1, folder, **settings)
        if state is None or has_stepped:
            trainer.train()
        if state is not None:
            trainer.load_checkpoint(state)
        trainer.max_epochs = epochs
        trainer.train()
        return trainer

    run(tmp_path / "a", 1).save_checkpoint("state.pth", save_single_model=False)
    whole = run(tmp_path / "whole", 2)
    resumed = run(tmp_path / "b", 2, str(tmp_path / "a" / "checkpoints" / "state.pth"))
    assert whole.optimizer.param_groups[0]["num_steps"] == 10
    assert resumed.optimizer.param_groups[0]["num_steps"] == 10
    assert differences(weights_of(whole.model), weights_of(resumed.model)) == []


def test_a_state_of_before_the_first_step_takes_the_values_away(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    optimizer = CountsInItsGroups(model.parameters(), lr=0.1)
    settings: dict[str, Any] = {"hooks": [], "step_fn": loss_of, "create_new_dir": None}
    trainer = Trainer(model, optimizer, None, make_batches(), 1, tmp_path, **settings)
    trainer.save_checkpoint("begin.pth", save_single_model=False)
    trainer.train()
    trainer.load_checkpoint("begin.pth")
    assert "num_steps" not in optimizer.param_groups[0]
