"""From text to tensors to scores: the GLUE tasks and the built-in task `parity`, tokenizers, batches, metrics,
submissions.

Read in this order: TASKS, load(), AlbertTokenizer, buckets(), score(); the rest stands below, in sections of its own.
Whatever a file, a row or an argument can get wrong is an InputError, one sentence for a person.
"""

import functools
import gc
import io
import json
import os
import random
import re
import sys
import unicodedata
import zipfile
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch

from checkpoint import InputError, atomic_write, cache_dir, download, extract_zip


# Tasks ----------------------------------------------------------------------------------------------------------------

class Example(NamedTuple):
    """One row: text_b is None for a single sentence; label is a class index, a float (stsb), or None (GLUE's test
    sets)."""
    text_a: str
    text_b: str | None
    label: int | float | None


class Source(NamedTuple):
    """A file to download: URL, size in bytes and sha256."""
    url: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Task:
    """A row of TASKS. `columns` and `label_column` are names in the files' headers; `rows` has the published row
    counts."""
    name: str
    folder: str                        # in the zips, in --data-dir, and the stem of the submission's file
    labels: tuple[str, ...] | None     # the words in the files, in the order of their class index; None: regression
    columns: tuple[str, ...]
    label_column: str | None
    metrics: tuple[str, ...]           # "score" is their mean
    rows: dict[str, int] = field(hash=False)
    sources: tuple[Source, ...] = ()

    @property
    def num_labels(self) -> int:
        """Classes; 1 for regression."""
        return len(self.labels) if self.labels else 1

    @property
    def pair(self) -> bool:
        return len(self.columns) == 2

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.rows)

    @property
    def dev_splits(self) -> tuple[str, ...]:
        return tuple(s for s in self.rows if s.startswith("dev"))

    @property
    def test_splits(self) -> tuple[str, ...]:
        return tuple(s for s in self.rows if s.startswith("test"))


def _glue(file: str, size: int, sha256: str) -> tuple[Source, ...]:
    return (Source(f"https://dl.fbaipublicfiles.com/glue/data/{file}", size, sha256),)


def _mrpc(file: str, size: int, sha256: str) -> tuple[Source, ...]:
    return (Source(f"https://dl.fbaipublicfiles.com/senteval/senteval_data/{file}", size, sha256),)


def _counts(train: int, dev: int, test: int) -> dict[str, int]:
    return {"train": train, "dev": dev, "test": test}


# Sizes and sha256 as Hugging Face datasets (glue/dataset_infos.json) and TFDS (url_checksums/glue.txt) publish them,
# which agree. MRPC is not in GLUE's bucket: its train and dev sets are made of Microsoft's training file and the list
# of dev ids.
_BINARY, _NLI = ("0", "1"), ("entailment", "not_entailment")
_MNLI, _TWO = ("entailment", "neutral", "contradiction"), ("sentence1", "sentence2")
TASKS = {task.name: task for task in (
    Task("cola", "CoLA", _BINARY, ("sentence",), "label", ("matthews",), _counts(8551, 1043, 1063),
         _glue("CoLA.zip", 376971, "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff")),
    Task("sst2", "SST-2", _BINARY, ("sentence",), "label", ("accuracy",), _counts(67349, 872, 1821),
         _glue("SST-2.zip", 7439277, "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa")),
    Task("mrpc", "MRPC", _BINARY, ("#1 String", "#2 String"), "Quality", ("accuracy", "f1"), _counts(3668, 408, 1725),
         _mrpc("msr_paraphrase_train.txt", 1047044, "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89")
         + _mrpc("msr_paraphrase_test.txt", 441275, "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784")
         + _glue("mrpc_dev_ids.tsv", 6222, "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7")),
    Task("stsb", "STS-B", None, _TWO, "score", ("pearson", "spearman"), _counts(5749, 1500, 1379),
         _glue("STS-B.zip", 802872, "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85")),
    Task("qqp", "QQP", _BINARY, ("question1", "question2"), "is_duplicate", ("accuracy", "f1"),
         _counts(363846, 40430, 390965),
         _glue("QQP-clean.zip", 41696084, "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0")),
    Task("mnli", "MNLI", _MNLI, _TWO, "gold_label", ("accuracy",),
         {"train": 392702, "dev_matched": 9815, "dev_mismatched": 9832, "test_matched": 9796, "test_mismatched": 9847},
         _glue("MNLI.zip", 312783507, "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633")),
    Task("qnli", "QNLI", _NLI, ("question", "sentence"), "label", ("accuracy",), _counts(104743, 5463, 5463),
         _glue("QNLIv2.zip", 10627589, "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5")),
    Task("rte", "RTE", _NLI, _TWO, "label", ("accuracy",), _counts(2490, 277, 3000),
         _glue("RTE.zip", 697150, "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee")),
    Task("wnli", "WNLI", _BINARY, _TWO, "label", ("accuracy",), _counts(635, 71, 146),
         _glue("WNLI.zip", 28999, "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46")),
    Task("ax", "AX", _MNLI, _TWO, None, ("accuracy",), {"test": 1104},
         _glue("AX.tsv", 222257, "0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd")),
    Task("parity", "parity", ("opposite", "same"), _TWO, "label", ("accuracy",), _counts(30000, 1000, 1000)),
)}


