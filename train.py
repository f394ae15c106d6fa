"""Fine-tune PALBERT and the systems that the paper compares it with.

    python train.py                            parity, from scratch, no download
    python train.py --task mrpc --device cuda  the paper's settings on MRPC
    python train.py --task mrpc --grid --seeds 5
                  the paper's protocol: Table 4's grid, then 5 fresh seeds
    torchrun --nproc-per-node 2 train.py --task mrpc
                  one run on two devices; only dropout's draws differ

A run is a folder under runs/: config.json, the tokenizer, model.safetensors
(of the best epoch), run.json (settings, origin, versions, results),
metrics.jsonl, and resume.pt while it is unfinished.
"""

import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import sys
import time

import torch
import torch.distributed as dist

from checkpoint import (InputError, atomic_write, check, guard, lock, read_torch, say, write_json,
                        write_safetensors)
from fast import pad, upload
from glue import buckets, sources
from ponder import berxit_loss, elbo_loss, exit_distribution, geometric_prior, layer_weighted_loss
from run import (DRAWS, PLACE, READ_BY, RUNS, Parser, Settings, autocast, changed_settings, choose_device,
                 describe, exit_result, fill, find_run, flag, full_depth, hashes, make_model, make_settings,
                 mean_of, open_run, origin_of, read_run, read_splits, run_main, run_name, study)

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
        return layer_weighted_loss(logits[:, -1:], labels)      # of the last layer alone
    return elbo_loss(logits, lam, labels, prior, settings.beta, settings.cut)


def make_optimizer(model, settings):
    """Adam at a constant rate, without decay; the Lambda head has its own rate unless lambda_lr is None."""
    parameters = {"lr": [], "lambda_lr": []}
    for name, p in model.named_parameters():
        own = name.startswith("lambda_head.") and settings.lambda_lr is not None
        parameters["lambda_lr" if own else "lr"].append(p)
    groups = [{"name": name, "params": group, "base": getattr(settings, name)}
              for name, group in parameters.items() if group]
    return torch.optim.Adam(groups, fused=True)


def train_step(model, optimizer, settings, step, inputs, labels, prior, rank=0, world=1):
    """One step on a global batch, of which this process takes every world-th row -> {part of the loss: this
    process's share ()}, on the device. Losses and gradients are summed over processes, so any number of them
    gives one result, but for dropout, which seed, step and rank decide."""
    torch.manual_seed((settings.seed * 1_000_003 + step) * 1_009 + rank)
    device, rows = next(model.parameters()).device, range(rank, len(inputs), world)
    share = len(rows) / len(inputs)
    rows = rows or range(1)             # a process without a row takes one that counts nothing
    batch = pad([inputs[row] for row in rows], model.encoder, device)
    targets = upload([labels[row] for row in rows], device)     # class indices, or floats
    optimizer.zero_grad()
    with autocast(device, settings.precision):
        logits, lam = model(*batch)
    loss, parts = loss_of(settings, logits, lam, targets, prior)
    (loss * share).backward()
    if world > 1:
        for p in model.parameters():
            dist.all_reduce(p.grad)
    if settings.clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    for group in optimizer.param_groups:
        group["lr"] = group["base"] * min(1, (step + 1) / max(1, settings.warmup))
    optimizer.step()
    return {name: part * share for name, part in ({"loss": loss.detach()} | parts).items()}


# ---- several processes, and signals ----

def on_rank_0(work):
    """work() of rank 0, which alone decides; the others are told its result, or end where it fails."""
    if not dist.is_initialized():
        return work()
    told = [None]
    try:
        if dist.get_rank() == 0:
            told = [[work()]]
    finally:
        dist.broadcast_object_list(told)
    if told[0] is None:
        sys.exit(1)
    return told[0][0]


@contextlib.contextmanager
def caught_signals():
    """Inside, Ctrl-C, SIGTERM and SIGHUP only fill the list that is given, so that the step is finished and
    saved. What is ignored, as SIGHUP under nohup, stays so."""
    caught, kept = [], {}
    for number in signal.Signals:
        if number.name in ("SIGINT", "SIGTERM", "SIGHUP") and signal.getsignal(number) != signal.SIG_IGN:
            kept[number] = signal.signal(number, lambda *_: caught.append(True))
    try:
        yield caught
    finally:
        if not caught:          # else the process ends, and a second signal must not cut that short
            for number, handler in kept.items():
                signal.signal(number, handler)


