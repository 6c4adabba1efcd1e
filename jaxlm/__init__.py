"""A small-language-model laboratory in JAX, Flax Linen and Optax.

Names are imported when they are first used: `import jaxlm` starts no device work.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxlm import convert as convert
    from jaxlm import optim as optim
    from jaxlm import parity as parity
    from jaxlm.beam import beam_search as beam_search
    from jaxlm.config import DataConfig as DataConfig
    from jaxlm.config import ExperimentConfig as ExperimentConfig
    from jaxlm.config import ModelConfig as ModelConfig
    from jaxlm.config import OptimConfig as OptimConfig
    from jaxlm.config import SampleConfig as SampleConfig
    from jaxlm.config import TrainConfig as TrainConfig
    from jaxlm.decode import generate as generate
    from jaxlm.decode import predict as predict
    from jaxlm.decode import score as score
    from jaxlm.maps import attention_maps as attention_maps
    from jaxlm.model import build_model as build_model
    from jaxlm.model import init_params as init_params
    from jaxlm.naive import generate_naive as generate_naive
    from jaxlm.presets import preset as preset
    from jaxlm.run import load_run as load_run
    from jaxlm.stack import stack_params as stack_params
    from jaxlm.stack import unstack_params as unstack_params
    from jaxlm.streaming import stream as stream

_HOME = {
    "DataConfig": "config",
    "ExperimentConfig": "config",
    "ModelConfig": "config",
    "OptimConfig": "config",
    "SampleConfig": "config",
    "TrainConfig": "config",
    "attention_maps": "maps",
    "beam_search": "beam",
    "build_model": "model",
    "generate": "decode",
    "generate_naive": "naive",
    "init_params": "model",
    "load_run": "run",
    "predict": "decode",
    "preset": "presets",
    "score": "decode",
    "stack_params": "stack",
    "stream": "streaming",
    "unstack_params": "stack",
}
_PACKAGES = ("convert", "optim", "parity")
__all__ = [*_HOME, *_PACKAGES]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"jaxlm.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"jaxlm.{_HOME[name]}"), name)
    raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")
