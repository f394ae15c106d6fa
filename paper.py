"""The paper's Tables 1 to 3 and Figures 2 to 5 beside ours, and the benchmark: eval.py --table, --plot, --bench."""

import dataclasses
import json
import re
import statistics
import sys
from pathlib import Path

import torch

import fast
from checkpoint import InputError, atomic_write
from glue import TASKS, buckets, load, negations
from fast import pad
from ponder import exit_distribution
from run import (RUNS, SWEEPS, all_layers, apply_exit, autocast, device_name, load_run, make_rule, make_settings, predict_all, read_run,
                 read_split, say, scores, splits_of, sweep, timed)


# ---- speed ----

def full_depth(model, inputs, batch_size):
    """The plain way: every layer whole, then the pool and the classifier; logits (N,C) in the order of the batches"""
    L, outputs = model.num_layers, []
    for batch in buckets([len(ids) for ids, _ in inputs], batch_size):
        ids, mask, segments = pad([inputs[row] for row in batch], model.encoder, next(model.parameters()).device)
        h = model.encoder.embed(ids, segments)
        for i in range(1, L + 1):
            h = model.encoder.layer(i, h, mask)
        pooled = model.encoder.pool(h)
        outputs.append(model.heads(torch.full((len(batch),), L, device=ids.device), pooled, pooled)[0])
    return torch.cat(outputs)


def released_way(model, inputs, layers, length=128):
    """The released code's inference: one row at a time, padded to 128, layer by layer with the heads after each, up to its exit"""
    outputs = []
    for (ids, segments), last in zip(inputs, layers.tolist()):
        ids, mask, segments = pad([(ids, segments)], model.encoder, next(model.parameters()).device, length)
        h = model.encoder.embed(ids, segments)
        previous = h.new_zeros(1, h.shape[2])
        for i in range(1, last + 1):
            h = model.encoder.layer(i, h, mask)
            pooled = model.encoder.pool(h)
            logits, _ = model.heads(torch.full((1,), i, device=ids.device), pooled, previous)
            previous = pooled
        outputs.append(logits)
    return torch.cat(outputs)


def peak_memory(device, work):
    """Peak bytes of work() above what was held before: of the GPU, or of this process where Linux can reset its high-water mark"""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")
        high_water = lambda key: int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
        before = high_water("VmRSS")
        work()
        return high_water("VmHWM") - before
    except OSError:
        return None


def flops(model, B, T, device):
    """Achieved FLOP/s of one layer on (B,T) and of a matrix product of its widest shape, measured in turn"""
    H = model.encoder.hidden_size
    F = model.encoder.config.intermediate_size
    h, mask = torch.randn(B, T, H, device=device), torch.ones(B, T, dtype=torch.bool, device=device)
    x, w = torch.randn(B * T, H, device=device), torch.randn(H, F, device=device)
    work = [(lambda: model.encoder.layer(1, h, mask), 2 * B * T * (4 * H * H + 2 * H * F) + 4 * B * T * T * H), (lambda: x @ w, 2 * B * T * H * F)]
    times = [[], []]
    for _ in range(20):
        for n, (function, _) in enumerate(work):
            times[n].append(timed(model, function)[0])
    return [operations / statistics.median(seconds) for (_, operations), seconds in zip(work, times)]


