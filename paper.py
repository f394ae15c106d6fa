"""The paper's Tables 1 to 3 and Figures 2 to 5 beside ours, and the benchmark, for eval.py."""

import dataclasses
import math
import random
import re
import statistics
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from checkpoint import InputError, atomic_write, check, read_json, say, shorten
from glue import TASKS, load, negations
from ponder import exit_distribution, geometric_prior
from run import (CRITERIA, METHODS, PLACE, all_layers, apply_exit, autocast, changed_settings, device_name,
                 full_depth, load_run, make_rule, make_settings, mean_of, read_splits, timed)


# ---- which runs make a cell ----

# What a search, a seed or a machine may change without making another system; every other setting makes one.
FREE = ("seed", "lr", "lambda_lr", "batch_size", "epochs", "stop_after", "max_steps", "clip", "warmup",
        "dropout", "max_length", "precision", *PLACE)
ORDER = ("finetune", "pabee", "pondernet", "palbert", "berxit")     # of methods in tables

# A finished run; score is that of its own exit on dev, and what follows encoder is study()'s.
Run = namedtuple("Run", "folder settings score encoder dev sweep by_layer oracle")


def system_of(settings):
    """The name of a system, a row of a table: the method, and the settings that differ from its preset"""
    changed = [name for name in changed_settings(settings) if name not in FREE]
    if (settings.lambda_lr is None) != ("lambda_lr" in METHODS[settings.method]):       # presets give None
        changed.append("lambda_lr")
    return ", ".join([settings.method, *(f"{name} {getattr(settings, name)}" for name in changed)])


def read_result(path):
    """(Run, what its seeds share: settings, precision, data, model, exits) of a run.json; None for one that
    is no result. Fails where something in it could not be printed or drawn."""
    values = read_json(path)
    settings = make_settings(**values["settings"])
    if not values["finished"] or settings.max_steps is not None:
        return None
    own = values["dev"][settings.exit]["score"]
    run = Run(path.parent, settings, own, *(values[name] for name in Run._fields[3:]))
    layers_cell([run])
    for name in run.dev:
        cell([run], name)
        check(len(run.dev[name]["histogram"]) == len(run.by_layer), "another number of layers")
        for row in run.sweep.get(name, ()):
            mean_of([row[name], row["score"], row["speed_up"]])
    # Where and how a run was made makes no other set; the precision is the one that was really used.
    rest = {"seed": 0, "precision": values["precision"], **dict.fromkeys(PLACE)}
    shared = dataclasses.replace(settings, **rest), str([values.get("data"), values.get("model"), *run.dev])
    return run, shared


def cells(root):
    """{(model, system): {task: runs}} of root/*/run.json and root/*.json, the one rule for tables, figures
    and submissions: the runs of a cell are the seeds of ONE set of settings, precision, data and model, the
    set with the most seeds, then the best mean. Of equal settings the newest counts. A damaged file is named
    and passed over."""
    sets, found, paths = {}, {}, [*root.glob("*/run.json"), *root.glob("*.json")]
    for path in sorted(paths, key=lambda path: path.lstat().st_mtime_ns):
        try:
            result = read_result(path)
            if result is None:
                continue
            run, shared = result
            chosen = run.settings
            key = Path(chosen.model).name, ORDER.index(chosen.method), system_of(chosen), chosen.task
            seeds = sets.get(key, {}).get(shared, {})
            mean_of([[*one[4:]] for one in [run, *seeds.values()]])     # fails where they do not fit together
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            say(f"passed over {path}, which is not what train.py writes ({type(error).__name__}: {error}); "
                "remove it, or train that run again")
            continue
        sets.setdefault(key, {}).setdefault(shared, {})[chosen.seed] = run
    for (model, _, system, task), choices in sorted(sets.items()):
        choices = [list(seeds.values()) for seeds in choices.values()]
        best = max(choices, key=lambda runs: (len(runs), statistics.mean(run.score for run in runs)))
        found.setdefault((model, system), {})[task] = best
    return found


