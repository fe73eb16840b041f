"""Metrics: the protocol, COCO's and VOC's average precision. Classification and the like come from torchmetrics."""

from torch_frame.metrics.detection import MeanAveragePrecision, PrecisionRecall
from torch_frame.metrics.metric import BaseMetric, Metric, ModelMetric, is_torchmetrics, results_of
from torch_frame.metrics.object_detection import ObjDetMAPMetric
from torch_frame.metrics.voc import VocAP, voc_average_precision

__all__ = [
    "BaseMetric",
    "MeanAveragePrecision",
    "Metric",
    "ModelMetric",
    "ObjDetMAPMetric",
    "PrecisionRecall",
    "VocAP",
    "is_torchmetrics",
    "results_of",
    "voc_average_precision",
]
