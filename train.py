"""Fine-tune PALBERT and the systems that the paper compares it with.

    python train.py                            parity, from scratch, no download
    python train.py --task mrpc --device cuda  the paper's settings on MRPC
    python train.py --task mrpc --grid --seeds 5
                  the paper's protocol: Table 4's grid, then 5 fresh seeds
    torchrun --nproc-per-node 2 train.py --task mrpc
                  one run on two devices: one process's, but for other dropout

A run is a folder under runs/: config.json, the tokenizer, model.safetensors
(of the best epoch), run.json (settings, origin, versions, results),
metrics.jsonl, and resume.pt while it is unfinished.
"""

import argparse
import atexit
import contextlib
import dataclasses
import datetime
import itertools
import json
import math
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

from checkpoint import InputError, atomic_write, read_torch, write_json, write_safetensors
from fast import pad, upload
from glue import buckets, load, sources
from paper import study
from ponder import berxit_loss, elbo_loss, geometric_prior, layer_losses, layer_weighted_loss
from run import (DRAWS, PLACE, RUNS, Interrupted, Parser, Settings, all_layers, autocast, changed_settings,
                 check, choose_device, compare_tensors, describe, evaluate, fill, find_run, flag, hashes,
                 make_model, make_settings, open_run, origin_of, read_run, read_split, run_main, run_name,
                 say, splits_of)

try:
    import fcntl
except ImportError:     # Windows, where a run is not locked
    fcntl = None

# Table 4
GRID = {"lr": (1e-5, 2e-5, 3e-5, 5e-5), "batch_size": (16, 32, 128), "lambda_lr": (1e-5, 2e-5, 3e-5)}
GROUPS = {"task": "the run", "exit": "the method", "lr": "the training"}    # of flags, by the first of each
LOG_EVERY = 50          # steps between two looks at the device, where the losses wait


# ---- one step ----

def loss_of(settings, logits, lam, labels, prior):
    """The method's loss over a batch, and its parts for the log"""
    if settings.method == "pabee":
        return layer_weighted_loss(logits, labels)
    if settings.method == "berxit":
        return berxit_loss(logits, lam, labels)
    if settings.method == "finetune":
        loss = layer_losses(logits[:, -1:], labels).mean()
        return loss, {"task": loss.detach()}
    return elbo_loss(logits, lam, labels, prior, settings.beta, settings.cut)


def make_optimizer(model, settings):
    """Adam at a constant rate, without decay; the Lambda head has its own rate unless lambda_lr is None."""
    own = set()
    if model.lambda_head is not None and settings.lambda_lr is not None:
        own = set(model.lambda_head.parameters())
    groups = [{"params": [p for p in model.parameters() if p not in own], "base": settings.lr}]
    if own:
        groups.append({"params": [p for p in model.parameters() if p in own], "base": settings.lambda_lr})
    optimizer = torch.optim.Adam(groups, fused=True)
    for p in model.parameters():    # as Adam's first step would do; so what is resumed has its place
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def train_step(model, optimizer, settings, step, inputs, labels, prior, rank=0, world=1):
    """One step on a global batch, of which this process takes every world-th row -> {part of the loss: this
    process's share ()}, on the device. Losses and gradients are summed over processes, so any number of them
    gives one result, but for dropout, which seed, step and rank decide."""
    torch.manual_seed((settings.seed * 1_000_003 + step) * 1_009 + rank)
    parameters = list(model.parameters())
    device, rows = parameters[0].device, range(rank, len(inputs), world)
    share = len(rows) / len(inputs)
    rows = rows or range(1)             # a process without a row takes one that counts nothing
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
    """How far a run is."""

    step: int = 0
    epoch: int = 0          # epochs that are done
    position: int = 0       # batches of the next epoch that are done
    best_epoch: int = 0
    log_bytes: int = 0      # of metrics.jsonl, as far as it counts
    best: float = -math.inf
    seconds: float = 0.0


def state_of(model, optimizer):
    """All tensors that a run goes on from, by name: the weights, and Adam's step and means for each"""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, p in model.named_parameters():
        tensors |= {f"{key}.{name}": tensor for key, tensor in optimizer.state[p].items()}
    return tensors