# ---- one run ----

class Training:
    """One run in one process. Rank 0 alone writes, reads results and decides."""

    def __init__(self, settings):
        self.settings, self.device = settings, choose_device(settings.device)
        autocast(self.device, settings.precision)       # refused before anything is read
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.step, self.best, self.best_epoch, self.waiting, self.made = 0, -math.inf, 0, [], False
        self.log = open(os.devnull, "ab")               # start() gives rank 0 a real one

    def start(self, folder):
        """Rank 0 alone: take the folder and save the first state of a run that begins -> the folder, and the
        results of a run that is finished, else None"""
        settings, folder = self.settings, folder or new_folder(self.settings)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.log = folder, open(folder / "metrics.jsonl", "ab")
        if not lock(self.log):                  # a run has one writer
            raise InputError(f"{folder}: another process trains it; wait or give another --name")
        self.made = os.listdir(folder) == ["metrics.jsonl"]
        values = recorded(folder)
        if values.get("finished"):
            (folder / "resume.pt").unlink(missing_ok=True)      # of a process that died at its end
            say(f"{folder} is finished already, nothing to do; give another --name to train it again")
            return folder, values.get("dev")
        if not values:
            origin, self.model = origin_of(settings), make_model(settings, folder)
            self.optimizer, self.started = make_optimizer(self.model, settings), time.time()
            self.save()
            encoder = {"encoder": self.model.encoder.config.model_type}
            write_json(folder / "run.json", describe(settings, self.device) | encoder | origin)
        elif hashes(sources(settings.task, settings.data_dir)) != values.get("data"):
            raise InputError(f"{folder}: the task's files have changed; put them back or train anew")
        say(f"{folder}: {settings.task} by {settings.method}, {settings.model}")
        return folder, None

    def close(self):
        """Unlock the folder, and remove it if nothing came of it, as where dev.tsv is damaged."""
        self.log.close()
        if self.made and self.step == 0:
            shutil.rmtree(self.folder)
            with contextlib.suppress(OSError):
                RUNS.rmdir()            # unless other runs are there

    def prepare(self):
        """Every process: the data, and model and optimizer as resume.pt has them"""
        settings = self.settings
        tokenizer, model = open_run(self.folder, settings)
        self.model = model.to_empty(device=self.device).train()
        self.optimizer = make_optimizer(self.model, settings)
        self.prior = geometric_prior(settings.prior, self.model.num_layers).to(self.device)
        self.inputs, self.labels = read_splits(settings, tokenizer, "train")["train"]
        self.dev = read_splits(settings, tokenizer, "dev")
        self.batches = math.ceil(len(self.inputs) / settings.batch_size)        # of an epoch
        self.total = min(settings.epochs * self.batches, settings.max_steps or math.inf)
        self.resume()

    def resume(self):
        """Take up what save() has left. InputError, before a file changes, where it does not fit the run."""
        path, log = self.folder / "resume.pt", self.folder / "metrics.jsonl"
        limits = {"step": self.total, "best_epoch": self.settings.epochs, "log_bytes": log.stat().st_size}
        with guard(path, "state of this run"):
            saved = read_torch(path)
            check(saved["run"] == run_name(self.settings), f"it is of {saved['run']}")
            for name, most in limits.items():
                good = type(saved[name]) is int and 0 <= saved[name] <= most
                check(good, f"{name} is {saved[name]}, expected 0 to {most}")
            self.step, self.best, self.best_epoch = saved["step"], float(saved["best"]), saved["best_epoch"]
            check(not math.isnan(self.best), "best is no score")
            self.started = time.time() - saved["seconds"]
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": saved["adam"]})
            for name, p in self.model.named_parameters():       # Adam itself does not compare shapes
                shapes = {key: value.shape for key, value in self.optimizer.state[p].items()}
                full = {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}
                check(shapes == (full if self.step else {}), f"Adam's state of {name} has other shapes")
        if self.rank == 0:
            self.log.truncate(saved["log_bytes"])
        if self.step:
            say(f"going on from step {self.step}")

    def save(self):
        """resume.pt, with all that decides the steps to come; the order of rows is drawn again"""
        self.flush()
        if self.rank == 0:
            self.log.flush()
            os.fsync(self.log.fileno())
            saved = {"model": self.model.state_dict(), "adam": self.optimizer.state_dict()["state"],
                     "step": self.step, "best": self.best, "best_epoch": self.best_epoch,
                     "log_bytes": self.log.tell(), "seconds": time.time() - self.started,
                     "run": run_name(self.settings)}
            with atomic_write(self.folder / "resume.pt") as file:
                torch.save(saved, file)

    def write(self, line):
        """A line of metrics.jsonl, one for each step and epoch"""
        line |= {"seconds": round(time.time() - self.started, 3)}
        self.log.write(json.dumps(line).encode() + b"\n")

    def flush(self):
        """Fetch the losses that wait on the device, write and check them -> the parts of the last"""
        if not self.waiting:
            return {}
        values = torch.stack([torch.stack(list(parts.values())) for *_, parts in self.waiting])
        if self.world > 1:
            dist.all_reduce(values)     # each process has its share
        for (line, rows, parts), numbers in zip(self.waiting, values.tolist()):
            parts = dict(zip(parts, numbers))
            self.write(line | parts)
            if not all(map(math.isfinite, numbers)):
                flags = "another --prior" if math.isinf(parts.get("kl", 0)) else "a lower --lr"
                raise InputError(f"step {line['step']}: the loss is not finite ({parts}) on training rows "
                                 f"{rows}; the weights of the best epoch so far are kept; try {flags}")
        self.waiting = []
        return parts

    def advance(self, epoch, batch):
        """One step. The host fetches its losses, and so waits for the device, only where it shows them."""
        inputs, labels = [self.inputs[row] for row in batch], [self.labels[row] for row in batch]
        parts = train_step(self.model, self.optimizer, self.settings, self.step, inputs, labels, self.prior,
                           self.rank, self.world)
        self.step += 1
        rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        self.waiting.append(({"step": self.step, "epoch": epoch} | rates, batch, parts))
        if self.step == 1 or self.step % LOG_EVERY == 0:
            numbers = ", ".join(f"{name} {value:z.3f}" for name, value in self.flush().items())
            pace = (time.time() - self.started) / self.step
            left = datetime.timedelta(seconds=round(pace * (self.total - self.step)))
            say(f"epoch {epoch}, step {self.step} of at most {self.total}: {numbers}; {1 / pace:.1f} "
                f"steps/s, at most {left} to go")

    def judge(self, epoch):
        """Rank 0 alone: the epoch's dev score; the best weights are kept -> the best epoch"""
        settings = self.settings
        try:
            arrays = full_depth(self.model.eval(), settings, self.dev)
            dev = mean_of([exit_result(settings.exit, settings, logits, lam, labels, split)
                           | {"p": exit_distribution(lam).mean(0).tolist()}
                           for split, (logits, lam, labels) in arrays.items()])
        except InputError as error:
            raise InputError(f"step {self.step}: {error}") from None
        self.model.train()
        self.write({"step": self.step, "epoch": epoch, "dev": dev})
        draws = f", mean of {DRAWS} draws," if settings.exit == "sample" else ""
        say(f"epoch {epoch}: dev {settings.task} {dev['score']:.1f} by {settings.exit} exit{draws} at layer "
            f"{dev['mean_layer']:.2f} of {self.model.num_layers}")
        if dev["score"] > self.best:
            self.best, self.best_epoch = dev["score"], epoch
            write_safetensors(self.folder / "model.safetensors", self.model.state_dict())
        return self.best_epoch

    def train(self):
        """The steps that are left, each epoch's end judged -> the results on dev by exit, kept in run.json"""
        settings, order = self.settings, torch.Generator().manual_seed(self.settings.seed)
        lengths = [len(ids) for ids, _ in self.inputs]
        with caught_signals() as caught:
            for epoch in range(1, settings.epochs + 1):
                # Drawn for the epochs that are done, too: so a resumed run goes on in the same order.
                batches, begun = buckets(lengths, settings.batch_size, order), (epoch - 1) * self.batches
                if self.step == self.total or epoch - 1 - self.best_epoch >= settings.stop_after:
                    break
                for batch in batches[self.step - begun:self.total - begun]:
                    self.advance(epoch, batch)
                    ended = self.step in (self.total, begun + self.batches)
                    if ended:
                        self.flush()
                        self.best_epoch = on_rank_0(lambda: self.judge(epoch))
                    stop = torch.tensor(len(caught))    # on the CPU: the host must not wait for a GPU
                    if self.world > 1:
                        dist.all_reduce(stop)           # all stop after the same step
                    if ended or stop or self.step % (settings.save_every or self.total) == 0:
                        self.save()
                    if stop:
                        say(f"stopped after step {self.step} and saved; go on with: "
                            f"python train.py --resume {shlex.quote(str(self.folder))}")
                        sys.exit(130)
        return on_rank_0(self.finish)

    def finish(self):
        """Rank 0 alone: what the best epoch's weights are worth, with which the run is finished"""
        model = fill(self.model, self.folder / "model.safetensors", self.device)
        kept = {path.name for path in self.folder.iterdir()} - {"run.json", "metrics.jsonl", "resume.pt"}
        values = recorded(self.folder) | study(self.settings, full_depth(model, self.settings, self.dev))
        values |= {"finished": True, "steps": self.step, "epochs": math.ceil(self.step / self.batches),
                   "best_epoch": self.best_epoch,
                   "files": hashes(self.folder / name for name in sorted(kept))}
        write_json(self.folder / "run.json", values)
        (self.folder / "resume.pt").unlink(missing_ok=True)
        say(f"the best epoch was {self.best_epoch}, and with its weights:")
        return values["dev"]


