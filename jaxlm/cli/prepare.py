"""`jaxlm prepare`: fetches a dataset."""

from jaxlm.cli.options import (
    JsonOption,
    first_word,
    parse_options,
    print_json,
)
from jaxlm.errors import UserError


def prepare(arguments: list[str]) -> int:
    """`jaxlm prepare DATASET`: fetches it and says where its files are."""
    from jaxlm.data.sources import fetch, names

    name, rest = first_word(arguments)
    options = parse_options(JsonOption, rest, "prepare DATASET", JsonOption())
    if name is None:
        raise UserError(f"no dataset given: choose one of {', '.join(names())}")
    files = [{"path": str(path), "bytes": path.stat().st_size} for paths in fetch(name) for path in paths]
    if options.json:
        print_json({"dataset": name, "files": files})
    else:
        for file in files:
            print(f"{name}: {file['path']} ({file['bytes']:,} bytes, sha256 as in the recipe)")
    return 0
