"""From files to examples and from predictions to scores: GLUE's tasks, own data, and the task `parity`."""

import contextlib
import functools
import math
import os
import random
import stat
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch

from checkpoint import InputError, cache_dir, check, download, extract_zip, guard, say, shorten


# ---- tasks ----

# text_b is None for a single sentence; label is a class index, a number (regression) or None (unknown).
Example = namedtuple("Example", ("text_a", "text_b", "label"), defaults=(None, None))
SINGLE, PAIR, SPLITS = ("sentence",), ("sentence1", "sentence2"), ("train", "dev", "test")


class Task:
    """labels: the files' words by class index, or None for a regression; columns: the names of one or two
    texts in the header."""

    def __init__(self, name, folder, labels, columns=PAIR, label_column=None, metrics=None, splits=SPLITS):
        self.name, self.folder, self.labels, self.columns, self.splits = name, folder, labels, columns, splits
        self.label_column = label_column or ("label" if labels else "score")
        self.metrics = metrics or (("accuracy",) if labels else ("pearson", "spearman"))
        self.num_labels, self.pair = len(labels) if labels else 1, len(columns) == 2


BINARY, NLI = ("0", "1"), ("entailment", "not_entailment")
MNLI = ("entailment", "neutral", "contradiction")
MNLI_SPLITS = ("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched")
TASKS = {task.name: task for task in (
    Task("cola", "CoLA", BINARY, SINGLE, metrics=("matthews",)),
    Task("sst2", "SST-2", BINARY, SINGLE),
    Task("mrpc", "MRPC", BINARY, ("#1 String", "#2 String"), "Quality", ("accuracy", "f1")),
    Task("stsb", "STS-B", None),
    Task("qqp", "QQP", BINARY, ("question1", "question2"), "is_duplicate", ("accuracy", "f1")),
    Task("mnli", "MNLI", MNLI, label_column="gold_label", splits=MNLI_SPLITS),
    Task("qnli", "QNLI", NLI, ("question", "sentence")),
    Task("rte", "RTE", NLI),
    Task("wnli", "WNLI", BINARY),
    Task("ax", "AX", MNLI, splits=("test",)),
    Task("parity", "parity", ("opposite", "same")),    # built in, below
)}


@functools.cache            # a folder's training file is read once, and what it says stays
def get_task(name):
    """Returns the Task of a name in TASKS, or of a folder of own data: train.tsv, dev.tsv, perhaps test.tsv,
    with columns `sentence`, or `sentence1` and `sentence2`, and `label` (the words in train.tsv, sorted, are
    the classes) or `score` (a number)."""
    if name in TASKS:
        return TASKS[name]
    splits = tuple(split for split in SPLITS if os.path.isfile(f"{name}/{split}.tsv"))
    if splits[:2] != ("train", "dev"):
        raise InputError(f"unknown task {shorten(name)!r}: expected a folder with train.tsv and dev.tsv, or "
                         "one of " + ", ".join(TASKS))
    path, labels = Path(name, "train.tsv"), None
    with guard(path, "TSV file"):
        header, rows = open_table(path)
        if "label" in header or "score" not in header:
            [place] = find_columns(header, ["label"])
            labels = sorted({fields[place] for _, fields in rows if len(fields) == len(header)} - {""})
            check(len(labels) > 1, f"the classes are {labels}, expected two or more")
    return Task(name, ".", labels, PAIR if "sentence1" in header else SINGLE, splits=splits)


# ---- rows of a file ----

def read_fields(path):
    """Yields (line number, fields). Only "\\n" ends a line, because texts hold U+2028 and its like; quotation
    marks are text; the file may begin with a BOM."""
    with guard(path, "TSV file"), open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            yield number, line.rstrip("\r\n").split("\t")


def open_table(path, header=None):
    """Returns the header, which is the first line unless given, and the rows, as (line number, fields).
    An empty line is no row, but in a table of one column it is an empty text."""
    rows = read_fields(path)
    if header is None:
        _, header = next(rows, (1, [""]))
    return header, (row for row in rows if row[1] != [""] or len(header) == 1)


def find_columns(header, names):
    """Returns the place of each name in the header. ValueError unless each is there once."""
    check("\r" not in "".join(header), "its lines end with CR, expected LF or CR LF")
    good = all(header.count(name) == 1 for name in names)
    check(good, f"its columns are {', '.join(header)}, expected {', '.join(names)}, each once")
    return [header.index(name) for name in names]


