"""Import path of torch-frame 1.7; see `torch_frame.tracking.environment` and `torch_frame.data.rng`."""

from torch_frame.data.rng import set_random_seed
from torch_frame.run.work_dir import get_workspace
from torch_frame.tracking.console import logger as logger
from torch_frame.tracking.environment import collect_env, create_small_table, symlink

__all__ = ["collect_env", "create_small_table", "get_workspace", "set_random_seed", "symlink"]