@torch.no_grad()
def bench(model, settings, tokenizer, exit, split, rows=128, rounds=5):
    """Examples per second by batch size, every way in turn within one process: medians of several rounds, on a sample of the split"""
    device, L = next(model.parameters()).device, model.num_layers
    inputs, _ = read_split(settings, tokenizer, splits_of(settings.task, split)[0])
    picked = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))[:rows].tolist()
    inputs = [inputs[row] for row in sorted(picked)]
    length = statistics.mean(len(ids) for ids, _ in inputs)
    rule = lambda: make_rule(exit, settings, L)

    def early(batch_size, first_tokens=fast.FIRST_TOKENS, depthwise=False):
        fast.FIRST_TOKENS = first_tokens
        with autocast(device):
            return model.predict_many(inputs, rule(), batch_size, depthwise)

    with autocast(device):
        _, layers = early(32)
        mean_layer = layers.float().mean().item()
        layer_rate, product_rate = flops(model, 32, round(length), device)
    print(f"{settings.task} {split}: {len(inputs)} rows of {length:.1f} tokens, {exit} exit at layer {mean_layer:.2f} of {L}; "
          f"PyTorch {torch.__version__}, {device_name(device)}, {'bf16' if autocast(device)._enabled else 'float32'}")
    print(f"one layer {layer_rate / 1e9:.0f} GFLOP/s, a matrix product {product_rate / 1e9:.0f} GFLOP/s\n")
    print("| batch | way | examples/s | against full depth | over L / mean layer | peak MiB |\n| --- | --- | --- | --- | --- | --- |")
    for batch_size in (1, 8, 32, 128):
        ways = {"full depth": lambda: full_depth(model, inputs, batch_size), "rows dropped": lambda: early(batch_size, 10**9),
                "decided first": lambda: early(batch_size)}
        if model.encoder.shared:
            ways["depth-wise"] = lambda: early(batch_size, depthwise=True)
        if batch_size == 32:
            ways["one by one at length 128, as released"] = lambda: released_way(model, inputs, layers)
        seconds = {way: [] for way in ways}
        with autocast(device):
            memory = {way: peak_memory(device, work) for way, work in ways.items()}     # and warms up
            for _ in range(rounds):
                for way, work in ways.items():
                    seconds[way].append(timed(model, work)[0])
        median = {way: statistics.median(values) for way, values in seconds.items()}
        for way in ways:
            ratio = median["full depth"] / median[way]
            over_formula = ratio / (L / mean_layer) if way != "full depth" else 1
            print(f"| {batch_size} | {way} | {len(inputs) / median[way]:.1f} | {ratio:.2f} | {over_formula:.2f} | "
                  f"{'-' if memory[way] is None else round(memory[way] / 2**20)} |", flush=True)


# ---- all runs: tables, submission ----

def finished_runs():
    """[(folder, Settings, dev results by exit)] of the finished runs under runs/, each set of settings once, the newest"""
    runs = {}
    for path in sorted(RUNS.glob("*/run.json"), key=lambda path: path.stat().st_mtime_ns):
        settings, values = read_run(path.parent)
        if values.get("finished"):
            runs[dataclasses.replace(settings, data_dir=None, device=None, save_every=None)] = (path.parent, settings, values["dev"])
    return list(runs.values())


