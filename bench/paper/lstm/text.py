"""Text as word indices: three files of a folder, or the help pages that come with Python."""

from __future__ import annotations

import collections
import hashlib
import importlib
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SPLITS = "train", "valid", "test"
UNKNOWN, END = "<unk>", "<eos>"
# Tokens of the help pages in each split, and their vocabulary.
HELP_TOKENS, HELP_WORDS = (12_000, 6_000, 8_000), 1_000


@dataclass(frozen=True)
class Corpus:
    """Word indices of the splits and the vocabulary."""

    name: str
    words: list[str]
    train: Tensor
    valid: Tensor
    test: Tensor


def read(folder: str | Path) -> Corpus:
    """``train.txt``, ``valid.txt`` and ``test.txt`` of a folder, or ``NAME.train.txt`` and so on.

    A token is what stands between white space; every line ends with ``<eos>``. The vocabulary is that of the training
    text; other words are ``<unk>``.

    Raises:
        FileNotFoundError: If a split has not one file.
        ValueError: If a split is empty, or other splits have words that the training text has not, and it no ``<unk>``.
    """
    folder = Path(folder)
    tokens = {}
    for split in SPLITS:
        found = sorted({*folder.glob(f"{split}.txt"), *folder.glob(f"*.{split}.txt")})
        if len(found) != 1:
            raise FileNotFoundError(
                f"data-dir: expected one file {split}.txt or NAME.{split}.txt in {folder}, found {len(found)}"
            )
        with found[0].open(encoding="utf8") as lines:
            tokens[split] = [word for line in lines for word in (*line.split(), END)]
        if len(tokens[split]) < 2:
            raise ValueError(f"data-dir: expected text in {found[0]}, got {len(tokens[split])} tokens")
    return _indexed(folder.name, tokens, sorted(set(tokens["train"])))


def help_pages() -> Corpus:
    """The help topics of this Python, ``pydoc_data.topics``: 12k, 6k and 8k tokens, 1,000 words.

    The topics come in the order of their names' hashes, one split after another; a paragraph that was there before is
    left out. The pages differ a little from one version of Python to the next, and with them the perplexities.

    Raises:
        ValueError: If the pages of this Python are too short.
    """
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    order = sorted(topics, key=lambda topic: hashlib.sha256(topic.encode()).digest())
    paragraphs = dict.fromkeys(paragraph for topic in order for paragraph in topics[topic].split("\n\n"))
    stream = [token for paragraph in paragraphs for token in (*re.findall(r"[a-z]+", paragraph.lower()), END)]
    if len(stream) < sum(HELP_TOKENS):
        raise ValueError(f"help pages: expected {sum(HELP_TOKENS)} tokens, found {len(stream)}")
    ends = list(itertools.accumulate(HELP_TOKENS, initial=0))
    tokens = {split: stream[a:b] for split, a, b in zip(SPLITS, ends[:-1], ends[1:], strict=True)}
    common = collections.Counter(tokens["train"]).most_common()
    kept = sorted(sorted(common, key=lambda item: (-item[1], item[0]))[: HELP_WORDS - 1])
    return _indexed("help", tokens, [UNKNOWN, *(word for word, _ in kept)])


def _indexed(name: str, tokens: dict[str, list[str]], words: list[str]) -> Corpus:
    index = {word: i for i, word in enumerate(words)}
    unknown = index.get(UNKNOWN)
    splits = {}
    for split, text in tokens.items():
        numbers = [index.get(word, unknown) for word in text]
        if None in numbers:
            raise ValueError(f"{split}: expected words of the training text, got {text[numbers.index(None)]!r}")
        splits[split] = torch.tensor(numbers)
    return Corpus(name, words, **splits)


def columns(text: Tensor, batch: int) -> Tensor:
    """The text cut into ``batch`` equal columns, ``(tokens per column, batch)``; the rest is left out.

    Raises:
        ValueError: If the columns would have fewer than two tokens.
    """
    rows = len(text) // batch
    if rows < 2:
        raise ValueError(f"batch: expected at most half of the {len(text)} tokens, got {batch}")
    return text[: rows * batch].view(batch, rows).T.contiguous()


def windows(text: Tensor, bptt: int) -> int:
    """The number of windows of ``bptt`` steps in columns of text, the last one shorter."""
    return -(-(len(text) - 1) // bptt)


def window(text: Tensor, bptt: int, i: int) -> tuple[Tensor, Tensor]:
    """Window i: its words, and for each the word that follows."""
    first, last = i * bptt, min((i + 1) * bptt, len(text) - 1)
    return text[first:last], text[first + 1 : last + 1]


def fingerprint(parts: Iterable[Tensor]) -> str:
    """A hash of word indices: tells whether two machines had the same text."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()[:16]
