"""Writers for experiment trackers: Weights & Biases, trackio and SwanLab through one, MLflow through another.

None of them lets points be taken back. A resumed run therefore continues in the tracker's run that it had only if nothing was
written behind the state that it resumes from, as after a stop by a signal. Otherwise it continues in a new one of the same
group, which begins with the rows before that state, from the run's `metrics.jsonl`: its curves are unbroken, and end where the
state ended. Without such a file (no JsonlWriter) the old one is continued, and a line says that points may be there twice.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import time
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from torch_frame.tracking.writers import RunInfo

_logger = logging.getLogger("torch_frame")
_COUNTERS = ("iter", "epoch", "time")


class _Beginning(NamedTuple):
    """Where a run is to be continued."""

    run_id: str | None
    """The tracker's run; None: a new one."""
    rows: list[tuple[int, dict[str, float]]]
    """(iteration, values) that a new one begins with."""


class ExperimentWriter:
    """Gives a run's values to Weights & Biases, trackio or SwanLab, which is imported when the run begins.

    A run of wandb that the script has begun already is used as it is, and left open.

    Args:
        package: "wandb", "trackio" or "swanlab".
        project: the tracker's project.
        settings: passed to the package's `init`, such as `mode="offline"`.

    Raises:
        ValueError: for another package.
    """

    def __init__(
        self,
        package: Literal["wandb", "trackio", "swanlab"] = "wandb",
        project: str = "torch-frame",
        **settings: Any,
    ) -> None:
        if package not in ("wandb", "trackio", "swanlab"):
            raise ValueError(f"package is {package!r}; it has to be 'wandb', 'trackio' or 'swanlab'.")
        self.package = package
        self.project = project
        self.settings = settings
        self._module: Any = None
        self._run: Any = None
        self._owns = True
        self._run_id: str | None = None
        self._error: BaseException | None = None
        self._left_out: set[str] = set()

    def begin(self, run: RunInfo) -> None:
        """Begin or continue the tracker's run.

        Raises:
            ModuleNotFoundError: the package is not installed.
        """
        self._module = _imported(self.package, self.package)
        current = getattr(self._module, "run", None)
        if current is not None and not isinstance(current, types.ModuleType):
            self._run, self._owns = current, False
            return
        beginning = _beginning(run, self._run_id, self.package)
        suffix = "" if run.resumed_iter is None or beginning.run_id else f"-from-{run.resumed_iter}"
        settings = {"project": self.project, "name": run.name + suffix, "group": run.run_id, **self.settings}
        if self.package == "trackio":
            settings = {"embed": False, "resume": "allow" if beginning.run_id else "never", **settings}
            settings["name"] = beginning.run_id or settings["name"]
        else:
            folder = {"wandb": ("dir", run.work_dir), "swanlab": ("log_dir", os.path.join(run.work_dir, "swanlog"))}
            key, path = folder[self.package]
            settings = {key: path, **settings}
            if beginning.run_id is not None:
                settings |= {"id": beginning.run_id, "resume": "allow"}
        self._run = self._module.init(**settings)
        self._run_id = str(self._run.name if self.package == "trackio" else self._run.id)
        for step, values in beginning.rows:
            self.write(step, values)

    def parameters(self, values: Mapping[str, Any]) -> None:
        """The run's settings, as its config."""
        self._run.config.update(dict(values))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, image: npt.NDArray[np.uint8]) -> None:
        picture = image[:, :, 0] if image.shape[2] == 1 and self.package != "trackio" else np.repeat(image, 3, 2)
        self._run.log({name: self._module.Image(picture if image.shape[2] == 1 else image)}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        kinds = {"wandb": "Html", "trackio": "Markdown", "swanlab": "Text"}
        shown = f"<pre>{_escaped(text)}</pre>" if self.package == "wandb" else text
        self._run.log({name: getattr(self._module, kinds[self.package])(shown)}, step=step)

    def histogram(self, step: int, name: str, values: npt.NDArray[np.float64]) -> None:
        if self.package == "swanlab":
            if name not in self._left_out:
                self._left_out.add(name)
                _logger.warning("swanlab has no histograms: %r is not written there.", name)
            return
        counts, edges = np.histogram(values, bins=64)
        self._run.log({name: self._module.Histogram(np_histogram=(counts, edges))}, step=step)

    def cut(self, step: int) -> None:
        """Done by `begin`."""

    def failed(self, error: BaseException) -> None:
        """The run ends by an error, and so does the tracker's."""
        self._error = error

    def close(self) -> None:
        run, self._run = self._run, None
        if run is None or not self._owns:
            return
        if self.package == "wandb":
            run.finish(exit_code=0 if self._error is None else 1)
        elif self.package == "swanlab" and self._error is not None:
            self._module.finish(state="crashed", error=f"{type(self._error).__name__}: {self._error}")
        else:
            run.finish()

    def state_dict(self) -> Any:
        """Which of the tracker's runs it is."""
        return {"run_id": self._run_id}

    def load_state_dict(self, state: Any) -> None:
        self._run_id = state["run_id"]


class MlflowWriter:
    """Gives a run's values to MLflow, which is imported when the run begins.

    Histograms are files `histograms/<name>_<step>.json` (counts, edges), texts `texts/<name>_<step>.md` of the MLflow run.

    Args:
        experiment: MLflow's experiment, made if there is none.
        tracking_uri: of the server or store; None: MLflow's own setting.
    """

    def __init__(self, experiment: str = "torch-frame", tracking_uri: str | None = None) -> None:
        self.experiment = experiment
        self.tracking_uri = tracking_uri
        self._client: Any = None
        self._entities: Any = None
        self._run_id: str | None = None
        self._status = "FINISHED"

    def begin(self, run: RunInfo) -> None:
        """Begin or continue MLflow's run.

        Raises:
            ModuleNotFoundError: mlflow is not installed.
        """
        mlflow = _imported("mlflow", "mlflow-skinny")
        self._entities = importlib.import_module("mlflow.entities")
        self._client = mlflow.MlflowClient(tracking_uri=self.tracking_uri)
        beginning = _beginning(run, self._run_id, "mlflow")
        if beginning.run_id is not None:
            self._run_id = beginning.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(self.experiment)
        experiment = self._client.create_experiment(self.experiment) if found is None else found.experiment_id
        tags = {"torch_frame.run_id": run.run_id, "torch_frame.resumed_iter": str(run.resumed_iter)}
        self._run_id = self._client.create_run(experiment, tags=tags, run_name=run.name).info.run_id
        for step, values in beginning.rows:
            self.write(step, values)

    def parameters(self, values: Mapping[str, Any]) -> None:
        """The run's settings, as MLflow's parameters."""
        parameters = [self._entities.Param(_key(name), str(value)[:6000]) for name, value in values.items()]
        for start in range(0, len(parameters), 100):  # MLflow's limit for one call
            self._client.log_batch(self._run_id, params=parameters[start : start + 100])

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now_ms = int(time.time() * 1000)
        metrics = [self._entities.Metric(_key(name), float(value), now_ms, step) for name, value in values.items()]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + 1000])

    def image(self, step: int, name: str, image: npt.NDArray[np.uint8]) -> None:
        picture = image[:, :, 0] if image.shape[2] == 1 else image
        self._client.log_image(self._run_id, picture, key=_key(name), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self._run_id, text, f"texts/{_key(name)}_{step}.md")

    def histogram(self, step: int, name: str, values: npt.NDArray[np.float64]) -> None:
        counts, edges = np.histogram(values, bins=64)
        content = {"counts": counts.tolist(), "edges": edges.tolist()}
        self._client.log_dict(self._run_id, content, f"histograms/{_key(name)}_{step}.json")

    def cut(self, step: int) -> None:
        """Done by `begin`."""

    def failed(self, error: BaseException) -> None:
        """The run ends by an error, and so does MLflow's."""
        self._status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None and self._run_id is not None:
            client.set_terminated(self._run_id, self._status)

    def state_dict(self) -> Any:
        """Which of MLflow's runs it is."""
        return {"run_id": self._run_id}

    def load_state_dict(self, state: Any) -> None:
        self._run_id = state["run_id"]


