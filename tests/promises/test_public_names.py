"""What `import torch_frame` gives, what it costs, and the import paths of 1.7."""

import importlib
import shutil
from pathlib import Path

import pytest

import torch_frame
from tests.small_runs import environment, run_python

PACKAGE = Path(torch_frame.__file__).parent


def test_every_exported_name_exists():
    for name in torch_frame.__all__:
        assert hasattr(torch_frame, name)


@pytest.mark.parametrize(
    ("path", "names"),
    [
        (
            "torch_frame",
            "Trainer HookBase CheckpointerHook EvalHook LoggerHook LRWarmupScheduler MetricStorage HistoryBuffer logger "
            "misc metric gpu_cnn_speed",
        ),
        ("torch_frame.trainer", "Trainer MetricStorage logger"),
        ("torch_frame.hooks", "HookBase CheckpointerHook EvalHook LoggerHook"),
        ("torch_frame.lr_scheduler", "LRWarmupScheduler"),
        (
            "torch_frame.utils",
            "EMA HistoryBuffer ProgressBar collect_env get_workspace gpu_cnn_speed set_random_seed setup_logger symlink",
        ),
        ("torch_frame.utils.dist_utils", "get_rank get_world_size is_dist_avail_and_initialized"),
        ("torch_frame.utils.misc", "collect_env create_small_table get_workspace set_random_seed symlink"),
        ("torch_frame.utils.metric", "BaseMetric ModelMetric ObjDetMAPMetric det_postprocess eval_map"),
        ("torch_frame.utils.ema", "EMA"),
        ("torch_frame.utils.history_buffer", "HistoryBuffer"),
        ("torch_frame.utils.logger", "setup_logger"),
        ("torch_frame.utils.progress_bar", "ProgressBar"),
        ("torch_frame.utils.test_speed", "BENCHMARK gpu_cnn_speed"),
        ("torch_frame", "vision"),
        (
            "torch_frame.vision",
            "filter_box det_postprocess bboxes_iou xyxy2cxcywh box_candidates eval_map random_perspective mixup_boxes mosaic "
            "RandomBrightness RandomGammaCorrection RandomHueSaturation RandomContrast tools augmentations",
        ),
        ("torch_frame.vision.tools", "filter_box det_postprocess bboxes_iou xyxy2cxcywh box_candidates eval_map"),
        (
            "torch_frame.vision.tools.object_detection",
            "filter_box det_postprocess bboxes_iou xyxy2cxcywh box_candidates eval_map bboxes_iou_torch bboxes_iou_numpy "
            "cal_match calc_ap clac_voc_ap",
        ),
        (
            "torch_frame.vision.augmentations",
            "RandomBrightness RandomGammaCorrection RandomHueSaturation RandomContrast random_perspective mixup_boxes mosaic",
        ),
        (
            "torch_frame.vision.augmentations.colors",
            "RandomBrightness RandomGammaCorrection RandomHueSaturation RandomContrast",
        ),
        ("torch_frame.vision.augmentations.boxes", "random_perspective mixup_boxes mosaic"),
        ("torch_frame.vision.augmentations.base", "mixup"),
        ("torch_frame.hooks.hookbase", "HookBase"),
        ("torch_frame.hooks.checkpoint_hook", "CheckpointerHook"),
        ("torch_frame.hooks.eval_hook", "EvalHook EvalTotalHook"),
        ("torch_frame.hooks.logger_hook", "LoggerHook"),
        ("torch_frame.datasets", "InfiniteDataLoader RepeatDataset"),
        ("torch_frame.datasets.dataloader_wrappers", "InfiniteDataLoader"),
        ("torch_frame.datasets.dataset_wrappers", "RepeatDataset"),
    ],
)
def test_import_paths_of_1_7_work(path, names):
    module = importlib.import_module(path)
    for name in names.split():
        assert hasattr(module, name), f"{path}.{name}"


def test_modules_of_1_7_are_attributes(tmp_path):
    names = (
        "hooks trainer utils utils.dist_utils utils.metric utils.misc utils.ema utils.logger utils.progress_bar "
        "utils.history_buffer metric misc lr_scheduler datasets utils.logger.setup_logger utils.misc.logger utils.test_speed "
        "hooks.hookbase.HookBase hooks.checkpoint_hook hooks.eval_hook.EvalTotalHook hooks.logger_hook "
        "datasets.dataloader_wrappers datasets.dataset_wrappers ddp_trainer accelerate_trainer vision.tools.object_detection "
        "vision.augmentations.boxes vision.augmentations.colors vision.augmentations.base.mixup"
    )
    code = "import torch_frame\n" + "".join(f"torch_frame.{name}\n" for name in names.split())
    result = run_python(code, tmp_path)
    assert result.returncode == 0, result.stderr


def test_import_is_light_and_changes_no_global_state(tmp_path):
    heavy = [
        "cv2",
        "accelerate",
        "tensorboard",
        "torchvision",
        "matplotlib",
        "sklearn",
        "transformers",
        "ray",
        "pandas",
        "hotcoco",
        "torchmetrics",
        "pynvml",
        "wandb",
        "mlflow",
        "trackio",
        "swanlab",
    ]
    result = run_python(
        "import logging, random, signal, sys\n"
        "import numpy, torch\n"
        "def globals_now():\n"
        "    return (torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist(),\n"
        "            torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(),\n"
        "            torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic,\n"
        "            signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM),\n"
        "            list(logging.getLogger().handlers), logging.getLogger().level)\n"
        "before, loaded = globals_now(), set(sys.modules)\n"
        "import torch_frame\n"
        "assert globals_now() == before\n"
        "assert not torch.cuda.is_initialized()\n"
        f"print([name for name in {heavy} if name in set(sys.modules) - loaded])\n",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_an_install_overwritten_by_pytorch_frame_is_noticed_at_import(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "torch_frame", ignore=shutil.ignore_patterns("__pycache__"))
    copy = environment(PYTHONPATH=str(tmp_path))
    assert run_python("import torch_frame", tmp_path, env=copy).returncode == 0
    (tmp_path / "torch_frame" / "_stype.py").write_text("class stype: ...\n")  # one of the other package's own files
    result = run_python("import torch_frame", tmp_path, env=copy)
    assert result.returncode == 1
    assert "Two packages share the import name torch_frame" in result.stderr
    assert "pip uninstall" in result.stderr
