"""Import path of torch-frame 1.7; see `torch_frame.vision`."""

from torch_frame.vision.colors import RandomBrightness, RandomContrast, RandomGammaCorrection, RandomHueSaturation

__all__ = ["RandomBrightness", "RandomContrast", "RandomGammaCorrection", "RandomHueSaturation"]