def _task(name: str) -> Task:
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}: the tasks are {', '.join(TASKS)}")
    return TASKS[name]


def load(task: str, split: str, data_dir: str | Path | None = None) -> list[Example]:
    """The rows of one split, in the order of the file. Splits are train, dev and test; mnli has dev_matched,
    dev_mismatched, test_matched, test_mismatched; ax has test alone. Without `data_dir` the files are downloaded once
    into the cache.

    Rows are read as GLUE wrote them: no quoting, lines end at "\\n" alone, columns by their names in the header. A row
    with too few fields, or in a labelled split too many, is dropped, and stderr says how many; a test row with too many
    fields keeps its named columns, because the server wants a prediction for every row. Test sets have no labels
    (None). Anything else that is not as it should be raises InputError."""
    spec = _task(task)
    if split not in spec.splits:
        raise InputError(f"{task} has no split {split!r}: its splits are {', '.join(spec.splits)}")
    if task == "parity":
        return parity(split)
    paths = _find(spec, split, data_dir)
    if not paths:
        raise InputError(f"{Path(data_dir) / _choices(spec, split)[0][0]} is not there: pass --data-dir a folder that "
                         "holds it (the layout of GLUE's zips), or leave --data-dir out where there is a network")
    return _read(spec, split, *paths)


def sources(task: str, data_dir: str | Path | None = None) -> list[Path]:
    """The files that load() reads for all splits of the task that are there (downloaded first without `data_dir`)."""
    spec = _task(task)
    found = [path for split in spec.splits for path in _find(spec, split, data_dir)] if spec.sources else []
    return list(dict.fromkeys(found))


def _choices(task: Task, split: str) -> list[tuple[str, ...]]:
    """The sets of files, any of which will do for a split, the usual one first."""
    if task.name == "ax":
        return [("AX/AX.tsv",), ("AX.tsv",), ("diagnostic/diagnostic.tsv",), ("diagnostic.tsv",), ("AX/test.tsv",)]
    files = [(f"{split}.tsv",)]
    if task.name == "mrpc":
        raw = "msr_paraphrase_test.txt" if split == "test" else "msr_paraphrase_train.txt"
        files += [(raw,)] if split == "test" else [(raw, "mrpc_dev_ids.tsv"), (raw, "dev_ids.tsv")]
    return [tuple(f"{folder}{name}" for name in names) for folder in (f"{task.folder}/", "") for names in files]


def _find(task: Task, split: str, data_dir: str | Path | None) -> tuple[Path, ...]:
    """The file of a split (and MRPC's dev ids where the split is made from the raw file), or () if `data_dir` has
    none."""
    if data_dir is None:
        data_dir = _fetch(task)
    elif not os.path.isdir(data_dir):
        raise InputError(f"{data_dir} is not there or not a folder: pass --data-dir the folder that holds "
                         f"{task.folder}/, or leave it out where there is a network for the download")
    for names in _choices(task, split):
        paths = tuple(Path(data_dir) / name for name in names)
        if all(map(os.path.isfile, paths)):
            return paths
    return ()


def _fetch(task: Task) -> Path:
    """Download and unpack what is not yet in the cache; returns a folder there that is laid out like --data-dir."""
    root = cache_dir() / "glue"
    for url, size, sha256 in task.sources:
        name = url.rsplit("/", 1)[1]
        unpacked = root / name.removesuffix(".zip") if name.endswith(".zip") else None
        if unpacked and os.path.isdir(unpacked):
            return unpacked
        path = root / name if unpacked else root / task.folder / name
        try:
            download([url], path, sha256=sha256, size=size)
        except InputError as error:
            wanted = " and ".join(_choices(task, task.splits[0])[0])
            raise InputError(f"could not fetch {task.folder}'s data from {url} ({str(error).rstrip('.')}): run once "
                             f"where there is a network, or pass --data-dir FOLDER that has FOLDER/{wanted}") from None
        if unpacked:    # text packs to a third or so: a member 20 times the size of its archive is no data set
            return extract_zip(path, unpacked, {f"{task.folder}/{split}.tsv": 20 * size for split in task.splits})
    return root