COLUMNS = ("sst2", "rte", "qnli", "cola", "mrpc", "mnli", "qqp", "stsb")
NAMES = {"sst2": "SST-2", "rte": "RTE", "qnli": "QNLI", "cola": "CoLA", "mrpc": "MRPC", "mnli": "MNLI", "qqp": "QQP", "stsb": "STS-B"}
SYSTEMS = {     # the rows of Tables 2 and 3: what identifies their runs (encoder, method, exit, layers), the paper's dev and test scores
    "ALBERT": (("albert", "finetune", "last", None), (92.7, 76.5, 91.5, 56.6, 90.5, 84.8, 88.9, 90.6), (93.4, 70.0, 92.1, 50.5, 85.6, 79.0, 84.7, 87.4)),
    "ALBERT, 9 layers": (("albert", "finetune", "last", 9), (91.1, 74.2, 91.2, 56.9, 89.7, 84.3, 89.7, 90.1), None),
    "PABEE (t = 6)": (("albert", "pabee", "patience", None), (92.7, 76.9, 91.5, 55.6, 88.3, 84.5, 88.9, 89.9), (92.7, 71.1, 91.3, 46.0, 84.3, 79.2, 83.7, 86.5)),
    "PonderNet (sampling)": (("albert", "pondernet", "sample", None), (91.3, 74.0, 88.3, 51.3, 87.1, 81.7, 87.7, 88.2), (90.2, 68.6, 88.5, 43.7, 84.3, 81.1, 77.4, 83.6)),
    "PALBERT": (("albert", "palbert", "q", None), (93.1, 78.3, 91.0, 58.1, 89.3, 84.7, 88.9, 89.9), (93.0, 73.5, 91.7, 48.6, 87.1, 79.8, 84.4, 86.5)),
    "RoBERTa": (("roberta", "finetune", "last", None), (94.5, 79.4, 92.4, 63.1, 91.3, 86.7, 89.8, 90.7), (94.5, 74.1, 93.1, 58.9, 89.1, 86.5, 80.9, 88.4)),
    "RoBERTa PABEE": (("roberta", "pabee", "patience", None), (93.8, 76.9, 91.9, 60.7, 89.6, 86.4, 91.1, 89.9), (95.4, 71.7, 92.0, 51.2, 87.6, 86.2, 80.4, 86.2)),
    "PRoBERTa": (("roberta", "palbert", "q", None), (93.7, 79.1, 91.6, 62.2, 90.2, 86.7, 91.1, 89.9), (94.5, 72.1, 91.8, 58.6, 88.3, 86.1, 79.6, 85.7)),
}
ABLATION = {    # the rows of Table 1: exit, Lambda rate of its own, Lambda's layers and input; the paper's SST-2, RTE, CoLA
    "ALBERT": (("last", False, 0, ""), ("92.7 ± 0.3", "77.0 ± 1.9", "57.0 ± 2.1")),
    "PonderNet, sampling": (("sample", False, 1, "current"), ("91.1 ± 0.6", "73.5 ± 1.9", "50.8 ± 2.2")),
    "PonderNet, expectation": (("expectation", False, 1, "current"), ("92.3 ± 0.4", "76.8 ± 3.0", "55.9 ± 2.2")),
    "Q-exit": (("q", False, 1, "current"), ("92.2 ± 0.3", "77.3 ± 1.4", "55.7 ± 0.9")),
    "+ Lambda rate": (("q", True, 1, "current"), ("92.7 ± 0.4", "77.3 ± 1.4", "56.5 ± 1.2")),
    "+ 3 layers": (("q", True, 3, "current"), ("92.6 ± 0.3", "77.0 ± 1.4", "56.3 ± 2.4")),
    "+ concatenation instead": (("q", True, 1, "concat"), ("93.0 ± 0.3", "76.5 ± 1.6", "56.9 ± 1.9")),
    "all: PALBERT": (("q", True, 3, "concat"), ("92.9 ± 0.2", "77.8 ± 1.2", "57.4 ± 1.7")),
}


def system_of(folder, settings):
    """What identifies a run's row in Tables 2 and 3"""
    encoder = json.loads((folder / "config.json").read_bytes()).get("model_type", "albert")
    return encoder, settings.method, settings.exit, settings.layers


def ablation_of(folder, settings):
    """What identifies a run's row in Table 1"""
    if settings.method == "finetune" and settings.layers is None:
        return "last", False, 0, ""
    return settings.exit, settings.lambda_lr is not None, settings.lambda_layers if settings.has_lambda else None, settings.lambda_input


def seeds_of(runs, task, model, identify, key):
    """The runs of one cell: of those with this key, the settings with the most seeds, or the best mean among equals"""
    groups = {}
    for folder, settings, dev in runs:
        whole = usual_prior(settings) and settings.max_steps is None
        if whole and (settings.task, Path(settings.model).name) == (task, model) and identify(folder, settings) == key:
            result = dev[settings.exit]
            groups.setdefault(dataclasses.replace(settings, seed=0, data_dir=None, device=None), []).append((result["score"], result["mean_layer"]))
    return max(groups.values(), key=lambda g: (len(g), statistics.mean(score for score, _ in g)), default=[])


