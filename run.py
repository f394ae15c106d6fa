"""What a run is: its settings, its folder, its model on a device, and its evaluation. train.py and eval.py stand on this file."""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy
import sentencepiece
import torch
import torch.distributed as dist

import albert
import bert
from checkpoint import InputError, atomic_write, read_json, read_safetensors, sha256_file
from glue import TASKS, buckets, load, score, sources
from text import load_tokenizer, train_tokenizer
from fast import pad
from ponder import (EntropyExit, FixedExit, PatienceExit, Ponder, QExit, SampleExit, exit_distribution, exit_layers,
                    expected_prediction)

RUNS = Path("runs")


# ---- settings ----

def setting(default, meaning, valid=None, expected=None):
    return dataclasses.field(default=default, metadata={"meaning": meaning, "valid": valid, "expected": expected})


def choice(default, meaning, options):
    return setting(default, meaning, lambda value: value in options, "one of " + ", ".join(options))


def above(least, meaning, default):
    return setting(default, meaning, lambda value: least < value < float("inf"), f"a number above {least}")


def count(least, meaning, default, most=10**9):
    return setting(default, meaning, lambda value: least <= value <= most, f"a whole number from {least}" + (f" to {most}" if most < 10**9 else ""))


METHODS = {                                             # what each preset changes in Settings
    "palbert": {},
    "pondernet": {"lambda_layers": 1, "lambda_input": "current", "lambda_lr": None, "exit": "sample"},
    "pabee": {"lambda_lr": None, "exit": "patience"},   # a classifier per layer
    "finetune": {"lambda_lr": None, "exit": "last"},    # the plain model
}
SCRATCH = {                                             # this project's own settings for what is trained from scratch
    "tiny": {"lr": 1e-3, "lambda_lr": 1e-3, "batch_size": 64, "beta": 0.02, "prior": 0.25, "dropout": 0.0, "epochs": 2, "warmup": 100, "clip": 1.0},
    "mini": {"lr": 5e-4, "lambda_lr": 5e-4, "batch_size": 64, "epochs": 3, "warmup": 100, "clip": 1.0},
}
EXITS = ("q", "sample", "expectation", "last", "patience", "entropy")


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run. Defaults are PALBERT's, as the paper and its released code (its RTE command) have them; --method
    and a from-scratch --model change some, see METHODS and SCRATCH. None stands for what the text beside it says."""

    task: str = choice("parity", "the task", tuple(name for name in TASKS if name != "ax"))
    model: str = setting(None, "a hub name, a folder with weights, or tiny | mini from scratch (default: tiny for parity, else albert-base-v2)")
    method: str = choice("palbert", "the system, a preset of the settings below", tuple(METHODS))
    layers: int = count(1, "layers to run; other than the model's only where layers are shared, e.g. 9 in Table 2 (default: the model's)", None, 1000)
    lr: float = above(0, "Adam's rate, constant (grid of Table 4)", 1e-5)
    lambda_lr: float = above(0, "the Lambda head's own rate (grid of Table 4); none: the rate of the rest", 1e-5)
    batch_size: int = count(1, "examples a step (grid of Table 4)", 32)
    beta: float = setting(0.5, "weight of the KL term (Table 4)", lambda v: 0 <= v < float("inf"), "a number of at least 0")
    prior: float = setting(0.1, "lambda of the geometric prior (section 4.5)", lambda v: 0 < v < 1, "a number between 0 and 1")
    lambda_layers: int = setting(3, "layers of the Lambda head (section 3.2)", lambda v: v in (1, 3), "1 or 3")
    lambda_input: str = choice("concat", "what Lambda reads: h_i, or h_i and h_{i-1} (section 3.2)", ("current", "concat"))
    exit: str = choice("q", "the exit by which the dev score stops and selects", EXITS)
    q: float = setting(0.5, "threshold of Q-exit (section 3.1)", lambda v: 0 < v <= 1, "a number above 0 and up to 1")
    patience: int = count(1, "PABEE's t: layers in a row that agree (section 4)", 6)
    tolerance: float = above(0, "PABEE on regression: two layers agree within this (this project's)", 0.1)
    entropy: float = above(0, "threshold of entropy exit in nats (this project's)", 0.3)
    dropout: float = setting(0.1, "before the classifier and Lambda, and nowhere else (released code)", lambda v: 0 <= v < 1, "a number from 0, below 1")
    epochs: int = count(1, "epochs at most (released code)", 25)
    stop_after: int = count(1, "epochs without a better dev score before stopping (section 4)", 5)
    max_length: int = count(8, "tokens a row, longer ones are truncated (released code)", 128, 512)
    warmup: int = count(0, "steps in which the rate rises to its value (from scratch only; the paper has none)", 0)
    clip: float = above(0, "gradient norm at most (from scratch only; the paper has none)", None)
    max_steps: int = count(1, "end the run after this many steps", None)
    seed: int = count(0, "seed of everything random", 0)
    data_dir: str = setting(None, "folder with the GLUE files (default: download them)")
    device: str = setting(None, "cuda, mps or cpu, also cuda:1 (default: the first that is there)")
    save_every: int = count(1, "steps between two checkpoints, besides the one after each epoch", None)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, valid = getattr(self, field.name), field.metadata["valid"]
            if value is None and (field.default is None or field.name == "lambda_lr"):
                continue
            if not isinstance(value, (int, float) if field.type is float else field.type) or isinstance(value, bool) or valid and not valid(value):
                raise InputError(f"--{field.name.replace('_', '-')} {value}: expected {field.metadata['expected'] or 'a word'}")
        if self.exit in ("patience", "entropy") and self.method != "pabee" or self.exit in ("q", "sample", "expectation") and not self.has_lambda:
            raise InputError(f"--exit {self.exit}: method {self.method} exits by {' or '.join(self.exits)}")
        if self.exit == "entropy" and TASKS[self.task].num_labels == 1:
            raise InputError(f"--exit entropy: {self.task} is a regression task and has no classes; use patience or last")

    @property
    def has_lambda(self):
        return self.method in ("palbert", "pondernet")

    @property
    def parts(self):
        """The parts of the training loss that are logged."""
        return ("task", "kl", "expected_layer", "cut_at_1") if self.has_lambda else ("task",)

    @property
    def exits(self):
        """The exits that this run's model can be evaluated by, its own first."""
        return {"finetune": ("last",), "pabee": ("patience", "last") if TASKS[self.task].num_labels == 1 else ("patience", "entropy", "last")}.get(
            self.method, ("q", "sample", "expectation", "last"))