def read_resume(path, tensors, order, progress, most):
    """Fill tensors, generator and progress from resume.pt. InputError, before anything is changed, where it
    does not fit; most: the greatest value of each counter."""
    saved = read_torch(path)
    try:
        compare_tensors(saved["tensors"], tensors, path)
        torch.Generator().set_state(saved["order"])
        for name, default in vars(progress).items():
            value = saved["progress"][name]
            if type(value) is not type(default) or (name in most and not 0 <= value <= most[name]):
                raise KeyError(f"{name} of {value}")
    except (AttributeError, LookupError, TypeError, RuntimeError) as error:
        raise InputError(f"{path}: does not fit this run ({error}); delete it to begin again") from None
    for name, tensor in tensors.items():
        tensor.copy_(saved["tensors"][name])
    order.set_state(saved["order"].clone())
    vars(progress).update(saved["progress"])


class Log:
    """metrics.jsonl, a line for each step and epoch. Losses wait on the device until flush(), so that it
    never waits for the host. Only rank 0 has a file."""

    def __init__(self, file, progress):
        self.file, self.progress, self.waiting = file, progress, []
        self.begun, self.before, self.started = progress.step, progress.seconds, time.time()
        if file is not None:
            if os.fstat(file.fileno()).st_size < progress.log_bytes:
                raise InputError(f"{file.name}: is shorter than resume.pt says; put it back or train again")
            file.truncate(progress.log_bytes)

    def write(self, line):
        self.progress.seconds = self.before + time.time() - self.started
        if self.file is not None:
            self.file.write(json.dumps(line | {"seconds": round(self.progress.seconds, 3)}).encode() + b"\n")

    def flush(self):
        """Fetch the losses that wait, write and check them -> the parts of the last"""
        values = torch.stack([torch.stack(list(parts.values())) for *_, parts in self.waiting])
        if dist.is_initialized():
            dist.all_reduce(values)     # the shares' sum
        for (line, rows, parts), numbers in zip(self.waiting, values.tolist()):
            parts = dict(zip(parts, numbers))
            self.write(line | parts)
            if not all(map(math.isfinite, numbers)):
                flags = "another --prior" if math.isinf(parts.get("kl", 0)) else "a lower --lr"
                raise InputError(f"step {line['step']}: the loss is not finite ({parts}) on training rows "
                                 f"{rows}; the weights of the best epoch so far are kept; try {flags}")
        self.waiting = []
        return parts

    def say(self, parts, total):
        """The last losses, the pace and the time that is left"""
        step = self.progress.step
        pace = (time.time() - self.started) / (step - self.begun)
        left = datetime.timedelta(seconds=round(pace * (total - step)))
        numbers = ", ".join(f"{name} {value:.3f}" for name, value in parts.items())
        say(f"epoch {self.progress.epoch + 1}, step {step} of at most {total}: {numbers}; {1 / pace:.1f} "
            f"steps/s, at most {left} to go")


# ---- one run ----

def on_rank_0(work):
    """work() of rank 0, which alone decides; the others are told its result, or end where it fails."""
    if not dist.is_initialized():
        return work()
    told = [None, False]
    try:
        if dist.get_rank() == 0:
            told = [work(), True]
    finally:
        dist.broadcast_object_list(told)
    if not told[1]:
        sys.exit(1)
    return told[0]


@contextlib.contextmanager
def caught_signals():
    """Inside, Ctrl-C, SIGTERM and SIGHUP only fill the list that is given, so that the step is finished and
    saved. What is ignored, as SIGHUP under nohup, stays so."""
    caught, kept = [], {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)    # Windows has no SIGHUP
        main_thread = threading.current_thread() is threading.main_thread()
        if main_thread and number and signal.getsignal(number) != signal.SIG_IGN:
            kept[number] = signal.signal(number, lambda *_: caught.append(True))
    try:
        yield caught
    except Interrupted:         # a second signal, which torchrun sends, must not cut the end short
        kept = {}
        raise
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


