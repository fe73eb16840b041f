"""torch-frame: a PyTorch training framework.

>>> import torch_frame
>>> torch_frame.Trainer.__name__
'Trainer'
"""

from torch_frame import _collision as _collision  # first: it says so where another package has overwritten this one
from torch_frame import datasets as datasets
from torch_frame import lr_scheduler as lr_scheduler
from torch_frame import vision
from torch_frame._version import __version__
from torch_frame.accelerate_trainer import AccelerateTrainer
from torch_frame.bench.cnn_speed import gpu_cnn_speed
from torch_frame.data.infinite import InfiniteDataLoader
from torch_frame.data.repeat import RepeatDataset
from torch_frame.data.rng import set_random_seed
from torch_frame.ddp_trainer import DDPTrainer
from torch_frame.errors import (
    CheckpointError,
    NonFiniteError,
    SettingError,
    StepOutputError,
    TorchFrameError,
    WorkDirError,
)
from torch_frame.hooks.base import HookBase
from torch_frame.hooks.checkpoint import CheckpointerHook
from torch_frame.hooks.early_stop import EarlyStoppingHook
from torch_frame.hooks.evaluate import EvalHook
from torch_frame.hooks.evaluate_total import EvalTotalHook
from torch_frame.hooks.logger import LoggerHook
from torch_frame.hooks.throughput import ThroughputHook
from torch_frame.tracking.console import logger, setup_logger
from torch_frame.tracking.environment import collect_env
from torch_frame.tracking.history import HistoryBuffer
from torch_frame.tracking.storage import MetricStorage
from torch_frame.trainer import Trainer
from torch_frame.training.ema import EMA
from torch_frame.training.schedules import LRWarmupScheduler
from torch_frame.utils import metric, misc

__all__ = [
    "EMA",
    "AccelerateTrainer",
    "CheckpointError",
    "CheckpointerHook",
    "DDPTrainer",
    "EarlyStoppingHook",
    "EvalHook",
    "EvalTotalHook",
    "HistoryBuffer",
    "HookBase",
    "InfiniteDataLoader",
    "LRWarmupScheduler",
    "LoggerHook",
    "MetricStorage",
    "NonFiniteError",
    "RepeatDataset",
    "SettingError",
    "StepOutputError",
    "ThroughputHook",
    "TorchFrameError",
    "Trainer",
    "WorkDirError",
    "__version__",
    "collect_env",
    "gpu_cnn_speed",
    "logger",
    "metric",
    "misc",
    "set_random_seed",
    "setup_logger",
    "vision",
]
