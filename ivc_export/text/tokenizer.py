"""Makes one tokenizer.json with every token of a checkpoint's files, under the ids that the files state."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ivc_export.checkpoint.folder import Checkpoint
from ivc_export.contract.names import TOKENIZER, TOKENIZER_CONFIG
from ivc_export.contract.records import INT32_MOST
from ivc_export.errors import UserError
from ivc_export.files import parse_json, read_text
from ivc_export.text.conversion import converted_tokenizer
from ivc_export.text.template import NAMED_TOKENS, named_tokens

MOST_BYTES = 128 << 20
"""The most bytes of a tokenizer.json: three times the largest published."""

ADVICE = "take all files of the tokenizer from one checkpoint"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class CheckpointTokenizer:
    """A tokenizer, the text of its tokenizer.json, and tokenizer_config.json with the additions of its class."""

    tokenizer: Tokenizer
    text: str
    config: Mapping[str, Any]


def read_tokenizer(path: Path, advice: str) -> Tokenizer:
    """Read the tokenizer of a tokenizer.json.

    Raises:
        UserError: see read_text; or it is not a tokenizer.
    """
    return parse_tokenizer(read_text(path, advice, MOST_BYTES), str(path), advice)


def parse_tokenizer(text: str, what: str, advice: str) -> Tokenizer:
    """Parse a tokenizer.json's text.

    what: names it in errors.

    Raises:
        UserError: it is not a tokenizer.
    """
    try:
        return Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises plain Exception, and a BaseException if it panics
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{what} cannot be read ({reason}): {advice}") from error


def tokenizer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """tokenizer_config.json. If it lists no added tokens, it is of an older kind, and special_tokens_map.json is put on
    top.

    Source: PreTrainedTokenizerBase._from_pretrained in transformers.
    """
    config = checkpoint.json(TOKENIZER_CONFIG) or {}
    if "added_tokens_decoder" in config:
        return config
    return config | (checkpoint.json("special_tokens_map.json") or {})


def checkpoint_tokenizer(checkpoint: Checkpoint, config: Mapping[str, Any]) -> CheckpointTokenizer | None:
    """The tokenizer of a checkpoint, or None if it has none.

    config: see tokenizer_config.

    Raises:
        UserError: a file is damaged, or one contradicts another.
    """
    path = checkpoint.folder / TOKENIZER
    if path.exists():
        text = read_text(path, "download it again", MOST_BYTES)
    else:
        conversion = converted_tokenizer(checkpoint, config)
        if conversion is None:
            return None
        text, config = conversion.tokenizer.to_str(pretty=True), {**conversion.names, **config}
    content = parse_json(text, str(path), "download it again")
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it should hold a JSON object): download it again")
    found = added_tokens(content, path)
    merged = with_stated(found, stated_tokens(checkpoint, config, found), checkpoint)
    merged |= unnumbered(special_texts(config, checkpoint), merged, vocabulary(content, path))
    if merged != found:
        content["added_tokens"] = [merged[number] for number in sorted(merged)]
        text = json.dumps(content, ensure_ascii=False, indent=2)
    tokenizer = parse_tokenizer(text, str(path), "download it again")
    for number, token in merged.items():
        given = tokenizer.token_to_id(token["content"])
        if given != number:
            raise UserError(
                f"{checkpoint.folder} says that {token['content']} is token {number}, but its tokenizer says "
                f"{given}: {ADVICE}"
            )
    return CheckpointTokenizer(tokenizer, text, config)


Token = dict[str, Any]
"""An entry of a tokenizer.json's added_tokens: `id`, `content` and FLAGS."""


def added_tokens(content: Mapping[str, Any], path: Path) -> dict[int, Token]:
    """The tokens that a tokenizer.json adds to the vocabulary, by ids."""
    stored = content.get("added_tokens") or []
    if not isinstance(stored, list):
        raise UserError(f"{path} is damaged (added_tokens is not a list): download it again")
    tokens = [token(entry.get("id") if isinstance(entry, dict) else None, entry, path) for entry in stored]
    return {entry["id"]: entry for entry in tokens}