def _lines(path: Path):
    """Yields (line number, fields). Bytes are split at b"\\n" alone: text may hold U+0085, U+2028 and other "line
    ends"."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removesuffix(b"\n").removesuffix(b"\r")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")    # a BOM; further down it would be text
                if line:
                    yield number, line.decode("utf-8").split("\t")
    except UnicodeDecodeError:
        raise InputError(f"{path}, line {number}, is not UTF-8 text: fetch the file again or convert it") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the file and its permissions") from None


def _read(task: Task, split: str, path: Path, dev_ids_path: Path | None = None) -> list[Example]:
    labelled = not split.startswith("test")
    lines = _lines(path)
    if task.name == "cola" and labelled:
        header, header_line = ["source", "label", "mark", "sentence"], None    # CoLA's train and dev have no header
    else:
        header_line, header = next(lines, (None, None))
        if header is None:
            raise InputError(f"{path} is empty: expected a header line and rows, so fetch the file again")
    wanted = list(task.columns) + [task.label_column] * labelled + ["#1 ID", "#2 ID"] * bool(dev_ids_path)
    absent = [name for name in wanted if name not in header]
    if absent:
        raise InputError(f"{path} has no column {absent[0]!r}: expected a header with {', '.join(wanted)}, found "
                         f"{_short(', '.join(header))}; check that this is the file of {task.folder}, {split}")
    where = [header.index(name) for name in task.columns]
    label_at = header.index(task.label_column) if labelled else None
    if dev_ids_path:
        dev_ids, seen = _dev_ids(dev_ids_path), set()
        ids_at = header.index("#1 ID"), header.index("#2 ID")
    classes = {word: index for index, word in enumerate(task.labels or ())}

    examples, dropped, rows = [], [], 0
    for number, fields in lines:
        rows += 1
        if len(fields) < len(header) or labelled and (len(fields) > len(header) or not fields[label_at]):
            dropped.append(number)
            continue
        if dev_ids_path:
            ids = fields[ids_at[0]], fields[ids_at[1]]
            seen.add(ids)
            if (ids in dev_ids) != (split == "dev"):
                continue
        label = None
        if labelled:
            word = fields[label_at]
            label = classes.get(word) if task.labels else _similarity(word)
            if label is None:
                expected = "one of " + ", ".join(task.labels) if task.labels else "a number from 0 to 5"
                raise InputError(f"{path}, line {number}, has the label {_short(word)!r}: expected {expected} in "
                                 f"column {label_at + 1}, so correct or remove the row")
        examples.append(Example(fields[where[0]], fields[where[1]] if task.pair else None, label))
    if dropped:
        print(f"{path}: dropped {len(dropped)} of {rows} rows, which have not the {len(header)} fields they should "
              f"(the first is line {dropped[0]})", file=sys.stderr)
    if dev_ids_path and dev_ids - seen:
        raise InputError(f"{len(dev_ids - seen)} of the {len(dev_ids)} dev ids in {dev_ids_path} are not in {path}: "
                         "the two files are not whole or not of one release, so fetch both again")
    if not examples:
        found = "no usable row" if rows else "a header but no rows" if header_line else "no rows"
        raise InputError(f"{path} has {found}: fetch the file again")
    return examples


def _dev_ids(path: Path) -> set[tuple[str, str]]:
    ids = set()
    for number, fields in _lines(path):
        if len(fields) != 2:
            raise InputError(f"{path}, line {number}, has {len(fields)} fields: expected two ids with a tab between, "
                             "so fetch the file again")
        ids.add((fields[0], fields[1]))
    if not ids:
        raise InputError(f"{path} is empty: expected MRPC's dev ids, so fetch the file again")
    return ids


def _similarity(word: str) -> float | None:
    try:
        value = float(word)
    except ValueError:
        return None
    return value if 0 <= value <= 5 else None


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


# The built-in task ----------------------------------------------------------------------------------------------------

# Phrases of both kinds have four words. How many phrases a text has is drawn first and then, at even odds, its label:
# so neither its length nor its number of phrases says anything about the label. Measured with a 12-layer ALBERT (H 64)
# from scratch: up to three phrases, of words that the two kinds do not share, it learns in 400 steps; with four, or
# with words in common, or with no short texts among them, it stays for long at "is there any negation?", 75%.
_NEGATING = ("it is false that", "it is wrong that", "it is untrue that")
_NEUTRAL = ("they all say that", "we all know that", "you all hear that")
_MOST_PHRASES = 3
_ADJECTIVES = ("red", "old", "small", "tall", "quiet", "happy", "grey", "young", "brave", "lazy", "kind", "thin")
_NOUNS = ("cat", "dog", "bird", "king", "child", "horse", "nurse", "wolf", "poet", "pilot", "fox", "judge", "duke",
          "clown", "queen", "goat", "baker", "monk", "bear", "guest")
_VERBS = ("sleeps", "runs", "sings", "waits", "jumps", "laughs", "eats", "reads", "swims", "dreams", "works", "hides",
          "walks", "smiles", "cooks", "writes")


def parity(split: str, seed: int = 0) -> list[Example]:
    """PonderNet's parity experiment told in sentence pairs: text_b is text_a under k = 0..3 nested negations, mixed
    with neutral phrases; the label is 1 ("same") where k is even. Half the rows of a split are of either class, also
    among the texts with the same number of phrases, and no pair occurs twice in the three splits. The same seed gives
    the same rows."""
    rows, draw, seen = TASKS["parity"].rows, random.Random(seed), set()
    if split not in rows:
        raise InputError(f"parity has no split {split!r}: its splits are {', '.join(rows)}")

    def pick(words):
        return words[int(draw.random() * len(words))]

    for name in ("test", "dev", "train"):    # train last: the two small ones are made without it
        part = []
        while len(part) < rows[name]:
            label = len(part) % 2
            phrases = pick(range(1, _MOST_PHRASES + 1))
            k = pick(range(0 if label else 1, phrases + 1, 2))
            negating = set(draw.sample(range(phrases), k))
            said = [pick(_NEGATING if i in negating else _NEUTRAL) for i in range(phrases)]
            sentence = f"the {pick(_ADJECTIVES)} {pick(_NOUNS)} {pick(_VERBS)}"
            example = Example(sentence, f"{' '.join(said)} {sentence}", label)
            if example not in seen:
                seen.add(example)
                part.append(example)
        if name == split:
            draw.shuffle(part)
            return part


def negations(text_b: str) -> int:
    """How many negating phrases of parity() stand in the text: k."""
    return sum(text_b.count(phrase) for phrase in _NEGATING)


# Tokenizers -----------------------------------------------------------------------------------------------------------

_SURROGATES = re.compile("[\ud800-\udfff]")
_REPLACEMENT = "\ufffd"
_NOT_ASCII = re.compile("[^\0-\x7f]+")


def _join(start: int, middle: list[int], end: int, segment_b: int, a: list[int], b: list[int] | None, max_length: int):
    """start A end, or start A middle B end, cut to max_length: token by token from the end of the longer of A and B, of
    B on a tie. `segment_b` is the segment of B and of the end after it. -> ids, segments"""
    special = 2 if b is None else 2 + len(middle)
    room = max_length - special
    if room < 0:
        raise InputError(f"max_length is {max_length}: expected at least {special}, the number of special tokens")
    if b is None:
        ids = [start, *(a if len(a) <= room else a[:room]), end]
        return ids, [0] * len(ids)
    if len(a) + len(b) > room:
        keep_b = min(len(b), max(room // 2, room - len(a)))
        a, b = a[:room - keep_b], b[:keep_b]
    ids = [start, *a, *middle, *b, end]
    first = 1 + len(a) + len(middle)
    return ids, [0] * first + [segment_b] * (len(ids) - first)


def _join_all(ids_of_texts, examples, max_length: int, join):
    """Every text of the examples goes through `ids_of_texts` in one call, and then `join` makes one input of each
    row."""
    collecting = gc.isenabled()
    gc.disable()    # many new lists and no cycle among them: to look for one again and again takes as long as the work
    try:
        ids_a = ids_of_texts([example[0] for example in examples])
        ids_b = iter(ids_of_texts([example[1] for example in examples if example[1] is not None]))
        return [join(a, None if example[1] is None else next(ids_b), max_length) for a, example in zip(ids_a, examples)]
    finally:
        if collecting:
            gc.enable()


class AlbertTokenizer:
    """ALBERT's SentencePiece tokenizer, equal to the slow AlbertTokenizer of transformers 4.57.6 (not to the
    fast ones, which differ). Special-token strings in a text are plain text. A file that is no such model raises InputError."""

    def __init__(self, model_file: str | Path):
        self.model_file = Path(model_file)
        self._model = _read_bytes(self.model_file)
        try:
            self._sp = sentencepiece.SentencePieceProcessor()
            self._sp.LoadFromSerializedProto(self._model)
            self.vocab_size = self._sp.get_piece_size()
            pieces = [self._sp.id_to_piece(i) for i in range(self.vocab_size)]
        except (RuntimeError, ValueError) as error:    # ValueError: a piece that is not UTF-8
            raise InputError(f"{self.model_file} is not a whole SentencePiece model ({_short(str(error))}): fetch it "
                             "again") from None
        self.pad_id, self.unk_id = self._special("<pad>"), self._sp.unk_id()
        self.cls_id, self.sep_id = self._special("[CLS]"), self._special("[SEP]")
        # "3," is one piece where text has it so, but Google's tokenizer wants the comma by itself: these ids are
        # replaced.
        self._split_ids = {i: self._split(piece) for i, piece in enumerate(pieces) if _ends_in_digit_comma(piece)}
        # Ids say too little about an unknown piece (it may end in a digit and a comma itself), so its text is done by
        # pieces.
        self._odd = frozenset(self._split_ids) | {self.unk_id}
        self._join = functools.partial(_join, self.cls_id, [self.sep_id], self.sep_id, 1)

    def _encode(self, texts, out_type: type = int):
        try:
            return self._sp.encode(texts, out_type=out_type)
        except (RuntimeError, ValueError) as error:    # damage that loading cannot see, such as in its normalizer
            raise InputError(f"{self.model_file} is damaged ({_short(str(error))}): fetch it again") from None

    def _special(self, piece: str) -> int:
        index = self._sp.piece_to_id(piece)
        if index == self._sp.unk_id():
            raise InputError(f"{self.model_file} has no piece {piece}: expected ALBERT's spiece.model, fetch it again")
        return index

    def _split(self, piece: str) -> list[int]:
        """The ids of a piece like "▁3,": its digits encoded anew (with ▁ only if it had one), then the comma."""
        parts = self._encode(piece[:-1].replace("▁", ""), str)
        if not piece.startswith("▁") and parts and parts[0].startswith("▁"):
            parts = parts[1:] if parts[0] == "▁" else [parts[0][1:], *parts[1:]]
        return [self._sp.piece_to_id(part) for part in [*parts, ","]]

    def _mend(self, text: str, ids: list[int]) -> list[int]:
        """The ids of a clean text as the reference has them, from SentencePiece's, in which some are odd."""
        if self.unk_id not in ids:
            for at in [at for at, i in enumerate(ids) if i in self._split_ids][::-1]:
                ids[at:at + 1] = self._split_ids[ids[at]]
            return ids
        mended = []
        for i, piece in zip(ids, self._encode(text, str)):
            if i != self.unk_id:
                mended += self._split_ids.get(i, (i,))
            elif _ends_in_digit_comma(piece):
                mended += self._split(piece)
            else:
                mended.append(self._sp.piece_to_id(piece))    # unknown, or the string of a special token
        return mended

    def _text_ids(self, text: str) -> list[int]:
        text = _clean(text)
        ids = self._encode(text)
        return ids if self._odd.isdisjoint(ids) else self._mend(text, ids)

    def _texts_ids(self, texts: list[str]) -> list[list[int]]:
        texts = [_clean(text) for text in texts]
        odd = self._odd
        return [ids if odd.isdisjoint(ids) else self._mend(text, ids) for text, ids in zip(texts, self._encode(texts))]

    def encode(self, a: str, b: str | None = None, max_length: int = 128) -> tuple[list[int], list[int]]:
        """[CLS] A [SEP] or [CLS] A [SEP] B [SEP] of at most max_length tokens -> ids, segments (0 for A, 1 for B)."""
        return self._join(self._text_ids(a), None if b is None else self._text_ids(b), max_length)

    def encode_all(self, examples, max_length: int = 128) -> list[tuple[list[int], list[int]]]:
        """encode() of every example (only its first two fields count), faster than one by one."""
        return _join_all(self._texts_ids, examples, max_length, self._join)

    def tokens(self, ids) -> list[str]:
        """The pieces of the ids, for people to read."""
        return [self._sp.id_to_piece(int(i)) for i in ids]

    def save(self, folder: str | Path) -> None:
        """Writes FOLDER/spiece.model, byte for byte the model that was read."""
        _write(folder, "spiece.model", self._model)


