"""From text to tensors to scores: the GLUE tasks and the built-in task `parity`, tokenizers, batches, metrics,
submissions.

Read in this order: TASKS, load(), AlbertTokenizer, buckets(), score(); the rest stands below, in sections of its own.
Whatever a file, a row or an argument can get wrong is an InputError, one sentence for a person.
"""

import os
import random
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from checkpoint import InputError, atomic_write, cache_dir, download, extract_zip
from text import _short


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
