"""What runs beside the loop: one hook a file."""

from torch_frame.hooks import checkpoint_hook as checkpoint_hook
from torch_frame.hooks import eval_hook as eval_hook
from torch_frame.hooks import hookbase as hookbase
from torch_frame.hooks import logger_hook as logger_hook
from torch_frame.hooks.base import HookBase
from torch_frame.hooks.checkpoint import CheckpointerHook
from torch_frame.hooks.early_stop import EarlyStoppingHook
from torch_frame.hooks.evaluate import EvalHook
from torch_frame.hooks.evaluate_total import EvalTotalHook
from torch_frame.hooks.evaluation import EvaluationHook
from torch_frame.hooks.logger import LoggerHook
from torch_frame.hooks.throughput import ThroughputHook

__all__ = [
    "CheckpointerHook",
    "EarlyStoppingHook",
    "EvalHook",
    "EvalTotalHook",
    "EvaluationHook",
    "HookBase",
    "LoggerHook",
    "ThroughputHook",
]