class Training:
    """One run in one process."""

    def __init__(self, settings):
        self.settings, self.device = settings, choose_device(settings.device)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if self.world > 1 and (self.device.type == "mps" or ":" in str(settings.device)):
            raise InputError(f"--device {settings.device or 'mps'}: expected cuda or cpu where torchrun "
                             "starts processes, each with a GPU of its own or a share of the CPU")
        self.folder, self.file, self.model, self.made = None, None, None, False

    def start(self, folder):
        """Rank 0 alone: take the folder; a run that begins gets its model -> (folder, results if finished)"""
        self.folder, self.file, self.made = take_folder(self.settings, folder)
        if (self.folder / "run.json").exists():
            values = read_run(self.folder)[1]
            if values.get("finished"):
                (self.folder / "resume.pt").unlink(missing_ok=True)     # of a process that died at its end
                return self.folder, values["dev"]
        if not (self.folder / "resume.pt").exists():
            examples = load(self.settings.task, "train", self.settings.data_dir)
            origin = origin_of(self.settings)
            self.tokenizer, self.model = make_model(self.settings, self.folder, examples)
            encoder = self.model.encoder.config.model_type
            values = describe(self.settings, self.device) | {"encoder": encoder} | origin
            write_json(self.folder / "run.json", values)
        return self.folder, None

    def close(self):
        """Unlock the folder, and remove it if nothing came of it."""
        if self.file is not None:
            self.file.close()
        if self.made and not (self.folder / "run.json").exists():
            shutil.rmtree(self.folder)
            with contextlib.suppress(OSError):
                RUNS.rmdir()            # unless other runs are there

    def prepare(self, folder):
        """Every process: data, model and optimizer, as rank 0 made them or resume.pt has them"""
        settings, self.folder, resume = self.settings, folder, folder / "resume.pt"
        if self.model is None:
            self.tokenizer, model = open_run(folder, settings)
            self.model = model.to_empty(device=self.device)
        self.model = self.model.to(self.device).train()
        self.optimizer = make_optimizer(self.model, settings)
        self.prior = geometric_prior(settings.prior, self.model.num_layers).to(self.device)
        self.inputs, self.labels = read_split(settings, self.tokenizer, "train")
        splits = splits_of(settings.task, "dev")
        self.dev = {split: read_split(settings, self.tokenizer, split) for split in splits}
        self.order, self.progress = torch.Generator().manual_seed(settings.seed), Progress()
        batches = -(-len(self.inputs) // settings.batch_size)
        self.total = min(settings.epochs * batches, settings.max_steps or 10**18)
        if resume.exists():
            most = {"step": self.total, "epoch": settings.epochs, "position": batches,
                    "best_epoch": settings.epochs, "log_bytes": 10**18}
            read_resume(resume, state_of(self.model, self.optimizer), self.order, self.progress, most)
            say(f"going on from step {self.progress.step}")
        elif self.world > 1:
            for p in self.model.parameters():
                dist.broadcast(p.data, 0)
        self.log = Log(self.file, self.progress)

    def save(self, shuffle):
        """resume.pt, with all that decides the steps to come; shuffle: order's state as the epoch began"""
        if self.rank == 0:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.progress.log_bytes = self.file.tell()
            with atomic_write(self.folder / "resume.pt") as file:
                torch.save({"tensors": state_of(self.model, self.optimizer), "order": shuffle,
                            "progress": vars(self.progress)}, file)

    def epoch(self, caught):
        """The steps that are left of an epoch"""
        settings, progress, shuffle = self.settings, self.progress, self.order.get_state()
        batches = buckets([len(ids) for ids, _ in self.inputs], settings.batch_size, self.order)
        for batch in batches[progress.position:]:
            inputs, labels = [self.inputs[row] for row in batch], [self.labels[row] for row in batch]
            parts = train_step(self.model, self.optimizer, settings, progress.step, inputs, labels,
                               self.prior, self.rank, self.world)
            progress.step += 1
            progress.position += 1
            rates = dict(zip(("lr", "lambda_lr"), [group["lr"] for group in self.optimizer.param_groups]))
            line = {"step": progress.step, "epoch": progress.epoch + 1} | rates
            self.log.waiting.append((line, batch, parts))
            stop = torch.tensor(len(caught))        # on the CPU, so that the host does not wait for a GPU
            if self.world > 1:
                dist.all_reduce(stop)               # all stop after the same step
            last = progress.step == settings.max_steps or progress.position == len(batches)
            look = progress.step % LOG_EVERY == 0 or progress.step == self.log.begun + 1
            due = settings.save_every is not None and progress.step % settings.save_every == 0
            if look or due or last or stop:
                parts = self.log.flush()
            if look:
                self.log.say(parts, self.total)
            if due or stop:
                self.save(shuffle)
            if stop:
                raise Interrupted(f"stopped after step {progress.step} and saved; go on with: "
                                  f"python train.py --resume {shlex.quote(str(self.folder))}")
            if last:
                break

    def judge(self):
        """Rank 0 alone: the epoch's dev score; the best weights are kept -> (best score, its epoch)"""
        settings, progress = self.settings, self.progress
        try:
            dev, p = evaluate(self.model, settings, self.dev)
        except InputError as error:
            raise InputError(f"step {progress.step}: {error}") from None
        self.log.write({"step": progress.step, "epoch": progress.epoch, "dev": dev, "p": p})
        draws = f", mean of {DRAWS} draws," if settings.exit == "sample" else ""
        say(f"epoch {progress.epoch}: dev {settings.task} {dev['score']:.1f} by {settings.exit} exit{draws} "
            f"at layer {dev['mean_layer']:.2f} of {self.model.num_layers}")
        if dev["score"] <= progress.best:
            return progress.best, progress.best_epoch
        write_safetensors(self.folder / "model.safetensors", self.model.state_dict())
        return dev["score"], progress.epoch

    def train(self):
        """The epochs that are left -> the results on dev by exit, which run.json keeps"""
        settings, progress = self.settings, self.progress
        with caught_signals() as caught:
            while progress.epoch < settings.epochs and progress.step != settings.max_steps:
                if progress.epoch - progress.best_epoch >= settings.stop_after:
                    break
                self.epoch(caught)
                progress.epoch, progress.position = progress.epoch + 1, 0
                progress.best, progress.best_epoch = on_rank_0(self.judge)
                self.save(self.order.get_state())
        return on_rank_0(self.finish)

    def finish(self):
        """Rank 0 alone: what the best epoch's weights are worth, with which the run is finished"""
        settings, progress, values = self.settings, self.progress, read_run(self.folder)[1]
        model = fill(self.model, self.folder / "model.safetensors", self.device).eval()
        outputs = {split: (*all_layers(model, inputs, precision=settings.precision), labels)
                   for split, (inputs, labels) in self.dev.items()}
        kept = {path.name for path in self.folder.iterdir()} - {"run.json", "metrics.jsonl", "resume.pt"}
        values |= {"finished": True, "steps": progress.step, "epochs": progress.epoch,
                   "best_epoch": progress.best_epoch,
                   "files": hashes(self.folder / name for name in sorted(kept))}
        values |= study(settings, outputs)
        write_json(self.folder / "run.json", values)
        (self.folder / "resume.pt").unlink(missing_ok=True)
        say(f"the best epoch was {progress.best_epoch}, and with its weights:")
        return values["dev"]


def run(settings, folder=None):
    """Train into the folder (None: a new one), go on where its run was stopped, or do nothing if that is
    finished -> the results on dev by exit"""
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


# ---- which folder ----

def folders(settings):
    """Where a run may be: its name, and where that is taken the same with -2, -3, ..."""
    yield RUNS / run_name(settings)
    for n in itertools.count(2):
        yield RUNS / f"{run_name(settings)}-{n}"


def take_folder(settings, folder):
    """(folder, its metrics.jsonl, whether it is new) of the given folder, or of the first name that is free.
    A run has one writer: the file is locked while it is open; InputError where another process has it."""
    made = False
    for path in folders(settings) if folder is None else [folder]:
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)            # decides between two processes that start at once
            made = True
        if made or folder is not None:
            break
    file = open(path / "metrics.jsonl", "ab")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{path}: another process trains it; wait for that or give another --name") from None
    except OSError:                             # a file system without locks
        pass
    return path, file, made


