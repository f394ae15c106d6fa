"""What a run is: its settings, its device, its folder and model, and its evaluation."""

import argparse
import dataclasses
import os
import platform
import signal
import statistics
import sys
import time
from pathlib import Path

import numpy
import sentencepiece
import torch

import albert
import bert
from checkpoint import (PUBLISHED, InputError, find_model, guard, read_json, read_safetensors, sha256_file,
                        say, shorten, write_json)
from fast import pad
from glue import TASKS, answers, get_task, load, score, sources
from ponder import (EntropyExit, FixedExit, LearnedExit, PatienceExit, Ponder, QExit, SampleExit,
                    exit_distribution, exit_layers, expected_prediction)
from text import load_tokenizer, train_tokenizer

RUNS = Path("runs")
METHODS = {     # what a method changes in Settings
    "palbert": dict(),
    "pondernet": dict(lambda_layers=1, lambda_input="current", lambda_lr=None, exit="sample"),
    "pabee": dict(classifiers="per_layer", lambda_lr=None, exit="patience"),
    "berxit": dict(classifiers="per_layer", lambda_layers=1, lambda_input="current", lambda_lr=None,
                   exit="learned"),
    "finetune": dict(lambda_lr=None, exit="last"),      # the plain model
}
EXITS = {       # by which a method's model can be evaluated
    "palbert": ("q", "sample", "expectation", "last"), "pondernet": ("q", "sample", "expectation", "last"),
    "pabee": ("patience", "entropy", "last"), "berxit": ("learned", "last"), "finetune": ("last",),
}
CRITERIA = tuple(dict.fromkeys(name for names in EXITS.values() for name in names))
SCRATCH = {     # this project's own settings for models from scratch
    "tiny": dict(lr=1e-3, lambda_lr=1e-3, batch_size=64, epochs=2, warmup=100, clip=1.0, beta=0.02,
                 prior=0.25, dropout=0.0),
    "mini": dict(lr=5e-4, lambda_lr=5e-4, batch_size=64, epochs=3, warmup=100, clip=1.0),
}
PLACE = ("data_dir", "device", "save_every")    # where and how a run is made, which makes no other run
DRAWS = 20      # of sampling, whose score is their mean: one draw is off by 1 to 2 points
RULES = {       # exit: its rule, the rule's arguments in Settings, the first one's values in a sweep
    "q": (QExit, ["q"], [n / 20 for n in range(1, 21)]),
    "patience": (PatienceExit, ["patience", "tolerance"], list(range(1, 12))),
    "entropy": (EntropyExit, ["entropy"], [0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6]),
    "learned": (LearnedExit, ["certainty"], [n / 20 for n in range(20)]),
}
THRESHOLDS = {name: takes[0] for name, (_, takes, _) in RULES.items()}
READ_BY = {"beta": ["q"], "cut": ["q"]}     # setting: the exits of the methods that alone read it
READ_BY |= dict.fromkeys(("prior", "lambda_layers", "lambda_input", "lambda_lr"), ["q", "learned"])
READ_BY |= {name: [criterion] for criterion, (_, takes, _) in RULES.items() for name in takes}


# ---- settings ----

