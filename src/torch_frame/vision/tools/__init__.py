"""Import path of torch-frame 1.7; see `torch_frame.vision`."""

from torch_frame.vision.tools.object_detection import (
    bboxes_iou,
    box_candidates,
    det_postprocess,
    eval_map,
    filter_box,
    xyxy2cxcywh,
)

__all__ = ["bboxes_iou", "box_candidates", "det_postprocess", "eval_map", "filter_box", "xyxy2cxcywh"]