def read_label(task, word, line):
    """Returns the class index or the number that a word stands for. ValueError if there is none."""
    with contextlib.suppress(ValueError):
        value = task.labels.index(word) if task.labels else float(word)
        if math.isfinite(value) and (task.name != "stsb" or 0 <= value <= 5):
            return value
    expected = "one of " + ", ".join(task.labels) if task.labels else "a finite number, in STS-B from 0 to 5"
    raise ValueError(f"line {line}: the label is '{word}', expected {expected}")


def read_split(task, split, path, ids_path=None):
    """Returns the Examples of a file, as load() says; with ids_path, the file is MRPC's raw training set."""
    has_header = task.name != "cola" or split == "test"
    header, rows = open_table(path, None if has_header else ["source", "label", "mark", "sentence"])
    if ids_path:
        rows = select_mrpc(rows, split, ids_path)
    labelled = not split.startswith("test") or (task.name not in TASKS and task.label_column in header)
    places = find_columns(header, task.columns)
    [label_place] = find_columns(header, [task.label_column]) if labelled else [None]
    examples, dropped = [], []
    for number, fields in rows:
        surplus = len(fields) - len(header)
        if surplus < 0 or (labelled and (surplus > 0 or fields[label_place] == "")):
            dropped.append(number)
            continue
        label = read_label(task, fields[label_place], number) if labelled else None
        examples.append(Example(*[fields[place] for place in places], label=label))
    if dropped:
        say(f"{path}: dropped {len(dropped)} of {len(dropped) + len(examples)} rows with too few or too many "
            f"fields or no label (the first is line {dropped[0]})")
    check(examples, "no usable row")
    return examples


def select_mrpc(rows, split, ids_path):
    """Returns the rows of MRPC's raw training file in dev, whose ids are listed, or in train, the others."""
    dev_ids = {tuple(fields) for _, fields in open_table(ids_path, ["#1 ID", "#2 ID"])[1]}
    marked = [(tuple(row[1][1:3]) in dev_ids, row) for row in rows]
    found, listed = sum(is_dev for is_dev, _ in marked), len(dev_ids)
    check(found == listed > 0, f"it has {found} of the {listed} dev ids in {ids_path}")
    return [row for is_dev, row in marked if is_dev == (split == "dev")]


def read_inputs(path, task):
    """Yields an unlabelled Example for each row of a file of any size with the columns `sentence`, or
    `sentence1` and `sentence2`. InputError if a row lacks a text, because each must get its answer."""
    with guard(path, "TSV file"):
        check(stat.S_ISREG(os.stat(path).st_mode), "a pipe or device, but it is read twice: write a file")
        header, rows = open_table(path)
        places = find_columns(header, PAIR if get_task(task).pair else SINGLE)
        for number, fields in rows:
            check(len(fields) > max(places), f"line {number} has {len(fields)} of {len(header)} fields")
            yield Example(*[fields[place] for place in places])


# ---- files of a task ----

# With the sha256 that Hugging Face datasets (glue/dataset_infos.json) and TFDS (url_checksums/glue.txt) have.
# MRPC's train and dev sets are made of Microsoft's training file and GLUE's list of dev ids.
SERVER = "https://dl.fbaipublicfiles.com/"
DOWNLOADS = {
    "cola": {"CoLA.zip": "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"},
    "sst2": {"SST-2.zip": "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"},
    "mrpc": {"msr_paraphrase_train.txt": "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
             "msr_paraphrase_test.txt": "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784",
             "mrpc_dev_ids.tsv": "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"},
    "stsb": {"STS-B.zip": "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"},
    "qqp": {"QQP-clean.zip": "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"},
    "mnli": {"MNLI.zip": "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"},
    "qnli": {"QNLIv2.zip": "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"},
    "rte": {"RTE.zip": "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"},
    "wnli": {"WNLI.zip": "ae0e8e4d16f4d46d4a0a566ec7ecceccfd3fbfaa4a7a4b4e02848c0f2561ac46"},
    "ax": {"AX.tsv": "0e13510b1bb14436ff7e2ee82338f0efb0133ecf2e73507a697dc210db3f05fd"},
}


def load(task, split, data_dir=None):
    """Returns the Examples of one split in the file's order. Without `data_dir`, GLUE's files are downloaded
    once into the cache. A row with too few fields, or in a labelled split with too many or no label, is
    dropped, and stderr says how many."""
    task = get_task(task)
    if split not in task.splits:
        raise InputError(f"{task.name} has no split {split!r}: its splits are {', '.join(task.splits)}")
    if task.name == "parity":
        return parity(split)
    paths = find_files(task, split, data_dir)
    with guard(paths[0], "TSV file"):
        return read_split(task, split, *paths)


