"""The lines that a run begins with, and how it ends."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torch_frame
from tests.small_runs import Net, make_batches, make_trainer
from torch_frame import CheckpointerHook
from torch_frame.run import first_block, length


def test_the_first_lines_say_what_is_trained_on_what_and_how_long(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Net()
    model.layers[0].bias.requires_grad_(False)
    data = DataLoader(TensorDataset(torch.ones(20, 3), torch.ones(20, 1)), batch_size=4)
    settings = {"gradient_accumulation_steps": 2, "precision": "bf16", "seed": 7}
    trainer = make_trainer(tmp_path / "run", model, data=data, max_epochs=3, **settings)
    trainer.log_param("a note", learning_rate=0.05)
    with caplog.at_level(logging.INFO, "torch_frame"):
        trainer.train()
    rows = dict(re.fullmatch(r"  (\S.*?)  +(\S.*)", line).groups() for line in caplog.messages[1:9])
    assert rows == {
        "Model": "Net, 41 parameters (33 trainable), 164 bytes",
        "Frozen": "layers.0.bias",
        "Data": "TensorDataset, 20 samples an epoch",
        "Batch": "8 samples an update (4 a batch x 2 accumulated)",
        "Steps": "3 epochs x 5 batches, 9 updates",
        "Optimizer": "SGD, lr 0.05",
        "Schedule": "constant",
        "Device": "cpu, precision bf16",
    }
    text = caplog.text
    assert "functions of seed 7 and the position" in " ".join(" ".join(caplog.messages).split())  # it may be wrapped
    for line in (
        f"torch-frame {torch_frame.__version__}",
        f"{tmp_path / 'run'}",
        "  a note\n",
        "  learning_rate: 0.05\n",
        "Training begins at epoch 1 of 3.",
    ):
        assert line in text
    trainer.train()
    assert "Nothing to train: max_epochs is 3, and 3 epochs are done." in caplog.text


@pytest.mark.parametrize(
    ("arguments", "row"),
    [
        ((None, 1, 1), "1 of the loader's batches an update"),
        ((None, 4, 2), "8 of the loader's batches an update"),
        ((8, 1, 1), "8 samples an update (8 a batch)"),
        ((8, 1, 4), "32 samples an update (8 a batch x 4 processes)"),
    ],
)
def test_the_batch_row_counts_the_samples_of_one_update(arguments: tuple[int | None, int, int], row: str) -> None:
    assert first_block.batch_row(*arguments) == row


def test_the_model_row_counts_shared_parameters_once_and_buffers_in_the_size() -> None:
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(1024))
    tied[1].weight = tied[0].weight
    assert first_block.model_row(tied) == "Sequential, 2,064 parameters (2,064 trainable), 16.1 KiB"


def test_a_loader_without_a_length_has_no_steps() -> None:
    assert length.steps_row(3, None, None) == "3 epochs; the loader has no length"


def test_what_happened_before_the_log_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(tmp_path / "run", hooks=[CheckpointerHook()]).train()
    trainer = make_trainer(tmp_path / "run", data=make_batches(), max_epochs=3, hooks=[CheckpointerHook()])
    trainer.load_checkpoint("latest.pth")
    with caplog.at_level(logging.INFO, "torch_frame"):
        trainer.train()
        trainer.max_epochs = 4
        trainer.train()
    assert caplog.text.count("Resumed from ") == 1
    assert "epoch 3, after 0 of its batches; 10 iterations and 10 updates in all." in caplog.text
