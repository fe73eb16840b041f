"""Import path of torch-frame 1.7; see `torch_frame.metrics`."""

from torch_frame.metrics.metric import BaseMetric, ModelMetric
from torch_frame.metrics.object_detection import ObjDetMAPMetric
from torch_frame.vision import det_postprocess, eval_map

__all__ = ["BaseMetric", "ModelMetric", "ObjDetMAPMetric", "det_postprocess", "eval_map"]
