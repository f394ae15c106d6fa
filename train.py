"""Fine-tune PALBERT and the systems that the paper compares it with.

    python train.py                              parity, from scratch, no download
    python train.py --task mrpc --device cuda    the paper's settings on MRPC
    python train.py --task mrpc --grid --seeds 5
                       the paper's protocol: Table 4's grid, then 5 fresh seeds
    torchrun --nproc-per-node 2 train.py --task mrpc
                       one run on two devices; without dropout it is the run of
                       one process, with it other masks are drawn

A run is a folder under runs/: config.json, the tokenizer, model.safetensors
(the weights of the best epoch), run.json (settings, origin, versions, results),
metrics.jsonl, and resume.pt while it is unfinished.
"""

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
import threading
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

import ponder
from checkpoint import InputError, atomic_write, read_torch, sha256_file, write_safetensors
from glue import buckets, load
from ponder import elbo_loss, geometric_prior, layer_losses, layer_weighted_loss, pad, upload
from run import (GROUPS, PLACE, RUNS, Interrupted, Parser, Settings, autocast, changed_settings, check, choose_device,
                 compare_tensors, describe, evaluate, fill, find_run, flag, get_task, make_model, make_settings,
                 open_run, origin_of, read_run, read_split, run_main, run_name, say, write_json)

try:
    import fcntl
except ImportError:     # Windows, where a run is not locked
    fcntl = None

GRID = {"lr": (1e-5, 2e-5, 3e-5, 5e-5), "batch_size": (16, 32, 128), "lambda_lr": (1e-5, 2e-5, 3e-5)}   # Table 4
LOG_EVERY = 50          # steps between two looks at the device, where the losses wait


# ---- one step ----

def loss_of(settings, logits, lam, labels, prior):
    """The method's loss over a batch, and its parts for the log"""
    if settings.ponders:
        return elbo_loss(logits, lam, labels, prior, settings.beta)
    if settings.method == "berxit":
        return ponder.berxit_loss(logits, lam, labels)
    if settings.method == "pabee":
        return layer_weighted_loss(logits, labels)
    loss = layer_losses(logits[:, -1:], labels).mean()
    return loss, {"task": loss.detach()}


def make_optimizer(model, settings):
    """Adam at a constant rate, without decay; the Lambda head has a rate of its own unless lambda_lr is None."""
    own = set()
    if model.lambda_head is not None and settings.lambda_lr is not None:
        own = set(model.lambda_head.parameters())
    groups = [{"params": [p for p in model.parameters() if p not in own], "lr": settings.lr}]
    if own:
        groups.append({"params": [p for p in model.parameters() if p in own], "lr": settings.lambda_lr})
    optimizer = torch.optim.Adam(groups, fused=True)
    for group in optimizer.param_groups:
        group["base"] = group["lr"]
        for p in group["params"]:       # Adam would do it in its first step; so resume finds it there
            optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                                  "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def train_step(model, optimizer, settings, step, inputs, labels, prior, rank=0, world=1):
    """One step on a global batch, of which this process takes every world-th row -> {name: part of the loss ()}, this
    process's share of it, left on the device.

    The loss is summed over local rows and divided by the global batch, and gradients are summed, so without dropout any
    number of processes gives one result. The global generator is seeded from (seed, step, rank): dropout depends on
    nothing else.
    """
    torch.manual_seed((settings.seed * 1_000_003 + step) * 1_009 + rank)
    parameters = list(model.parameters())
    device, local = parameters[0].device, range(rank, len(inputs), world)
    share = len(local) / len(inputs)
    rows = local if share else range(1)     # a process without a row computes one that counts 0
    batch = pad([inputs[row] for row in rows], model.encoder, device)
    targets = upload([labels[row] for row in rows], device, dtype=None)     # class indices, or floats
    optimizer.zero_grad()
    with autocast(device, settings.precision):
        logits, lam = model(*batch)
    loss, parts = loss_of(settings, logits, lam, targets, prior)
    (loss * share).backward()
    if world > 1:
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = grad.view_as(p)
    if settings.clip is not None:
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
    for group in optimizer.param_groups:
        group["lr"] = group["base"] * min(1, (step + 1) / max(1, settings.warmup))
    optimizer.step()
    return {name: part * share for name, part in ({"loss": loss.detach()} | parts).items()}