def run(settings, folder=None):
    """Train into the folder (None: a new one), go on where its run was stopped, or do nothing if that is
    finished -> the dev score by the run's own exit"""
    training = Training(settings)
    try:
        training.folder, results = on_rank_0(lambda: training.start(folder))
        if results is None:
            training.prepare()
            results = training.train()
    finally:
        training.close()
    say(f"{'exit':<12} {'dev score':>9} {'mean layer':>10}")
    with guard(training.folder / "run.json", "record of a run"):
        check(settings.exit in results, f"no result by {settings.exit}")
        for name, result in results.items():
            say(f"{name:<12} {result['score']:>9.1f} {result['mean_layer']:>10.2f}")
        return results[settings.exit]["score"]


# ---- which folder ----

def recorded(folder):
    """What run.json holds; {} without one"""
    return read_run(folder)[1] if (folder / "run.json").exists() else {}


def folders_of(settings):
    """The folders that a run may have: its own name under runs/, and that with -2, -3, ..."""
    own = RUNS / run_name(settings)
    yield own
    for n in itertools.count(2):
        yield own.with_name(f"{own.name}-{n}")


def new_folder(settings):
    """The first of folders_of() that is new, made"""
    for folder in folders_of(settings):
        with contextlib.suppress(FileExistsError):      # decides between two processes that start at once
            folder.mkdir(parents=True)
            return folder