def setting(default, allowed, meaning):
    """A field of Settings; allowed: its words, or its least and greatest number, or None for any word"""
    return dataclasses.field(default=default, metadata={"allowed": allowed, "meaning": meaning})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides a run; the defaults are the paper's and the released command's for RTE."""

    task: str = setting("parity", None, "a task of GLUE, parity, or a folder of your own data")
    model: str = setting(None, None, "a published name, a folder, runs/NAME, or tiny or mini from scratch")
    method: str = setting("palbert", tuple(METHODS), "the system, a preset of the settings below")
    seed: int = setting(0, (0, 10**9), "seed of everything random")
    max_steps: int = setting(None, (1, 10**9), "steps after which the run ends")
    save_every: int = setting(None, (1, 10**9), "steps between checkpoints, besides one an epoch")
    data_dir: str = setting(None, None, "folder with the GLUE files; without it they are downloaded")
    device: str = setting(None, None, "cuda, cuda:N, mps or cpu; without it the first that is there")
    precision: str = setting(None, ("float32", "bf16"), "not given: bf16 on a GPU that has it, else float32")
    exit: str = setting("q", CRITERIA, "the exit whose dev score stops and selects")
    q: float = setting(0.5, (0, 1), "threshold of Q-exit (section 3.1)")
    beta: float = setting(0.5, (0, 1e9), "weight of the KL term (Table 4)")
    prior: float = setting(0.1, (1e-6, 1 - 1e-6), "lambda of the geometric prior (section 4.5)")
    cut: float = setting(0.05, (0, 0.99), "what is left of p where it is cut (section 3); 0: no cut")
    lambda_layers: int = setting(3, (1, 3), "layers of the Lambda head (section 3.2)")
    lambda_input: str = setting("concat", ("current", "concat"), "h_i, or h_i and h_{i-1} (section 3.2)")
    layers: int = setting(None, (1, 1000), "layers to run, where layers are shared (Table 2 has 9)")
    classifiers: str = setting("shared", ("shared", "per_layer"), "one in all or one a layer (section 5)")
    patience: int = setting(6, (1, 10**9), "PABEE's t: layers in a row that agree (section 4)")
    tolerance: float = setting(0.2, (1e-9, 1e9), "within which values agree for PABEE (released code)")
    entropy: float = setting(0.3, (1e-9, 1e9), "threshold of entropy exit in nats (ours)")
    certainty: float = setting(0.9, (0, 1), "threshold of BERxiT's learned exit (ours)")
    dropout: float = setting(0.1, (0, 0.99), "before classifier and Lambda alone (released code)")
    lr: float = setting(1e-5, (1e-12, 1e38), "Adam's rate, constant (Table 4)")
    lambda_lr: float = setting(1e-5, (1e-12, 1e38), "Lambda's own rate (Table 4); none: that of the rest")
    batch_size: int = setting(32, (1, 10**9), "examples a step (Table 4)")
    epochs: int = setting(25, (1, 10**9), "epochs at most (released code)")
    stop_after: int = setting(5, (1, 10**9), "epochs without a better dev score that end it (section 4)")
    max_length: int = setting(128, (8, 512), "tokens a row; longer ones are truncated (released code)")
    warmup: int = setting(0, (0, 10**9), "steps in which the rate rises (the paper has none)")
    clip: float = setting(None, (1e-9, 1e9), "gradient norm at most (the paper has none)")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, allowed = getattr(self, field.name), field.metadata["allowed"]
            if value is None and (field.default is None or field.name == "lambda_lr"):
                continue
            if field.type is str:
                good = type(value) is str and value != "" and (allowed is None or value in allowed)
                expected = "one of " + ", ".join(allowed) if allowed else "a word"
            else:
                good = type(value) in (int, field.type) and allowed[0] <= value <= allowed[1]
                kind = "whole number" if field.type is int else "number"
                expected = f"a {kind} from {allowed[0]:g} to {allowed[1]:g}"
            if not good:
                raise InputError(f"{flag(field.name)} {value}: expected {expected}")

    @property
    def exits(self):
        """The exits that this run's model can be evaluated by; entropy needs classes."""
        regression = get_task(self.task).num_labels == 1
        return tuple(name for name in EXITS[self.method] if name != "entropy" or not regression)


def make_settings(**given):
    """Settings with the presets of model and method under what is given"""
    task, model = given.get("task", Settings.task), given.get("model")
    if task not in TASKS and os.path.isdir(task):
        task = os.path.abspath(task)        # own data, which a run finds from any folder
    if model is None:
        model = "tiny" if task == "parity" else "albert-base-v2"
    presets = SCRATCH.get(model, {}) | METHODS.get(given.get("method"), {})
    return Settings(**presets | given | {"task": task, "model": model})


def changed_settings(settings):
    """The names of the settings that differ from the preset of their task, model and method"""
    preset = make_settings(task=settings.task, model=settings.model, method=settings.method)
    return [name for name, value in vars(settings).items() if value != getattr(preset, name)]