def usual_prior(settings):
    """Whether the run has the prior of its method and model, and is not part of a study of priors"""
    return settings.prior == make_settings(task=settings.task, model=settings.model, method=settings.method).prior


def cell(found, median):
    """median, or mean ± std, of scores; how many seeds; their mean exit layer"""
    if not found:
        return "not run"
    values = [score for score, _ in found]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    value = f"{statistics.median(values):.1f}" if median else f"{statistics.mean(values):.1f}{spread}"
    return f"{value} ({len(found)} seed{'s' * (len(found) > 1)}, layer {statistics.mean(layer for _, layer in found):.1f})"


def print_tables():
    """The paper's Tables 1, 2 and 3 in Markdown, ours beside the paper's"""
    runs = finished_runs()
    models = sorted({Path(settings.model).name for _, settings, _ in runs if settings.task != "parity"}) or ["albert-base-v2"]

    def table(title, columns, rows):
        print(f"\n{title}\n\n| system | whose | " + " | ".join(columns) + " |\n" + "| --- " * (len(columns) + 2) + "|")
        for row in rows:
            print("| " + " | ".join(row) + " |")

    rows = []
    for name, (key, paper) in ABLATION.items():
        rows.append([name, "paper", *paper])
        for model in models:
            found = [seeds_of(runs, task, model, ablation_of, key) for task in ("sst2", "rte", "cola")]
            rows.append(["", f"ours, {model}", *(cell(f, False) for f in found)])
    table("Table 1. Ablation, GLUE dev, mean ± std over seeds", ("SST-2", "RTE", "CoLA"), rows)
    rows = []
    for name, (key, paper, _) in SYSTEMS.items():
        rows.append([name, "paper", *(f"{value:.1f}" for value in paper), f"{statistics.mean(paper):.1f}"])
        for model in models:
            found = [seeds_of(runs, task, model, system_of, key) for task in COLUMNS]
            mean = f"{statistics.mean(statistics.median(s for s, _ in f) for f in found):.1f}" if all(found) else "not run"
            rows.append(["", f"ours, {model}", *(cell(f, True) for f in found), mean])
    table("Table 2. GLUE dev, median over seeds", [*NAMES.values(), "mean"], rows)
    rows = []
    for name, (_, _, paper) in SYSTEMS.items():
        if paper:
            rows += [[name, "paper", *(f"{value:.1f}" for value in paper), f"{statistics.mean(paper):.1f}"], ["", "ours", *["not run"] * 9]]
    table("Table 3. GLUE test: scored by GLUE's server only; eval.py --submit writes what it takes", [*NAMES.values(), "mean"], rows)


# ---- figures ----

COLOURS, MARKERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"), "osD^vP"      # Okabe and Ito: distinct to the colour-blind


def plot(kind, device, data_dir, batch_size):
    """One of the figures below, over the finished runs, as runs/KIND.png"""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise InputError("--plot: figures need matplotlib, which is not installed; pip install matplotlib") from None
    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3})
    runs = [(folder, dataclasses.replace(settings, data_dir=data_dir or settings.data_dir)) for folder, settings, _ in finished_runs()]
    figure = {"q": plot_q, "speedup": plot_speedup, "prior": plot_prior, "distribution": plot_distribution, "negations": plot_negations}[kind](
        pyplot, runs, device, batch_size)
    path = RUNS / f"{kind}.png"
    with atomic_write(path) as file:
        figure.savefig(file, dpi=150, bbox_inches="tight", format="png")
    pyplot.close(figure)
    print(path)


def dev_outputs(folder, settings, device, batch_size, split=None):
    """(model, inputs, labels, logits, lam) of a run on its first dev split, or on the split named"""
    say(f"reading {folder}")
    _, tokenizer, model = load_run(folder, device)
    inputs, labels = read_split(settings, tokenizer, split or TASKS[settings.task].dev_splits[0])
    return model, inputs, labels, *all_layers(model, inputs, batch_size)