def _clean(text: str) -> str:
    """ALBERT's text before SentencePiece: single spaces, `` and '' -> ", NFKD without combining marks, lower case."""
    plain = text.isascii()
    if plain and text.isprintable() and "  " not in text:
        text = text.strip(" ")    # the same as the line below and, for most texts, cheaper
    else:
        text = " ".join(text.split())
    if "`" in text or "'" in text:
        text = text.replace("``", '"').replace("''", '"')
    if not plain:
        # The reference lowers character by character before this, so no capital sigma sees that it ends a word.
        text = _NOT_ASCII.sub(_plain, text.replace("Σ", "σ"))
    return text.lower()


def _plain(run: re.Match) -> str:
    """NFKD without combining marks. ASCII is its own NFKD and nothing combines across it, so run by run is exact."""
    text = unicodedata.normalize("NFKD", run[0])
    return _SURROGATES.sub(_REPLACEMENT, "".join([c for c in text if not unicodedata.combining(c)]))


def _ends_in_digit_comma(piece: str) -> bool:
    return len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit()


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the file and its permissions") from None


def _write(folder: str | Path, name: str, data: bytes) -> Path:
    path = Path(folder) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be made ({error.strerror}): name another") from None
    with atomic_write(path) as file:
        file.write(data)
    return path