def find_own(settings, origin, name=None):
    """(folder, results on dev if finished) of the run of these settings and origin: the folder of that name,
    or the first of its names that holds it or is free. InputError where the name is another run's."""
    for folder in folders(settings) if name is None else [RUNS / name]:
        if not (folder / "run.json").exists():
            return folder, None
        before, values = read_run(folder)
        before = dataclasses.replace(before, **{key: getattr(settings, key) for key in PLACE})
        if before == settings and {key: values.get(key) for key in origin} == origin:
            return folder, values["dev"] if values.get("finished") else None
    raise InputError(f"{folder} holds a run with other settings, data or model; give another --name")


def find_stopped(name):
    """(folder, settings) of a run to go on with. InputError if the files of its task have changed."""
    folder = find_run(name, unfinished=True)
    settings, values = read_run(folder)
    data = hashes(sources(settings.task, settings.data_dir))
    if not values.get("finished") and data != values.get("data"):
        raise InputError(f"{folder}: the task's files have changed since then; put them back or train anew")
    return folder, settings


# ---- the paper's protocol ----

def train_all(runs, origin, dry_run):
    """Train those of the runs that are not finished -> the dev scores of all by their own exit. A dry run
    prints their commands instead -> the scores of the others"""
    scores = []
    for settings in runs:
        folder, results = on_rank_0(lambda: find_own(settings, origin))
        if results is None and dry_run:
            say(command(settings, folder.name), sys.stdout)
            continue
        if results is None:
            results = run(settings, folder)
        scores.append(results[settings.exit]["score"])
    return scores


