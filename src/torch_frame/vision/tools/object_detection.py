"""Import path of torch-frame 1.7; see `torch_frame.vision`."""

from torch_frame.vision.average_precision import cal_match, calc_ap, clac_voc_ap, eval_map
from torch_frame.vision.boxes import bboxes_iou, box_candidates, filter_box, xyxy2cxcywh
from torch_frame.vision.postprocess import det_postprocess

bboxes_iou_numpy = bboxes_iou_torch = bboxes_iou

__all__ = ["bboxes_iou", "box_candidates", "det_postprocess", "eval_map", "filter_box", "xyxy2cxcywh"]
__all__ += ["bboxes_iou_numpy", "bboxes_iou_torch", "cal_match", "calc_ap", "clac_voc_ap"]
