"""A model of another library beside jaxlm's import of it: transformers' own module, or the user's copy of nanoGPT."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jaxlm.config import ModelConfig
from jaxlm.convert import from_hf, from_nanogpt
from jaxlm.convert.families import by_model_type
from jaxlm.convert.families.gpt2 import NANOGPT
from jaxlm.convert.files import open_tensors, read_json
from jaxlm.convert.foreign import wrapper
from jaxlm.convert.tensors import load_torch, to_array, to_tensor
from jaxlm.errors import UserError
from jaxlm.parity.capture import hooked
from jaxlm.parity.float64 import float64_throughout
from jaxlm.parity.networks import Pass, Values
from jaxlm.types import Params

if TYPE_CHECKING:
    import torch

ReferenceName = Literal["hf", "nanogpt"]
REFERENCES: dict[ReferenceName, str] = {"hf": "transformers", "nanogpt": "nanoGPT's model.py"}


@dataclasses.dataclass(frozen=True)
class Source:
    """A foreign model, and what jaxlm made of it."""

    reference: ReferenceName
    cfg: ModelConfig
    params: Params
    modules: Mapping[str, str]
    """The foreign module of each layer of jaxlm's that has one."""
    entries: Sequence[Any]
    """Which of jaxlm's leaves each foreign tensor holds, and how."""
    build: Callable[[str], "torch.nn.Module"]
    """The foreign module with its own weights, in a type."""

    def network(self, cfg: ModelConfig, params: Params) -> "SourceNetwork":
        """The source in the type of a config; its weights come from its own files."""
        kind = TransformersNetwork if self.reference == "hf" else NanoGPTNetwork
        return kind(self, cfg, {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()})


def open_source(path: str | os.PathLike[str], reference: str = "hf") -> Source:
    """Reads a foreign model with jaxlm's importer, and prepares its own library's module.

    Args:
      path: for "hf" a folder that save_pretrained wrote; for "nanogpt" a folder with ckpt.pt and the model.py of the
        nanoGPT that trained it, which is imported, so its code runs.

    Raises:
      UserError: the reference is unknown, transformers is missing, a file is missing or cannot be imported.
    """
    if reference not in get_args(ReferenceName):
        raise UserError(f"reference = {reference!r} is unknown: choose among {', '.join(get_args(ReferenceName))}")
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the one that holds the model")
    return _open_hf(folder) if reference == "hf" else _open_nanogpt(folder)


