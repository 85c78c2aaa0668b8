"""Tokenizers without a tokenizer.json become transformers' own fast ones."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer
from transformers.utils import sentencepiece_model_pb2_new as protocol

from ivc_export import cli
from ivc_export.checkpoint.folder import Checkpoint
from ivc_export.errors import UserError
from ivc_export.source.configuration import read_description
from ivc_export.text.tokenizer import checkpoint_tokenizer, tokenizer_config
from samples.make_sample import make_checkpoint

TEXTS = [
    "Hello, world! It's 2024.  Größe 字\n\n  tabs\tand e\u0301 don't",
    "What is it?<|im_end|>\n<|im_start|>assistant\n",
    "USER: <image>\nWhere? ASSISTANT: there</s><s> again",
    " leading",
    "\r\n x  ",
    "\U0001f600",
    "",
]


def ours(folder: Path) -> Tokenizer:
    checkpoint = Checkpoint(folder)
    found = checkpoint_tokenizer(checkpoint, tokenizer_config(checkpoint))
    assert found is not None
    return found.tokenizer


def compare(found: Tokenizer, stock: Any) -> None:
    for text in TEXTS:
        ids = found.encode(text).ids
        assert ids == stock(text).input_ids, text
        assert found.decode(ids, skip_special_tokens=True) == stock.decode(ids, skip_special_tokens=True), text


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-VL checkpoint's files without its weights."""
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("whole") / "checkpoint")
    (checkpoint / "model.safetensors").unlink()
    return checkpoint


@pytest.fixture
def pairs(whole: Path, tmp_path: Path) -> Path:
    """The same, with vocab.json and merges.txt in the place of tokenizer.json."""
    folder = Path(shutil.copytree(whole, tmp_path / "checkpoint"))
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    split(content, folder)
    added = [(str(token.pop("id")), token) for token in content["added_tokens"]]
    write(folder, eos_token="<|im_end|>", tokenizer_class="Qwen2Tokenizer", added_tokens_decoder=dict(added))
    return folder


def split(content: dict[str, Any], folder: Path) -> None:
    """vocab.json and merges.txt of a tokenizer.json."""
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def write(folder: Path, **config: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def pieces(texts: list[str], special: int = 3, **spaces: Any) -> Any:
    """A SentencePiece model of byte pairs: <unk>, <s>, </s>, then bytes, then `texts`, best first."""
    model = protocol.ModelProto()
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
    model.normalizer_spec.remove_extra_whitespaces = False
    for key, value in spaces.items():
        setattr(model.normalizer_spec, key, value)
    every = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *texts]
    for number, text in enumerate(every):
        kind = 2 if number == 0 else 3 if number < special else 6 if number < 259 else 1
        model.pieces.add(piece=text, score=-float(number), type=kind)
    return model


LETTERS = list("▁HWeloritsUSERATN:.,?!dgh")
WORDS = ["▁w", "el", "ll", "He", "▁the", "re", "or", "▁t", "th", "er", "▁there", "ere", "Hell", "llo", "ello"]


@pytest.fixture
def stock_pieces(monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' converter, which asks for the library sentencepiece and then reads the model without it."""
    converter = importlib.import_module("transformers.convert_slow_tokenizer")
    monkeypatch.setattr(converter, "requires_backends", lambda *_: None)
    monkeypatch.setattr(converter, "import_protobuf", lambda *_: protocol)
    return converter


def test_byte_pairs_become_transformers_qwen2_tokenizer(pairs: Path, whole: Path) -> None:
    found = ours(pairs)
    compare(found, transformers.Qwen2Tokenizer.from_pretrained(pairs))
    before = Tokenizer.from_file(str(whole / "tokenizer.json"))
    assert found.get_vocab() == before.get_vocab()
    tokens = read_description(Checkpoint(pairs)).prompts.tokens
    assert (tokens.image, tokens.vision_start, tokens.vision_end) == (503, 500, 501)


@pytest.mark.parametrize("config", [{}, {"legacy": True, "add_bos_token": True}, {"add_prefix_space": False}])
def test_pieces_become_transformers_llama_tokenizer(tmp_path: Path, stock_pieces: Any, config: dict[str, Any]) -> None:
    (tmp_path / "tokenizer.model").write_bytes(pieces([*LETTERS, *WORDS]).SerializeToString())
    write(tmp_path, tokenizer_class="LlamaTokenizer", extra_special_tokens=["<image>"], **config)
    compare(ours(tmp_path), transformers.LlamaTokenizer.from_pretrained(tmp_path))


def test_pieces_become_internlms_tokenizer(tmp_path: Path, stock_pieces: Any) -> None:
    """Spaces as the model says; added tokens in unused places and behind all others; BOS before a text."""
    model = pieces([*LETTERS, "[UNUSED]", *WORDS], add_dummy_prefix=False)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    place, end = 259 + len(LETTERS), len(model.pieces)
    added = {place: "<|im_end|>", end: "<img>", end + 1: "</img>", end + 2: "<IMG_CONTEXT>"}
    decoder = {str(number): {"content": text, "special": True} for number, text in added.items()}
    write(tmp_path, tokenizer_class="InternLM2Tokenizer", added_tokens_decoder=decoder)
    found = ours(tmp_path)
    assert {number: found.id_to_token(number) for number in added} == added
    vocabulary, content = found.get_vocab(), json.loads(found.to_str())
    merges = stock_pieces.generate_merges({piece.piece: i for i, piece in enumerate(model.pieces)}, None)
    inside = {text: number for text, number in vocabulary.items() if number < end}
    stock = stock_pieces.SpmConverter.build_tokenizer_from_spm_proto(proto=model, vocab=inside, merges=merges)
    stock.add_special_tokens(["<unk>", "<s>", "</s>", *added.values()])
    assert [tuple(merge) for merge in content["model"]["merges"]] == merges
    for text in (*TEXTS, "<img><IMG_CONTEXT></img>Hello there"):
        assert found.encode(text, add_special_tokens=False).ids == stock.encode(text).ids
        assert found.encode(text).ids == [1, *stock.encode(text).ids]
        assert found.decode(found.encode(text).ids) == stock.decode(stock.encode(text).ids)


def real(name: str) -> tuple[dict[str, Any], Path]:
    """A released tokenizer.json, and its configuration."""
    place = os.environ.get("IVC_TOKENIZERS")
    if not place:
        pytest.skip("IVC_TOKENIZERS names no folder of released tokenizers")
    content = json.loads(gzip.decompress((Path(place) / f"{name}.tokenizer.json.gz").read_bytes()))
    return content, Path(place) / f"{name}.tokenizer_config.json"


def test_a_released_vocabulary_of_byte_pairs_is_whole(tmp_path: Path) -> None:
    content, config = real("qwen3")
    split(content, tmp_path)
    shutil.copyfile(config, tmp_path / "tokenizer_config.json")
    found = ours(tmp_path)
    compare(found, transformers.Qwen2Tokenizer.from_pretrained(tmp_path))
    assert found.get_vocab() == Tokenizer.from_str(json.dumps(content)).get_vocab()


def test_a_released_vocabulary_of_pieces_is_whole(tmp_path: Path, stock_pieces: Any) -> None:
    content, config = real("llama2")
    texts = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    (tmp_path / "tokenizer.model").write_bytes(pieces(texts[259:]).SerializeToString())
    shutil.copyfile(config, tmp_path / "tokenizer_config.json")
    found = ours(tmp_path)
    compare(found, transformers.LlamaTokenizer.from_pretrained(tmp_path))
    assert found.get_vocab() == content["model"]["vocab"]
    ordered = [tuple(merge) for merge in json.loads(found.to_str())["model"]["merges"]]
    stated = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in content["model"]["merges"]]
    assert {*ordered} == {*stated}