def _imported(package: str, distribution: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ModuleNotFoundError(
            f"The writer for {package} needs it, and it is not installed. Run: pip install {distribution}", name=package
        ) from error


def _beginning(run: RunInfo, run_id: str | None, tracker: str) -> _Beginning:
    """Where a run continues: in the tracker's run that it had, or in a new one that begins with its rows."""
    if run.resumed_iter is None:
        return _Beginning(None, [])
    path = os.path.join(run.work_dir, "metrics.jsonl")
    if not os.path.exists(path):
        if run_id is not None:
            _logger.warning(
                "%s cannot take back what was written for iteration %d and later: points may be there twice. With a JsonlWriter "
                "beside it, a resumed run begins with the rows of metrics.jsonl.",
                tracker,
                run.resumed_iter,
            )
        return _Beginning(run_id, [])
    rows = list(_rows(path))
    if run_id is not None and all(step < run.resumed_iter for step, _ in rows):
        return _Beginning(run_id, [])
    return _Beginning(None, [(step, values) for step, values in rows if step < run.resumed_iter])


def _rows(path: str) -> Iterator[tuple[int, dict[str, float]]]:
    with open(path, "rb") as file:
        for line in file:
            try:
                row = json.loads(line)
                step = int(row["iter"])
            except (ValueError, KeyError, TypeError):  # a half-written last line
                continue
            yield step, {name: value for name, value in row.items() if name not in _COUNTERS and value is not None}


def _key(name: str) -> str:
    """A name with the characters that MLflow takes.

    >>> _key("loss/[cls] 1")
    'loss/_cls_ 1'
    """
    return re.sub(r"[^\w\-. /]", "_", name)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