def find_folder(settings, origin, folders):
    """The first of the folders that is free or holds this very run; InputError where all are others'"""
    for folder in folders:
        if not (folder / "run.json").exists():
            return folder
        before, values = read_run(folder)
        before = dataclasses.replace(before, **{key: getattr(settings, key) for key in PLACE})
        if before == settings and values | origin == values:
            return folder
    raise InputError(f"{folder} holds a run with other settings, data or model; give another --name")


# ---- the paper's protocol ----

def train_all(runs, origin, dry_run):
    """The dev scores of the runs by their own exit; a dry run prints the commands of those that are left."""
    scores = []
    for settings in runs:
        folder = on_rank_0(lambda: find_folder(settings, origin, folders_of(settings)))
        if dry_run and not recorded(folder).get("finished"):
            keys = dict.fromkeys(["task", "model", "method", "seed", *changed_settings(settings)])
            flags = [f"{flag(key)}={getattr(settings, key)}" for key in keys]
            say(shlex.join(["python", "train.py", *flags, "--name", folder.name]), sys.stdout)
        else:
            scores.append(run(settings, folder))
    return scores


def protocol(settings, seeds, grid, dry_run):
    """The grid of Table 4, then that many seeds of its best settings by dev score, none of which the grid has
    seen. What is finished is skipped; a dry run prints what is left, the grid's commands, then the seeds'."""
    origin, first = on_rank_0(lambda: origin_of(settings)), settings.seed
    if grid:
        axes = {name: values for name, values in GRID.items() if getattr(settings, name) is not None}
        runs = [dataclasses.replace(settings, **dict(zip(axes, point)))
                for point in itertools.product(*axes.values())]
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