def model(folder: Path, **spaces: Any) -> Path:
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    (folder / "tokenizer.model").write_bytes(pieces(LETTERS, **spaces).SerializeToString())
    write(folder, tokenizer_class="LlamaTokenizer")
    return folder / "tokenizer.model"


def unigram(folder: Path) -> None:
    path = model(folder)
    stored = protocol.ModelProto()
    stored.trainer_spec.model_type = 1
    path.write_bytes(stored.SerializeToString())


def cut(folder: Path) -> None:
    path = model(folder)
    path.write_bytes(path.read_bytes()[:-3])


BAD = [
    ("another class", lambda f: write(f, tokenizer_class="GPT2Tokenizer"), "of a GPT2Tokenizer .* save_pretrained"),
    ("a merge of three", lambda f: (f / "merges.txt").write_text("a b c"), "does not hold two parts"),
    ("a merge of unknowns", lambda f: (f / "merges.txt").write_text("字 字"), "no tokenizer in vocab.json and merges"),
    ("merges no text", lambda f: (f / "merges.txt").write_bytes(b"\xff"), "is not UTF-8 text"),
    ("a vocabulary of words", lambda f: (f / "vocab.json").write_text('{"a": "b"}'), "no tokenizer in vocab.json"),
    ("a vocabulary no object", lambda f: (f / "vocab.json").write_text("[]"), "should hold a JSON object"),
    ("an empty vocabulary", lambda f: (f / "vocab.json").write_text("{}"), "no tokenizer in vocab.json"),
    ("pieces cut short", cut, "is not a SentencePiece model"),
    ("pieces of text", lambda f: model(f).write_text("x" * 99), "is not a SentencePiece model"),
    ("pieces of no pairs", unigram, "not a SentencePiece model of Llama's kind: .* save_pretrained"),
    (
        "pieces with characters",
        lambda f: model(f, precompiled_charsmap=b"x"),
        "not a SentencePiece model of Llama's kind",
    ),
    ("pieces without an image", model, "the tokenizer of .* has no <|image_pad|>"),
]


@pytest.mark.parametrize(("spoil", "sentence"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_files_are_told_in_one_sentence(
    pairs: Path, spoil: Any, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(pairs)
    with pytest.raises(UserError, match=sentence.replace("|", r"\|")):
        read_description(Checkpoint(pairs))
    assert cli.ivc_export(["--model", str(pairs), "--output", f"{pairs}-out", "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and not Path(f"{pairs}-out").exists()


def test_bytes_of_every_kind_are_no_model(tmp_path: Path) -> None:
    """Whatever lies in tokenizer.model: a tokenizer, or one sentence."""
    whole, chance = pieces([*LETTERS, *WORDS]).SerializeToString(), random.Random(0)
    write(tmp_path, tokenizer_class="LlamaTokenizer")
    refused = 0
    for _ in range(100):
        mutant = bytearray(whole)
        for _ in range(chance.randint(1, 20)):
            mutant[chance.randrange(len(mutant))] = chance.randrange(256)
        (tmp_path / "tokenizer.model").write_bytes(mutant)
        try:
            ours(tmp_path)
        except UserError:
            refused += 1
    assert 0 < refused <= 100
