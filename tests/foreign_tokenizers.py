"""Contents of tokenizer.json files as other models have them, made without transformers."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

TEXT = "the cat sat on the mat; the dog sat on the log.\nnaïve café  two  spaces\n" * 3
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEMPLATE = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])


def _trained(normalizer, pre_tokenizer, special, size, text=TEXT):
    made = tokenizers.Tokenizer(models.BPE())
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet() if normalizer is None else []
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([text], trainer)
    return made


def gpt2_tokenizer(**changes):
    """As published for GPT-2: byte-level BPE whose model has no "type"; <|endoftext|> is 0, and nothing is added."""
    made = _trained(None, pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"], 300)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    data = json.loads(made.to_str())
    del data["model"]["type"]
    return {**data, **changes}


def llama3_tokenizer(text=TEXT, size=300):
    """As of Llama 3: byte-level BPE behind a pattern, and <s> in front of each text."""
    pattern = tokenizers.Regex(
        r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
    )
    parts = [
        pre_tokenizers.Split(pattern, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    made = _trained(None, pre_tokenizers.Sequence(parts), ["<unk>", "<s>", "</s>"], size, text)
    made.decoder = decoders.ByteLevel()
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), begin])
    return json.loads(made.to_str())


def llama2_tokenizer(metaspace=False, post_processor=TEMPLATE):
    """As of Llama 2: SentencePiece's BPE with bytes, ▁ for spaces and in front; or with Metaspace, as written today.

    <unk>, <s> and </s> are 0, 1, 2, and <0x00> is 3. <s> begins a text and </s> ends it.
    """
    special = ["<unk>", "<s>", "</s>"]
    cut = pre_tokenizers.Split("▁", "merged_with_next")
    learned = json.loads(_trained(normalizers.Replace(" ", "▁"), cut, special + BYTES, 330).to_str())
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    if post_processor is not None:
        made.post_processor = post_processor
    data = json.loads(made.to_str())
    data["model"] |= {"vocab": learned["model"]["vocab"], "merges": learned["model"]["merges"]}
    return {**data, "added_tokens": [token for token in learned["added_tokens"] if token["content"] in special]}


def gemma_tokenizer():
    """As of Gemma: as Llama 2, but no space in front, words end with their space, and only <s> is added."""
    data = llama2_tokenizer(post_processor=processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]))
    data["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    cut = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    data["decoder"]["decoders"] = data["decoder"]["decoders"][:3]
    return {**data, "pre_tokenizer": cut}