def main_cells(found):
    """{(task, model): {method: runs}} of the system that stands for each method: of those on the most tasks
    the one nearest the preset, then the one with the most seeds"""
    best, chosen = {}, {}
    for (model, system), by_task in found.items():
        rank = len(by_task), -system.count(","), sum(map(len, by_task.values()))
        best.setdefault((model, system.split(",")[0]), []).append((rank, by_task))
    for (model, method), systems in best.items():
        for task, runs in max(systems, key=lambda system: system[0])[1].items():
            chosen.setdefault((task, model), {})[method] = runs
    return chosen


def prior_cells(found):
    """{(task, model): {prior: runs}} of PALBERT with no other change, where there are priors to compare"""
    panels = {}
    for (model, system), by_task in found.items():
        if re.fullmatch("palbert(, prior [^,]+)?", system):
            for task, runs in by_task.items():
                panels.setdefault((task, model), {})[runs[0].settings.prior] = runs
    return {key: dict(sorted(priors.items())) for key, priors in panels.items() if len(priors) > 1}


# ---- tables ----

NAMES = {task: TASKS[task].folder for task in "sst2 rte qnli cola mrpc mnli qqp stsb".split()}
# The paper's numbers, with the system that is ours beside them: row: system: dev: test
TABLE_1 = """\
ALBERT: finetune: 92.7±0.3 77.0±1.9 57.0±2.1
PonderNet, sampling: pondernet: 91.1±0.6 73.5±1.9 50.8±2.2
PonderNet, expectation: pondernet, exit expectation: 92.3±0.4 76.8±3.0 55.9±2.2
Q-exit: pondernet, exit q: 92.2±0.3 77.3±1.4 55.7±0.9
+ Lambda rate: palbert, lambda_layers 1, lambda_input current: 92.7±0.4 77.3±1.4 56.5±1.2
+ 3 layers: palbert, lambda_input current: 92.6±0.3 77.0±1.4 56.3±2.4
+ concatenation instead: palbert, lambda_layers 1: 93.0±0.3 76.5±1.6 56.9±1.9
all, PALBERT: palbert: 92.9±0.2 77.8±1.2 57.4±1.7"""
TABLES_2_3 = """\
ALBERT: finetune: 92.7 76.5 91.5 56.6 90.5 84.8 88.9 90.6: 93.4 70.0 92.1 50.5 85.6 79.0 84.7 87.4
ALBERT, 9 layers: finetune, layers 9: 91.1 74.2 91.2 56.9 89.7 84.3 89.7 90.1
PABEE (t = 6): pabee: 92.7 76.9 91.5 55.6 88.3 84.5 88.9 89.9: 92.7 71.1 91.3 46.0 84.3 79.2 83.7 86.5
PonderNet: pondernet: 91.3 74.0 88.3 51.3 87.1 81.7 87.7 88.2: 90.2 68.6 88.5 43.7 84.3 81.1 77.4 83.6
PALBERT: palbert: 93.1 78.3 91.0 58.1 89.3 84.7 88.9 89.9: 93.0 73.5 91.7 48.6 87.1 79.8 84.4 86.5
RoBERTa: finetune: 94.5 79.4 92.4 63.1 91.3 86.7 89.8 90.7: 94.5 74.1 93.1 58.9 89.1 86.5 80.9 88.4
RoBERTa PABEE: pabee: 93.8 76.9 91.9 60.7 89.6 86.4 91.1 89.9: 95.4 71.7 92.0 51.2 87.6 86.2 80.4 86.2
PRoBERTa: palbert: 93.7 79.1 91.6 62.2 90.2 86.7 91.1 89.9: 94.5 72.1 91.8 58.6 88.3 86.1 79.6 85.7"""


