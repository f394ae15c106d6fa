"""From text to ids: ALBERT's SentencePiece and RoBERTa's byte-level BPE, each equal to the slow tokenizer of transformers."""

import functools
import gc
import io
import json
import os
import random
import re
import sys
import unicodedata
from heapq import heapify, heappop, heappush
from pathlib import Path

import sentencepiece

from checkpoint import InputError, atomic_write


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


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
