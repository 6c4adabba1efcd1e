"""Tokenizers of Hugging Face, from and to the files that transformers reads."""

from collections.abc import Sequence
from typing import Any

from jaxlm.data.bpe import BPETokenizer, decoder_steps
from jaxlm.data.tokenizer import CharTokenizer, Tokenizer, TranscriptTokenizer
from jaxlm.errors import UserError


def from_hugging_face(data: dict[str, Any]) -> Tokenizer:
    """The tokenizer of Hugging Face's tokenizer.json, without its truncation and padding of texts.

    Those that `hugging_face_files` wrote come back as they were.

    Raises:
      UserError: it is neither one of these nor a byte-pair encoding, or its decoder does more to a text than to
        join tokens, write spaces for ▁, read bytes such as <0xE4> and drop a space in front: then texts cannot be
        joined.
    """
    model = data.get("model")
    kind = model.get("type") if isinstance(model, dict) else model
    if isinstance(model, dict) and kind is None and {"vocab", "merges"} <= model.keys():
        kind = "BPE"  # older files do not say it
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if kind == "WordLevel" and isinstance(vocabulary, dict):
        for own in (TranscriptTokenizer(), CharTokenizer(text for text in vocabulary if len(text) == 1)):
            if hugging_face_files(own)["tokenizer.json"] == data:
                return own
    if kind != "BPE":
        raise UserError(f"its model is of type {kind!r}, only 'BPE' is supported")
    _check_decoder(data.get("decoder"))
    return BPETokenizer.from_json(data)


def _check_decoder(decoder: Any) -> None:
    """Refuses a decoder with which the text of a token depends on others, but for the first and for single bytes."""
    steps = decoder_steps(decoder) if isinstance(decoder, dict) and "type" in decoder else []
    kinds = [step["type"] for step in steps]
    if kinds in (["ByteLevel"], ["Metaspace"]):
        return
    fused = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    by_step = [
        (kind == "Replace" and i < fused and "String" in step["pattern"])
        or (kind == "Strip" and i > fused and step["stop"] == 0)
        or kind in ("ByteFallback", "Fuse")
        for i, (kind, step) in enumerate(zip(kinds, steps, strict=True))
    ]
    if fused == len(kinds) or not all(by_step):
        shown = repr(kinds[0]) if len(kinds) == 1 else " then ".join(kinds) or repr(decoder)
        raise UserError(f"its decoder is of type {shown}, which cannot give a text piece by piece")


def hugging_face_files(
    tokenizer: Tokenizer, stop_tokens: Sequence[int] = (), max_length: int | None = None
) -> dict[str, dict[str, Any]]:
    """The files with which transformers' AutoTokenizer gives the same ids and the same text, by name; none for ids.

    Where a row or a text begins with a special token, transformers puts it in front too.

    Args:
      stop_tokens: ids that end a text; the first is the file's eos_token.
      max_length: tokens that the model reads at most.
    """
    if isinstance(tokenizer, BPETokenizer):
        data = tokenizer.to_dict()["tokenizer"]
        begin, end = tokenizer.before[:1], list(stop_tokens)[:1]
        special = {"bos_token": begin, "eos_token": end}
    elif isinstance(tokenizer, TranscriptTokenizer):
        data = _characters([tokenizer.decode([i]) for i in range(tokenizer.vocab_size)], tokenizer.eos_token)
        special = {"bos_token": [tokenizer.eos_token], "eos_token": [tokenizer.eos_token]}
        special |= {"pad_token": [tokenizer.pad_token]}
    elif isinstance(tokenizer, CharTokenizer):
        data, special = _characters(list(tokenizer.chars), None), {}
    else:
        return {}
    spelled = {added["id"]: added["content"] for added in data["added_tokens"]}
    tokens = {name: spelled[ids[0]] for name, ids in special.items() if ids and ids[0] in spelled}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **tokens}
    if max_length is not None:
        config["model_max_length"] = max_length
    return {"tokenizer.json": data, "tokenizer_config.json": config, "special_tokens_map.json": tokens}


def _characters(spelled: Sequence[str], first: int | None) -> dict[str, Any]:
    """A tokenizer.json with an id for each character; longer ones are special, and `first` begins each text."""
    special = [(i, text) for i, text in enumerate(spelled) if len(text) > 1]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    template = None
    if first is not None:
        name = spelled[first]
        template = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {name: {"id": name, "ids": [first], "tokens": [name]}},
        }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **flags} for i, text in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        "post_processor": template,
        "decoder": {"type": "Fuse"},
        # Without an unknown token, transformers refuses other characters, as jaxlm does.
        "model": {"type": "WordLevel", "vocab": {text: i for i, text in enumerate(spelled)}, "unk_token": "<unk>"},
    }
