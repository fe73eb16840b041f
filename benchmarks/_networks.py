"""The two networks of make gpu, their optimizers and their batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_frame.bench.models import build

Made = Callable[[torch.device], tuple[nn.Module, torch.optim.Optimizer]]


class Transformer(nn.Module):
    """A decoder of `depth` blocks over `length` tokens; returns its loss.

    Args:
        width: of the tokens' vectors; heads are 64 wide.
    """

    def __init__(self, vocabulary: int, width: int, depth: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, following = batch  # (B, T) each
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), following.flatten())


class Block(nn.Module):
    """Causal attention and a two-layer network, each behind a layer norm and added to what comes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = width // 64
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, width)
        q, k, v = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, 2)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.mlp(self.norm_2(x))


class Classifier(nn.Module):
    """ResNet-50 that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build("resnet50")

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch  # (B, 3, H, W), (B,)
        return F.cross_entropy(self.net(images), labels)


def resnet(device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Classifier().to(device).to(memory_format=torch.channels_last)
    return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def transformer(device: torch.device, width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Transformer(8192, width, depth=6, length=512).to(device)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4)


def images(batch_size: int, size: int) -> tuple[Tensor, Tensor]:
    batch = torch.randn(batch_size, 3, size, size).to(memory_format=torch.channels_last)
    return batch, torch.randint(0, 1000, (batch_size,))


def moved(batch: Iterable[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    return tuple(part.to(device) for part in batch)