# ---- what a run remembers ----

@dataclass
class Progress:
    """How far a run is; resume.pt keeps it."""

    step: int = 0
    epoch: int = 0          # epochs that are done
    position: int = 0       # batches of the next one that are done
    best_epoch: int = 0
    log_bytes: int = 0
    best: float = float("-inf")
    seconds: float = 0.0


class Log:
    """metrics.jsonl: a line for each step and each epoch. Losses wait on the device until flush(), so that it never
    waits for the host. Only rank 0 has the file."""

    def __init__(self, file, settings, progress):
        self.file, self.settings, self.progress, self.waiting = file, settings, progress, []
        self.started = time.time() - progress.seconds
        if file is not None:
            size = os.fstat(file.fileno()).st_size
            if size < progress.log_bytes:
                raise InputError(f"{file.name}: it has {size} bytes, fewer than the {progress.log_bytes} that resume.pt "
                                 "counts; put the whole file back, or delete the run")
            file.truncate(progress.log_bytes)

    def write(self, line):
        self.progress.seconds = time.time() - self.started
        if self.file is not None:
            self.file.write(json.dumps(line | {"seconds": round(self.progress.seconds, 3)}).encode() + b"\n")

    def flush(self):
        """Fetch the losses that wait, write and check them -> the last step's parts"""
        if not self.waiting:
            return {}
        values = torch.stack([torch.stack(list(parts.values())) for _, _, _, parts in self.waiting])
        if dist.is_initialized():
            dist.all_reduce(values)         # from this process's share to the whole
        for (step, rates, rows, parts), numbers in zip(self.waiting, values.tolist()):
            parts = dict(zip(parts, numbers))
            self.write({"step": step, "epoch": self.progress.epoch + 1} | parts | rates)
            self.check(step, rows, parts)
        self.waiting = []
        return parts

    def check(self, step, rows, parts):
        if parts.get("kl") == float("inf"):
            raise InputError(f"step {step}: the KL term is infinite, since the prior {self.settings.prior} leaves some "
                             "layer no probability; try another --prior")
        if not all(abs(part) < float("inf") for part in parts.values()):
            raise InputError(f"step {step}: the loss is not finite ({parts}) on training rows {rows}; the weights of "
                             "the best epoch so far are kept; try a lower --lr")

    def save(self):
        """Flush, and bring the file to the disk as far as resume.pt will count it."""
        self.flush()
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.progress.log_bytes = self.file.tell()


def state_of(model, optimizer):
    """All tensors that a run goes on from, by name: weights, and Adam's two means and step count of each"""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, p in model.named_parameters():
        tensors |= {f"{key}.{name}": tensor for key, tensor in optimizer.state[p].items()}
    return tensors


def read_resume(path, model, optimizer, order, settings, batches):
    """The Progress that resume.pt holds, after its tensors are copied to where they belong; InputError, and nothing is
    changed, if anything in it does not fit."""
    saved = read_torch(path)
    try:
        tensors, shuffle, values = saved["tensors"], saved["order"], saved["progress"]
        progress = Progress(**values)
        compare_tensors(tensors, state_of(model, optimizer), path)
        order.set_state(shuffle.clone())
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path}: it is not of this run ({error}); delete it to start the run again") from None
    most = {"step": settings.epochs * batches, "epoch": settings.epochs, "position": batches, "best_epoch": settings.epochs, "log_bytes": float("inf")}
    for name, top in most.items():
        if type(values[name]) is not int or not 0 <= values[name] <= top:
            raise InputError(f"{path}: {name} is {values[name]!r}, and not a whole number from 0 to {top}; delete it to "
                             "start the run again")
    for name, tensor in state_of(model, optimizer).items():
        tensor.copy_(tensors[name])
    return progress


# ---- one run ----

def on_rank_0(work):
    """work() as rank 0 finds it: one process decides, and those beside it are told what, or end where it failed."""
    if not dist.is_initialized():
        return work()
    told = [None, False]
    try:
        if dist.get_rank() == 0:
            told = [work(), True]
    finally:
        dist.broadcast_object_list(told)
    if not told[1]:
        raise SystemExit(1)
    return told[0]