def cell(runs, criterion=None, median=False):
    """mean ± std, or median, of dev scores by an exit or the runs' own; mean layer, score of dealt layers"""
    if not runs:
        return "not run"
    criterion = criterion or runs[0].settings.exit
    mean = mean_of([run.dev[criterion] for run in runs])
    values = [run.dev[criterion]["score"] for run in runs]
    text = f"{statistics.median(values):.1f}" if median else f"{mean['score']:.1f}"
    if len(values) > 1 and not median:
        text += f" ± {statistics.stdev(values):.1f}"
    dealt = "" if criterion in ("last", "expectation") else f", dealt {mean['dealt']:.1f}"
    return f"{text} (n = {len(runs)}, layer {mean['mean_layer']:.1f}{dealt})"


def layers_cell(runs):
    """The score of every fixed layer; then the oracle's at its mean layer"""
    if not runs:
        return "not run"
    by_layer, oracle = mean_of([[run.by_layer, run.oracle] for run in runs])
    fixed = " ".join(f"{score:.1f}" for score in by_layer)
    return f"{fixed}; {oracle['score']:.1f} at {oracle['mean_layer']:.1f}"


def print_table(title, columns, rows):
    print(f"\n{title}\n\n| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def paper_table(found, title, table, column=0):
    """The rows of a paper's table whose encoders were run on GLUE, and under each dev row ours of each model;
    Tables 2 and 3 have medians"""
    rows, median = [], table is TABLES_2_3
    tasks = list(NAMES) if median else ["sst2", "rte", "cola"]
    encoders = {model: runs[0].encoder for (model, _), by_task in found.items()
                for task, runs in by_task.items() if task in NAMES}
    for line in table.splitlines():
        name, system, *numbers = line.split(": ")
        encoder = "roberta" if "RoBERTa" in name else "albert"
        models = [model for model in encoders if encoders[model] == encoder]
        if models and column < len(numbers):
            rows.append([name, "paper", *numbers[column].split()])
        for model in models if column == 0 else ():
            ours = [found.get((model, system), {}).get(task) for task in tasks]
            rows.append(["", f"ours, {model}", *(cell(runs, median=median) for runs in ours)])
    if rows:
        print_table(title, ["row", "whose", *(NAMES[task] for task in tasks)], rows)


def print_tables(root):
    """Tables 1 to 3 of the paper with ours beside it, in Markdown. Then every system that was run, by each of
    its exits, and what says whether an exit has learned anything: every fixed layer, and the oracle."""
    found, exits, layers = cells(root), [], []
    if not found:
        say(f"found no finished runs in {root}/, so no row is ours; train.py makes them")
    paper_table(found, "Table 1. Ablation, GLUE dev, mean ± std", TABLE_1)
    paper_table(found, "Table 2. GLUE dev, median over seeds", TABLES_2_3)
    paper_table(found, "Table 3. GLUE test; ours: see eval.py --submit", TABLES_2_3, 1)
    run_tasks = {task for by_task in found.values() for task in by_task}
    tasks = [*(task for task in NAMES if task in run_tasks), *sorted(run_tasks - NAMES.keys())]
    names = [Path(task).name for task in tasks]             # own data's task is a path
    for (model, system), by_task in found.items():
        layers.append([model, system, *(layers_cell(by_task.get(task)) for task in tasks)])
        for criterion in CRITERIA:
            runs = {task: runs for task, runs in by_task.items() if criterion in runs[0].dev}
            if runs and (criterion != "last" or system.startswith("finetune")):     # else it is a fixed layer
                exits.append([model, system, criterion, *(cell(runs.get(task), criterion) for task in tasks)])
    print_table("Every system, on dev, mean ± std; dealt: the same exit layers given to random rows",
                ["model", "system", "exit", *names], exits)
    print_table("The same systems at every fixed layer; then the oracle, each row's first right layer",
                ["model", "system", *names], layers)


# ---- figures ----

CURVES = (      # method, exit, label, colour (Okabe and Ito's), marker
    ("pabee", "patience", "PABEE", "#D55E00", "s"), ("pabee", "entropy", "PABEE by entropy", "#E69F00", "v"),
    ("pondernet", "q", "PonderNet by Q-exit", "#009E73", "^"), ("palbert", "q", "PALBERT", "#0072B2", "o"),
    ("berxit", "learned", "BERxiT", "#CC79A7", "D"),
)
FIGURES = ("q", "speedup", "prior", "distribution", "negations")    # Figs. 2 to 5; parity's own


def plot(kind, root, out, device, batch_size, changed):
    """One of the figures below over the runs under root, as out or root/KIND.png; models are read with the
    settings `changed`: the folder of the data, the precision"""
    try:
        from matplotlib import figure, style
    except ImportError:
        raise InputError("--plot: matplotlib is not installed, and draws; pip install matplotlib") from None

    def read(run, split):
        """(logits, lam, labels) of the run's model over a split"""
        say(f"reading {run.folder}")
        settings, tokenizer, model = load_run(run.folder, device)
        settings = dataclasses.replace(settings, **changed)
        splits = read_splits(settings, tokenizer, split)
        return full_depth(model, settings, splits, batch_size)[split]

    found = cells(root)
    panels, draw = main_cells(found), partial(draw_curves, kind=kind)
    if kind == "prior":
        panels, draw = prior_cells(found), draw_priors
    elif kind in ("distribution", "negations"):
        panels = {key: {"palbert": members["palbert"]} for key, members in panels.items()
                  if "palbert" in members and (key[0] == "parity" or kind == "distribution")}
        draw = partial(draw_distribution, read=read)
    if not panels:
        raise InputError(f"--plot {kind}: expected finished runs in {root}/, found none; train.py makes them")
    style.use("seaborn-v0_8-whitegrid")
    drawn, out = figure.Figure(layout="constrained"), Path(out or root / f"{kind}.png")
    with atomic_write(out) as file:         # which refuses a place before any model is read
        if kind == "negations":
            draw_negations(drawn, list(panels.values())[-1]["palbert"], read)
        else:
            draw_panels(drawn, panels, draw)
        drawn.savefig(file, dpi=150, format="png")
    print(out)


def draw_panels(figure, panels, draw):
    """A panel for each task and model, drawn by draw(axis, {the name of a line: its runs}), and one legend"""
    columns, legend = math.ceil(len(panels) ** 0.5), {}
    height = math.ceil(len(panels) / columns)
    figure.set_size_inches(4.4 * columns, 3.1 * height)
    for place, ((task, model), members) in enumerate(panels.items(), 1):
        seeds = sorted({len(runs) for runs in members.values()})
        n = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else seeds[0]
        title = f"{NAMES.get(task, shorten(Path(task).name))}, {shorten(model)}, n = {n}"
        axis = figure.add_subplot(height, columns, place, title=title.replace("$", r"\$"))
        draw(axis, members)
        handles, labels = axis.get_legend_handles_labels()
        legend |= dict(zip(labels, handles))
    if legend:
        figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=3)


