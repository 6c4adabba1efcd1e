"""Runs that begin with the weights and the vocabulary of another run."""

import dataclasses
import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
from foreign_folders import GPT2, word_tokenizer, write
from models import BASE, family, variant
from support import apply, built, random_tokens, snapshot

from jaxlm.config import DataConfig
from jaxlm.config.presets import preset
from jaxlm.data.tokenizer import BPETokenizer, CharTokenizer, TranscriptTokenizer
from jaxlm.errors import CheckError, UserError
from jaxlm.evals.loss import evaluate
from jaxlm.model.layer_stack import stack_params, unstack_params
from jaxlm.run import checkpoint, metrics
from jaxlm.run.folder import load_run, new_folder, read_config
from jaxlm.run.import_weights import import_run
from jaxlm.run.init_from import default_config
from jaxlm.run.session import new_session, resumed_session
from jaxlm.run.training import train
from jaxlm.training.step import TrainState

CHARS, LEARNED = "\nabcdefghij", variant(position="learned")


def random_text(characters, length, seed=0):
    return "".join(np.random.default_rng(seed).choice(list(characters), length))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(random_text(CHARS, 600))
    return path


@pytest.fixture
def begin(tmp_path, text):
    """Makes a run of a model at step 7, and begins another from it with some settings changed."""

    def begin(source_model=BASE, tokenizer=None, source_data=None, extend_positions=False, name="new", **changes):
        source = tmp_path / "source"
        tiny = preset("tiny")
        config = dataclasses.replace(
            tiny,
            model=source_model,
            data=DataConfig(path=str(text), **(source_data or {})),
            optim=dataclasses.replace(tiny.optim, warmup_steps=2),
            train=dataclasses.replace(tiny.train, steps=6, batch_size=3, eval_every=3, checkpoint_every=3),
        )
        if not source.exists():
            with new_folder(source, config, tokenizer or CharTokenizer(CHARS), "0" * 64) as folder:
                state = TrainState(built(source_model)[1], (), jax.numpy.int32(7))
                checkpoint.save(folder / "checkpoints", state, None, keep=1)
        for part, fields in changes.items():
            config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **fields)})
        return new_session(config, tmp_path / name, init_from=source, extend_positions=extend_positions)

    return begin


def refusal(tmp_path, begin, *arguments, **settings):
    """The message of a refusal, which leaves nothing behind."""
    with pytest.raises(UserError) as refused:
        begin(*arguments, **settings)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "text.txt"}
    return str(refused.value)


