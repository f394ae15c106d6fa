"""Fine-tune PALBERT and the systems that the paper compares it with.

    python train.py                                   the built-in task parity, from scratch, no download
    python train.py --task mrpc --device cuda         MRPC and albert-base-v2, with the paper's settings
    python train.py --task mrpc --grid --seeds 5      the paper's protocol: Table 4's grid, then 5 seeds of its best settings
    torchrun --nproc-per-node 2 train.py --task mrpc  one run on two devices, with the same result

A run is a folder under runs/: config.json, the tokenizer, model.safetensors (the weights of the best epoch), run.json (settings,
versions, data, results), metrics.jsonl, and resume.pt while it is unfinished.
"""

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import platform
import shlex
import signal
import statistics
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
import roberta
from checkpoint import InputError, atomic_write, read_json, read_safetensors, read_torch, sha256_file, write_safetensors
from glue import TASKS, buckets, load, load_tokenizer, score, sources, train_tokenizer
from ponder import (EntropyExit, FixedExit, PatienceExit, Ponder, QExit, SampleExit, elbo_loss, exit_distribution, exit_layers,
                    expected_prediction, geometric_prior, layer_losses, layer_weighted_loss, pad, upload)

RUNS = Path("runs")
LOG_EVERY = 50      # steps between two looks at the device: losses wait there until then


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
GRID = {"lr": (1e-5, 2e-5, 3e-5, 5e-5), "batch_size": (16, 32, 128), "lambda_lr": (1e-5, 2e-5, 3e-5)}      # Table 4
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


def precision(device):
    """bf16 autocast where the device computes in it, else float32"""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def encoder_module(model):
    """albert or roberta, by the model's name or by model_type in the folder's config.json"""
    if model in roberta.SIZES or model.removeprefix("FacebookAI/") in roberta.SIZES:
        return roberta
    config = Path(model) / "config.json"
    return roberta if config.exists() and read_json(config).get("model_type") == "roberta" else albert


def check_model(settings):
    """What can be known of the model before anything is loaded; InputError where it does not exist or does not fit the settings."""
    name = settings.model.removeprefix("albert/").removeprefix("FacebookAI/")
    config = {**albert.SIZES, **roberta.SIZES}.get(name)
    if config is None:
        if not Path(settings.model).exists() and not Path(settings.model + ".index").exists():
            raise InputError(f"--model {settings.model}: expected a folder with weights, or one of {', '.join([*albert.SIZES, *roberta.SIZES])}")
        return
    if name in roberta.SIZES and settings.layers not in (None, config.num_hidden_layers):
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
        encoder = (module.Roberta if module is roberta else module.Albert).from_pretrained(settings.model)
        fitting(tokenizer, encoder, source).save(folder)
    config = {"model_type": "roberta" if module is roberta else "albert", **dataclasses.asdict(encoder.config)}
    if settings.max_length > encoder.max_length:
        raise InputError(f"--max-length {settings.max_length}: {settings.model} has positions for {encoder.max_length} tokens")
    with atomic_write(folder / "config.json") as file:
        file.write(json.dumps(config, indent=1).encode())
    return tokenizer, make_ponder(encoder, settings)


def open_run(folder, settings):
    """(tokenizer, untrained model) from the config.json and tokenizer of a run's folder"""
    values, source = read_json(folder / "config.json"), str(folder / "config.json")
    if values.get("model_type") == "roberta":
        encoder = roberta.Roberta(roberta.RobertaConfig.from_json(values, source))
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
    with precision(device):
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


def leave(exit, settings, logits, lam):
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
            outputs, layers = leave(exit, settings, logits, lam)
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


# ---- training ----

class Interrupted(Exception):
    """SIGINT came; the step is finished and saved."""


def loss_of(settings, logits, lam, labels, prior):
    """The method's training loss over a batch, and its parts for the log."""
    if settings.has_lambda:
        return elbo_loss(logits, lam, labels, prior, settings.beta)
    if settings.method == "pabee":
        return layer_weighted_loss(logits, labels)
    loss = layer_losses(logits[:, -1:], labels).mean()
    return loss, {"task": loss.detach()}


def make_optimizer(model, settings):
    """Adam at a constant rate, without decay; the Lambda head has a rate of its own unless lambda_lr is None."""
    own = set(model.lambda_head.parameters()) if model.lambda_head and settings.lambda_lr else set()
    groups = [{"params": [p for p in model.parameters() if p not in own], "lr": settings.lr}]
    if own:
        groups.append({"params": [p for p in model.parameters() if p in own], "lr": settings.lambda_lr})
    return torch.optim.Adam([group | {"base": group["lr"]} for group in groups], fused=True)


