"""Models by their name on the Hugging Face Hub, through the optional package huggingface_hub."""

import re
from pathlib import Path

from jaxlm.convert.files import WEIGHTS
from jaxlm.errors import UserError

HUB = "the Hugging Face Hub"
TEXTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""What is fetched beside the weights."""


def local_folder(source: str) -> Path:
    """The folder (or file) of a model: a local path, or ORG/NAME on the Hub, whose files are fetched into its cache.

    What exists here is never looked for on the Hub. Only the files that jaxlm reads are fetched, the weights in one
    format, safetensors if there are any. Without a network the copy in the cache is taken.

    Returns: the path; one that does not exist if `source` cannot be the name of a model on the Hub.

    Raises:
      UserError: huggingface_hub is not installed, the Hub cannot be reached and the cache has no copy, or it has no
        such model or does not give it to this user.
    """
    if Path(source).exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        return Path(source)
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise UserError(
            f"{source} is not there; to take it from {HUB}, install {error.name}: pip install 'jaxlm[hub]'"
        ) from None
    try:
        for name in WEIGHTS:
            stem, suffix = Path(name).stem, Path(name).suffix
            wanted = [*TEXTS, f"{stem}*{suffix}", f"{name}.index.json"]
            folder = Path(snapshot_download(source, allow_patterns=wanted))
            if any(folder.glob(f"{stem}*{suffix}")):
                break
        return folder
    except errors.GatedRepoError:
        raise UserError(
            f"{source} is gated on {HUB}: accept its terms at https://huggingface.co/{source}, then `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{source} is neither here nor on {HUB}: check the name; a private model needs `hf auth login`"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"{source} is not there, and {HUB} cannot be reached: go online, or give the folder of a model"
        ) from None
    except Exception as error:  # of many kinds: a broken connection, a full disk
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{source} cannot be taken from {HUB} ({reason}): try again, or give a folder") from None