def draw_curves(axis, members, kind):
    """Fig. 2: dev score against q, mean ± std. Fig. 3: mean dev score against L / mean layer by threshold.
    The paper's q = 0.5 and t = 6 are ringed, and the plain model is a dashed line."""
    x, name = ("q", "threshold q") if kind == "q" else ("speed_up", "speed-up, L / mean layer")
    axis.set(xlabel=name, ylabel="dev score")
    for method, criterion, label, colour, marker in CURVES:
        runs = [run for run in members.get(method, ()) if criterion in run.sweep]
        if not runs or (kind == "q" and criterion != "q"):
            continue
        label = system_of(runs[0].settings).replace(method, label)
        rows = mean_of([run.sweep[criterion] for run in runs])
        places, mean = [row[x] for row in rows], np.array([row["score"] for row in rows])
        axis.plot(places, mean, color=colour, marker=marker, markersize=4, label=label)
        if kind == "q":
            values = [[row["score"] for row in run.sweep["q"]] for run in runs]
            std = np.std(values, 0, ddof=min(1, len(runs) - 1))
            axis.fill_between(places, mean - std, np.minimum(mean + std, 100), color=colour, alpha=0.2)
        for row in rows:
            if row.get("q") == 0.5 or row.get("patience") == 6:
                axis.plot(row[x], row["score"], "ko", fillstyle="none", markersize=9, label="q = 0.5, t = 6")
    if "finetune" in members:
        values = [run.score for run in members["finetune"]]
        axis.axhline(statistics.mean(values), color="k", ls="--", lw=1, label="plain model")
    if kind == "speedup":
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")


