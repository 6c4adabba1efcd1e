"""Language models that score texts: a run, or a Hugging Face folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, Integer

from jaxlm.data.reading import read_json
from jaxlm.data.tokenizer import prompt_ids
from jaxlm.decode.capacity import power_of_two
from jaxlm.decode.score import score
from jaxlm.errors import UserError
from jaxlm.model.layers import LanguageModel
from jaxlm.run.folder import Run, load_run
from jaxlm.types import Params

TextScores = tuple[Float[np.ndarray, " N"], Int[np.ndarray, " N"]]
"""The log-probability of each text in nats, and its length in tokens."""


@runtime_checkable
class Scorer(Protocol):
    """A language model with a tokenizer of its own."""

    def __call__(self, texts: Sequence[str]) -> TextScores:
        """Scores each text. Its first token counts as certain where nothing precedes it."""


class RunScorer:
    """A run of jaxlm; on transcripts <eos> precedes each text."""

    def __init__(self, run: Run, batch_size: int) -> None:
        self._run, self._batch_size = run, batch_size

    def __call__(self, texts: Sequence[str]) -> TextScores:
        """Scores each text, as the run's tokenizer encodes it."""
        try:
            rows = [prompt_ids(text, self._run.tokenizer, "text") for text in texts]
            log_probs = row_log_probs(self._run.model, self._run.params, rows, self._batch_size)
        except UserError as error:
            raise UserError(f"oracle {self._run.path}: {error}") from None
        return log_probs, np.array([len(row) for row in rows])


class HuggingFaceScorer:
    """A causal language model and its tokenizer, saved by Hugging Face's `save_pretrained`; on the CPU, in float32.

    Where the tokenizer has a beginning-of-text token, it precedes each text; no other special token is added.
    """

    def __init__(self, path: Path, batch_size: int) -> None:
        try:
            import torch
            import transformers
        except ImportError as error:
            raise UserError(
                f"oracle {path} is a Hugging Face folder, for which {error.name} is missing: "
                "pip install 'jaxlm[parity]'"
            ) from None
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()  # missing weights are refused below, in one line
        try:
            local = {"local_files_only": True, "trust_remote_code": False}
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(path, **local)
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                path, **local, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:  # of any kind: a damaged file, wrong shapes, an unknown architecture
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"oracle {path} cannot be loaded ({reason}): save its model and its tokenizer there"
            ) from None
        model, loading_info = loaded
        if loading_info["missing_keys"]:  # transformers fills them with random numbers
            missing = ", ".join(sorted(loading_info["missing_keys"]))
            raise UserError(f"oracle {path} has no weights for {missing}: save a causal language model")
        ids, embeddings = len(self._tokenizer), model.get_input_embeddings().weight.shape[0]
        if ids > embeddings:
            raise UserError(
                f"oracle {path} has a tokenizer of {ids} ids but a model of {embeddings}: "
                "save a model together with its own tokenizer"
            )
        self._path, self._model, self._batch_size = path, model.eval(), batch_size

    def __call__(self, texts: Sequence[str]) -> TextScores:
        """Scores each text, as the model's own tokenizer encodes it."""
        import torch

        rows = [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        if self._tokenizer.bos_token_id is not None:
            rows = [[self._tokenizer.bos_token_id, *row] for row in rows]
        longest = max(map(len, rows))
        most = getattr(self._model.config, "max_position_embeddings", None)
        if most is not None and longest > most:
            raise UserError(
                f"oracle {self._path} reads at most {most} tokens, but a text has {longest}: give another model"
            )
        log_probs = np.zeros(len(rows))
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            tokens = torch.zeros(len(batch), len(rows[batch[-1]]), dtype=torch.long)
            real = torch.zeros_like(tokens)
            for place, row in enumerate(batch):
                tokens[place, : len(rows[row])] = torch.tensor(rows[row])
                real[place, : len(rows[row])] = 1
            with torch.inference_mode():
                logits = self._model(input_ids=tokens, attention_mask=real).logits[:, :-1].float()
                per_token = logits.gather(-1, tokens[:, 1:, None])[..., 0] - logits.logsumexp(-1)
            log_probs[batch] = (per_token.double() * real[:, 1:]).sum(-1).numpy()
        return log_probs, np.array([len(row) for row in rows])


def load_scorer(path: Path, batch_size: int) -> Scorer:
    """The model in a folder: a run that `jaxlm train` made, or what Hugging Face's `save_pretrained` wrote.

    Raises:
      UserError: the folder is neither, or cannot be loaded.
    """
    try:
        config = read_json(path / "config.json")
    except (OSError, ValueError):
        config = None
    keys = set(config) if isinstance(config, dict) else set()
    if "corpus_sha256" in keys:
        return RunScorer(load_run(path), batch_size)
    if "model_type" in keys:
        return HuggingFaceScorer(path, batch_size)
    raise UserError(
        f"oracle {path} is neither a run nor a Hugging Face folder: give a folder that `jaxlm train` made, or one with "
        "the config.json of a Hugging Face model"
    )


def row_log_probs(
    model: LanguageModel,
    params: Params,
    rows: Sequence[Integer[np.ndarray, " _"]],
    batch_size: int,
    prompt: int = 1,
) -> Float[np.ndarray, " N"]:
    """The log-probability in nats of what follows the first `prompt` tokens of each row, given all before.

    Rows of similar length share a batch, padded to a power of two: few programs serve them all.

    Raises:
      UserError: a row that is longer than a learned position table.
    """
    lengths = np.array([len(row) for row in rows])
    cfg = model.cfg
    cfg.check_reach(int(lengths.max()) - 1, "use a model with a longer table")  # the last token is only a target
    log_probs, order = np.zeros(len(rows)), np.argsort(lengths, kind="stable")
    for batch, real in batches(len(rows), batch_size):
        batch = order[batch]
        width = cfg.within_reach(power_of_two(max(int(lengths[batch].max()) - 1, 1)))
        tokens = np.zeros((len(batch), width + 1), np.int32)
        for place, row in enumerate(batch):
            tokens[place, : lengths[row]] = rows[row]
        target = np.arange(1, width + 1)[None]
        weights = (target >= prompt) & (target < lengths[batch][:, None])
        scores = score(model, params, tokens, weights.astype(np.float32))
        log_probs[batch[:real]] = np.asarray(scores)[:real]
    return log_probs


def batches(count: int, batch_size: int) -> list[tuple[Int[np.ndarray, " b"], int]]:
    """The rows 0 to count - 1 in batches of one size, and how many of each batch are real: repeats of the last row fill
    up the last batch.
    """
    size = min(batch_size, count)
    return [
        (np.minimum(np.arange(start, start + size), count - 1), min(size, count - start))
        for start in range(0, count, size)
    ]