def make_settings(**given):
    """Settings with the presets of method and model under what is given; unknown names are an InputError."""
    known = {field.name for field in dataclasses.fields(Settings)}
    for name in given:
        if name not in known:
            raise InputError(f"--{name.replace('_', '-')} is not a setting; settings are {', '.join(sorted(known))}")
    task, method = given.get("task", Settings.task), given.get("method", Settings.method)
    model = given.get("model") or ("tiny" if task == "parity" else "albert-base-v2")
    return Settings(**{**SCRATCH.get(model, {}), **METHODS.get(method, {}), **given, "model": model})


def parse(field, text):
    """The value of one flag from the command line."""
    if text == "none" and (field.default is None or field.name == "lambda_lr"):
        return None
    try:
        return field.type(text)
    except ValueError:
        raise InputError(f"--{field.name.replace('_', '-')} {text}: expected {field.metadata['expected']}") from None


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; {self.prog} --help lists the flags")


# ---- a model and a run ----

def choose_device(name):
    """torch.device by name; None takes cuda, mps or cpu, the first that is there. InputError if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        return torch.device(next(kind for kind in there if there[kind]))
    kind, _, index = name.partition(":")
    if kind not in there or index and not index.isdigit():
        raise InputError(f"--device {name}: expected cuda, mps or cpu")
    if not there[kind] or kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: PyTorch {torch.__version__} finds no such device here; it finds {', '.join(k for k in there if there[k])}")
    return torch.device(name)


def autocast(device):
    """bf16 autocast where the device computes in it, else float32"""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def encoder_module(model):
    """albert or roberta, by the model's name or by model_type in the folder's config.json"""
    if model in bert.SIZES or model.removeprefix("FacebookAI/") in bert.SIZES:
        return bert
    config = Path(model) / "config.json"
    return bert if config.exists() and read_json(config).get("model_type") == "roberta" else albert


def check_model(settings):
    """What can be known of the model before anything is loaded; InputError where it does not exist or does not fit the settings."""
    name = settings.model.removeprefix("albert/").removeprefix("FacebookAI/")
    config = {**albert.SIZES, **bert.SIZES}.get(name)
    if config is None:
        if not Path(settings.model).exists() and not Path(settings.model + ".index").exists():
            raise InputError(f"--model {settings.model}: expected a folder with weights, or one of {', '.join([*albert.SIZES, *bert.SIZES])}")
        return
    if name in bert.SIZES and settings.layers not in (None, config.num_hidden_layers):
        raise InputError(f"--layers {settings.layers}: {settings.model} has {config.num_hidden_layers}, each with weights of its own; only a "
                         f"model with shared layers (ALBERT) can run another number")


def make_ponder(encoder, settings):
    """The untrained Ponder of these settings around an encoder."""
    try:
        return Ponder(encoder, TASKS[settings.task].num_labels, settings.layers, settings.lambda_layers if settings.has_lambda else 0,
                      settings.lambda_input == "concat", settings.method == "pabee", settings.prior, settings.dropout)
    except ValueError as error:
        raise InputError(f"--layers {settings.layers}: {error}") from None


def make_model(settings, folder, train_examples):
    """(tokenizer, model) of a new run, from pretrained weights or from scratch; config and tokenizer are written to the folder."""
    module = encoder_module(settings.model)
    if settings.model in SCRATCH:
        texts = [text for example in train_examples for text in (example.text_a, example.text_b) if text]
        tokenizer = train_tokenizer(texts, folder, albert.SIZES[settings.model].vocab_size, settings.seed)
        torch.manual_seed(settings.seed)
        encoder = albert.Albert(dataclasses.replace(albert.SIZES[settings.model], vocab_size=tokenizer.vocab_size))
    else:
        source = module.fetch(settings.model)
        tokenizer = load_tokenizer(source)
        torch.manual_seed(settings.seed)
        encoder = (module.Roberta if module is bert else module.Albert).from_pretrained(settings.model)
        fitting(tokenizer, encoder, source).save(folder)
    config = {"model_type": "roberta" if module is bert else "albert", **dataclasses.asdict(encoder.config)}
    if settings.max_length > encoder.max_length:
        raise InputError(f"--max-length {settings.max_length}: {settings.model} has positions for {encoder.max_length} tokens")
    with atomic_write(folder / "config.json") as file:
        file.write(json.dumps(config, indent=1).encode())
    return tokenizer, make_ponder(encoder, settings)


def open_run(folder, settings):
    """(tokenizer, untrained model) from the config.json and tokenizer of a run's folder"""
    values, source = read_json(folder / "config.json"), str(folder / "config.json")
    if values.get("model_type") == "roberta":
        encoder = bert.Roberta(bert.RobertaConfig.from_json(values, source))
    else:
        encoder = albert.Albert(albert.AlbertConfig.from_json(values, source))
    return fitting(load_tokenizer(folder), encoder, folder), make_ponder(encoder, settings)


