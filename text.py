"""From text to ids: ALBERT's SentencePiece, RoBERTa's byte-level BPE and BERT's WordPiece.

The ids are those of the slow tokenizers of transformers 4.57.6 (its fast ones give others), but for one
thing: the string of a special token, such as "[SEP]", is plain text in a text.
"""

import functools
import gc
import io
import itertools
import random
import re
import string
from pathlib import Path
from unicodedata import category, combining, normalize

import sentencepiece

from checkpoint import InputError, atomic_write, check, fields, guard, read_json, shorten, write_json


# ---- what the three share ----

class Tokenizer:
    """pad_id, cls_id, sep_id and unk_id are the ids of special tokens, vocab_size is the largest id + 1."""
    separators, segment_b = 1, 1    # separators between A and B, and the segment of B
    obeyed, settings = {}, {}    # what the class follows in tokenizer_config.json: defaults, and this one's
    fixed = {}    # what else there changes the ids, with the only value that the class knows

    def set_vocabulary(self, ids):
        """Takes the ids by piece. Raises ValueError where a special token has none."""
        needed = self.special[:4]    # the fifth, the mask, may be missing
        check(set(needed) <= set(ids), f"it lacks one of the pieces {', '.join(needed)}")
        self.cls_id, self.sep_id, self.pad_id, self.unk_id = [ids[piece] for piece in needed]
        self.pieces = {index: piece for piece, index in ids.items()}
        self.vocab_size = max(self.pieces) + 1
        # What a text can become: never a separator or padding, whatever is written in it.
        self.ids = {piece: index for piece, index in ids.items() if piece not in self.special}
        self.word_ids = functools.lru_cache(1 << 17)(self.word_ids)

    def encode(self, a, b=None, max_length=128):
        """Returns (ids, segments) of the text a or the pair a, b: [CLS] A [SEP] or [CLS] A [SEP] B [SEP] with
        segment 1 for B [SEP]; RoBERTa: <s> A </s> or <s> A </s></s> B </s> with segment 0. The longer text,
        B if both are equal, loses its last token until all fit into max_length."""
        return self.encode_all([(a, b)], max_length)[0]

    def encode_all(self, examples, max_length=128):
        """encode() of each (text, None) or (text_a, text_b) in a list; further fields do not count."""
        if any(isinstance(example, str) for example in examples):
            raise TypeError("expected examples like (text, None), found a string")
        texts = [re.sub("[\ud800-\udfff]", "\ufffd", text)
                 for example in examples for text in example[:2] if text is not None]
        gc.disable()    # no new list is garbage, and looking for some takes as long as all the rest
        try:
            ids = iter(self.texts_ids(texts))
            return [self.join(next(ids), b if b is None else next(ids), max_length) for _, b, *_ in examples]
        finally:
            gc.enable()

    def texts_ids(self, texts):
        """The ids of each text, word by word; word_ids() remembers what it has had."""
        return [[index for word in self.words(text) for index in self.word_ids(word)] for text in texts]

    def join(self, a, b, max_length):
        """encode() of the ids of the texts."""
        room = max_length - (2 if b is None else 2 + self.separators)
        check(room >= 0, f"max_length {max_length} leaves no room for the special tokens")
        if b is None:
            return [self.cls_id, *a[:room], self.sep_id], [0] * (2 + len(a[:room]))
        keep_b = min(len(b), max(room // 2, room - len(a)))
        first = [self.cls_id, *a[:room - keep_b], *[self.sep_id] * self.separators]
        second = [*b[:keep_b], self.sep_id]
        return first + second, [0] * len(first) + [self.segment_b] * len(second)

    def tokens(self, ids):
        """The pieces of the ids, as the vocabulary spells them."""
        return [self.pieces[index] for index in ids]

    def save(self, folder):
        """Writes the files that were read, byte for byte, and a tokenizer_config.json if it is needed."""
        for name, data in self.files.items():
            with atomic_write(Path(folder) / name) as file:
                file.write(data)
        if self.settings != self.obeyed:
            write_json(Path(folder) / "tokenizer_config.json", self.settings)


def read_lines(data):
    """The lines of a file's bytes. ValueError where it does not end with its last line."""
    *lines, last = data.decode("utf-8").replace("\r\n", "\n").split("\n")
    check(last == "", "it breaks off within a line")
    return lines


# ---- ALBERT ----

class AlbertTokenizer(Tokenizer):
    """SentencePiece over cleaned text."""
    special = ("[CLS]", "[SEP]", "<pad>", "<unk>", "[MASK]")
    obeyed = {"do_lower_case": True, "keep_accents": False}
    fixed = {"remove_space": True, "sp_model_kwargs": {}}

    def __init__(self, model_file, lower_case=True, keep_accents=False):
        self.model_file, self.model = model_file, sentencepiece.SentencePieceProcessor()
        self.settings = {"do_lower_case": lower_case, "keep_accents": keep_accents}
        with guard(model_file, "SentencePiece model"):
            self.files = {"spiece.model": Path(model_file).read_bytes()}
            # 3 is normalizer_spec, with which it ends; half a file is a whole model of fewer pieces.
            check(3 in dict(fields(self.files["spiece.model"])), "it breaks off")
            self.model.LoadFromSerializedProto(self.files["spiece.model"])
            self.set_vocabulary({self.model.id_to_piece(i): i for i in range(self.model.get_piece_size())})
            # Where one of these occurs, SentencePiece's own ids are not the slow tokenizer's.
            self.odd = {i for i, piece in self.pieces.items() if self.word_ids(piece) != [i]} | {self.unk_id}

    def texts_ids(self, texts):
        texts = [clean(text, **self.settings) for text in texts]
        with guard(self.model_file, "SentencePiece model"):    # some damage shows only here
            ids_of_texts = self.model.encode(texts)
            for n, ids in enumerate(ids_of_texts):
                if not self.odd.isdisjoint(ids):
                    [ids_of_texts[n]] = super().texts_ids([texts[n]])
        return ids_of_texts

    def words(self, text):
        return self.model.encode(text, out_type=str)

    def word_ids(self, piece):
        """The ids of a piece. One like "▁3," is cut: its digits are encoded anew, and the comma follows."""
        parts = [piece]
        if piece.endswith(",") and piece[-2:-1].isdigit():
            parts = [*self.words(piece[:-1].replace("▁", "")), ","]
            if not piece.startswith("▁"):
                parts[0] = parts[0].removeprefix("▁")
        return [self.ids.get(part, self.unk_id) for part in parts if part]


def clean(text, do_lower_case=True, keep_accents=False):
    """ALBERT's text before SentencePiece: single spaces, `` and '' as ", NFKD without marks, lower case."""
    text = " ".join(text.split()).replace("``", '"').replace("''", '"')
    if not text.isascii():
        # The reference lowers each character by itself, so no sigma becomes a final one; and normalize() of
        # a whole text takes quadratic time to sort marks, which are dropped.
        if do_lower_case:
            text = "".join([c.lower() for c in text])
        if not keep_accents:
            text = "".join([normalize("NFKD", c) for c in text])
            text = "".join([c for c in text if not combining(c)])
    return text.lower() if do_lower_case else text


def train_tokenizer(texts, folder, vocab_size=8000, seed=0):
    """Trains a SentencePiece model with ALBERT's special ids -> AlbertTokenizer of FOLDER/spiece.model. It is
    of the kind "bpe": ALBERT's, "unigram", makes no piece of a word that is not part of a longer one."""
    texts, model = [text for text in map(clean, texts) if text], io.BytesIO()
    if len(texts) > 100_000:
        texts = random.Random(seed).sample(texts, 100_000)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            hard_vocab_limit=False, normalization_rule_name="identity", character_coverage=0.9999,
            num_threads=1, minloglevel=2, pad_id=0, unk_id=1, bos_id=-1, eos_id=-1, pad_piece="<pad>",
            control_symbols=["[CLS]", "[SEP]", "[MASK]"])
    except RuntimeError as error:
        raise InputError(f"no tokenizer of {vocab_size} pieces can be trained on these {len(texts)} texts, "
                         f"use others: {shorten(str(error))}") from None
    path = Path(folder) / "spiece.model"
    with atomic_write(path) as file:
        file.write(model.getvalue())
    return AlbertTokenizer(path)


# ---- RoBERTa ----

# GPT-2's pattern, in ASCII, for `re` has no class of all letters or all numbers; ascii_like() does the rest.
WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[a-zA-Z]+| ?[0-9]+| ?[^\sa-zA-Z0-9]+|\s+(?!\S)|\s+", re.ASCII)


class RobertaTokenizer(Tokenizer):
    """Byte-level BPE: the bytes of each word, as symbols, are merged in the order of merges.txt."""
    special = ("<s>", "</s>", "<pad>", "<unk>", "<mask>")
    separators, segment_b = 2, 0
    fixed = {"add_prefix_space": False}

    def __init__(self, vocab_json, merges_txt):
        with guard(vocab_json, "vocab.json"):
            ids = read_json(vocab_json)
            numbers = {index for index in ids.values() if type(index) is int}
            good = len(numbers) == len(ids) and min(numbers) == 0 and max(numbers) < len(ids) + 10
            check(good, "its ids do not number its pieces from 0 on, with at most 10 left out")    # 2019's: 3
            self.set_vocabulary(ids)
        with guard(merges_txt, "merges.txt"):
            self.files = {Path(path).name: Path(path).read_bytes() for path in (vocab_json, merges_txt)}
            version, *lines = read_lines(self.files["merges.txt"])
            self.ranks = {(a, b): rank for rank, (a, b) in enumerate([line.split(" ") for line in lines])}
            good = version.startswith("#version") and all([a + b in ids for a, b in self.ranks])
            check(good, "it has no #version, or a line makes a piece that vocab.json lacks")
        # A byte is written as itself where that can be seen, else as one of the characters from U+0100 on.
        visible, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, map(chr, range(256, 512))
        self.symbols = [chr(byte) if byte in visible else next(others) for byte in range(256)]

    def words(self, text):
        if text.isascii():
            return WORDS.findall(text)
        kinds = "".join([ascii_like(c) for c in text])
        return [text[match.start():match.end()] for match in WORDS.finditer(kinds)]

    def word_ids(self, word):
        pieces = merge([self.symbols[byte] for byte in word.encode("utf-8")], self.ranks)
        return [self.ids.get(piece, self.unk_id) for piece in pieces]


def ascii_like(c):
    """A character of ASCII of the same kind for WORDS: letter, number, white space or another."""
    if c.isascii():
        return c
    return "\n" if c.isspace() else {"L": "a", "N": "0"}.get(category(c)[0], "!")


def merge(pieces, ranks):
    """Byte pair encoding: time and again, the pair of neighbours of the lowest rank is merged all over."""
    while len(pieces) > 1:
        pair = min(set(zip(pieces, pieces[1:])), key=lambda pair: ranks.get(pair, float("inf")))
        if pair not in ranks:
            break
        a, b = pair    # spaces on both sides of each piece make the merge a replacement of text
        pieces = "".join([f" {piece} " for piece in pieces]).replace(f" {a}  {b} ", f" {a}{b} ").split()
    return pieces


# ---- BERT ----

CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf"
                     "\U0002f800-\U0002fa1f]")


