"""The document's multi-card script: nothing is changed but its placeholders and typos, each named where it stands.

python examples/ddp_spawn.py              # a process for each GPU; without a GPU two on the CPU, by gloo
python examples/ddp_spawn.py --single     # use_dist=False: one process
"""

# ruff: noqa: I001  # the imports stand where the document has them
import argparse
import socket

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim import Adam
from torch.optim.lr_scheduler import MultiStepLR
from torch_frame import EvalHook, LoggerHook

from torch.utils.data import Dataset, DataLoader  # the document has torch.util.dataset, which torch does not know
from torch_frame import DDPTrainer
import torch.multiprocessing as mp
import torch.distributed as dist

# The placeholders of the document, filled in.
conf = argparse.Namespace(channels=16, num_classes=10)
lr = 0.002
num_epochs = 6


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


def main(cur_gpu, args):
    if args.use_dist:
        rank = args.nprocs * args.machine_rank + cur_gpu
        # The document has backend="nccl", which needs GPUs.
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend=backend, init_method=args.url, world_size=args.world_size, rank=rank)
        args.train_batch_size = args.batch_size // args.world_size  # 这里需要把一个batch平分到每个gpu的数量
    else:
        args.train_batch_size = args.batch_size

    # 创建网络相关对象
    model = get_model(conf)

    if args.use_dist and torch.cuda.is_available():
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # the document has torcg,nn.SyncBatchNorn
        torch.cuda.set_device(cur_gpu)
        model.cuda(cur_gpu)
        # The document has find_unused_parameter.
        model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[cur_gpu], find_unused_parameters=True)
    elif args.use_dist:  # without a GPU: no SyncBatchNorm, which needs one, and no device_ids
        model = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(device)
    optimizer = Adam(model.parameters(), lr)
    lr_scheduler = MultiStepLR(optimizer, milestones=[4, 6], gamma=0.3)

    train_dataset = Digits(train=True)
    train_params = dict(batch_size=args.train_batch_size)  # noqa: C408  # the document has batch_size=32 for each GPU

    if cur_gpu == 0:
        val_dataloader = DataLoader(Digits(train=False), batch_size=128)
        hooks = [EvalHook(val_dataloader, accuracy, save_metric="acc"), LoggerHook()]
    else:
        hooks = []

    # The document has DDPtrainer.
    trainer = DDPTrainer(
        model, optimizer, lr_scheduler, train_dataset, train_params, num_epochs, hooks=hooks, use_dist=args.use_dist
    )
    trainer.train()
    if args.use_dist:
        dist.destroy_process_group()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":  # the document has "__name__"
    parser = argparse.ArgumentParser()
    parser.add_argument("--single", action="store_true", help="one process")
    parser.add_argument("--nprocs", type=int, default=torch.cuda.device_count() or 2, help="processes on this machine")
    args = parser.parse_args(namespace=argparse.Namespace(machine_rank=0, batch_size=32))
    args.use_dist = not args.single
    args.world_size = args.nprocs  # times the number of machines
    args.url = f"tcp://127.0.0.1:{free_port()}"
    if args.use_dist:
        mp.spawn(main, nprocs=args.nprocs, args=(args,))
    else:
        main(0, args)
