"""Trains a GAN on scikit-learn's handwritten digits (8 x 8 pixels) in about a minute, and draws a picture of samples.

    python examples/gan.py
    python examples/gan.py --resume     # goes on where an interrupted run with the same options stood

Two optimizers under names, each with a schedule and a loss of its own: `train_one_iter` says which loss is whose, and `update`
does the rest (clipping, the schedules, EMA, accumulation, fp16; docs/optimizers.md). The samples are those of EMA's generator.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, TensorDataset

from torch_frame import CheckpointerHook, HookBase, LoggerHook, Trainer, set_random_seed

NOISE = 32


class DigitGan(nn.Module):
    """A generator, (N, NOISE) -> (N, 64) in [-1, 1], and a discriminator, (N, 64) -> (N, 1) logits of being real."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(NOISE, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, 64),
            nn.Tanh(),
        )
        self.discriminator = nn.Sequential(
            nn.Linear(64, width),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.3),
            nn.Linear(width, 1),
        )

    def sample(self, num: int) -> Tensor:
        """`num` generated digits, (num, 64) in [-1, 1]."""
        samples: Tensor = self.generator(torch.randn(num, NOISE))
        return samples


class GanTrainer(Trainer):
    def train_one_iter(self, batch: Any) -> dict[str, Tensor]:
        gan, (real,) = self.model, batch
        assert isinstance(gan, DigitGan)
        with self.autocast():
            fake = gan.sample(len(real)).detach()
            d_loss = F.softplus(-gan.discriminator(real)).mean() + F.softplus(gan.discriminator(fake)).mean()
        self.update(d_loss, "discriminator")
        with self.autocast():
            g_loss = F.softplus(-gan.discriminator(gan.sample(len(real)))).mean()
        self.update(g_loss, "generator")
        return {"total_loss": d_loss + g_loss, "d_loss": d_loss, "g_loss": g_loss}


class Samples(HookBase):
    """Draws samples of the averaged generator after every n-th epoch and the last one: `samples.png` in the work dir."""

    def __init__(self, every_n: int) -> None:
        self.every_n = every_n

    def after_epoch(self) -> None:
        if self.every_n_epochs(self.every_n) or self.is_last_epoch():
            draw(samples_of(self.trainer.model_evaluate, 100), Path(self.trainer.work_dir) / "samples.png")


def samples_of(gan: nn.Module, num: int) -> Tensor:
    """`num` digits from fixed noise, (num, 8, 8) in [0, 1]; the global random numbers are left alone."""
    assert isinstance(gan, DigitGan)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return (gan.sample(num) + 1).view(-1, 8, 8) / 2


def draw(digits: Tensor, path: Path) -> None:
    """A picture of 100 digits, (100, 8, 8), ten in a row."""
    from matplotlib import image

    rows = F.pad(digits, (1, 1, 1, 1)).view(10, 10, 10, 10).permute(0, 2, 1, 3).reshape(100, 100)
    large = rows.repeat_interleave(5, 0).repeat_interleave(5, 1)
    image.imsave(path, large.numpy(), cmap="gray_r", vmin=0, vmax=1)


def judged(samples: Tensor, digits: Any) -> str:
    """What a classifier of the real digits says of the samples, in words."""
    from sklearn.svm import SVC

    judge = SVC(gamma=0.001).fit(digits.data, digits.target)
    counts = torch.bincount(
        torch.as_tensor(judge.predict((samples * 16).reshape(len(samples), 64).numpy())), minlength=10
    )
    shares = ", ".join(f"{digit}: {count / len(samples):.0%}" for digit, count in enumerate(counts.tolist()))
    return f"Of {len(samples)} samples a classifier of the real digits sees {shares}."


def main() -> None:
    from sklearn.datasets import load_digits

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--work-dir", default="work_dir_gan")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue the newest whole state of the work dir")
    options = parser.parse_args()

    set_random_seed(options.seed)
    torch.set_num_threads(1)  # the networks are small
    digits = load_digits()
    real = torch.as_tensor(digits.data, dtype=torch.float32) / 8 - 1  # (1797, 64) in [-1, 1]
    loader = DataLoader(TensorDataset(real), 64, shuffle=True, drop_last=True)

    gan = DigitGan()
    optimizers = {
        "discriminator": Adam(gan.discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999)),
        "generator": Adam(gan.generator.parameters(), lr=4e-4, betas=(0.5, 0.999)),
    }
    fall = {name: LinearLR(optimizer, 1.0, 0.1, options.epochs) for name, optimizer in optimizers.items()}
    trainer = GanTrainer(
        gan,
        optimizers,
        fall,
        loader,
        options.epochs,
        options.work_dir,
        use_ema=True,
        ema_decay=0.998,
        precision=options.precision,
        hooks=[Samples(every_n=20), CheckpointerHook(period=20), LoggerHook()],
        resume="auto" if options.resume else None,
    )
    trainer.train()
    print(judged(samples_of(trainer.model_evaluate, 1000), digits))
    print(f"Files: {trainer.work_dir} (samples.png)")


if __name__ == "__main__":
    main()