def train_tokenizer(texts, folder: str | Path, vocab_size: int = 8000, seed: int = 0) -> AlbertTokenizer:
    """Trains a SentencePiece model with ALBERT's special ids on the texts (a sample of them, if there are very many)
    and writes FOLDER/spiece.model. Where the texts have too little in them for vocab_size pieces, there are fewer. The
    same texts and seed give the same model.

    The model is of the kind "bpe": SentencePiece's unigram trainer, which ALBERT used, counts every different word
    once, and so makes no piece of a word that is not part of a longer one; on `parity` it spells nearly letter by
    letter."""
    texts = list(texts)
    if len(texts) > 100_000:
        texts = random.Random(seed).sample(texts, 100_000)
    texts = [text for text in map(_clean, texts) if text]
    if not texts:
        raise InputError("there is no text to train a tokenizer on: expected at least one row that is not empty")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            hard_vocab_limit=False, normalization_rule_name="identity", character_coverage=0.9999, num_threads=1,
            pad_id=0, unk_id=1, bos_id=-1, eos_id=-1, pad_piece="<pad>", control_symbols=["[CLS]", "[SEP]", "[MASK]"],
            minloglevel=2)
    except RuntimeError as error:
        raise InputError(f"no tokenizer of {vocab_size} pieces can be trained on these {len(texts)} texts "
                         f"({_short(str(error))}): use more text or another size") from None
    return AlbertTokenizer(_write(folder, "spiece.model", model.getvalue()))


