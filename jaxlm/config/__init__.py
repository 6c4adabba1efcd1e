"""Every configuration, as frozen dataclasses. Nothing here imports JAX or torch."""

from jaxlm.config.data import DataConfig as DataConfig
from jaxlm.config.experiment import ExperimentConfig as ExperimentConfig
from jaxlm.config.experiment import SampleConfig as SampleConfig
from jaxlm.config.mesh import MeshConfig as MeshConfig
from jaxlm.config.model import ModelConfig as ModelConfig
from jaxlm.config.optim import OptimConfig as OptimConfig
from jaxlm.config.sampling import SamplingParams as SamplingParams
from jaxlm.config.train import TrainConfig as TrainConfig