def fitting(tokenizer, encoder, source):
    """The tokenizer, if the encoder has an embedding for each of its ids"""
    if tokenizer.vocab_size > encoder.config.vocab_size:
        raise InputError(f"{source}: the tokenizer has {tokenizer.vocab_size} pieces, but the model has embeddings for {encoder.config.vocab_size}; "
                         "they belong to different models")
    return tokenizer


def load_run(folder, device):
    """(settings, tokenizer, model) of a run's folder, with the weights of its best epoch, in evaluation mode on the device"""
    folder = Path(folder)
    settings, values = read_run(folder)
    for name, digest in values.get("files", {}).items():
        if sha256_file(folder / name) != digest:
            raise InputError(f"{folder / name}: is not the file that this run ended with (its sha256 differs); get a whole copy or train again")
    tokenizer, model = open_run(folder, settings)
    load_state(model, read_safetensors(folder / "model.safetensors"), folder / "model.safetensors")
    return settings, tokenizer, model.to(device).eval()


def load_state(model, state, path):
    """Put a dict of tensors into the model; names or shapes that do not fit are an InputError."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"{path}: the weights do not fit the run's config.json and settings ({str(error).splitlines()[-1].strip()})") from None


def read_run(folder):
    """(Settings, the whole of run.json) of a run's folder"""
    values = read_json(Path(folder) / "run.json")
    if not isinstance(values.get("settings"), dict):
        raise InputError(f"{folder}/run.json: expected the settings of a run, found none")
    try:
        return make_settings(**values["settings"]), values
    except InputError as error:
        raise InputError(f"{folder}/run.json: {error}") from None