def sources(task, data_dir=None):
    """Returns the files from which a run is made: those that load() reads for all splits but the test's."""
    task = get_task(task)
    splits = [split for split in task.splits if not split.startswith("test")]
    return list(dict.fromkeys(path for split in splits for path in find_files(task, split, data_dir)))


def find_files(task, split, data_dir):
    """Returns the file of a split, and MRPC's dev ids if the split is made from the raw file; [] for parity.
    InputError where the file is not there."""
    if task.name == "parity":
        return []    # it is made, not read
    if task.name not in TASKS:
        data_dir = task.name
    elif data_dir is None:
        data_dir = fetch(task)
    choices = [[f"{split}.tsv"]]
    if task.name == "ax":
        choices = [["AX.tsv"], ["diagnostic.tsv"], ["diagnostic/diagnostic.tsv"]]
    elif task.name == "mrpc" and split == "test":
        choices += [["msr_paraphrase_test.txt"]]
    elif task.name == "mrpc":
        choices += [["msr_paraphrase_train.txt", ids] for ids in ("mrpc_dev_ids.tsv", "dev_ids.tsv")]
    for folder in (task.folder, "."):
        for names in choices:
            paths = [Path(data_dir, folder, name) for name in names]
            if all(os.path.isfile(path) for path in paths):
                return paths
    raise InputError(f"{task.folder}/{split}.tsv is not in {data_dir}: pass a --data-dir that holds "
                     "it, or none where there is a network")


def fetch(task):
    """Downloads and unpacks what is not in the cache yet -> a folder that will do as --data-dir."""
    root = cache_dir() / "glue"
    for name, sha256 in DOWNLOADS[task.name].items():
        path, folder = root / name, root / Path(name).stem
        if not folder.is_dir():
            place = "senteval/senteval_data/" if name.startswith("msr_") else "glue/data/"
            try:
                download(SERVER + place + name, path, sha256=sha256)
            except InputError as error:
                raise InputError(f"{error}; or pass a --data-dir that holds {task.folder}/") from None
        if path.suffix == ".zip":
            return extract_zip(path, folder, [f"{task.folder}/{split}.tsv" for split in task.splits])
    return root


# ---- the task parity ----

# All phrases have four words, and their number is drawn before the label, so no length tells the label. A
# 12-layer ALBERT (H 64) from scratch learns up to three phrases in 400 steps; with four, with words that
# both kinds share, or without short texts, it stays for long at "is there any negation?", 75%.
NEGATING = ("it is false that", "it is wrong that", "it is untrue that")
NEUTRAL = ("they all say that", "we all know that", "you all hear that")
ADJECTIVES = "red old small tall quiet happy grey young brave lazy kind thin".split()
NOUNS = ("cat dog bird king child horse nurse wolf poet pilot fox judge duke clown queen goat baker monk "
         "bear guest").split()
VERBS = ("sleeps runs sings waits jumps laughs eats reads swims dreams works hides walks smiles cooks "
         "writes").split()


def parity(split):
    """Returns a split of PonderNet's parity experiment, as sentence pairs: text_b is text_a under k = 0..3
    nested negations, mixed with neutral phrases; the label is 1 ("same") where k is even. Half the rows have
    each label, and no pair occurs twice in the three splits."""
    draw, examples = random.Random(0), {}    # a dict keeps the order, and each example once
    start, end = {"test": (0, 1000), "dev": (1000, 2000), "train": (2000, 32000)}[split]

    def pick(words):
        return words[int(draw.random() * len(words))]

    while len(examples) < end:
        label, phrases = len(examples) % 2, pick((1, 2, 3))
        k = pick(range(1 - label, phrases + 1, 2))
        negating = set(draw.sample(range(phrases), k))
        said = [pick(NEGATING if i in negating else NEUTRAL) for i in range(phrases)]
        sentence = f"the {pick(ADJECTIVES)} {pick(NOUNS)} {pick(VERBS)}"
        examples[Example(sentence, f"{' '.join(said)} {sentence}", label)] = None
    examples = list(examples)[start:]
    draw.shuffle(examples)
    return examples


def negations(text_b):
    """Returns k, the number of parity()'s negating phrases in the text."""
    return sum(text_b.count(phrase) for phrase in NEGATING)