def flag(name):
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """A command line whose errors are InputErrors, and which gives only what was asked."""

    def __init__(self, name, description):
        super().__init__(name, description=description, allow_abbrev=False,
                         argument_default=argparse.SUPPRESS,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise InputError(f"{message}; {self.prog} --help lists the flags")


# ---- device and precision ----

def choose_device(name=None):
    """torch.device by its name; None takes cuda, mps or cpu, the first that is there. Each of torchrun's
    processes has the GPU of its rank. InputError where there is no such device."""
    rank, count, found = os.environ.get("LOCAL_RANK"), torch.cuda.device_count(), {"cpu": "cpu"}
    if rank is None:
        if torch.backends.mps.is_available():
            found["mps"] = "mps"        # not for torchrun, whose processes cannot talk through it
        found |= {f"cuda:{n}": f"cuda:{n}" for n in range(count)}
    if count > int(rank or 0):
        found["cuda"] = f"cuda:{rank or 0}"
    if name is None:
        name = "cuda" if count else list(found)[-1]
    if name not in found:
        raise InputError(f"--device {name}: expected one of {', '.join(found)}, which PyTorch "
                         f"{torch.__version__} finds; each of torchrun's processes needs a GPU of its own")
    device = torch.device(found[name])
    if device.type == "cuda":
        torch.cuda.set_device(device.index)
        # cuDNN's attention plans anew for each shape, 3.4 s for MRPC's dev set on an H100.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def autocast(device, precision=None):
    """The context to compute in, bf16 (None: on a GPU that has it) or float32; InputError if it cannot."""
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        able = has.get("avx512_bf16") or has.get("amx_bf16")
    bf16 = precision == "bf16" or (precision is None and device.type == "cuda" and able)
    if bf16 and not able:
        raise InputError(f"--precision bf16: this {device.type} does not compute in it; use float32")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def timed(model, work):
    """(seconds, result) of work(), what the device does for it included"""
    wait = torch.get_device_module(next(model.parameters()).device).synchronize     # a CPU's does nothing
    wait()
    start, result = time.perf_counter(), work()
    wait()
    return time.perf_counter() - start, result


# ---- the model of a run ----

ENCODERS = {"albert": albert.Albert, "bert": bert.Bert, "roberta": bert.Roberta}    # by model_type


def encoder_of(config):
    """The class of encoder that the dict of a config.json is for; Google's does not say, and is ALBERT's"""
    kind = config.get("model_type", "albert")
    if kind not in list(ENCODERS):      # it may be of any type
        raise InputError(f"model_type {shorten(kind)} is not built here; use one of {', '.join(ENCODERS)}")
    return ENCODERS[kind]


def make_model(settings, folder):
    """The model of a new run; the encoder's config and the tokenizer are written to the folder."""
    torch.manual_seed(settings.seed)
    if settings.model in SCRATCH:
        examples = load(settings.task, "train", settings.data_dir)
        texts = [text for example in examples for text in (example.text_a, example.text_b) if text]
        config = albert.SIZES[settings.model]
        tokenizer = train_tokenizer(texts, folder, config.vocab_size, settings.seed)
        encoder = albert.Albert(dataclasses.replace(config, vocab_size=tokenizer.vocab_size))
    elif Path(settings.model, "run.json").exists():
        _, tokenizer, model = load_run(settings.model, torch.device("cpu"))
        encoder = model.encoder
    else:
        config = find_model(settings.model).config
        tokenizer = load_tokenizer(config.parent)
        encoder = encoder_of(read_json(config)).from_pretrained(settings.model)
    if settings.layers is not None and settings.layers < encoder.num_layers and hasattr(encoder, "truncate"):
        encoder.truncate(settings.layers)
    model, config = make_ponder(encoder, settings, tokenizer), encoder.config
    write_json(folder / "config.json", {"model_type": config.model_type, **dataclasses.asdict(config)})
    tokenizer.save(folder)
    return model


def make_ponder(encoder, settings, tokenizer):
    """The untrained Ponder of these settings around an encoder that fits them and the tokenizer"""
    if tokenizer.vocab_size > encoder.config.vocab_size:
        raise InputError(f"{settings.model}: the tokenizer has {tokenizer.vocab_size} pieces, the model "
                         f"embeddings for {encoder.config.vocab_size}; take both from one model")
    if tokenizer.vocab_size < encoder.config.vocab_size:        # harmless, unless the vocabulary is cut short
        say(f"{settings.model}: the tokenizer has {tokenizer.vocab_size} pieces, the model embeddings for "
            f"{encoder.config.vocab_size}; if they are not of one model, take both from one")
    if settings.max_length > encoder.max_length:
        raise InputError(f"--max-length: {settings.model} takes no more than {encoder.max_length} tokens")
    lambda_layers = 0 if settings.method in ("pabee", "finetune") else settings.lambda_layers
    num_labels = get_task(settings.task).num_labels
    try:
        return Ponder(encoder, num_labels, settings.layers, lambda_layers, settings.lambda_input == "concat",
                      settings.classifiers == "per_layer", settings.prior, settings.dropout)
    except ValueError as error:
        raise InputError(f"--layers {settings.layers}: {error}") from None


# ---- the folder of a run ----

def open_run(folder, settings):
    """(tokenizer, model) by the config.json and tokenizer of a run's folder. The model is on the meta device,
    where what only a config claims takes no memory."""
    path = folder / "config.json"
    values, tokenizer = read_json(path), load_tokenizer(folder)
    encoder_class = encoder_of(values)
    with torch.device("meta"):
        encoder = encoder_class(encoder_class.config_class.from_json(values, path))
        return tokenizer, make_ponder(encoder, settings, tokenizer)


def fill(model, path, device):
    """The model, on the device and to evaluate, with the weights of a safetensors file, which it must fit"""
    with guard(path, "set of the run's weights"):
        weights = {name: tensor.to(device, torch.float32, copy=True)
                   for name, tensor in read_safetensors(path).items()}
        model.load_state_dict(weights, assign=True)
    return model.eval()


def load_run(folder, device=None):
    """(settings, tokenizer, model) of a run's folder, with the weights of its best epoch, to evaluate on the
    device (None: the first that is there). InputError for a folder that is not whole."""
    folder, (settings, values) = Path(folder), read_run(folder)
    for name, sha256 in values.get("files", {}).items():    # half a spiece.model is a whole smaller one
        sha256_file(folder / name, sha256)
    tokenizer, model = open_run(folder, settings)
    return settings, tokenizer, fill(model, folder / "model.safetensors", device or choose_device())


def read_run(folder):
    """(Settings, the whole of run.json) of a run's folder"""
    path = Path(folder, "run.json")
    values = read_json(path)
    try:
        return make_settings(**values["settings"]), values
    except (InputError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not what train.py writes ({error}); train again") from None


def find_run(name=None, unfinished=False):
    """The folder of the run of that name or path; without one the newest with weights, or to be resumed"""
    if name is not None:
        for folder in (RUNS / name, Path(name)):
            if (folder / "run.json").exists():
                return folder
        raise InputError(f"no run {name!r}: expected {RUNS / name}/run.json or {Path(name)}/run.json")
    ready = "resume.pt" if unfinished else "model.safetensors"
    for path in sorted(RUNS.glob(f"*/{ready}"), key=os.path.getmtime, reverse=True):
        if not unfinished or not read_run(path.parent)[1].get("finished"):
            return path.parent
    raise InputError(f"no run with a {ready} under {RUNS}/; python train.py makes one")


def run_name(settings):
    """The name of a run: task, method, model, what differs from the preset, and the seed"""
    changed = [name for name in changed_settings(settings) if name not in ("seed", *PLACE)]
    words = [Path(settings.task).name, settings.method, Path(settings.model).name]
    return "-".join(words + [f"{name}{getattr(settings, name)}" for name in [*changed, "seed"]])


def hashes(paths):
    return {path.name: sha256_file(path) for path in paths}


def origin_of(settings):
    """What a run is made of, by sha256; a model that is published or from scratch is known by its name"""
    model = settings.model
    published = Path(model).name in (*PUBLISHED, "minilm") and not Path(model).exists()
    if model not in SCRATCH and not published:
        files = find_model(model)
        shards = [*files.weights.parent.glob("*.data-*"), *files.weights.parent.glob("model-*-of-*")]
        model = hashes([files.config, files.weights, *sorted(shards)])
    return {"model": model, "data": hashes(sources(settings.task, settings.data_dir))}


def describe(settings, device):
    """What run.json records so that a number can be traced: settings, versions, device, precision"""
    versions = {module.__name__: module.__version__ for module in (torch, numpy, sentencepiece)}
    with autocast(device, settings.precision):
        bf16 = torch.is_autocast_enabled(device.type)
    return {"settings": dataclasses.asdict(settings), "finished": False, "device": device_name(device),
            "precision": "bf16" if bf16 else "float32",
            "versions": {"python": platform.python_version(), **versions}}


# ---- evaluation ----

def read_splits(settings, tokenizer, split):
    """{split: (inputs, labels)} of the splits that a name means, for MNLI's dev and test two; inputs: a list
    of (ids, segments)"""
    found = {}
    parts = [name for name in get_task(settings.task).splits if name.startswith(f"{split}_")]
    for name in parts or [split]:
        examples = load(settings.task, name, settings.data_dir)
        inputs = tokenizer.encode_all(examples, settings.max_length)
        found[name] = inputs, [example.label for example in examples]
    return found


@torch.no_grad()
def all_layers(model, inputs, batch_size=32, precision=None):
    """One pass of full depth: logits (N,L,C), lam (N,L), float32 on the CPU, in the order of the inputs"""
    device, outputs = next(model.parameters()).device, []
    order = torch.tensor([len(ids) for ids, _ in inputs]).argsort(descending=True, stable=True)
    with autocast(device, precision):
        for batch in order.split(batch_size):
            outputs.append(model(*pad([inputs[row] for row in batch.tolist()], model.encoder, device)))
    logits, lam = (torch.cat(column).float().cpu()[order.argsort()] for column in zip(*outputs))
    check_finite(logits.isfinite().all(-1) & lam.isfinite(), torch.arange(1, lam.shape[1] + 1).expand_as(lam))
    return logits, lam


def full_depth(model, settings, splits, batch_size=32):
    """{split: (logits (N,L,C), lam (N,L), labels)} of what read_splits() gives"""
    return {split: (*all_layers(model, inputs, batch_size, settings.precision), labels)
            for split, (inputs, labels) in splits.items()}


def predict_all(model, settings, criterion, inputs, batch_size):
    """Early exit for real, or every layer for the expectation: outputs (N,C), layers (N,), on the CPU, in the
    order of the inputs"""
    if criterion == "expectation":
        return apply_exit(criterion, settings, *all_layers(model, inputs, batch_size, settings.precision))
    rule = make_rule(criterion, settings, model.num_layers)
    with autocast(next(model.parameters()).device, settings.precision):
        outputs, layers = (answer.cpu() for answer in model.predict_many(inputs, rule, batch_size))
    check_finite(outputs.isfinite().all(-1), layers)
    return outputs.float(), layers


def check_finite(good, layers):
    """InputError unless good (...) bool is True at all layers (...): what is not finite has no score."""
    bad = layers[~good]
    if len(bad):
        raise InputError(f"layer {int(bad.min())} gives a number that is NaN or infinite; try a lower --lr")


def make_rule(criterion, settings, L, draw=0):
    """The exit rule of that name, of sampling one a draw; the expectation reads every layer, as last does"""
    if criterion == "sample":
        return SampleExit(torch.Generator().manual_seed(settings.seed + draw))
    if criterion not in RULES:
        return FixedExit(L)
    rule, takes, _ = RULES[criterion]
    return rule(*[getattr(settings, name) for name in takes])


def apply_exit(criterion, settings, logits, lam, draw=0):
    """The exit over arrays of full depth, logits (N,L,C), lam (N,L) -> predictions (N,C), layers (N,)"""
    layers = exit_layers(make_rule(criterion, settings, lam.shape[1], draw), logits, lam)
    if criterion == "expectation":
        return expected_prediction(logits, exit_distribution(lam)), layers
    return logits[torch.arange(len(layers)), layers - 1], layers


# ---- what one pass of full depth tells ----

def mean_of(trees):
    """Dicts and lists of one form -> their mean, number by number; a key may be missing in some"""
    if isinstance(trees[0], dict):
        keys = dict.fromkeys(key for tree in trees for key in tree)
        return {key: mean_of([tree[key] for tree in trees if key in tree]) for key in keys}
    if isinstance(trees[0], list):
        return [mean_of(same) for same in zip(*trees, strict=True)]
    return statistics.mean(trees)


def exit_result(criterion, settings, logits, lam, labels, split):
    """An exit over logits (N,L,C), lam (N,L) and labels of a split -> score, metrics by split, mean_layer,
    histogram (L,) of exits, and dealt: the score if the same layers go to random rows, which a good choice of
    rows beats. All are means of DRAWS draws."""
    draws, (N, L) = [], lam.shape
    for draw in range(DRAWS):
        outputs, layers = apply_exit(criterion, settings, logits, lam, draw)
        order = torch.randperm(N, generator=torch.Generator().manual_seed(draw))
        dealt = logits[torch.arange(N), layers[order] - 1]
        metrics = score(settings.task, answers(outputs), labels)
        shares = torch.bincount(layers, minlength=L + 1)[1:].double() / N
        draws.append({"score": metrics.pop("score"), "metrics": {split: metrics},
                      "dealt": score(settings.task, answers(dealt), labels)["score"],
                      "mean_layer": layers.double().mean().item(), "histogram": shares.tolist()})
    return mean_of(draws)


def study(settings, splits):
    """What run.json keeps of a finished run, so that tables and Figs. 2 to 4 need no model: splits {split:
    (logits (N,L,C), lam (N,L), labels)} -> dev {exit: exit_result()}, sweep {exit: a row for each threshold},
    by_layer (L,): the score of every fixed layer, oracle: score and mean_layer of each row's first right one,
    L where none is; for regression of the one with the least error"""
    trees = []
    for split, (logits, lam, labels) in splits.items():
        dev, sweep, (N, L) = {}, {}, lam.shape
        for criterion in settings.exits:
            dev[criterion] = exit_result(criterion, settings, logits, lam, labels, split)
            _, takes, values = RULES.get(criterion, (None, None, ()))
            for value in values:
                changed = dataclasses.replace(settings, **{takes[0]: value})
                result = exit_result(criterion, changed, logits, lam, labels, split)
                row = {name: result[name] for name in ("score", "mean_layer", "dealt")}
                row |= {criterion: value, "speed_up": L / result["mean_layer"]}
                sweep.setdefault(criterion, []).append(row)
        error = (answers(logits.flatten(0, 1)).view(N, L) - torch.tensor(labels)[:, None]).abs()
        if logits.shape[2] > 1:
            error = (error > 0).int()
            error[:, -1] = 0                                        # layer L is taken where none is right
        best = error.argmin(1)                                      # (N,) from 0, the first of the least
        chosen = [*logits.unbind(1), logits[torch.arange(N), best]]
        *by_layer, oracle = [score(settings.task, answers(outputs), labels)["score"] for outputs in chosen]
        oracle = {"score": oracle, "mean_layer": (best + 1).double().mean().item()}
        trees.append({"dev": dev, "sweep": sweep, "by_layer": by_layer, "oracle": oracle})
    return mean_of(trees)


# ---- commands ----

def run_main(main):
    """Run a command: what a user can mend is one sentence and exit code 1; a closed pipe ends it quietly."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # leaves nothing behind, like Ctrl-C
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")    # for terminals that are not UTF-8
    try:
        main()
        sys.stdout.flush()
        if torch.distributed.is_initialized():
            # A thread of it may still hold a tensor, and would abort a Python that has ended meanwhile.
            torch.distributed.destroy_process_group()
            os._exit(0)
    except BrokenPipeError:
        for number in (1, 2):                   # Python flushes both once more as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        sys.exit(1)
    except InputError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename or 'a file'} cannot be read or written: {error.strerror or error}")
    except torch.OutOfMemoryError:
        sys.exit("error: the device's memory does not suffice; try a smaller --batch-size")
    except KeyboardInterrupt:
        sys.exit(130)