# Letters and numbers that came to Unicode after version 14 (Python 3.11's), up to the newest: with them the classes
# below are the same under every Python. (Hexadecimal, as FROM-TO.)
_NEW_LETTERS = (
    "558 58b-58c 88f c5c cdc 1c89-1c8a 208f 209d-209f a7cb-a7cf a7d2 a7d4 a7da-a7dd a7e2 a7f1 ab6c-ab6d 105c0-105f3 "
    "107bb-107bf 10940-10959 10d4a-10d65 10d6f-10d85 10ec2-10ec7 10ed9-10eee 1123f-11240 11380-11389 1138b 1138e "
    "11390-113b5 113b7 113d1 113d3 11b0a 11bc0-11be0 11db0-11ddb 11df1 11f02 11f04-11f10 11f12-11f33 1342f "
    "13441-13446 13460-143fa 16100-1611d 16d40-16d6c 16ea0-16eb8 16ebb-16ed3 16ff2-16ff3 187f8-187ff 18cd6-18cda "
    "18cff 18d09-18d20 18d80-18df2 18e00-19191 191a0-191d2 1b123-1b128 1b132 1b155 1b168 1d6a6 1df1f-1df81 "
    "1df90-1df96 1dfcd-1dfff 1e030-1e06d 1e4d0-1e4eb 1e5d0-1e5ed 1e5f0 1e6c0-1e6de 1e6e0-1e6e2 1e6e4-1e6e5 "
    "1e6e7-1e6ed 1e6f0-1e6f4 1e6fe-1e6ff 2b739-2b73f 2b81e 2cea2-2cead 2ebf0-2ee5d 31350-33479 3d000-3fc3f")
_NEW_NUMBERS = (
    "10d40-10d49 116d0-116e3 11bf0-11bf9 11de0-11de9 11f50-11f59 1246f 12475-1247f 12550-12686 16130-16139 "
    "16d70-16d79 16ff4-16ff6 1ccf0-1ccf9 1d2c0-1d2d3 1e4f0-1e4f9 1e5f1-1e5fa")


@functools.lru_cache(maxsize=1)
def _word_pattern() -> re.Pattern:
    """How GPT-2 cuts text into words, for `re`, which knows no \\p{L}, and whose \\s has U+001C to U+001F besides
    White_Space."""
    def ranges(kind: str, new: str) -> str:
        points = {c for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c))[0] == kind}
        for span in new.split():
            first, _, last = span.partition("-")
            points.update(range(int(first, 16), int(last or first, 16) + 1))
        starts = sorted(c for c in points if c - 1 not in points)
        ends = sorted(c for c in points if c + 1 not in points)
        return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in zip(starts, ends))
    letter, number = ranges("L", _NEW_LETTERS), ranges("N", _NEW_NUMBERS)
    space = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    return re.compile(f"'s|'t|'re|'ve|'m|'ll|'d| ?[{letter}]+| ?[{number}]+| ?[^{space}{letter}{number}]+"
                      f"|[{space}]+(?![^{space}])|[{space}]+")


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte in vocab.json and merges.txt: itself, or one from U+0100 on."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]


class RobertaTokenizer:
    """RoBERTa's byte-level BPE, equal to the slow RobertaTokenizer of transformers 4.57.6, save that special-token
    strings in a text are plain text. Segments are 0 throughout: the type vocabulary has one entry. Damaged files raise
    InputError."""

    def __init__(self, vocab_json: str | Path, merges_txt: str | Path):
        self._vocab_bytes, self._merges_bytes = _read_bytes(Path(vocab_json)), _read_bytes(Path(merges_txt))
        self._vocab = _parse_vocab(self._vocab_bytes, vocab_json)
        self._ranks = _parse_merges(self._merges_bytes, merges_txt, self._vocab)
        self._pieces = {index: piece for piece, index in self._vocab.items()}
        self.vocab_size = max(self._pieces) + 1
        self.cls_id, self.pad_id, self.sep_id, self.unk_id = (self._vocab[s] for s in ("<s>", "<pad>", "</s>", "<unk>"))
        self._symbols = _byte_symbols()
        self._words, self._cache = _word_pattern().findall, {}
        self._join = functools.partial(_join, self.cls_id, [self.sep_id, self.sep_id], self.sep_id, 0)

    def _text_ids(self, text: str) -> list[int]:
        ids = []
        for word in self._words(text):
            known = self._cache.get(word)
            if known is None:
                known = self._word_ids(word)
                if len(word) <= 50:
                    if len(self._cache) >= 100_000:
                        self._cache.clear()
                    self._cache[word] = known
            ids += known
        return ids

    def _texts_ids(self, texts: list[str]) -> list[list[int]]:
        return [self._text_ids(text) for text in texts]

    def _word_ids(self, word: str) -> list[int]:
        data = _SURROGATES.sub(_REPLACEMENT, word).encode("utf-8")
        pieces = _merge([self._symbols[byte] for byte in data], self._ranks)
        return [self._vocab.get(piece, self.unk_id) for piece in pieces]

    def encode(self, a: str, b: str | None = None, max_length: int = 128) -> tuple[list[int], list[int]]:
        """<s> A </s> or <s> A </s></s> B </s> of at most max_length tokens -> ids, segments (all 0)."""
        return self._join(self._text_ids(a), None if b is None else self._text_ids(b), max_length)

    def encode_all(self, examples, max_length: int = 128) -> list[tuple[list[int], list[int]]]:
        """encode() of every example (only its first two fields count)."""
        return _join_all(self._texts_ids, examples, max_length, self._join)

    def tokens(self, ids) -> list[str]:
        """The pieces of the ids, in the files' own spelling (Ġ is a space)."""
        return [self._pieces.get(int(i), "<unk>") for i in ids]

    def save(self, folder: str | Path) -> None:
        """Writes FOLDER/vocab.json and FOLDER/merges.txt, byte for byte the files that were read."""
        for name, data in (("vocab.json", self._vocab_bytes), ("merges.txt", self._merges_bytes)):
            _write(folder, name, data)