def make_parser(defaults):
    """The command line, which tells these Settings as its defaults"""
    parser = Parser("train.py", __doc__)
    for field in dataclasses.fields(Settings):
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        allowed, meaning = field.metadata["allowed"], field.metadata["meaning"]
        default = getattr(defaults, field.name)
        if field.type is str and allowed is not None:
            meaning += ": " + ", ".join(allowed)
        if default is not None:
            meaning += f" [{default}]"
        group.add_argument(flag(field.name), help=meaning, metavar=field.type.__name__)
    group = parser.add_argument_group("several runs, and runs that were stopped")
    group.add_argument("--name", help="folder under runs/; what is unfinished there goes on")
    group.add_argument("--resume", nargs="?", const="", metavar="RUN", help="go on with it [the newest]")
    group.add_argument("--seeds", type=int, metavar="N", help="train N seeds, and print mean, std and median")
    group.add_argument("--grid", action="store_true", help="first search Table 4's grid for the best")
    group.add_argument("--dry-run", action="store_true", help="with these: print the commands that are left")
    return parser


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    words = [word for word in argv if word not in ("-h", "--help")]
    asked, given = vars(make_parser(Settings()).parse_args(words)), {}
    for field in dataclasses.fields(Settings):
        if field.name in asked:
            text = given[field.name] = asked[field.name]
            with contextlib.suppress(ValueError):       # what is no number stays a text; Settings refuses it
                given[field.name] = None if text.lower() == "none" else field.type(text)
    settings, name, resume = make_settings(**given), asked.get("name"), asked.get("resume")
    if len(words) < len(argv):
        return make_parser(settings).print_help()       # with the defaults of the task and model asked for
    seeds, grid, exits = asked.get("seeds"), "grid" in asked, settings.exits
    several = seeds is not None or grid
    idle = [name for name in given if not set(READ_BY.get(name, exits)) & set(exits)]
    for wrong, sentence in (
            (settings.exit not in exits,
             f"--exit {settings.exit}: {settings.method} on {settings.task} exits by {' or '.join(exits)}"),
            (idle, f"{settings.method} on {settings.task} does not read {', '.join(map(flag, idle))}; "
                   "leave that out"),
            (name is not None and (name == ".." or (RUNS / name).parent != RUNS),
             f"--name {name!r}: expected the name of a folder under {RUNS}/"),
            (name is not None and several, "--name: runs of --seeds and --grid have names of their own"),
            (seeds is not None and not 1 <= seeds <= 9999, f"--seeds {seeds}: expected from 1 to 9999"),
            ("dry_run" in asked and not several, "--dry-run: expected together with --seeds or --grid"),
            (resume is not None and (given or name or several),
             "--resume goes on with the settings that the run has; give it without others")):
        if wrong:
            raise InputError(sentence)
    if "LOCAL_RANK" in os.environ:      # by torchrun; what the host decides goes by gloo, without a GPU
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=4))
    folder = None
    if resume is not None:
        folder = on_rank_0(lambda: find_run(resume or None, unfinished=True))
        settings = read_run(folder)[0]
    elif name is not None:
        folder = on_rank_0(lambda: find_folder(settings, origin_of(settings), [RUNS / name]))
    if several:
        protocol(settings, seeds or 0, grid, "dry_run" in asked)
    else:
        run(settings, folder)


if __name__ == "__main__":
    run_main(main)