def find_run(name=None, ready="model.safetensors"):
    """The folder of the run that is named, or of the newest one that has the file `ready`."""
    if name is not None:
        for folder in (RUNS / name, Path(name)):
            if (folder / "run.json").exists():
                return folder
        raise InputError(f"no run {name!r}: expected {RUNS / name}/run.json or {Path(name)}/run.json")
    runs = [path.parent for path in RUNS.glob("*/run.json") if (path.parent / ready).exists()]
    if not runs:
        raise InputError(f"no run with a {ready} under {RUNS}/ here; python train.py makes one")
    return max(runs, key=lambda folder: (folder / "run.json").stat().st_mtime_ns)


def run_name(settings):
    """The name of a run: task, method, model, whatever differs from the preset, and the seed."""
    plain = make_settings(task=settings.task, model=settings.model, method=settings.method)
    changed = [f"{field.name}{getattr(settings, field.name)}" for field in dataclasses.fields(settings)
               if field.name not in ("seed", "data_dir", "device", "save_every") and getattr(settings, field.name) != getattr(plain, field.name)]
    return "-".join([settings.task, settings.method, Path(settings.model).name, *changed, f"seed{settings.seed}"])


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"


def describe(settings, device):
    """What run.json records beside the settings, so that a number can be traced: versions, device, commit, hashes of the data."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True) \
        if (Path(__file__).parent / ".git").exists() else None
    return {"settings": dataclasses.asdict(settings),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__,
                         "sentencepiece": sentencepiece.__version__},
            "device": device_name(device),
            "commit": git.stdout.strip() if git and git.returncode == 0 else None,
            "data": {path.name: sha256_file(path) for path in sources(settings.task, settings.data_dir)},
            "finished": False}


# ---- evaluation ----

def read_split(settings, tokenizer, split):
    """(inputs, labels) of a split: a list of (ids, segments), and the labels as they come"""
    examples = load(settings.task, split, settings.data_dir)
    return tokenizer.encode_all(examples, settings.max_length), [example.label for example in examples]


@torch.no_grad()
def all_layers(model, inputs, batch_size=32):
    """One pass of full depth: logits (N,L,C), lam (N,L), float32 on the CPU, in the order of the inputs. From these follow every q,
    every sample, the expectation and every histogram."""
    device, order, outputs = next(model.parameters()).device, buckets([len(ids) for ids, _ in inputs], batch_size), []
    with autocast(device):
        for batch in order:
            outputs.append(model(*pad([inputs[row] for row in batch], model.encoder, device)))
    by_row = torch.tensor([row for batch in order for row in batch]).argsort()
    logits, lam = (torch.cat(column).float().cpu()[by_row] for column in zip(*outputs))
    return logits, lam


def make_rule(exit, settings, L):
    """The exit rule of that name; expectation is no rule of exit: it reads every layer, as last does."""
    return {"q": lambda: QExit(settings.q), "sample": lambda: SampleExit(torch.Generator().manual_seed(settings.seed)),
            "patience": lambda: PatienceExit(settings.patience, settings.tolerance), "entropy": lambda: EntropyExit(settings.entropy),
            "expectation": lambda: FixedExit(L), "last": lambda: FixedExit(L)}[exit]()


def apply_exit(exit, settings, logits, lam):
    """The exit applied to arrays of full depth: predictions (N,C), layers (N,)"""
    layers = exit_layers(make_rule(exit, settings, lam.shape[1]), logits, lam)
    if exit == "expectation":
        return expected_prediction(logits, exit_distribution(lam)), layers
    return logits[torch.arange(len(layers)), layers - 1], layers


def scores(task, outputs, labels):
    """GLUE metrics of predictions (N,C) against labels: classes by argmax, values as they are"""
    return score(task, (outputs[:, 0] if outputs.shape[1] == 1 else outputs.argmax(1)).numpy(), labels)


def evaluate(model, settings, dev, exits):
    """{exit: {"score", "metrics", "mean_layer"}} and mean p per layer, over the dev splits {split: (inputs, labels)}; the score is the
    splits' mean (MNLI has two)."""
    was_training, results, p = model.training, {exit: {"score": 0, "mean_layer": 0, "metrics": {}} for exit in exits}, 0
    model.eval()
    for split, (inputs, labels) in dev.items():
        logits, lam = all_layers(model, inputs)
        p = p + exit_distribution(lam).mean(0) / len(dev)
        for exit, result in results.items():
            outputs, layers = apply_exit(exit, settings, logits, lam)
            metrics = scores(settings.task, outputs, labels)
            result["score"] += metrics["score"] / len(dev)
            result["mean_layer"] += layers.float().mean().item() / len(dev)
            result["metrics"][split] = metrics
    model.train(was_training)
    return results, p.tolist()