def _merge(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte pair encoding: as long as any two neighbours have a rank, the pair of lowest rank is merged wherever it
    stands, from left to right. A heap and a linked list, since one "word" may have 10,000 letters and the plain loop is
    quadratic."""
    last = len(pieces) - 1
    after, before = list(range(1, last + 2)), list(range(-1, last))
    heap = [(ranks[pair], i) for i, pair in enumerate(zip(pieces, pieces[1:])) if pair in ranks]
    heapify(heap)
    while heap:
        rank, fresh = heap[0][0], []
        while heap and heap[0][0] == rank:    # all places of this pair come before any pair that arises from it
            i = heappop(heap)[1]
            j = after[i]
            if pieces[i] is None or j > last or ranks.get((pieces[i], pieces[j])) != rank:
                continue    # an entry whose place has been merged meanwhile
            pieces[i], pieces[j] = pieces[i] + pieces[j], None
            after[i] = after[j]
            if after[i] <= last:
                before[after[i]] = i
            fresh += [place for place in (before[i], i) if place >= 0]
        for i in fresh:
            j = after[i]
            if pieces[i] is not None and j <= last and (pieces[i], pieces[j]) in ranks:
                heappush(heap, (ranks[pieces[i], pieces[j]], i))
    return [piece for piece in pieces if piece is not None]


def _parse_vocab(data: bytes, path: str | Path) -> dict[str, int]:
    try:
        vocab = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not whole JSON: expected RoBERTa's vocab.json, so fetch it again") from None
    ids = list(vocab.values()) if isinstance(vocab, dict) else [None]
    if not all(type(index) is int for index in ids) or sorted(ids) != list(range(len(ids))):
        raise InputError(f"{path} does not give every id from 0 on to one piece: it is damaged, so fetch it again")
    for piece in ("<s>", "<pad>", "</s>", "<unk>"):
        if piece not in vocab:
            raise InputError(f"{path} has no piece {piece}: expected RoBERTa's vocab.json, so fetch it again")
    return vocab


def _parse_merges(data: bytes, path: str | Path, vocab: dict[str, int]) -> dict[tuple[str, str], int]:
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: expected RoBERTa's merges.txt, so fetch it again") from None
    if not lines[0].startswith("#version"):
        raise InputError(f"{path} does not begin with #version: expected RoBERTa's merges.txt, so fetch it again")
    if lines[-1]:
        raise InputError(f"{path} breaks off in line {len(lines)}: expected a line end there, so fetch it again")
    ranks = {}
    for number, line in enumerate(lines[1:-1], 2):
        pair = tuple(line.removesuffix("\r").split(" "))
        if len(pair) != 2 or "".join(pair) not in vocab:
            raise InputError(f"{path}, line {number}, is not a merge of two pieces into one of the vocabulary: the "
                             "file is damaged or belongs to another vocab.json, so fetch both again")
        ranks[pair] = number
    return ranks


def load_tokenizer(folder: str | Path) -> AlbertTokenizer | RobertaTokenizer:
    """The tokenizer whose files are in the folder: spiece.model or 30k-clean.model, or vocab.json with merges.txt."""
    folder = Path(folder)
    for name in ("spiece.model", "30k-clean.model"):
        if os.path.isfile(folder / name):
            return AlbertTokenizer(folder / name)
    if os.path.isfile(folder / "vocab.json") and os.path.isfile(folder / "merges.txt"):
        return RobertaTokenizer(folder / "vocab.json", folder / "merges.txt")
    raise InputError(f"{folder} has no tokenizer: expected spiece.model or 30k-clean.model (ALBERT), or vocab.json and "
                     "merges.txt (RoBERTa), so copy them there from where the model came from")


# Batches --------------------------------------------------------------------------------------------------------------

def buckets(lengths, batch_size: int, generator: torch.Generator | None = None) -> list[list[int]]:
    """Cuts 0..N-1 into batches of rows of like length, so that little is padded; at most one batch is not full.

    With a generator (training): shuffled, sorted by length only within runs of 50 batches, and the batches shuffled, so
    every call gives a new order, which the generator's state decides alone. Without: longest first, ties in order. """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: expected 1 or more")
    lengths = np.asarray(lengths)
    if generator is None:
        order = np.argsort(-lengths, kind="stable").tolist()
        return [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    order = torch.randperm(len(lengths), generator=generator).numpy()
    batches = []
    for i in range(0, len(order), 50 * batch_size):
        run = order[i:i + 50 * batch_size]
        run = run[np.argsort(lengths[run], kind="stable")].tolist()    # ties stay in their random order
        batches += [run[j:j + batch_size] for j in range(0, len(run), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


# Metrics --------------------------------------------------------------------------------------------------------------

def score(task: str, predictions, labels) -> dict[str, float]:
    """The task's GLUE metrics and "score", their mean, which is the paper's number, all times 100. predictions and
    labels (N,): class indices, or for stsb numbers. Where scikit-learn or SciPy find a metric undefined (NaN), it is 0
    here. mnli's score is that of one dev set: the paper's is the mean over both."""
    spec = _task(task)
    predictions, labels = _column(predictions, "predictions"), _column(labels, "labels")
    if len(predictions) != len(labels) or not len(labels):
        raise InputError(f"{len(predictions)} predictions for {len(labels)} labels of {task}: expected as many, not 0")
    if spec.labels:
        for name, values in (("predictions", predictions), ("labels", labels)):
            if not np.isin(values, np.arange(spec.num_labels)).all():
                raise InputError(f"the {name} of {task} must be class indices from 0 to {spec.num_labels - 1}")
    values = {name: 100 * float(_METRICS[name](predictions, labels)) for name in spec.metrics}
    return values | {"score": sum(values.values()) / len(values)}


def _column(values, name: str) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    try:
        values = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"the {name} must be numbers (GLUE's test sets have no labels to score against)") from None
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or np.isnan(values).any() and name == "labels":
        raise InputError(f"the {name} must be one number a row, found the shape {values.shape}")
    return values


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return (predictions == labels).mean()


def _f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1."""
    both, either = ((predictions == 1) & (labels == 1)).sum(), (predictions == 1).sum() + (labels == 1).sum()
    return 2 * both / either if either else 0.0


def _matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation: Pearson's of two indicators, here from the counts."""
    n, p, t = len(labels), int(predictions.sum()), int(labels.sum())
    both = int((predictions * labels).sum())
    square = p * (n - p) * t * (n - t)
    return (n * both - p * t) / square**0.5 if square else 0.0


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    if (x == x[0]).all() or (y == y[0]).all() or not (np.isfinite(x).all() and np.isfinite(y).all()):
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.abs(x).max(), y / np.abs(y).max()    # so that no square over- or underflows
    return float(np.clip(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)), -1, 1))


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of the ranks; equal values share the mean of their ranks."""
    if np.isnan(x).any() or np.isnan(y).any():
        return 0.0
    return _pearson(_ranks(x), _ranks(y))


def _ranks(x: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


_METRICS = {"accuracy": _accuracy, "f1": _f1, "matthews": _matthews, "pearson": _pearson, "spearman": _spearman}


# GLUE's server --------------------------------------------------------------------------------------------------------

# The eleven files of a submission and the (task, split) that each holds.
SUBMISSION = {
    "CoLA.tsv": ("cola", "test"), "SST-2.tsv": ("sst2", "test"), "MRPC.tsv": ("mrpc", "test"),
    "STS-B.tsv": ("stsb", "test"), "QQP.tsv": ("qqp", "test"), "MNLI-m.tsv": ("mnli", "test_matched"),
    "MNLI-mm.tsv": ("mnli", "test_mismatched"),
    "QNLI.tsv": ("qnli", "test"), "RTE.tsv": ("rte", "test"), "WNLI.tsv": ("wnli", "test"), "AX.tsv": ("ax", "test"),
}


def submission_rows(task: str, split: str, predictions) -> tuple[str, list[str]]:
    """-> the file's name in the zip and its lines, header first: class words for mnli, qnli, rte and ax, else 0/1; for
    stsb the number, clipped to 0..5. predictions (N,): class indices or numbers, as many as the test set has rows, else
    InputError."""
    spec = _task(task)
    names = [name for name, key in SUBMISSION.items() if key == (task, split)]
    if not names:
        raise InputError(f"GLUE takes no predictions for {task}, {split}: it takes "
                         + ", ".join(f"{a} {b}" for a, b in SUBMISSION.values()))
    values = _column(predictions, "predictions")
    if len(values) != spec.rows[split]:
        raise InputError(f"{len(values)} predictions for {task}, {split}: GLUE expects {spec.rows[split]}, one a row, "
                         "so predict the whole test set of the published files")
    if spec.labels is None:
        if np.isnan(values).any():
            raise InputError(f"a prediction for {task}, {split}, is not a number: GLUE expects numbers from 0 to 5")
        words = [f"{value:.3f}" for value in np.clip(values, 0, 5)]
    else:
        if not np.isin(values, np.arange(spec.num_labels)).all():
            raise InputError(f"the predictions of {task} must be class indices from 0 to {spec.num_labels - 1}")
        words = [spec.labels[int(value)] for value in values]
    return names[0], ["index\tprediction", *(f"{index}\t{word}" for index, word in enumerate(words))]


def write_submission(zip_path: str | Path, predictions: dict) -> list[str]:
    """Writes the zip for GLUE's server from {(task, split): predictions (N,)} -> the names of the files that it lacks.
    The same predictions give the same bytes. Nothing is written unless every set of predictions is right."""
    files = dict(submission_rows(task, split, values) for (task, split), values in predictions.items())
    if not files:
        raise InputError("there are no predictions to submit: train at least one GLUE task first")
    with atomic_write(Path(zip_path)) as target, zipfile.ZipFile(target, "w") as archive:
        for name in SUBMISSION:
            if name in files:
                member = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
                member.external_attr = 0o644 << 16
                archive.writestr(member, "\n".join(files[name]) + "\n", zipfile.ZIP_DEFLATED)
    return [name for name in SUBMISSION if name not in files]