def vocabulary(content: Mapping[str, Any], path: Path) -> dict[str, int]:
    """The vocabulary of a tokenizer.json without added tokens: ids by texts."""
    model = content.get("model")
    stored = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(stored, list):
        return {str(entry[0]): i for i, entry in enumerate(stored) if isinstance(entry, list) and entry}
    if isinstance(stored, dict) and all(isinstance(number, int) for number in stored.values()):
        return stored
    raise UserError(f"{path} is damaged (it has no vocabulary): download it again")


def token(number: Any, entry: Any, path: Path) -> Token:
    """A token from some file, with all flags.

    Raises:
        UserError: it is not a token.
    """
    if isinstance(entry, str):
        entry = {"content": entry, "special": True}
    text = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text or not isinstance(number, int) or not 0 <= number <= INT32_MOST:
        raise UserError(f"{path} is damaged ({entry!r:.80} of id {number!r:.20} is not a token): download it again")
    special = bool(entry.get("special"))
    defaults = dict.fromkeys(FLAGS, False) | {"normalized": not special}
    return {"id": number, "content": text} | {flag: bool(entry.get(flag, defaults[flag])) for flag in FLAGS}


def stated_tokens(checkpoint: Checkpoint, config: Mapping[str, Any], known: Mapping[int, Token]) -> Iterator[Token]:
    """The tokens with ids in tokenizer_config.json, or else in added_tokens.json."""
    names, path = {*special_texts(config, checkpoint)}, checkpoint.folder / TOKENIZER_CONFIG
    if "added_tokens_decoder" in config:
        stored = config["added_tokens_decoder"]
        if not isinstance(stored, dict):
            raise UserError(f"{path} is damaged (added_tokens_decoder is not an object): download it again")
        for number, entry in stored.items():
            found = token(int(number) if number.isdecimal() else number, entry, path)
            yield found | {"special": found["special"] or found["content"] in names}
        return
    path = checkpoint.folder / "added_tokens.json"
    flags = {entry["content"]: entry for entry in known.values()}
    for text, number in (checkpoint.json(path.name) or {}).items():
        yield token(number, flags.get(text, {"content": text, "special": text in names}), path)


def special_texts(config: Mapping[str, Any], checkpoint: Checkpoint) -> list[str]:
    """Texts of the special tokens that tokenizer_config.json names without ids, in transformers' order."""
    path = checkpoint.folder / TOKENIZER_CONFIG
    try:
        names = named_tokens(config)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): download it again") from error
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    entries = list(extra.values()) if isinstance(extra, dict) else extra if isinstance(extra, list) else [extra]
    texts = [entry.get("content") if isinstance(entry, dict) else entry for entry in entries]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{path} is damaged (a special token is not text): download it again")
    own = [key for key in names if key not in NAMED_TOKENS]
    ordered = [names[key] for key in (*NAMED_TOKENS, *own) if key in names]
    return [text for text in dict.fromkeys([*ordered, *texts]) if text]


def with_stated(found: Mapping[int, Token], stated: Iterable[Token], checkpoint: Checkpoint) -> dict[int, Token]:
    """Added tokens, together with those of other files.

    Raises:
        UserError: two files give one id to two texts, or two ids to one.
    """
    merged = dict(found)
    ids = {entry["content"]: number for number, entry in found.items()}
    for entry in stated:
        number, text = entry["id"], entry["content"]
        other = merged.get(number, entry)["content"]
        if other != text or ids.get(text, number) != number:
            where = f"{text} is token {ids[text]}" if text in ids else f"token {number} is {other}"
            raise UserError(
                f"the files of the tokenizer in {checkpoint.folder} contradict each other ({where}, and token {number} "
                f"is {text}): {ADVICE}"
            )
        merged[number], ids[text] = entry, number
    return merged


def unnumbered(texts: Iterable[str], known: Mapping[int, Token], vocabulary: Mapping[str, int]) -> dict[int, Token]:
    """Special tokens that are named without an id, and are not among the added ones yet.

    A token in the vocabulary has its id there. Others come after all tokens, as transformers adds them.
    """
    held, found = {entry["content"] for entry in known.values()}, dict[int, Token]()
    for text in texts:
        if text not in held:
            number = vocabulary.get(text, max([-1, *vocabulary.values(), *known, *found]) + 1)
            found[number] = token(number, text, Path(TOKENIZER_CONFIG))
    return found