def print_results(results, file=sys.stderr):
    print(f"{'exit':<12} {'dev score':>9} {'mean layer':>10}", file=file)
    for exit, result in results.items():
        print(f"{exit:<12} {result['score']:>9.1f} {result['mean_layer']:>10.2f}", file=file)


def timed(model, work):
    """(seconds, result) of work(), the device's work included"""
    device = next(model.parameters()).device
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - start, result


def predict_all(model, settings, exit, inputs, batch_size):
    """Early exit for real over a split: outputs (N,C), layers (N,), on the CPU"""
    with autocast(next(model.parameters()).device):
        logits, layers = model.predict_many(inputs, make_rule(exit, settings, model.num_layers), batch_size)
    return logits.float().cpu(), layers.cpu()


def splits_of(task, split):
    """The splits meant by a name: dev and test stand for both of MNLI's"""
    return {"dev": TASKS[task].dev_splits, "test": TASKS[task].test_splits}.get(split, (split,))


SWEEPS = {"q": [n / 20 for n in range(1, 21)], "patience": list(range(1, 12)), "entropy": [0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6]}


def sweep(settings, exit, logits, lam, labels):
    """Score and mean layer for every q (or patience, or entropy threshold), from arrays of full depth -> list of dicts"""
    rows = []
    for value in SWEEPS[exit]:
        outputs, layers = apply_exit(exit, dataclasses.replace(settings, **{exit: value}), logits, lam)
        mean_layer = layers.float().mean().item()
        rows.append({exit: value, "score": scores(settings.task, outputs, labels)["score"], "mean_layer": mean_layer,
                     "speed_up": lam.shape[1] / mean_layer})
    return rows


# ---- commands ----

class Interrupted(Exception):
    """SIGINT came; the step is finished and saved."""


def local_device(device):
    """The device of this process: its own GPU where torchrun started several on GPUs"""
    if dist.is_initialized() and device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def say(text, rank=0):
    if rank == 0:
        print(text, file=sys.stderr, flush=True)


def in_main_thread():
    return threading.current_thread() is threading.main_thread()


def write_json(path, values):
    with atomic_write(path) as file:
        file.write(json.dumps(values, indent=1).encode())


def run_main(main):
    """Run a command; what goes wrong with its input is one sentence on stderr and exit code 1."""
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename or 'a file'} could not be read or written: {error.strerror or error}")
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
