"""Converts tokenizers without a tokenizer.json, as transformers does."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from ivc_export.checkpoint.folder import Checkpoint
from ivc_export.errors import UserError
from ivc_export.files import read_bytes, read_object, read_text

AGAIN = "download it again"
SPACE = "▁"

QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pieces within which byte pairs are merged: English endings, words, single digits, signs, and space."""

QWEN_NAMES = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")
LLAMA_NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


@dataclass(frozen=True)
class ConvertedTokenizer:
    """A tokenizer, and the special tokens of its class for keys that tokenizer_config.json does not have."""

    tokenizer: Tokenizer
    names: Mapping[str, str]


def converted_tokenizer(checkpoint: Checkpoint, config: Mapping[str, Any]) -> ConvertedTokenizer | None:
    """The tokenizer of vocab.json and merges.txt, or of tokenizer.model. None if there are no such files.

    config: tokenizer_config.json, which names the class.

    Raises:
        UserError: a file is damaged, or the tokenizer is of another class.
    """
    kind, folder = str(config.get("tokenizer_class") or "").removesuffix("Fast"), checkpoint.folder
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        files, known = "vocab.json and merges.txt", {"": qwen, "Qwen2Tokenizer": qwen}
    elif (folder / "tokenizer.model").exists():
        files = "tokenizer.model"
        known = {"": llama, "LlamaTokenizer": llama, "InternLM2Tokenizer": internlm}
    else:
        return None
    if kind not in known:
        raise UserError(
            f"{files} of a {kind} in {folder} cannot be converted here: load the folder with transformers' "
            "AutoTokenizer, and write tokenizer.json with its save_pretrained"
        )
    convert: Callable[[Path, Mapping[str, Any]], ConvertedTokenizer] = known[kind]
    try:
        return convert(folder, config)
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises plain Exception, and a BaseException if it panics
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"there is no tokenizer in {files} of {folder} ({reason}): {AGAIN}") from error


def qwen(folder: Path, config: Mapping[str, Any]) -> ConvertedTokenizer:
    """Byte-level BPE in Qwen2's way.

    Source: Qwen2Tokenizer in transformers.
    """
    path = folder / "merges.txt"
    lines = (line.rstrip("\r") for line in read_text(path, AGAIN).split("\n"))
    parts = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if not all(len(part) == 2 for part in parts):
        raise UserError(f"{path} is damaged (a line does not hold two parts): {AGAIN}")
    merges = [(part[0], part[1]) for part in parts]
    vocabulary = read_object(folder / "vocab.json", AGAIN)
    tokenizer = Tokenizer(BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix=""))
    tokenizer.normalizer = normalizers.NFC()
    prefix = bool(config.get("add_prefix_space"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return ConvertedTokenizer(tokenizer, QWEN_NAMES)


def llama(folder: Path, config: Mapping[str, Any]) -> ConvertedTokenizer:
    """A SentencePiece model in Llama's way.

    Source: LlamaTokenizer in transformers.
    """
    model = read_pieces(folder / "tokenizer.model", config)
    tokenizer = Tokenizer(BPE(model.ids, merges_of(model.ids), fuse_unk=True, byte_fallback=True))
    prefix = config.get("add_prefix_space") is not False
    scheme = ("always" if config.get("legacy") else "first") if prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    return finished(tokenizer, model, config, prefix, begins=False)


def internlm(folder: Path, config: Mapping[str, Any]) -> ConvertedTokenizer:
    """A SentencePiece model in InternLM2's way: as Llama's, with its own settings of spaces.

    Source: the code that comes with InternLM2's checkpoints.
    """
    model = read_pieces(folder / "tokenizer.model", config)
    tokenizer = Tokenizer(
        BPE(model.ids, merges_of(model.ids), unk_token=model.unknown, fuse_unk=True, byte_fallback=True)
    )
    start = [normalizers.Prepend(SPACE)] if model.prefix else []
    tokenizer.normalizer = normalizers.Sequence([*start, normalizers.Replace(" ", SPACE)])
    return finished(tokenizer, model, config, model.prefix, begins=True)


def finished(
    tokenizer: Tokenizer, model: Pieces, config: Mapping[str, Any], prefix: bool, begins: bool
) -> ConvertedTokenizer:
    """Add decoder, special tokens, and the tokens that begin and end a text.

    prefix: whether a space is written before a text. begins: whether BOS begins a text if `config` does not say.
    """
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=special) for text, special in model.added])
    names = {key: config.get(key, text) for key, text in LLAMA_NAMES.items()}
    texts = {key: text["content"] if isinstance(text, dict) else text for key, text in names.items()}
    added = {"bos_token": config.get("add_bos_token", begins), "eos_token": config.get("add_eos_token", False)}
    ends = {key: str(texts[key]) if wanted and texts[key] else "" for key, wanted in added.items()}
    known = [(text, tokenizer.token_to_id(text)) for text in ends.values() if text]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{ends['bos_token']} $A {ends['eos_token']}".strip(), special_tokens=known
    )
    return ConvertedTokenizer(tokenizer, LLAMA_NAMES)