def assert_same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# The weights


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(BASE, marks=pytest.mark.slow),
        pytest.param(LEARNED, marks=pytest.mark.slow),
        pytest.param(variant(scan_layers=True), marks=pytest.mark.slow),
        variant(position="learned", scan_layers=True, param_dtype="bfloat16"),
        family("recurrent", cell="lstm", embed_dim=24, num_layers=2),
        pytest.param(family("recurrent", cell="elman", embed_dim=24, scan_layers=True), marks=pytest.mark.slow),
        family("bigram"),
        pytest.param(family("embedding_bigram", embed_dim=24, tie_embeddings=False), marks=pytest.mark.slow),
    ],
    ids=lambda cfg: f"{cfg.family}-{cfg.position}-{cfg.scan_layers}-{cfg.param_dtype}",
)
def test_the_weights_are_the_sources_to_the_bit_and_all_else_is_new(begin, tmp_path, model):
    session = begin(model, train={"seed": 5})
    theirs = built(model)[1]
    assert_same(session.state.params, theirs)
    assert (int(session.state.step), session.saved_step) == (0, 0)
    assert_same(session.state.opt_state, session.tx.init(theirs))
    run = load_run(tmp_path / "new")
    assert (run.step, run.config, run.tokenizer.chars) == (0, session.config, CHARS)
    assert_same(run.params, theirs)
    digest = hashlib.sha256()
    leaves = {"/".join(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(theirs)}
    for path in sorted(leaves):
        array = np.array(leaves[path])
        digest.update(f"{path} {array.dtype.name} {list(array.shape)}\n".encode() + array.tobytes())
    record = json.loads((tmp_path / "new/config.json").read_text())
    where = {"run": str(tmp_path / "source"), "step": 7}
    assert record["init_from"] == {**where, "sha256": digest.hexdigest()}


@pytest.mark.parametrize(
    "position",
    ["rope", pytest.param("sinusoidal", marks=pytest.mark.slow), pytest.param("none", marks=pytest.mark.slow)],
)
def test_a_model_without_a_table_takes_a_longer_context_and_computes_the_same_on_a_short_one(begin, tmp_path, position):
    session = begin(variant(position=position), model={"max_seq_len": 20})
    source = load_run(tmp_path / "source")
    tokens = random_tokens(BASE, 3, 7)
    before, after = (
        apply(model, params, tokens)[0]
        for model, params in ((source.model, source.params), (session.model, session.state.params))
    )
    np.testing.assert_array_equal(before, after)
    assert session.corpus.train.targets_per_window == 20
    assert np.isfinite(apply(session.model, session.state.params, random_tokens(BASE, 3, 20))[0]).all()


def test_a_learned_table_ends_unless_it_is_extended_with_zeros(begin, tmp_path):
    said = refusal(tmp_path, begin, LEARNED, model={"max_seq_len": 20})
    assert "max_seq_len = 20 is beyond the learned position table of" in said
    assert "source, 7 places: give --model.extend-positions (the new places begin at zero)" in said
    session = begin(LEARNED, model={"max_seq_len": 20}, extend_positions=True)
    source = load_run(tmp_path / "source")
    table = session.state.params["position_embedding"]
    assert table.shape == (20, 24)
    np.testing.assert_array_equal(table[:7], source.params["position_embedding"])
    assert not table[7:].any()
    assert_same({**session.state.params, "position_embedding": table[:7]}, source.params)
    tokens = random_tokens(BASE, 3, 7)
    before, after = (
        apply(model, params, tokens)[0]
        for model, params in ((source.model, source.params), (session.model, session.state.params))
    )
    np.testing.assert_array_equal(before, after)


def test_a_shorter_context_keeps_the_first_places(begin, tmp_path):
    session = begin(LEARNED, model={"max_seq_len": 5})
    table = load_run(tmp_path / "source").params["position_embedding"]
    np.testing.assert_array_equal(session.state.params["position_embedding"], table[:5])


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        (LEARNED, {}, "has nothing to add: .*source has a learned position table of 7 places, and max_seq_len = 7"),
        (LEARNED, {"max_seq_len": 5}, "has nothing to add: .* and max_seq_len = 5: leave it out"),
        (BASE, {"max_seq_len": 20}, "is for a learned position table, and .*source has none: leave it out"),
        (LEARNED, {"position": "none"}, "is for a learned position table, and the new model has none"),
    ],
)
def test_extending_what_needs_none_is_refused(begin, model, changes, words):
    with pytest.raises(UserError, match=words):
        begin(model, model=changes, extend_positions=True)