class BertTokenizer(Tokenizer):
    """WordPiece: the longest pieces of each word, from left to right."""
    special = ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]")
    obeyed = {"do_lower_case": True}
    fixed = {"tokenize_chinese_chars": True, "do_basic_tokenize": True, "never_split": [],
             "strip_accents": None}    # which follows do_lower_case

    def __init__(self, vocab_txt, lower_case=True):
        self.settings = {"do_lower_case": lower_case}
        with guard(vocab_txt, "vocab.txt"):
            self.files = {"vocab.txt": Path(vocab_txt).read_bytes()}
            pieces = read_lines(self.files["vocab.txt"])
            check(len(set(pieces)) == len(pieces), "it has a piece twice")
            self.set_vocabulary({piece: index for index, piece in enumerate(pieces)})

    def words(self, text):
        return text.split(" ")    # none of the steps of word_ids() looks beyond a space

    def word_ids(self, word):
        """The ids of a text without spaces."""
        text = [c for c in word if c in "\t\n\r" or (category(c)[0] != "C" and c != "\ufffd")]
        if self.settings["do_lower_case"]:
            text = [c for c in ordered("".join([c.lower() for c in text])) if category(c) != "Mn"]
        else:
            text = normalize("NFC", ordered(text))
        words = "".join([f" {c} " if is_word(c) else c for c in text]).split()
        return [index for word in words for index in self.longest_pieces(word)]

    def longest_pieces(self, word):
        if len(word) > 100:
            return [self.unk_id]
        ids, start = [], 0
        while start < len(word):
            prefix = "##" if start > 0 else ""
            ends = [end for end in range(start + 1, len(word) + 1) if prefix + word[start:end] in self.ids]
            if not ends:
                return [self.unk_id]
            ids.append(self.ids[prefix + word[start:ends[-1]]])
            start = ends[-1]
        return ids