@dataclass(frozen=True)
class Pieces:
    """The parts of a SentencePiece model that are used.

    ids: by text. added: texts of control and user-defined pieces, and whether they are special. unknown: the text of
    the piece for unknown text. prefix: whether a space is written before a text.
    """

    ids: dict[str, int]
    added: list[tuple[str, bool]]
    unknown: str
    prefix: bool


def read_pieces(path: Path, config: Mapping[str, Any]) -> Pieces:
    """Read a SentencePiece model of byte pairs. Added tokens take the places that tokenizer_config.json gives them.

    Raises:
        UserError: it is damaged, or of another kind.
    """
    try:
        model = message(read_bytes(path, AGAIN))
        trainer, spaces = message(model.get(2, [b""])[-1]), message(model.get(3, [b""])[-1])
        pieces = [message(piece) for piece in model.get(1, [])]
        texts = [bytes(piece[1][-1]).decode("utf-8") for piece in pieces]
        kinds = [piece.get(3, [NORMAL])[-1] for piece in pieces]
        unknown = bytes(trainer.get(45, [b"<unk>"])[-1]).decode("utf-8")
    except (ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise UserError(f"{path} is damaged (it is not a SentencePiece model): {AGAIN}") from error
    if trainer.get(3, [1])[-1] != BYTE_PAIRS or spaces.get(2, [b""])[-1] or spaces.get(4, [1])[-1]:
        raise UserError(
            f"{path} is not a SentencePiece model of Llama's kind: load the folder with transformers' AutoTokenizer, "
            "and write tokenizer.json with its save_pretrained"
        )
    ids = {text: number for number, text in enumerate(texts)}
    stated = config.get("added_tokens_decoder")
    for key, entry in (stated if isinstance(stated, dict) else {}).items():
        text, number = entry.get("content") if isinstance(entry, dict) else None, int(key) if key.isdecimal() else -1
        if isinstance(text, str) and 0 <= number < len(texts) and text not in ids:  # in an unused place
            del ids[texts[number]]
            ids[text], texts[number] = number, text
    added = [(text, kind == CONTROL) for text, kind in zip(texts, kinds, strict=True) if kind in (CONTROL, DEFINED)]
    return Pieces(ids, added, unknown, bool(spaces.get(3, [1])[-1]))


NORMAL, CONTROL, DEFINED = 1, 3, 4
"""Kinds of pieces in SentencePiece's protocol."""
BYTE_PAIRS = 2
"""The kind of model there that is supported."""


def merges_of(ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, in the order of the pieces; for one piece, the shortest first part comes
    first.

    Source: generate_merges in transformers.
    """
    pairs = [
        (number, cut, text)
        for text, number in ids.items()
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]
    return [(text[:cut], text[cut:]) for _, cut, text in sorted(pairs)]


def message(data: bytes) -> dict[int, list[Any]]:
    """Decode a Protocol Buffers message: values by field number, in their order; bytes, ints or floats as stored.

    Raises:
        ValueError: it is not a message.
    """
    found: dict[int, list[Any]] = {}
    for number, value in fields(memoryview(data)):
        found.setdefault(number, []).append(value)
    return found


def fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of a message."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    while place < len(data):
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == 0:
            yield number, varint()
            continue
        length = {1: 8, 2: -1, 5: 4}.get(kind)
        if length is None:
            raise ValueError(f"a field of kind {kind}")
        length = varint() if length < 0 else length
        if place + length > len(data):
            raise ValueError("a field that is longer than its message")
        value = bytes(data[place : place + length])
        place += length
        yield number, struct.unpack("<f", value)[0] if kind == 5 else value
