"""The document's resume script: goes on where document_single.py, run in the same folder, ended or was killed."""

# ruff: noqa: I001  # the imports stand where the document has them
from types import SimpleNamespace

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim import Adam
from torch.optim.lr_scheduler import MultiStepLR
from torch_frame import EvalHook, LoggerHook

# 创建dataset和dataloader
from torch.utils.data import Dataset, DataLoader  # the document has torch.util.dataset, which torch does not know
from torch_frame import Trainer

# The placeholders of the document, filled in.
conf = SimpleNamespace(channels=16, num_classes=10)
lr = 0.002
num_epochs = 8  # two more than in document_single.py: there is something left to train when that run has ended


class Digits(Dataset):
    """scikit-learn's handwritten digits: 1,797 images of 8 x 8; every fifth one is for evaluation."""

    def __init__(self, train):
        images, labels = load_digits(return_X_y=True)
        chosen = [i for i in range(len(labels)) if (i % 5 != 0) == train]
        self.images = torch.tensor(images[chosen] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
        self.labels = torch.tensor(labels[chosen])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


class TinyCNN(nn.Module):
    """Returns its loss in training, and the scores of the classes in evaluation."""

    def __init__(self, conf):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, conf.channels, 3, padding=1),
            nn.BatchNorm2d(conf.channels),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(conf.channels * 4 * 4, conf.num_classes),
        )

    def forward(self, batch):
        images, labels = batch
        scores = self.layers(images)
        return F.cross_entropy(scores, labels) if self.training else scores


def get_model(conf):
    return TinyCNN(conf)


def accuracy(model, batch):
    """One score for each image: 1 where it is recognised, else 0."""
    return {"acc": (model(batch).argmax(dim=1) == batch[1]).float()}


train_dataset = Digits(train=True)
train_dataloader = DataLoader(train_dataset, batch_size=32, shuffle=True)
val_dataloader = DataLoader(Digits(train=False), batch_size=128)

# 创建网络相关对象
model = get_model(conf)
optimizer = Adam(model.parameters(), lr)
lr_scheduler = MultiStepLR(optimizer, milestones=[4, 6], gamma=0.3)

# 创建hooker，承载验证集部分和评估保存模型的任务
hooks = [EvalHook(val_dataloader, accuracy, save_metric="acc"), LoggerHook()]

trainer = Trainer(model, optimizer, lr_scheduler, train_dataloader, num_epochs, "保存路径", hooks=hooks)
trainer.load_checkpoint("latest.pth")
trainer.train(1, 1)