class SourceNetwork:
    """The foreign module, its layers, parameters and gradients under jaxlm's names and in jaxlm's layouts."""

    begins_anywhere = True

    def __init__(self, source: Source, cfg: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
        import torch

        self.cfg, self._source, self._shapes = cfg, source, shapes
        self.model = source.build(cfg.dtype).eval()
        for module in self.model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.padding_idx = None  # it would leave a gradient out
        self._heads_first: dict[str, bool] = {}
        self._layers = {self._own_name(theirs): ours for ours, theirs in source.modules.items() if theirs}

    def forward(self, windows: np.ndarray, weights: np.ndarray, with_grads: bool = True) -> Pass:
        """The same as `JaxNetwork.forward`; the loss without weights is the one that the source computes itself."""
        import torch

        import torchref

        tokens = to_tensor(windows).long()
        with _exactly(self.cfg.dtype), torch.set_grad_enabled(with_grads):
            with hooked(self.model, self._layers) as values:
                logits, plain = self._losses(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
            loss = torchref.cross_entropy(logits, tokens[:, 1:], to_tensor(weights))
            if with_grads:
                loss.backward()
        grads = self._gradients() if with_grads else {}
        self.model.zero_grad(set_to_none=True)
        return Pass(
            self._tokens_first(values, windows.shape[1] - 1), to_array(logits), to_array(loss), to_array(plain), grads
        )

    def decode(self, chunks: Sequence[np.ndarray], capacity: int) -> Iterator[tuple[Values, np.ndarray]]:
        """The same as `JaxNetwork.decode`, but no key is forgotten: `capacity` must hold all tokens."""
        import torch

        state = None
        for chunk in chunks:
            with _exactly(self.cfg.dtype), torch.no_grad(), hooked(self.model, self._layers) as values:
                logits, state = self._continued(to_tensor(chunk).long(), state)
            read = slice(-chunk.shape[1], None)  # a source without a cache reads everything again
            placed = self._tokens_first(values, chunk.shape[1])
            yield {event: value[:, read] for event, value in placed.items()}, to_array(logits)

    def greedy(self, prompt: np.ndarray, new: int, capacity: int) -> np.ndarray:
        """The same as `JaxNetwork.greedy`."""
        import torch

        unread, state, found = to_tensor(prompt).long(), None, []
        with _exactly(self.cfg.dtype), torch.no_grad():
            for _ in range(new):
                logits, state = self._continued(unread, state)
                unread = logits[:, -1].argmax(dim=-1, keepdim=True)
                found.append(unread)
        return to_array(torch.cat(found, dim=1))

    def logits(self, tokens: np.ndarray, first: int = 0) -> np.ndarray:
        """The same as `JaxNetwork.logits`."""
        import torch

        with _exactly(self.cfg.dtype), torch.no_grad():
            return to_array(self._placed(to_tensor(tokens).long(), first))

    def _tokens_first(self, values: Values, length: int) -> Values:
        """The values as [B, T, ...]: some norms of queries and keys read [B, heads, T, width]."""
        placed = {}
        for event, value in values.items():
            if value.ndim == 4 and value.shape[1] != value.shape[2]:
                self._heads_first[event.layer] = value.shape[2] == length
            placed[event] = value.swapaxes(1, 2) if self._heads_first.get(event.layer) else value
        return placed

    def _own_name(self, name: str) -> str:
        """The name that a module, or a parameter, of the file has in the module."""
        return name

    def _gradients(self) -> dict[str, np.ndarray]:
        import torch

        grads: dict[str, np.ndarray] = {}
        for entry in self._source.entries:
            parameter = self.model.get_parameter(self._own_name(entry.name))
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            leaves = entry.layout.split(to_array(grad), [self._shapes[path] for path in entry.paths])
            grads |= dict(zip(entry.paths, leaves, strict=True))
        return grads

    def _losses(self, tokens: "torch.Tensor", targets: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
        """Logits [B, T, V] and the mean loss of all targets."""
        raise NotImplementedError

    def _continued(self, tokens: "torch.Tensor", state: Any) -> tuple["torch.Tensor", Any]:
        """Logits of tokens [B, T] after those that the state holds (None = none), and the state with them."""
        raise NotImplementedError

    def _placed(self, tokens: "torch.Tensor", first: int) -> "torch.Tensor":
        """Logits of tokens whose positions begin at `first`."""
        raise NotImplementedError


class TransformersNetwork(SourceNetwork):
    """A module of transformers."""

    model: Any

    def _own_name(self, name):
        head = self._source.modules["head"]  # files of GPT-NeoX call it embed_out
        return f"lm_head{name[len(head) :]}" if name.startswith(head) else name

    def _losses(self, tokens, targets):
        logits = self.model(input_ids=tokens, use_cache=False).logits
        options = {"vocab_size": self.model.config.vocab_size, "shift_labels": targets}
        with _quiet():
            return logits, self.model.loss_function(logits=logits, labels=targets, **options)

    def _continued(self, tokens, state):
        result = self.model(input_ids=tokens, past_key_values=state, use_cache=True)
        return result.logits, result.past_key_values

    def _placed(self, tokens, first):
        import torch

        positions = torch.arange(first, first + tokens.shape[1])[None].expand(len(tokens), -1)
        return self.model(input_ids=tokens, position_ids=positions, use_cache=False).logits


class NanoGPTNetwork(SourceNetwork):
    """nanoGPT's GPT. It has no cache, so decoding reads everything again, and its positions begin at 0."""

    begins_anywhere = False

    def _losses(self, tokens, targets):
        return self.model(tokens, targets)  # without targets it computes the last logits alone

    def _continued(self, tokens, state):
        import torch

        read = tokens if state is None else torch.cat([state, tokens], dim=1)
        logits, _ = self.model(read, read)
        return logits[:, -tokens.shape[1] :], read

    def _placed(self, tokens, first):
        return self._continued(tokens, None)[0]


def _open_hf(folder: Path) -> Source:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: give a folder that save_pretrained wrote")
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"--reference hf needs {error.name}, which is missing: pip install 'jaxlm[parity]'") from None
    cfg, params = _wide(*from_hf(folder))
    family = by_model_type(read_json(folder / "config.json")["model_type"])

    def build(dtype: str) -> Any:
        import torch

        files = open_tensors(folder)
        outer = len(wrapper(files.names, files.where))
        state = {name[outer:]: to_tensor(files.read(name)) for name in files.names}  # in the files' own types
        options = {"attn_implementation": "eager", "dtype": getattr(torch, dtype)}
        try:
            with _exactly(dtype), _quiet():
                own = {"trust_remote_code": False}  # no code of the folder runs, and nobody is asked whether it may
                config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **own)
                made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", **own)
                return type(made).from_pretrained(None, config=config, state_dict=state, **options)
        except Exception as error:  # of many kinds, of a config that transformers refuses
            raise UserError(f"transformers cannot load {folder}: {_line(error)}") from None

    return Source("hf", cfg, params, family.modules(cfg), family.entries(cfg), build)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no notes of transformers on stderr."""
    import transformers

    log = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()


def _open_nanogpt(folder: Path) -> Source:
    missing = [name for name in ("ckpt.pt", "model.py") if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} has no {' and no '.join(missing)}: give a folder with nanoGPT's checkpoint and its model.py"
        )
    cfg, params = _wide(*from_nanogpt(folder))

    def build(dtype: str) -> Any:
        import torch

        record = load_torch(folder / "ckpt.pt")
        code = _imported(folder / "model.py")
        # It prints its size on stdout, and draws weights that are replaced at once.
        with _exactly(dtype), contextlib.redirect_stdout(sys.stderr), torch.random.fork_rng(devices=[]):
            try:
                model = code.GPT(code.GPTConfig(**record["model_args"]))
                state = {name.removeprefix("_orig_mod."): tensor for name, tensor in record["model"].items()}
                own = set(model.state_dict())
                # Old versions stored causal masks.
                masks = {name for name in state if name.endswith((".attn.bias", ".attn.masked_bias"))} - own
                model.to(getattr(torch, dtype))
                model.load_state_dict({name: tensor for name, tensor in state.items() if name not in masks})
            except Exception as error:  # the user's code
                raise UserError(f"{folder / 'model.py'} does not fit ckpt.pt: {_line(error)}") from None
        return model

    return Source("nanogpt", cfg, params, NANOGPT.modules(cfg), NANOGPT.entries(cfg), build)


def _exactly(dtype: str) -> contextlib.AbstractContextManager[None]:
    return float64_throughout() if dtype == "float64" else contextlib.nullcontext()


def _imported(file: Path) -> Any:
    """The module in a file, which runs its code."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(spec.name)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code
        raise UserError(f"{file} cannot be imported: {_line(error)}") from None
    finally:
        sys.modules.pop(spec.name)
        if before is not None:
            sys.modules[spec.name] = before
    absent = [name for name in ("GPT", "GPTConfig") if not hasattr(module, name)]
    if absent:
        raise UserError(f"{file} has no {' and no '.join(absent)}: give the model.py of nanoGPT")
    return module


def _line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _wide(cfg: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The model in at least float32, whose rounding is small enough to show anything else."""
    if cfg.dtype != "bfloat16":
        return cfg, params
    wide = dataclasses.replace(cfg, dtype="float32", param_dtype="float32")
    return wide, jax.tree.map(lambda leaf: leaf.astype("float32"), params)


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 (hex) of the files in a folder that a model can come from: its config and its weights."""
    kinds = {".safetensors", ".bin", ".pt", ".msgpack", ".json", ".py"}
    hashes = {}
    for file in sorted(path for path in folder.iterdir() if path.suffix in kinds and path.is_file()):
        with file.open("rb") as opened:
            hashes[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return hashes
