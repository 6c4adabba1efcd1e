"""Every configuration, as frozen dataclasses. Nothing here imports JAX or torch."""

from jaxlm.config.experiment import DataConfig as DataConfig
from jaxlm.config.experiment import ExperimentConfig as ExperimentConfig
from jaxlm.config.experiment import MeshConfig as MeshConfig
from jaxlm.config.experiment import OptimConfig as OptimConfig
from jaxlm.config.experiment import SampleConfig as SampleConfig
from jaxlm.config.experiment import TrainConfig as TrainConfig
from jaxlm.config.model import ModelConfig as ModelConfig
from jaxlm.config.sampling import SamplingParams as SamplingParams
