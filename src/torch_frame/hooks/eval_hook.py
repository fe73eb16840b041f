"""Import path of torch-frame 1.7; see `torch_frame.hooks.evaluate` and `torch_frame.hooks.evaluate_total`."""

from torch_frame.hooks.evaluate import EvalHook
from torch_frame.hooks.evaluate_total import EvalTotalHook

__all__ = ["EvalHook", "EvalTotalHook"]