def draw_priors(axis, members):
    """Fig. 4: the share of dev rows that exit at each layer, a line for each prior, with its dev score"""
    results = [mean_of([run.dev["q"] for run in runs]) for runs in members.values()]
    shares = 100 * np.array([result["histogram"] for result in results])        # (priors,L)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=150, aspect="auto")          # no blue too dark for text
    for y, x in np.argwhere(shares.round()):
        axis.text(x, y, f"{shares[y, x]:.0f}%", ha="center", va="center")
    labels = [f"λ {prior:g}: {result['score']:.1f}" for prior, result in zip(members, results)]
    axis.set(xlabel="exit layer", ylabel="prior: dev score", yticks=range(len(labels)), yticklabels=labels)
    axis.set_xticks(range(shares.shape[1]), range(1, shares.shape[1] + 1))
    axis.grid(False)


def draw_distribution(axis, members, read):
    """Fig. 5: p(i|x), mean over the training set and over all seeds, and the prior"""
    runs = members["palbert"]
    p = torch.stack([exit_distribution(read(run, "train")[1]).mean(0) for run in runs]).mean(0)     # (L,)
    layers, prior = range(1, len(p) + 1), runs[0].settings.prior
    axis.plot(layers, p, "o-", label="PALBERT")
    axis.plot(layers, geometric_prior(prior, len(p)), "k--", lw=1, label=f"prior {prior:g}")
    axis.set(xlabel="layer i", ylabel="mean p(i|x), training set")


def draw_negations(figure, runs, read):
    """parity by the number of nested negations, means over all seeds: cumulative exit probability, mean exit
    layer, and accuracy at the exit beside that of layer 1"""
    figure.set_size_inches(10, 3.6)
    left, right = figure.subplots(1, 2)
    k, tables = torch.tensor([negations(example.text_b) for example in load("parity", "dev")]), []
    for run in runs:
        logits, lam, labels = read(run, "dev")
        outputs, layers = apply_exit("q", run.settings, logits, lam)
        hits = torch.stack([outputs, logits[:, 0]], 1).argmax(2) == torch.tensor(labels)[:, None]  # (N,2)
        tables.append(torch.cat([layers[:, None], 100 * hits, exit_distribution(lam).cumsum(1)], 1))
    mean = torch.stack(tables).mean(0)                                                          # (N,3+L)
    for n in k.unique().tolist():
        layer, at_exit, at_1, *cdf = mean[k == n].mean(0).tolist()
        left.plot(range(1, len(cdf) + 1), cdf, "o-", lw=5 - 1.2 * n, label=n)       # no line hides another
        text = f"layer {layer:.2f}\n{at_exit:.0f}% right\n(layer 1: {at_1:.0f}%)"
        right.bar_label(right.bar(n, layer), [text])
    left.axhline(runs[0].settings.q, color="k", ls="--", lw=1, label="q")
    left.set(xlabel="layer", ylabel="mean cumulative exit probability", title=f"n = {len(runs)} seeds")
    left.legend(title="negations")
    right.set(xlabel="nested negations", ylabel="mean exit layer", xticks=k.unique().tolist())
    right.margins(y=0.3)                                                            # room for the labels
    right.grid(False)