@pytest.mark.parametrize("window", [pytest.param(w, marks=pytest.mark.slow) for w in (None, (2, None))])
def test_layers_are_stacked_and_unstacked(begin, tmp_path, window):
    plain = built(BASE)[1]
    session = begin(BASE, model={"scan_layers": True, "remat": True, "window": window})
    assert_same(session.state.params, stack_params(session.config.model, plain))
    shutil.rmtree(tmp_path / "source")
    scanned = variant(scan_layers=True, window=(3, 2))
    session = begin(scanned, model={"scan_layers": False, "window": window}, name="unrolled")
    assert_same(session.state.params, unstack_params(scanned, built(scanned)[1]))
    session = begin(scanned, model={"window": window}, name="scanned")
    assert_same(unstack_params(session.config.model, session.state.params), unstack_params(scanned, built(scanned)[1]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mlp_dim": 30}, ["block_0/mlp/down/kernel is [20, 24] float32 there, [30, 24] float32 here", "block_1/mlp"]),
        ({"num_layers": 3}, ["block_2/attention/key/bias is absent there, [12] float32 here", "and 10 more"]),
        ({"num_layers": 1}, ["block_1/attention/key/bias is [12] float32 there, absent here"]),
        ({"embed_dim": 48}, ["block_0/attention/key/bias is [12] float32 there, [24] float32 here"]),
        ({"position": "learned"}, ["position_embedding is absent there, [7, 24] float32 here"]),
        ({"tie_embeddings": False}, ["head/kernel is absent there, [24, 11] float32 here"]),
        ({"param_dtype": "bfloat16"}, ["block_0/attention/key/bias is [12] float32 there, [12] bfloat16 here"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_weights_that_do_not_fit_are_named_by_path(begin, tmp_path, changes, words):
    said = refusal(tmp_path, begin, model=changes)
    assert "source do not fit the model: " in said
    for word in words:
        assert word in said
    assert "drop the --model options that need other parameters" in said


def test_a_table_of_another_width_is_named_with_its_own_shape(begin, tmp_path):
    few = variant(position="learned", num_layers=1, mlp_dim=0, norm="none", use_bias=False)
    said = refusal(tmp_path, begin, few, model={"embed_dim": 48, "max_seq_len": 5})
    assert "position_embedding is [7, 24] float32 there, [5, 48] float32 here" in said


def test_other_settings_under_the_same_weights_are_said(begin):
    with pytest.warns(UserWarning, match=r"source are read with norm_eps = 0.001 instead of 1e-05, rope_theta = 500"):
        begin(model={"norm_eps": 1e-3, "rope_theta": 500.0})
    free = {"window": 3, "dropout": 0.1, "attention_dropout": 0.1, "attention_impl": "local", "dtype": "bfloat16"}
    begin(model=free, name="free")  # warnings are errors


# The vocabulary


def test_a_corpus_with_fewer_characters_keeps_the_ids_of_the_source(begin, text):
    text.write_text(random_text("bdj", 400))
    session = begin()
    assert session.config.model.vocab_size == 11
    assert session.corpus.tokenizer.chars == CHARS
    assert set(np.unique(session.corpus.train.tokens)) == {2, 4, 10}


def test_a_character_that_the_source_does_not_know_is_named(begin, tmp_path, text):
    text.write_text("abcz" + random_text(CHARS, 400) + "ab\tY")
    said = refusal(tmp_path, begin)
    assert f"corpus {text}: characters 'z' are outside the vocabulary (first 'z' at position 3)" in said


BYTES = BPETokenizer.train([], 256)
MERGED = BPETokenizer.train(["abc abc abc abd abd"] * 3, 260)


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size", "kind", "data", "words"),
    [
        (CharTokenizer(CHARS), 11, "char", {"tokenizer": "bpe"}, r"id 0 is '!', and '\n' there"),
        (CharTokenizer(CHARS), 11, "char", {"tokenizer": "transcript"}, r"id 0 is 'A', and '\n' there"),
        (CharTokenizer("AB"), 2, "char", {"tokenizer": "transcript"}, "id 2 is 'C', and absent there"),
        (TranscriptTokenizer(), 30, "transcript", {"tokenizer": "char"}, r"id 0 is '\n', and 'A' there"),
        (MERGED, 260, "bpe", {"tokenizer": "char"}, r"id 0 is '\n', and '!' there"),
    ],
)
def test_another_kind_of_tokenizer_is_refused_with_the_first_id_that_differs(
    begin, tmp_path, tokenizer, vocab_size, kind, data, words
):
    said = refusal(
        tmp_path,
        begin,
        variant(vocab_size=vocab_size),
        tokenizer,
        {"tokenizer": kind},
        data={"bpe_vocab_size": 300, **data},
    )
    assert f"data.tokenizer = {data['tokenizer']!r} has another vocabulary than" in said
    assert f"{words}; give --data.tokenizer {kind}" in said


def test_a_size_of_the_vocabulary_that_is_not_the_sources_is_refused(begin, tmp_path):
    said = refusal(tmp_path, begin, model={"vocab_size": 12})
    assert "vocab_size = 12 is not the tokenizer's 11 (ids from 11 on differ): leave it out" in said


def test_a_byte_level_vocabulary_stays_whatever_the_corpus_is(begin, tmp_path, text):
    text.write_text("Zoë abc " * 80)
    bpe = variant(vocab_size=260), MERGED, {"tokenizer": "bpe", "bpe_vocab_size": 260}
    session = begin(*bpe)
    first = MERGED.encode("Zoë abc Zoë abc ")
    np.testing.assert_array_equal(session.corpus.train.tokens[: len(first)], first)
    assert (session.config.model.vocab_size, session.config.data.bpe_vocab_size) == (260, 260)
    with pytest.raises(
        UserError, match=r"bpe_vocab_size = 300 is not that of .*, whose 260 entries stay \(ids from 260"
    ):
        begin(*bpe, data={"bpe_vocab_size": 300}, name="other")


def test_transcripts_go_on_from_transcripts(begin, tmp_path):
    data = tmp_path / "data.csv"
    data.write_text("id,transcript\n" + "1,YES\n2,NO SIR\n" * 20)
    session = begin(
        variant(vocab_size=30), TranscriptTokenizer(), {"tokenizer": "transcript"}, data={"path": str(data)}
    )
    assert session.config.model.vocab_size == 30


# Imported runs


def settings(source, text, **changes):
    base = default_config(source, None)
    few = dataclasses.replace(base.train, steps=4, batch_size=2, eval_every=2, checkpoint_every=2)
    optim = dataclasses.replace(base.optim, warmup_steps=1)
    data = dataclasses.replace(base.data, path=str(text))
    return dataclasses.replace(base, train=few, optim=optim, data=data, **changes)


@pytest.mark.slow
def test_an_imported_run_is_trained_with_its_own_tokenizer_and_rows(tmp_path, text):
    hf = write(tmp_path / "gpt2", GPT2)
    (hf / "tokenizer.json").write_text(json.dumps(word_tokenizer()))
    source, out = tmp_path / "imported", tmp_path / "trained"
    imported = import_run("hf", hf, source)
    text.write_text("abcde abc ab de " * 60)
    config = settings(source, text)
    assert config.data.tokenizer == "bpe"
    assert train(config, out, init_from=source).step == 4
    run = load_run(out)
    assert run.tokenizer.to_dict() == imported.tokenizer.to_dict()
    assert (run.config.model, run.tokenizer.vocab_size) == (imported.config.model, 10)  # 37 rows
    longer = dataclasses.replace(run.config, train=dataclasses.replace(run.config.train, steps=6))
    assert train(longer, out, resume=True).step == 6
    assert evaluate(load_run(out))["val_targets"] > 0


def test_a_run_of_ids_is_trained_on_ids_and_none_is_cut_in_two(tmp_path, text):
    source = tmp_path / "imported"
    import_run("hf", write(tmp_path / "gpt2", GPT2), source)
    ids = np.random.default_rng(0).integers(10, 37, 300)
    for indent in range(3):  # the boundary falls into an id, before one and after one
        text.write_text(" " * indent + " ".join(map(str, ids)))
        session = new_session(settings(source, text), tmp_path / str(indent), init_from=source)
        train_split, val_split = session.corpus.train.tokens, session.corpus.val.tokens
        np.testing.assert_array_equal(np.concatenate([train_split, val_split]), ids)
        assert 265 < len(train_split) < 275


# Resuming


def rows(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in metrics.OF_CLOCKS} for row in lines]


@pytest.mark.parametrize("killed_at", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_resumed_a_run_is_bitwise_the_uninterrupted_one_without_its_source(begin, tmp_path, killed_at):
    config = begin(variant(position="learned", num_layers=1, dropout=0.1), train={"seed": 5}).config
    longer = dataclasses.replace(config, model=dataclasses.replace(config.model, max_seq_len=9))
    whole, out, source = tmp_path / "whole", tmp_path / "resumed", tmp_path / "source"
    options = {"init_from": source, "extend_positions": True}
    assert train(longer, whole, **options).step == 6
    if killed_at:
        shutil.copytree(whole, out)
        shutil.rmtree(out / "checkpoints/6")
    else:
        new_session(longer, out, **options)  # as a kill before the first step leaves it
    entry = json.loads((out / "config.json").read_text())["init_from"]
    shutil.rmtree(source)
    assert resumed_session(read_config(out), out).saved_step == killed_at
    assert train(read_config(out), out, resume=True).step == 6
    ours, theirs = load_run(out, 6), load_run(whole, 6)
    assert_same(ours.params, theirs.params)
    assert rows(out) == rows(whole)
    for path in (out, whole):
        assert json.loads((path / "config.json").read_text())["init_from"] == entry


def test_a_run_that_lost_its_checkpoints_does_not_begin_with_other_weights(begin, tmp_path):
    config = begin().config
    shutil.rmtree(tmp_path / "new/checkpoints/0")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=r"new has lost its checkpoints, .* with --init-from .*source"):
        train(config, tmp_path / "new", resume=True)
    assert snapshot(tmp_path) == before


# Bad input


def test_what_is_no_source_is_named(begin, tmp_path, text):
    config = begin().config
    source, out = tmp_path / "source", tmp_path / "other"
    before = snapshot(tmp_path)

    def refused(error, words, out=out, **options):
        with pytest.raises(error, match=words):
            train(config, out, **options)

    refused(UserError, "text.txt is not a run: it has no config.json", init_from=text)
    refused(UserError, "nowhere is not a run: it has no config.json", init_from=str(tmp_path / "nowhere"))
    refused(UserError, "source already holds a run: continue it with --resume", out=source, init_from=source)
    refused(UserError, "--init-from .*source is for a new run", out=source, init_from=source, resume=True)
    refused(UserError, "extend-positions is for a new run", out=source, extend_positions=True, resume=True)
    refused(UserError, "extend-positions is for the weights of another run: add --init-from", extend_positions=True)
    assert snapshot(tmp_path) == before
    assert not out.exists()
    victim = max(
        (path for path in (source / "checkpoints/7").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    victim.write_bytes(victim.read_bytes()[:-1] + b"\x00\x01")
    refused(CheckError, "checkpoint .*7 is damaged: .* has changed", init_from=source)
    shutil.rmtree(source / "checkpoints")
    refused(UserError, "source has no checkpoint yet: continue its training with --resume", init_from=source)
    assert not out.exists()
