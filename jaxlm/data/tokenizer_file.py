"""The tokenizer in a file: of a run or a prepared corpus, or of Hugging Face."""

from pathlib import Path

from jaxlm.data.hugging_face import from_hugging_face
from jaxlm.data.reading import read_json
from jaxlm.data.tokenizer import Tokenizer, from_dict
from jaxlm.errors import UserError


def read_tokenizer_file(path: Path, option: str = "--data.tokenizer") -> Tokenizer:
    """Reads a tokenizer.json, or that of a folder.

    Args:
      option: what the message tells the user to give.

    Raises:
      UserError: there is no such file, or it holds no tokenizer that jaxlm can read.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        content = read_json(file)
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        tokenizer = from_dict(content) if "type" in content else from_hugging_face(content)
        tokenizer.decode(range(min(tokenizer.vocab_size, 1)))  # what cannot decode fails here, not at the first text
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): give a tokenizer.json by {option}") from None
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UserError(f"{file} is not a tokenizer that jaxlm can read ({error}): give another by {option}") from None
    return tokenizer


def kind(tokenizer: Tokenizer) -> str:
    """The value of data.tokenizer for data that this tokenizer reads; a text of ids is a text like another."""
    name = tokenizer.to_dict()["type"]
    return "char" if name == "ids" else name
