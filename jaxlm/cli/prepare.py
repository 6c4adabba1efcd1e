"""`jaxlm prepare`: fetches a dataset."""

import dataclasses
from typing import Annotated

import tyro

from jaxlm.cli.options import JsonOption, parse_options
from jaxlm.cli.output import print_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PrepareOptions(JsonOption):
    """Download a dataset into the local cache and check it against the sha256 in its recipe."""

    dataset: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DATASET")]
    """Dataset to download: librispeech (1 GB) or tinyshakespeare."""


def prepare(arguments: list[str]) -> int:
    """`jaxlm prepare DATASET`: fetches it and says where its files are."""
    options = parse_options(_PrepareOptions, arguments, "prepare")
    from jaxlm.data.sources import fetch

    name = options.dataset
    files = [{"path": str(path), "bytes": path.stat().st_size} for paths in fetch(name) for path in paths]
    if options.json:
        print_json({"dataset": name, "files": files})
    else:
        for file in files:
            print(f"{name}: {file['path']} ({file['bytes']:,} bytes, sha256 as in the recipe)")
    return 0
