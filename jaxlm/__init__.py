"""A small-language-model laboratory in JAX, Flax Linen and Optax.

Names are imported when they are first used: `import jaxlm` starts no device work.
"""

from etils import epy as _epy

with _epy.lazy_api_imports(globals()):
    from jaxlm import attention as attention
    from jaxlm import config as config
    from jaxlm import convert as convert
    from jaxlm import optim as optim
    from jaxlm import parity as parity
    from jaxlm.config import DataConfig as DataConfig
    from jaxlm.config import ExperimentConfig as ExperimentConfig
    from jaxlm.config import MeshConfig as MeshConfig
    from jaxlm.config import ModelConfig as ModelConfig
    from jaxlm.config import OptimConfig as OptimConfig
    from jaxlm.config import SampleConfig as SampleConfig
    from jaxlm.config import TrainConfig as TrainConfig
    from jaxlm.config.presets import preset as preset
    from jaxlm.decode.beam_search import beam_search as beam_search
    from jaxlm.decode.generate import generate as generate
    from jaxlm.decode.generate import predict as predict
    from jaxlm.decode.score import score as score
    from jaxlm.decode.stream import stream as stream
    from jaxlm.decode.uncached import generate_naive as generate_naive
    from jaxlm.model.build import build_model as build_model
    from jaxlm.model.build import init_params as init_params
    from jaxlm.model.layer_stack import stack_params as stack_params
    from jaxlm.model.layer_stack import unstack_params as unstack_params
    from jaxlm.run.attention_maps import attention_maps as attention_maps
    from jaxlm.run.folder import load_run as load_run
    from jaxlm.run.training import train as train
    from jaxlm.sharding.layout import put_params as put_params
    from jaxlm.sharding.mesh import make_mesh as make_mesh
    from jaxlm.sharding.mesh import use_mesh as use_mesh

__all__ = [
    "DataConfig",
    "ExperimentConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "SampleConfig",
    "TrainConfig",
    "attention",
    "attention_maps",
    "beam_search",
    "build_model",
    "config",
    "convert",
    "generate",
    "generate_naive",
    "init_params",
    "load_run",
    "make_mesh",
    "optim",
    "parity",
    "predict",
    "preset",
    "put_params",
    "score",
    "stack_params",
    "stream",
    "train",
    "unstack_params",
    "use_mesh",
]


def __dir__() -> list[str]:
    return __all__
