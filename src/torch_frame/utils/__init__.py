"""Import paths of torch-frame 1.7; each name lives elsewhere now."""

from torch_frame.bench.cnn_speed import gpu_cnn_speed
from torch_frame.data.rng import set_random_seed
from torch_frame.run.work_dir import get_workspace
from torch_frame.tracking.bar import ProgressBar
from torch_frame.tracking.console import setup_logger
from torch_frame.tracking.environment import collect_env, create_small_table, symlink
from torch_frame.tracking.history import HistoryBuffer
from torch_frame.training.ema import EMA
from torch_frame.utils import dist_utils as dist_utils
from torch_frame.utils import ema as ema
from torch_frame.utils import history_buffer as history_buffer
from torch_frame.utils import logger as logger
from torch_frame.utils import metric as metric
from torch_frame.utils import misc as misc
from torch_frame.utils import progress_bar as progress_bar
from torch_frame.utils import test_speed as test_speed

__all__ = [
    "EMA",
    "HistoryBuffer",
    "ProgressBar",
    "collect_env",
    "create_small_table",
    "get_workspace",
    "gpu_cnn_speed",
    "set_random_seed",
    "setup_logger",
    "symlink",
]