def chosen(runs, what, condition):
    """Runs for a figure by (task, model), those that meet the condition; an error if there are none"""
    panels = {}
    for folder, settings in runs:
        if condition(settings):
            panels.setdefault((settings.task, Path(settings.model).name), []).append((folder, settings))
    if not panels:
        raise InputError(f"--plot: expected finished runs of {what} under {RUNS}/, found none; train.py makes them")
    return dict(sorted(panels.items()))


def axes_for(pyplot, panels, width=4, height=3.2):
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(width * columns, height * lines), squeeze=False, layout="constrained")
    for extra in axes.flat[len(panels):]:
        extra.set_visible(False)
    return figure, axes.flat


def plot_q(pyplot, runs, device, batch_size):
    """Fig. 2: dev score against q, mean ± std over seeds"""
    panels = chosen(runs, "palbert or pondernet", lambda settings: settings.has_lambda and usual_prior(settings))
    figure, axes = axes_for(pyplot, panels)
    for axis, ((task, model), members) in zip(axes, panels.items()):
        for colour, marker, method in zip(COLOURS, MARKERS, ("palbert", "pondernet")):
            curves = []
            for folder, settings in members:
                if settings.method == method:
                    _, _, labels, logits, lam = dev_outputs(folder, settings, device, batch_size)
                    curves.append([row["score"] for row in sweep(settings, "q", logits, lam, labels)])
            if curves:
                curves = torch.tensor(curves)
                mean, std = curves.mean(0), curves.std(0) if len(curves) > 1 else torch.zeros(curves.shape[1])
                label = f"{method}, {len(curves)} seed{'s' * (len(curves) > 1)}"
                axis.plot(SWEEPS["q"], mean, color=colour, marker=marker, markersize=3, label=label)
                axis.fill_between(SWEEPS["q"], mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)
        axis.set(title=f"{NAMES.get(task, task)}, {model}", xlabel="threshold q", ylabel="dev score")
        axis.legend(frameon=False)
    return figure


def plot_speedup(pyplot, runs, device, batch_size):
    """Fig. 3: dev score against measured speed-up over full depth: Q-exit over q, patience over t, entropy over its threshold"""
    panels = chosen(runs, "palbert or pabee", lambda settings: settings.method in ("palbert", "pabee", "finetune") and settings.seed == 0)
    figure, axes = axes_for(pyplot, panels)
    for axis, ((task, model_name), members) in zip(axes, panels.items()):
        for folder, settings in members:
            model, inputs, labels, logits, lam = dev_outputs(folder, settings, device, batch_size)
            full, _ = timed(model, lambda: all_layers(model, inputs, batch_size))
            if settings.method == "finetune":
                axis.axhline(scores(task, logits[:, -1], labels)["score"], color="black", linewidth=1, linestyle="--", label="plain model")
                continue
            for exit in (exit for exit in settings.exits if exit in SWEEPS):
                points = []
                for value in SWEEPS[exit][::2]:
                    there = dataclasses.replace(settings, **{exit: value})
                    seconds, (outputs, _) = timed(model, lambda: predict_all(model, there, exit, inputs, batch_size))
                    points.append((full / seconds, scores(task, outputs, labels)["score"]))
                n = list(SWEEPS).index(exit)
                label = {"q": "PALBERT, Q-exit", "patience": "PABEE, patience", "entropy": "PABEE heads, entropy"}[exit]
                axis.plot(*zip(*points), color=COLOURS[n], marker=MARKERS[n], markersize=4, label=label)
        axis.set(title=f"{NAMES.get(task, task)}, {model_name}", ylabel="dev score",
                 xlabel=f"measured speed-up (times), batch {batch_size}")
        axis.legend(frameon=False)
    return figure