def command(settings, name):
    """The command that trains these settings under that name, and does nothing where they are finished"""
    words = ["python", "train.py"]
    for key in dict.fromkeys(["task", "model", "method", "seed", *changed_settings(settings)]):
        value = getattr(settings, key)
        words += [flag(key), "none" if value is None else str(value)]
    return shlex.join([*words, "--name", name])


def protocol(settings, seeds, grid, dry_run):
    """The grid of Table 4, then that many seeds of its best settings by dev score, none of which the grid has
    seen. What is finished is skipped; a dry run prints what is left, the grid's commands, then the seeds'."""
    origin, first = on_rank_0(lambda: origin_of(settings)), settings.seed
    if grid:
        axes = {name: values for name, values in GRID.items() if getattr(settings, name) is not None}
        points = [dict(zip(axes, point)) for point in itertools.product(*axes.values())]
        runs = [dataclasses.replace(settings, **point) for point in points]
        scores = train_all(runs, origin, dry_run)
        if len(scores) < len(runs):
            return
        settings, first = runs[scores.index(max(scores))], first + 1
        best = ", ".join(f"{name} {getattr(settings, name)}" for name in axes)
        say(f"best of {len(runs)} settings: {best}, dev {max(scores):.1f}")
    scores = train_all([dataclasses.replace(settings, seed=first + n) for n in range(seeds)], origin, dry_run)
    if seeds and len(scores) == seeds:
        std = statistics.stdev(scores) if seeds > 1 else 0
        each = ", ".join(f"{score:.2f}" for score in scores)
        say(f"{settings.task} {settings.method} by {settings.exit}: mean {statistics.mean(scores):.2f} ± "
            f"{std:.2f}, median {statistics.median(scores):.2f} over {seeds} seeds from {first} ({each})",
            sys.stdout)


# ---- the command ----

def make_parser():
    parser = Parser("train.py", __doc__)
    for field in dataclasses.fields(Settings):
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        allowed, meaning = field.metadata["allowed"], field.metadata["meaning"]
        if field.type is str and allowed is not None:
            meaning += ": " + ", ".join(allowed)
        if field.default is not None:
            meaning += f" [{field.default}]"
        group.add_argument(flag(field.name), default=argparse.SUPPRESS, help=meaning,
                           metavar=field.type.__name__)
    group = parser.add_argument_group("several runs, and runs that were stopped")
    group.add_argument("--name", help="folder under runs/; what is unfinished there goes on")
    group.add_argument("--resume", nargs="?", const="", metavar="RUN", help="go on with it [the newest]")
    group.add_argument("--seeds", metavar="N", help="train N seeds; prints mean, std and median")
    group.add_argument("--grid", action="store_true", help="first search Table 4's grid for the best")
    group.add_argument("--dry-run", action="store_true", help="with these: print the commands that are left")
    return parser


def main(argv=None):
    flags = vars(make_parser().parse_args(argv))
    for field in dataclasses.fields(Settings):
        if field.name in flags:
            text = flags[field.name]
            with contextlib.suppress(ValueError):       # what is no number stays a text; Settings refuses it
                flags[field.name] = None if text == "none" else field.type(text)
    name, resume, seeds = flags.pop("name"), flags.pop("resume"), flags.pop("seeds")
    grid, dry_run = flags.pop("grid"), flags.pop("dry_run")
    settings = make_settings(**flags)
    if name is not None and (name in ("", ".", "..") or re.search(r"[/\\\0]", name)):
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
    if "LOCAL_RANK" in os.environ:      # by torchrun; what the host decides goes by gloo, without a GPU
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=4))
        atexit.register(dist.destroy_process_group)
    if resume is not None:
        folder, settings = on_rank_0(lambda: find_stopped(resume or None))
        run(settings, folder)
    elif seeds or grid:
        protocol(settings, int(seeds or 0), grid, dry_run)
    elif name is not None:
        run(settings, on_rank_0(lambda: find_own(settings, origin_of(settings), name))[0])
    else:
        run(settings)


if __name__ == "__main__":
    run_main(main)