# ---- batches ----

def buckets(lengths, batch_size, generator):
    """Cuts 0..N-1 into batches of rows of like length, so that little is padded; at most one is less than
    full. Shuffled rows are sorted by length within runs of 50 batches, and the batches are shuffled."""
    lengths, batches = torch.as_tensor(lengths), []
    for run in torch.randperm(len(lengths), generator=generator).split(50 * batch_size):
        batches += run[lengths[run].argsort(stable=True)].split(batch_size)
    return [batches[i].tolist() for i in torch.randperm(len(batches), generator=generator)]


# ---- scores ----

def answers(logits):
    """logits (N, C), all finite -> predictions (N,): class indices, or for C = 1 the values."""
    return logits[:, 0] if logits.shape[1] == 1 else logits.argmax(1)


def score(task, predictions, labels):
    """Returns the task's metrics and "score", their mean, which is the paper's number (mnli: of one dev set),
    times 100. A metric is 0 where scikit-learn or SciPy give NaN (constant input, one row)."""
    task = get_task(task)
    predictions, labels = as_numbers(task, predictions), as_numbers(task, labels)
    if len(predictions) != len(labels) or len(labels) == 0:
        raise InputError(f"expected a prediction for each label, found {len(predictions)} for {len(labels)}")
    values = {name: 100 * float(metric(name, predictions, labels)) for name in task.metrics}
    return values | {"score": sum(values.values()) / len(values)}


def as_numbers(task, values):
    """values (N,) or (N, 1) -> float64 (N,): class indices, or finite numbers for a regression."""
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        values = torch.as_tensor(values, dtype=torch.float64).detach().cpu().reshape(len(values)).numpy()
        right = np.isin(values, range(task.num_labels)) if task.labels else np.isfinite(values)
        if right.all():
            return values
    expected = f"class indices below {task.num_labels}" if task.labels else "finite numbers"
    raise InputError(f"{task.name}: predictions and labels must be {expected}, one for each row")


def metric(name, x, y):
    """Returns the metric of predictions x and labels y (N,), at most 1; f1 of class 1."""
    if name == "accuracy":
        return (x == y).mean()
    if name == "f1":
        return 2 * (x * y).sum() / max((x + y).sum(), 1)
    if name == "spearman":
        x, y = rank(x), rank(y)
    if (x == x[0]).all() or (y == y[0]).all():
        return 0
    # Pearson's correlation; Matthews' is the same number for classes 0 and 1. Dividing keeps squares finite.
    return np.corrcoef(x / np.abs(x).max(), y / np.abs(y).max())[0, 1]


def rank(x):
    """Returns the rank of each value; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


# ---- GLUE's server ----

# The task and split of the eleven files of a submission, and how many rows each must have.
SUBMISSION = {("cola", "test"): 1063, ("sst2", "test"): 1821, ("mrpc", "test"): 1725, ("stsb", "test"): 1379,
              ("qqp", "test"): 390965, ("mnli", "test_matched"): 9796, ("mnli", "test_mismatched"): 9847,
              ("qnli", "test"): 5463, ("rte", "test"): 3000, ("wnli", "test"): 146, ("ax", "test"): 1104}
SUFFIXES = {"test": "", "test_matched": "-m", "test_mismatched": "-mm"}


def write_submission(zip_file, predictions):
    """Writes the zip for GLUE's server from {(task, split): predictions as score() takes them} -> the names
    of the files that it lacks. The same predictions give the same bytes. zip_file: a path or an open file"""
    missing = []
    with zipfile.ZipFile(zip_file, "w") as archive:
        for (name, split), size in SUBMISSION.items():
            task = TASKS[name]
            file = f"{task.folder}{SUFFIXES[split]}.tsv"
            if (name, split) not in predictions:
                missing.append(file)
                continue
            values = as_numbers(task, predictions[name, split])
            if len(values) != size:
                raise InputError(f"{len(values)} predictions for {file}: GLUE's server expects {size}")
            words = [f"{value:.3f}" for value in np.clip(values, 0, 5)]
            if task.labels:
                words = [task.labels[int(value)] for value in values]
            rows = [f"{index}\t{word}\n" for index, word in enumerate(words)]
            member = zipfile.ZipInfo(file)    # dated 1980, so that the bytes are the same every time
            member.external_attr = 0o644 << 16
            archive.writestr(member, "index\tprediction\n" + "".join(rows), zipfile.ZIP_DEFLATED)
    return missing