def ordered(text):
    """NFD in linear time: normalize() orders each run of marks by insertion, so sorted() does it here."""
    runs = itertools.groupby("".join([normalize("NFD", c) for c in text]), key=lambda c: combining(c) > 0)
    return "".join([c for _, run in runs for c in sorted(run, key=combining)])


def is_word(c):
    """Punctuation, which has ASCII's symbols in it for BERT, and ideographs are words of their own."""
    return c in string.punctuation or category(c)[0] == "P" or CHINESE.match(c) is not None


# ---- from a folder ----

def load_tokenizer(folder):
    """The tokenizer whose files are in the folder. What tokenizer_config.json and added_tokens.json say of
    ids is obeyed or an InputError; special_tokens_map.json and tokenizer.json are not read."""
    folder = Path(folder)
    for kind, *names in ((AlbertTokenizer, "spiece.model"), (AlbertTokenizer, "30k-clean.model"),
                         (RobertaTokenizer, "vocab.json", "merges.txt"), (BertTokenizer, "vocab.txt")):
        if all((folder / name).is_file() for name in names):
            return kind(*[folder / name for name in names], *read_settings(folder, kind))
    raise InputError(f"{folder} has no tokenizer: expected spiece.model or 30k-clean.model (ALBERT), "
                     "vocab.json and merges.txt (RoBERTa) or vocab.txt (BERT); copy them from its source")


def read_settings(folder, kind):
    """The values of kind.obeyed in the folder. InputError if it asks for ids that the class does not give."""
    files = folder / "tokenizer_config.json", folder / "added_tokens.json"
    settings, tokens = [read_json(file) if file.is_file() or file.is_symlink() else {} for file in files]
    with guard(files[0], "tokenizer_config.json"):
        added = [value for key, value in settings.items() if key.endswith("_token") and value]
        added += settings.get("additional_special_tokens") or []
        added += settings.get("added_tokens_decoder", {}).values()
        tokens = [*tokens, *[token["content"] if isinstance(token, dict) else token for token in added]]
    values = {key: settings.get(key, default) for key, default in kind.obeyed.items()}
    odd = [key for key, value in values.items() if type(value) is not bool]
    odd += [key for key, value in kind.fixed.items() if settings.get(key) not in (value, None)]
    odd += [str(token) for token in tokens if token not in kind.special]
    if odd:
        raise InputError(f"{folder}: its tokenizer has {shorten(', '.join(odd))}, which changes the ids, but "
                         f"{kind.__name__} does not know how; use a model without that")
    return values.values()
