"""The configuration of trackers: which of them get a run's scalars, and under which names."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from megatron_cord.errors import CordError

Mode = Literal["off", "offline", "online"]


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases; the key comes from WANDB_API_KEY or `wandb login`."""

    mode: Mode = "off"  #: offline writes output_dir/wandb, for `wandb sync`
    project: str = "megatron_cord"  #: the project there
    entity: str | None = None  #: user or team; null is the key's own
    name: str | None = None  #: of the run; null takes the name of output_dir


@dataclass(frozen=True)
class MlflowConfig:
    """MLflow; a server's user, password or token come from MLFLOW_TRACKING_USERNAME, …_PASSWORD or …_TOKEN."""

    mode: Mode = "off"  #: offline writes output_dir/mlflow, for `mlflow ui`
    tracking_uri: str | None = None  #: of online: a server's address; null takes MLFLOW_TRACKING_URI
    experiment: str = "megatron_cord"  #: the experiment there
    name: str | None = None  #: of the run; null takes the name of output_dir

    def __post_init__(self) -> None:
        if self.tracking_uri is not None and re.match(r"[^/]*//[^/]*@", self.tracking_uri):
            raise CordError(
                "tracking_uri must hold no user or password, as every copy of the configuration would; set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )


@dataclass(frozen=True)
class TrackioConfig:
    """trackio; a Space's token comes from HF_TOKEN or `hf auth login`."""

    mode: Mode = "off"  #: offline writes output_dir/trackio, or TRACKIO_DIR if that is set
    project: str = "megatron_cord"  #: the project there
    space: str | None = None  #: of online: the Hugging Face Space, OWNER/NAME, which is made private if it is new
    name: str | None = None  #: of the run; null takes the name of output_dir


@dataclass(frozen=True)
class SwanlabConfig:
    """SwanLab; the key comes from SWANLAB_API_KEY or `swanlab login`."""

    mode: Mode = "off"  #: offline writes output_dir/swanlab, for `swanlab sync`
    project: str = "megatron_cord"  #: the project there
    workspace: str | None = None  #: user or organization; null is the key's own
    name: str | None = None  #: of the run; null takes the name of output_dir


@dataclass(frozen=True)
class MetricsConfig:
    """Where metrics go beside metrics.jsonl and the terminal."""

    tensorboard: bool = True  #: event files in output_dir/tensorboard
    #: dense bfloat16 peak of one device, in 1e12 floating-point operations a second, for model_flop_utilisation; null
    #: takes the published peak of a GPU that `cord plan` has
    device_peak_tflops: float | None = None
    wandb: WandbConfig = field(default_factory=WandbConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    trackio: TrackioConfig = field(default_factory=TrackioConfig)
    swanlab: SwanlabConfig = field(default_factory=SwanlabConfig)

    def __post_init__(self) -> None:
        if self.device_peak_tflops is not None and self.device_peak_tflops <= 0:
            raise CordError(f"metrics.device_peak_tflops must be above 0, got {self.device_peak_tflops:g}")