def train_step(model, optimizer, settings, step, inputs, labels, prior, rank=0, world=1):
    """One step on a global batch, of which this process takes every world-th row -> parts of the loss (len(settings.parts),), this
    process's share of them, left on the device.

    The loss is summed over local rows and divided by the global batch, and gradients are summed, so any number of processes gives one
    result. The global generator is seeded from (seed, step) first: dropout depends on nothing else.
    """
    torch.manual_seed((settings.seed * 1_000_003 + step) * 1_009 + rank)
    parameters = list(model.parameters())
    device = parameters[0].device
    local = range(rank, len(inputs), world)
    share = len(local) / len(inputs)
    parts = torch.zeros(len(settings.parts), device=device)
    optimizer.zero_grad()
    if share:
        batch = pad([inputs[row] for row in local], model.encoder, device)
        targets = upload([labels[row] for row in local], device, dtype=None)    # class indices, or floats
        with precision(device):
            logits, lam = model(*batch)
        loss, named = loss_of(settings, logits, lam, targets, prior)
        (loss * share).backward()
        parts = torch.stack([named[name] for name in settings.parts]) * share
    if world > 1:
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = grad.view_as(p)
    if settings.clip:
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
    for group in optimizer.param_groups:
        group["lr"] = group["base"] * min(1, (step + 1) / max(1, settings.warmup))
    optimizer.step()
    return parts