@contextlib.contextmanager
def caught_signals():
    """Inside, Ctrl-C, SIGTERM and SIGHUP (schedulers send them) only fill the list that is given, so that the step is
    finished and saved. Who ignores a signal, as under nohup, goes on ignoring it."""
    caught, kept = [], {}
    names = ("SIGINT", "SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    for number in [getattr(signal, name) for name in names if hasattr(signal, name)]:   # Windows has no SIGHUP
        if signal.getsignal(number) != signal.SIG_IGN:
            kept[number] = signal.signal(number, lambda *_: caught.append(True))
    try:
        yield caught
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


class Training:
    """One run in one process: what it is made of, and how far it is."""

    def __init__(self, settings):
        self.settings, self.device = settings, choose_device(settings.device)
        autocast(self.device, settings.precision)   # which fails where there is no bf16
        self.rank, self.world = 0, 1
        if dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if self.world > 1 and (self.device.type == "mps" or ":" in (settings.device or "")):
            raise InputError("--device: torchrun gives each process a GPU of its own or shares the CPU; expected "
                             f"--device cuda or cpu, found {settings.device or self.device.type}")
        self.file, self.model, self.tokenizer = None, None, None

    def start(self, folder):
        """Rank 0 alone: take the folder (None: a new one), and make the model of a run that begins -> (folder, the
        results of a finished run)"""
        folder, made = take_folder(self.settings, folder)
        try:
            self.file = claim(folder)
            values = {}
            if (folder / "run.json").exists():
                values = read_run(folder)[1]
            if values.get("finished"):
                return folder, values["dev"]
            if not (folder / "resume.pt").exists():
                origin = origin_of(self.settings)
                examples = load(self.settings.task, "train", self.settings.data_dir)
                self.tokenizer, self.model = make_model(self.settings, folder, examples)
                write_json(folder / "run.json", {"settings": dataclasses.asdict(self.settings), "finished": False}
                           | describe(self.settings, self.device) | origin)
        except BaseException:
            self.close()
            if made and not (folder / "run.json").exists():
                shutil.rmtree(folder)
                with contextlib.suppress(OSError):      # other runs are in it
                    RUNS.rmdir()
            raise
        return folder, None

    def close(self):
        if self.file is not None:
            self.file.close()                           # which unlocks the run

    def prepare(self, folder):
        """Every process: the data, and the model as rank 0 made it or as resume.pt has it"""
        settings, self.folder = self.settings, folder
        if self.model is None:
            self.tokenizer, self.model = open_run(folder, settings)
            self.model = self.model.to_empty(device=self.device)
        self.model = self.model.to(self.device).train()
        self.optimizer = make_optimizer(self.model, settings)
        self.prior = geometric_prior(settings.prior, self.model.num_layers).to(self.device)
        examples = load(settings.task, "train", settings.data_dir)
        self.inputs = self.tokenizer.encode_all(examples, settings.max_length)
        self.labels = [example.label for example in examples]
        self.dev = {split: read_split(settings, self.tokenizer, split) for split in get_task(settings.task).dev_splits}
        self.batches = -(-len(examples) // settings.batch_size)
        self.total = min(settings.epochs * self.batches, settings.max_steps or 10**18)
        self.order, self.progress = torch.Generator().manual_seed(settings.seed), Progress()
        if (folder / "resume.pt").exists():
            self.progress = read_resume(folder / "resume.pt", self.model, self.optimizer, self.order, settings,
                                        self.batches)
            say(f"going on from step {self.progress.step}")
        elif self.world > 1:
            for p in self.model.parameters():
                dist.broadcast(p.data, 0)
        self.log = Log(self.file, settings, self.progress)
        self.speed_from = self.progress.step, time.time()

    def save(self, shuffle):
        """resume.pt: all that decides the steps to come; shuffle is the order's state at the start of the epoch."""
        self.log.save()
        if self.rank == 0:
            with atomic_write(self.folder / "resume.pt") as file:
                torch.save({"tensors": state_of(self.model, self.optimizer), "order": shuffle,
                            "progress": dataclasses.asdict(self.progress)}, file)

    def epoch(self, caught):
        """The steps of one epoch that are left"""
        settings, progress, shuffle = self.settings, self.progress, self.order.get_state()
        order = buckets([len(ids) for ids, _ in self.inputs], settings.batch_size, self.order)
        for batch in order[progress.position:]:
            parts = train_step(self.model, self.optimizer, settings, progress.step, [self.inputs[row] for row in batch],
                               [self.labels[row] for row in batch], self.prior, self.rank, self.world)
            progress.step += 1
            progress.position += 1
            rates = dict(zip(("lr", "lambda_lr"), [group["lr"] for group in self.optimizer.param_groups]))
            self.log.waiting.append((progress.step, rates, batch, parts))
            if progress.step % LOG_EVERY == 0 or progress.step == self.speed_from[0] + 1:
                self.say_progress(self.log.flush())
            stop = self.anyone(caught)
            if stop or (settings.save_every and progress.step % settings.save_every == 0):
                self.save(shuffle)
            if stop:
                raise Interrupted(f"stopped after step {progress.step} and saved; go on with: python train.py --resume "
                                  + shlex.quote(str(self.folder)))
            if progress.step == settings.max_steps:
                break
        self.log.flush()

    def anyone(self, caught):
        """Whether a signal came to any process; all must stop after the same step."""
        if self.world == 1:
            return bool(caught)
        came = torch.tensor(len(caught))    # on the CPU, so that the host does not wait for a GPU
        dist.all_reduce(came)
        return bool(came)

    def say_progress(self, parts):
        first, since = self.speed_from
        pace = (time.time() - since) / (self.progress.step - first)
        left = datetime.timedelta(seconds=round(pace * (self.total - self.progress.step)))
        numbers = ", ".join(f"{name} {value:.3f}" for name, value in parts.items())
        say(f"epoch {self.progress.epoch + 1}, step {self.progress.step} of at most {self.total}: {numbers}; "
            f"{1 / pace:.1f} steps/s, at most {left} to go")

    def judge(self):
        """Rank 0 alone: score the epoch on dev, and keep its weights if they are the best -> (best, its epoch)"""
        settings, progress, name = self.settings, self.progress, self.settings.exit
        try:
            results, p = evaluate(self.model, settings, self.dev, (name,))
        except InputError as error:
            raise InputError(f"step {progress.step}: {error}") from None
        result = results[name]
        self.log.write({"step": progress.step, "epoch": progress.epoch, "dev": result, "p": p})
        draws = " (mean of 20 draws)" if name == "sample" else ""
        say(f"epoch {progress.epoch}: dev {settings.task} {result['score']:.1f} by {name} exit{draws} at layer "
            f"{result['mean_layer']:.2f} of {self.model.num_layers}")
        if result["score"] <= progress.best:
            return progress.best, progress.best_epoch
        write_safetensors(self.folder / "model.safetensors", self.model.state_dict())
        return result["score"], progress.epoch

    def train(self):
        """All epochs that are left, and the results on dev by exit, which run.json keeps"""
        settings, progress = self.settings, self.progress
        with caught_signals() as caught:
            while (progress.epoch < settings.epochs and progress.epoch - progress.best_epoch < settings.stop_after
                   and progress.step != settings.max_steps):
                self.epoch(caught)
                progress.epoch, progress.position = progress.epoch + 1, 0
                progress.best, progress.best_epoch = on_rank_0(self.judge)
                self.save(self.order.get_state())
        return on_rank_0(self.finish)

    def finish(self):
        """Rank 0 alone: the results of the best epoch's weights, by exit; the run is finished with them."""
        fill(self.model, self.folder / "model.safetensors", self.device)
        results, _ = evaluate(self.model, self.settings, self.dev, self.settings.exits)
        kept = [path for path in sorted(self.folder.iterdir())
                if path.name not in ("run.json", "metrics.jsonl", "resume.pt")]
        values = read_run(self.folder)[1]
        values |= {"finished": True, "steps": self.progress.step, "epochs": self.progress.epoch,
                   "best_epoch": self.progress.best_epoch, "files": {path.name: sha256_file(path) for path in kept},
                   "dev": results}
        write_json(self.folder / "run.json", values)
        (self.folder / "resume.pt").unlink(missing_ok=True)
        say(f"the best epoch was {self.progress.best_epoch}, of which this is:")
        return results


def run(settings, folder=None):
    """Train a run into the folder (without one, into a new one), go on with it where it was stopped, or do nothing if it
    is finished -> its results on dev by exit"""
    training = Training(settings)
    try:
        folder, results = on_rank_0(lambda: training.start(folder))
        if results is None:
            say(f"{folder}: {settings.task} by {settings.method}, {settings.model}")
            training.prepare(folder)
            results = training.train()
        else:
            say(f"{folder} is finished already, nothing to do; give another --name to train it again")
    finally:
        training.close()
    say(f"{'exit':<12} {'dev score':>9} {'mean layer':>10}")
    for name, result in results.items():
        say(f"{name:<12} {result['score']:>9.1f} {result['mean_layer']:>10.2f}")
    return results


# ---- the folder of a run ----

def folders(settings):
    """Where a run may be: its name, and where others have that, the same with -2, -3, ..."""
    yield RUNS / run_name(settings)
    for n in itertools.count(2):
        yield RUNS / f"{run_name(settings)}-{n}"


def take_folder(settings, folder):
    """(a run's folder, whether it is made here): the given one, or the first of its names that is free; mkdir decides
    between processes that start at once."""
    for path in folders(settings) if folder is None else [folder]:
        try:
            path.mkdir(parents=True)
            return path, True
        except FileExistsError:
            if folder is not None:
                return path, False


def claim(folder):
    """metrics.jsonl, opened to go on with it and locked while it is open: a run has one writer. InputError where another
    process has it."""
    file = open(folder / "metrics.jsonl", "ab")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"{folder}: another process trains this run; wait for it or give another --name") from None
    except OSError:                                     # a file system without locks
        pass
    return file


def difference(folder, settings, origin):
    """In what the run that the folder holds is another than that of these settings and origin; "" if it is the same, or
    if there is none"""
    if not (folder / "run.json").exists():
        return ""
    before, values = read_run(folder)
    names = [field.name for field in dataclasses.fields(settings) if field.name not in PLACE]
    other = [flag(name) for name in names if getattr(before, name) != getattr(settings, name)]
    other += [f"the {part}'s files" for part in ("data", "model") if values.get(part) != origin[part]]
    return ", ".join(other)


def named(settings, name):
    """The folder of that name; InputError if it holds another run."""
    folder = RUNS / name
    other = difference(folder, settings, origin_of(settings))
    if other:
        raise InputError(f"{folder} holds a run that differs in {other}; give another --name, or delete it")
    return folder


def stopped(name):
    """(folder, settings) of a run to go on with; InputError if its data are no longer what they were."""
    folder = find_run(None if name is True else name, unfinished=True)
    settings, values = read_run(folder)
    data = None if values.get("finished") else origin_of(settings)["data"]
    if data is not None and data != values.get("data"):
        raise InputError(f"{folder}: the task's files are not those that the run began with; put them back or train anew")
    return folder, settings


# ---- the paper's protocol ----

def finish(runs, origin, dry_run):
    """Train what is not finished of the runs -> their dev scores by their own exit; None after a dry run that has printed
    the commands that are left."""
    scores = []
    for settings in runs:
        folder = on_rank_0(lambda: next(path for path in folders(settings) if not difference(path, settings, origin)))
        finished = on_rank_0(lambda: (folder / "run.json").exists() and read_run(folder)[1].get("finished"))
        if dry_run and not finished:
            say(command(settings, folder.name), sys.stdout)
        else:
            scores.append(run(settings, folder)[settings.exit]["score"])
    return scores if len(scores) == len(runs) else None


def command(settings, name):
    """The command that trains these settings under that name, so that a finished run is skipped wherever it is given."""
    names = dict.fromkeys(["task", "model", "method", "seed", *changed_settings(settings)])
    values = {name: getattr(settings, name) for name in names}
    flags = [part for name, value in values.items() for part in (flag(name), "none" if value is None else str(value))]
    return shlex.join(["python", "train.py", *flags, "--name", name])


def protocol(settings, seeds, grid, dry_run):
    """The grid of Table 4, then that many seeds of its best settings by dev score, none of which the grid has seen;
    finished runs are skipped. With dry_run the commands that are left are printed, first the grid's, then the seeds'."""
    origin, first = on_rank_0(lambda: origin_of(settings)), settings.seed
    if grid:
        axes = {name: values for name, values in GRID.items() if getattr(settings, name) is not None}
        runs = [dataclasses.replace(settings, **dict(zip(axes, values))) for values in itertools.product(*axes.values())]
        scores = finish(runs, origin, dry_run)
        if scores is None:
            return
        settings, first = runs[scores.index(max(scores))], first + 1
        best = ", ".join(f"{name} {getattr(settings, name)}" for name in axes)
        say(f"best of {len(runs)} settings: {best}, dev {max(scores):.1f}")
    found = finish([dataclasses.replace(settings, seed=first + n) for n in range(seeds)], origin, dry_run)
    if found:
        spread = statistics.stdev(found) if len(found) > 1 else 0
        say(f"{settings.task} {settings.method} by {settings.exit}: mean {statistics.mean(found):.2f} ± {spread:.2f}, "
            f"median {statistics.median(found):.2f} over {len(found)} seeds from {first} "
            f"({', '.join(f'{value:.2f}' for value in found)})", sys.stdout)


# ---- the command ----

def parse_flags(argv):
    """(settings that are given, the other flags), each checked as far as it can be alone"""
    parser = Parser("train.py", __doc__)
    for field in dataclasses.fields(Settings):
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        allowed, meaning = field.metadata["allowed"], field.metadata["meaning"]
        if field.type is str and allowed:
            meaning += f"; {', '.join(allowed)}"
        if field.default is not None:
            meaning += f" [{field.default}]"
        group.add_argument(flag(field.name), default=argparse.SUPPRESS, metavar=field.type.__name__, help=meaning)
    group = parser.add_argument_group("several runs, and runs that were stopped")
    group.add_argument("--name", help="the run's folder under runs/; what is finished in it is left alone, else it goes on")
    group.add_argument("--resume", nargs="?", const=True, metavar="RUN", help="go on with a stopped run [the newest]")
    group.add_argument("--seeds", metavar="N", help="train N seeds; prints mean, std and median")
    group.add_argument("--grid", action="store_true", help="search Table 4's grid first, and take its best settings")
    group.add_argument("--dry-run", action="store_true", help="print the runs that --seeds or --grid leave, a command a line")
    return vars(parser.parse_args(argv))


def typed(kind, text):
    """The value of a flag; a text that is none stays a text, which Settings refuses."""
    if text == "none":
        return None
    try:
        return kind(text)
    except ValueError:
        return text


def main(argv=None):
    flags = parse_flags(argv)
    name, resume, seeds, grid, dry_run = (flags.pop(key) for key in ("name", "resume", "seeds", "grid", "dry_run"))
    types = {field.name: field.type for field in dataclasses.fields(Settings)}
    settings = make_settings(**{key: typed(types[key], text) for key, text in flags.items()})
    if name is not None and (name in ("", ".", "..") or "/" in name or os.sep in name):
        raise InputError(f"--name {name!r}: expected the name of a folder under {RUNS}/")
    if seeds is not None and not re.fullmatch("[1-9][0-9]{0,3}", seeds):
        raise InputError(f"--seeds {seeds}: expected a whole number from 1 to 9999")
    if dry_run and not (seeds or grid):
        raise InputError("--dry-run: expected together with --seeds or --grid")
    if resume is not None and (flags or name or seeds or grid):
        raise InputError("--resume goes on with the settings that the run has; give it without others")
    if name is not None and (seeds or grid):
        raise InputError("--name: runs of --seeds and --grid have names of their own")
    check(settings)
    autocast(choose_device(settings.device), settings.precision)
    with processes():
        if resume is not None:
            folder, settings = on_rank_0(lambda: stopped(resume))
            run(settings, folder)
        elif seeds or grid:
            protocol(settings, int(seeds or 0), grid, dry_run)
        else:
            run(settings, None if name is None else on_rank_0(lambda: named(settings, name)))


@contextlib.contextmanager
def processes():
    """torch.distributed for as long as the block lasts, where torchrun started this process"""
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    # What the host decides goes by gloo, so that it does not wait for a GPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=4))
    try:
        yield
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