# ---- speed ----

def flops(model, operations, work):
    """FLOP/s of work(); as many calls as take 0.2 s, so that the two waits for the device do not count"""
    calls, seconds = 1, 0
    while seconds < 0.2:
        calls *= 2
        seconds, _ = timed(model, lambda: [work() for _ in range(calls)])
    return operations * calls / seconds


def layer_speed(model, B, T, dtype):
    """What one layer on (B,T) reaches, beside the best products that the device gives in the dtype: torch.mm,
    which on a CPU in float32 is MKL's, and there oneDNN's, too"""
    from torch.utils.mkldnn import to_mkldnn    # here, because PyTorch warns of what it imports
    H, F = model.encoder.hidden_size, model.encoder.config.intermediate_size
    new = partial(torch.randn, device=next(model.parameters()).device, dtype=dtype)
    h, mask, best = new(B, T, H), new(B, T) < float("inf"), {}
    layer = flops(model, 2 * B * T * H * (4 * H + 2 * F + 2 * T), lambda: model.encoder.layer(1, h, mask))
    for m, k, n in ((B * T, H, F), (B * T, F, H), (1024, 1024, 1024), (2048, 2048, 2048)):
        x = new(m, k)
        products = {"torch.mm": partial(torch.mm, x, new(k, n))}
        if x.device.type == "cpu" and dtype == torch.float32:
            products["oneDNN"] = partial(to_mkldnn(nn.Linear(k, n)), x)
        for name, product in products.items():
            best[name] = max(best.get(name, 0), flops(model, 2 * m * k * n, product))
    beside = [f"{layer / most:.0%} of {name}'s best {most / 1e9:.0f}" for name, most in best.items()]
    return f"one layer on {B} x {T}: {layer / 1e9:.0f} GFLOP/s, {', '.join(beside)}"


@torch.no_grad()
def bench(model, settings, tokenizer, criterion, split, rounds=3):
    """The speed of a layer in each precision that the device has; and in the one that is asked for (None: in
    each) rows a second by batch size, all ways in turn, medians of rounds, on 128 rows of the split"""
    device, L = next(model.parameters()).device, model.num_layers
    autocast(device, settings.precision)                            # refuses what the device has not
    inputs, _ = next(iter(read_splits(settings, tokenizer, split).values()))
    inputs = random.Random(0).sample(inputs, min(128, len(inputs)))
    T = round(statistics.mean(len(ids) for ids, _ in inputs))

    def early(batch_size, depthwise=False):
        return model.predict_many(inputs, make_rule(criterion, settings, L), batch_size, depthwise)

    print(f"{settings.task} {split}: {len(inputs)} rows of {T} tokens; PyTorch {torch.__version__}, "
          f"{device_name(device)}")
    for precision, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        try:
            context = autocast(device, precision)
        except InputError:
            continue
        with context:
            print(f"\n{precision}: {layer_speed(model, 32, T, dtype)}")
            if settings.precision not in (None, precision):
                continue
            mean_layer = early(32)[1].double().mean().item()
            print_table(f"exit by {criterion} at {mean_layer:.2f} of {L}",
                        ("batch", "way", "rows/s", "against full depth", "over L / mean layer"), [])
            for batch_size in (1, 8, 32, 128):
                ways = {"full depth": partial(all_layers, model, inputs, batch_size, precision),
                        "early exit": partial(early, batch_size)}
                if model.encoder.shared:
                    ways["depth-wise"] = partial(early, batch_size, True)
                seconds = [[timed(model, work)[0] for work in ways.values()] for _ in range(1 + rounds)]
                medians = [statistics.median(column[1:]) for column in zip(*seconds)]   # after the warm-up
                for way, median in zip(ways, medians):
                    ratio = medians[0] / median
                    print(f"| {batch_size} | {way} | {len(inputs) / median:.1f} | {ratio:.2f} | "
                          f"{ratio * mean_layer / L:.2f} |")
