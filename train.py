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
import shlex
import signal
import statistics
import time

import torch
import torch.distributed as dist

from checkpoint import InputError, atomic_write, read_safetensors, read_torch, sha256_file, write_safetensors
from glue import TASKS, buckets, load
from fast import pad, upload
from ponder import elbo_loss, geometric_prior, layer_losses, layer_weighted_loss
from run import (RUNS, Interrupted, Parser, Settings, autocast, check_model, choose_device, describe, evaluate, find_run, in_main_thread,
                 load_state, local_device, make_model, make_settings, open_run, parse, print_results, read_run, read_split, run_main,
                 run_name, say, write_json)

GRID = {"lr": (1e-5, 2e-5, 3e-5, 5e-5), "batch_size": (16, 32, 128), "lambda_lr": (1e-5, 2e-5, 3e-5)}      # Table 4
LOG_EVERY = 50        # steps between two looks at the device: losses wait there until then


# ---- training ----

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
        with autocast(device):
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


if __name__ == "__main__":
    run_main(main)