def plot_prior(pyplot, runs, device, batch_size):
    """Fig. 4: histogram of exit layers by the prior's lambda, with the scores below"""
    panels = chosen(runs, "palbert", lambda settings: settings.method == "palbert")
    figure, axes = axes_for(pyplot, panels, width=5)
    for axis, ((task, model), members) in zip(axes, panels.items()):
        by_prior = {}
        for folder, settings in members:
            _, _, labels, logits, lam = dev_outputs(folder, settings, device, batch_size)
            outputs, layers = apply_exit("q", settings, logits, lam)
            histogram = torch.bincount(layers, minlength=lam.shape[1] + 1)[1:] / len(layers)
            by_prior.setdefault(settings.prior, []).append((histogram, scores(task, outputs, labels)["score"]))
        for n, (prior, found) in enumerate(sorted(by_prior.items())):
            share = torch.stack([histogram for histogram, _ in found]).mean(0)
            width = 0.8 / len(by_prior)
            axis.bar((torch.arange(1, len(share) + 1) - 0.4 + (n + 0.5) * width).numpy(), (100 * share).numpy(), width, color=COLOURS[n % 6],
                     label=f"λ {prior:g}: {statistics.mean(score for _, score in found):.1f}")
        axis.set(title=f"{NAMES.get(task, task)}, {model}", xlabel="exit layer", ylabel="share of dev rows (%)", xticks=range(1, lam.shape[1] + 1))
        axis.legend(frameon=False, title="prior, dev score", loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    return figure


def plot_distribution(pyplot, runs, device, batch_size):
    """Fig. 5: mean p(i|x) over the training set, by task"""
    panels = chosen(runs, "palbert", lambda settings: settings.method == "palbert" and settings.seed == 0 and usual_prior(settings))
    figure, axis = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for n, ((task, model), ((folder, settings), *_)) in enumerate(panels.items()):
        *_, lam = dev_outputs(folder, settings, device, batch_size, split="train")
        p = exit_distribution(lam).mean(0)
        axis.plot(range(1, len(p) + 1), p, color=COLOURS[n % 6], marker=MARKERS[n % 6], label=f"{NAMES.get(task, task)}, {model}")
    axis.set(xlabel="layer i", ylabel="mean p(i|x) over the training set", xticks=range(1, len(p) + 1))
    axis.legend(frameon=False)
    return figure


def plot_negations(pyplot, runs, device, batch_size):
    """parity: the cumulative exit probability and the exit layer by the number of nested negations, and the accuracy at the exit"""
    members = chosen(runs, "palbert on parity", lambda settings: settings.task == "parity" and settings.method == "palbert")
    folder, settings = next(iter(members.values()))[-1]
    _, _, labels, logits, lam = dev_outputs(folder, settings, device, batch_size)
    outputs, layers = apply_exit("q", settings, logits, lam)
    right = (outputs.argmax(1) == torch.tensor(labels)).float()
    k = torch.tensor([negations(example.text_b) for example in load("parity", "dev")])
    cdf, L = exit_distribution(lam).cumsum(1), lam.shape[1]
    figure, (left, bars) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained", width_ratios=(3, 2))
    for n in k.unique().tolist():
        left.plot(range(1, L + 1), cdf[k == n].mean(0), color=COLOURS[n], marker=MARKERS[n], markersize=4, label=f"{n} negation{'s' * (n != 1)}")
        mean = layers[k == n].float().mean().item()
        bars.bar(n, mean, color=COLOURS[n])
        bars.annotate(f"{mean:.2f}\n{right[k == n].mean():.0%} right", (n, mean), ha="center", va="bottom", fontsize=9)
    left.axhline(settings.q, color="black", linewidth=1, linestyle="--")
    left.annotate(f"q = {settings.q:g}", (L, settings.q), ha="right", va="bottom")
    left.set(xlabel="layer", ylabel="mean cumulative exit probability", xticks=range(1, L + 1), ylim=(0, 1.03))
    left.legend(frameon=False, loc="lower right")
    bars.set(xlabel="nested negations in the second sentence", ylabel="mean exit layer", xticks=k.unique().tolist())
    bars.margins(y=0.25)
    return figure