def train(settings, folder):
    """Train one run into its folder, or go on with it from its resume.pt; returns the results on dev by exit, as run.json keeps them."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = local_device(choose_device(settings.device))
    task, started = TASKS[settings.task], time.time()
    examples = load(settings.task, "train", settings.data_dir)
    resume = folder / "resume.pt"
    resumed = read_torch(resume) if resume.exists() else None
    if rank == 0 and resumed is None:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer, model = make_model(settings, folder, examples)
        write_json(folder / "run.json", describe(settings, device))
    if world > 1:
        dist.barrier()
    if rank or resumed is not None:
        tokenizer, model = open_run(folder, settings)
    model = model.to(device).train()
    optimizer = make_optimizer(model, settings)
    prior = geometric_prior(settings.prior, model.num_layers).to(device)
    inputs, labels = tokenizer.encode_all(examples, settings.max_length), [example.label for example in examples]
    dev = {split: read_split(settings, tokenizer, split) for split in task.dev_splits}
    order, at = torch.Generator().manual_seed(settings.seed), {"step": 0, "epoch": 0, "position": 0, "best": None, "worse": 0, "metrics": 0}
    if resumed is not None:
        try:
            load_state(model, resumed["model"], resume)
            optimizer.load_state_dict(resumed["optimizer"])
            order.set_state(resumed["order"])
            at = {name: resumed["at"][name] for name in at}
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise InputError(f"{resume}: does not fit this run ({error}); delete it to start the run again") from None
        say(f"going on from step {at['step']}", rank)
    elif world > 1:
        for p in model.parameters():
            dist.broadcast(p.data, 0)
    metrics, waiting, interrupted = (open(folder / "metrics.jsonl", "ab") if rank == 0 else None), [], []
    if rank == 0:
        metrics.truncate(at["metrics"])

    def write(line):
        if rank == 0:
            metrics.write(json.dumps(line | {"seconds": round(time.time() - started, 3)}).encode() + b"\n")

    def flush():
        """Fetch the losses that wait on the device, check and log them."""
        if not waiting:
            return
        values = torch.stack([parts for _, _, parts in waiting])
        if world > 1:
            dist.all_reduce(values)
        first = at["step"] - len(waiting) + 1
        for step, ((rows, rates, _), parts) in enumerate(zip(waiting, values.tolist()), first):
            write({"step": step, "epoch": at["epoch"] + 1} | dict(zip(settings.parts, parts)) | dict(zip(("lr", "lambda_lr"), rates)))
            if not all(abs(part) < float("inf") for part in parts):
                raise InputError(f"step {step}: the loss is not finite ({dict(zip(settings.parts, parts))}) on training rows {rows}; "
                                 f"the weights of the best epoch so far are kept; try a lower --lr")
        waiting.clear()

    def save(generator_state):
        flush()
        if rank == 0:
            metrics.flush()
            os.fsync(metrics.fileno())
            at["metrics"] = metrics.tell()
            with atomic_write(resume) as file:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "order": generator_state, "at": at}, file)

    handler = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True)) if world == 1 and in_main_thread() else None
    done_before, speed_from = at["step"], time.time()
    try:
        while at["epoch"] < settings.epochs and at["worse"] < settings.stop_after and at["step"] != settings.max_steps:
            generator_state = order.get_state()
            batches = buckets([len(ids) for ids, _ in inputs], settings.batch_size, order)
            total = min(settings.epochs * len(batches), settings.max_steps or 10**12)
            for batch in batches[at["position"]:]:
                parts = train_step(model, optimizer, settings, at["step"], [inputs[row] for row in batch], [labels[row] for row in batch],
                                   prior, rank, world)
                waiting.append((batch, [group["lr"] for group in optimizer.param_groups], parts))
                at["step"] += 1
                at["position"] += 1
                if at["step"] % LOG_EVERY == 0:
                    logged = parts
                    flush()
                    pace = (time.time() - speed_from) / (at["step"] - done_before)
                    say(f"epoch {at['epoch'] + 1}, step {at['step']} of at most {total}: "
                        + ", ".join(f"{name} {value:.3f}" for name, value in zip(settings.parts, logged.tolist()))
                        + f"; {1 / pace:.1f} steps/s, at most {datetime.timedelta(seconds=round(pace * (total - at['step'])))} to go", rank)
                if interrupted or settings.save_every and at["step"] % settings.save_every == 0:
                    save(generator_state)
                if interrupted:
                    raise Interrupted(f"stopped after step {at['step']} and saved; go on with: python train.py --resume {folder.name}")
                if at["step"] == settings.max_steps:
                    break
            flush()
            at["epoch"], at["position"] = at["epoch"] + 1, 0
            if rank == 0:
                results, p = evaluate(model, settings, dev, (settings.exit,))
                result = results[settings.exit]
                write({"step": at["step"], "epoch": at["epoch"], "dev": result, "p": p})
                say(f"epoch {at['epoch']}: dev {task.name} {result['score']:.1f} by {settings.exit} exit at layer {result['mean_layer']:.2f} "
                    f"of {model.num_layers}", rank)
                if at["best"] is None or result["score"] > at["best"]:
                    at["best"], at["worse"] = result["score"], 0
                    write_safetensors(folder / "model.safetensors", model.state_dict())
                else:
                    at["worse"] += 1
            if world > 1:
                worse = torch.tensor(at["worse"]).to(device)
                dist.broadcast(worse, 0)
                at["worse"] = int(worse)
            save(order.get_state())
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        if rank == 0:
            metrics.close()
    if rank == 0:
        load_state(model, read_safetensors(folder / "model.safetensors"), folder / "model.safetensors")
        results, _ = evaluate(model, settings, dev, settings.exits)
        files = {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.name not in ("run.json", "metrics.jsonl", "resume.pt")}
        write_json(folder / "run.json", read_run(folder)[1] | {"finished": True, "steps": at["step"], "epochs": at["epoch"], "files": files, "dev": results})
        resume.unlink(missing_ok=True)
        return results


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


# ---- the protocol: one run, seeds, the grid ----

def run(settings, name=None):
    """Train a run by name, go on with it where it was stopped, or do nothing if it is finished; without a name make a new one.
    Returns its folder."""
    if name is None:
        names = itertools.chain([run_name(settings)], (f"{run_name(settings)}-{n}" for n in itertools.count(2)))
        name = next(name for name in names if not (RUNS / name).exists())
    check_model(settings)
    folder = RUNS / name
    if (folder / "run.json").exists():
        before, values = read_run(folder)
        here = {name: getattr(settings, name) for name in ("data_dir", "device", "save_every")}
        if dataclasses.replace(before, **here) != settings:
            raise InputError(f"{folder} holds a run with other settings; give another --name, or delete it")
        if values.get("finished"):
            say(f"{folder} is finished already, nothing to do; give another --name to train it again")
            print_results(values["dev"])
            return folder
    say(f"{folder}: {settings.task} by {settings.method}, {settings.model}")
    results = train(settings, folder)
    if results:
        print_results(results)
    return folder


def command(settings):
    """The command that trains these settings under their own name, so that a finished run is skipped wherever it is given."""
    plain = make_settings(task=settings.task, model=settings.model, method=settings.method)
    flags = [(field.name, getattr(settings, field.name)) for field in dataclasses.fields(settings)
             if field.name in ("task", "model", "method", "seed") or getattr(settings, field.name) != getattr(plain, field.name)]
    return shlex.join(["python", "train.py", *(part for name, value in flags for part in
                                               (f"--{name.replace('_', '-')}", "none" if value is None else str(value))),
                       "--name", run_name(settings)])


def dev_score(settings):
    """The dev score of a finished run, by its own exit; None while it is not finished."""
    path = RUNS / run_name(settings) / "run.json"
    values = read_run(path.parent)[1] if path.exists() else {}
    return values["dev"][settings.exit]["score"] if values.get("finished") else None


def protocol(given, seeds, grid, dry_run):
    """The paper's protocol: the grid of Table 4, its best by dev score, then that many seeds; finished runs are skipped. With dry_run
    the runs that are left are printed, a command a line: the grid's first, and once those are finished, the seeds'."""
    def finish(runs):
        left = [settings for settings in runs if dev_score(settings) is None]
        for settings in left:
            print(command(settings)) if dry_run else run(settings, run_name(settings))
        return not (left and dry_run)

    best = make_settings(**given)
    if grid:
        axes = {name: values for name, values in GRID.items() if getattr(best, name) is not None}
        runs = [make_settings(**(given | dict(zip(axes, values)))) for values in itertools.product(*axes.values())]
        if not finish(runs):
            return
        best = max(runs, key=dev_score)
        say(f"best of {len(runs)} settings: " + ", ".join(f"{name} {getattr(best, name)}" for name in axes) + f", dev {dev_score(best):.1f}")
    runs = [dataclasses.replace(best, seed=best.seed + n) for n in range(seeds)]
    if finish(runs):
        found = [dev_score(settings) for settings in runs]
        std = statistics.stdev(found) if len(found) > 1 else 0
        print(f"{best.task} {best.method} by {best.exit}: mean {statistics.mean(found):.2f} ± {std:.2f}, median {statistics.median(found):.2f} "
              f"over {len(found)} seeds ({', '.join(f'{value:.2f}' for value in found)})")


def main(argv=None):
    parser = Parser("train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for field in dataclasses.fields(Settings):
        meaning = field.metadata["meaning"] + (f" [{field.metadata['expected']}]" if field.metadata["expected"] else "")
        if field.default is not None:
            meaning += f" (default: {field.default})"
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, metavar=field.type.__name__, help=meaning.replace("%", "%%"))
    parser.add_argument("--name", help="the run's folder under runs/; a finished run is left alone, an unfinished one goes on")
    parser.add_argument("--resume", nargs="?", const=True, metavar="RUN", help="go on with a run that was stopped, the newest if not named")
    parser.add_argument("--seeds", type=int, metavar="N", help="train N seeds; prints mean, std and median")
    parser.add_argument("--grid", action="store_true", help="search Table 4's grid first, and take its best settings")
    parser.add_argument("--dry-run", action="store_true", help="with --seeds or --grid: print the runs that are left, a command a line")
    flags = vars(parser.parse_args(argv))
    name, resume, seeds, grid, dry_run = (flags.pop(flag) for flag in ("name", "resume", "seeds", "grid", "dry_run"))
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    given = {name: parse(fields[name], text) for name, text in flags.items()}
    if seeds is not None and seeds < 1:
        raise InputError(f"--seeds {seeds}: expected a whole number from 1")
    if dry_run and not (seeds or grid):
        raise InputError("--dry-run: expected together with --seeds or --grid")
    if resume:
        if given or name or seeds or grid:
            raise InputError("--resume goes on with the settings that the run has; give it without others")
        folder = find_run(None if resume is True else resume, ready="resume.pt")
        return run(read_run(folder)[0], folder.name)
    if name and (seeds or grid):
        raise InputError("--name: runs of --seeds and --grid have names of their own")
    with processes(choose_device(given.get("device"))):
        if seeds or grid:
            return protocol(given, seeds or 1, grid, dry_run)
        run(make_settings(**given), name)


@contextlib.contextmanager
def processes(device):
    """torch.distributed for as long as the block lasts, where torchrun started this process."""
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=4))
    try:
        yield
    finally:
        dist.destroy_process_group()


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


if __name__ == "__main__":
    run_main(main)
