"""Import path of torch-frame 1.7; see `torch_frame.bench.cnn_speed`. No test: the name is 1.7's."""

from torch_frame.bench.cards import SECONDS_OF_300_PASSES as BENCHMARK
from torch_frame.bench.cnn_speed import gpu_cnn_speed

__all__ = ["BENCHMARK", "gpu_cnn_speed"]
