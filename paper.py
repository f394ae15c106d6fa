"""The paper's Tables 1 to 3 and Figures 2 to 5 beside ours, and the benchmark, for eval.py.

First what one pass of full depth tells, then which runs make a cell, tables, figures, speed.
"""

import dataclasses
import json
import statistics
from collections import namedtuple
from functools import partial
from pathlib import Path

import torch

import fast
from checkpoint import InputError, atomic_write, read_json
from fast import pad
from glue import buckets, load, negations
from ponder import FixedExit, exit_distribution, geometric_prior
from run import (DRAWS, PLACE, SWEEPS, THRESHOLDS, all_layers, apply_exit, autocast, device_name,
                 load_run, make_rule, make_settings, mean_scores, read_split, say, scores, splits_of, timed)


# ---- what one pass of full depth tells ----

def mean_of(trees):
    """Dicts and lists of one form -> that form with the means; a key that some lack is the others' mean."""
    if trees[0] is None:
        return None
    if isinstance(trees[0], dict):
        keys = dict.fromkeys(key for tree in trees for key in tree)
        return {key: mean_of([tree[key] for tree in trees if key in tree]) for key in keys}
    if isinstance(trees[0], list):
        return [mean_of(same) for same in zip(*trees)]
    return statistics.mean(trees)


def at_layers(logits, layers):
    """logits (N,L,C) of each row's own layer (N,) in 1..L -> (N,C)"""
    return logits[torch.arange(len(layers)), layers - 1]


def oracle_layers(logits, labels):
    """(N,) the first layer that is right, L where none is; for regression the layer with the least error."""
    labels = torch.tensor(labels)
    if logits.shape[2] == 1:
        return (logits[:, :, 0] - labels[:, None]).abs().argmin(1) + 1
    right = logits.argmax(2) == labels[:, None]                     # (N,L)
    right[:, -1] = True
    return right.int().argmax(1) + 1


def exit_result(criterion, settings, logits, lam, labels, split):
    """An exit over arrays of full depth -> score, metrics by split, mean_layer, histogram (L,): the share of
    rows that exit at each layer, dealt: the score if the same layers go to random rows, which an exit that
    chooses its rows well beats. Of sampling the mean of its draws. Without labels the scores are None."""
    labelled, L = labels[0] is not None, lam.shape[1]
    metrics, shares, dealt = {"score": None}, [], []
    if labelled:
        metrics, _ = mean_scores(criterion, settings, logits, lam, labels)
    for draw in range(DRAWS):
        _, layers = apply_exit(criterion, settings, logits, lam, draw)
        shares.append(torch.bincount(layers, minlength=L + 1)[1:].double() / len(layers))
        order = torch.randperm(len(layers), generator=torch.Generator().manual_seed(draw))
        outputs = at_layers(logits, layers[order])
        dealt.append(scores(settings.task, outputs, labels)["score"] if labelled else None)
    histogram = torch.stack(shares).mean(0)
    mean_layer = (histogram * torch.arange(1, L + 1)).sum().item()
    return {"score": metrics.pop("score"), "metrics": {split: metrics}, "mean_layer": mean_layer,
            "histogram": histogram.tolist(), "dealt": mean_of(dealt)}


def study(settings, splits):
    """What run.json keeps of a finished run, so that tables and Figs. 2 to 4 need no model.

    splits {split: (logits (N,L,C), lam (N,L), labels)} -> dev {exit: exit_result()}, sweep {exit: a row for
    each threshold}, by_layer (L,): the score of every fixed layer, oracle: its score and mean_layer.
    """
    trees = []
    for split, (logits, lam, labels) in splits.items():
        dev, sweep, L = {}, {}, lam.shape[1]
        for criterion in settings.exits:
            dev[criterion] = exit_result(criterion, settings, logits, lam, labels, split)
            for value in SWEEPS.get(criterion, ()):
                changed = dataclasses.replace(settings, **{THRESHOLDS[criterion]: value})
                result = exit_result(criterion, changed, logits, lam, labels, split)
                row = {criterion: value, "speed_up": L / result["mean_layer"]}
                row |= {name: result[name] for name in ("score", "mean_layer", "dealt")}
                sweep.setdefault(criterion, []).append(row)
        best = oracle_layers(logits, labels)
        oracle = {"score": scores(settings.task, at_layers(logits, best), labels)["score"],
                  "mean_layer": best.double().mean().item()}
        by_layer = [scores(settings.task, logits[:, i], labels)["score"] for i in range(L)]
        trees.append({"dev": dev, "by_layer": by_layer, "oracle": oracle, "sweep": sweep})
    return mean_of(trees)


# ---- which runs make a cell ----

# What a search, a seed or a machine may change without making another system; every other setting makes one.
FREE = ("task", "model", "seed", "lr", "lambda_lr", "batch_size", "epochs", "stop_after", "max_steps", "clip",
        "warmup", "dropout", "max_length", "data_dir", "device", "precision", "save_every")


# A finished run. score: on dev by its own exit; one_set: what the seeds of one set of settings share.
Run = namedtuple("Run", "folder settings encoder study score one_set")


def read_result(path):
    """A run.json as a Run; None if the run is unfinished, or was cut by --max-steps and is no result"""
    values = read_json(path)
    settings = make_settings(**values["settings"])
    if not values["finished"] or settings.max_steps is not None:
        return None
    study = {name: values[name] for name in ("dev", "by_layer", "oracle", "sweep")}
    data = json.dumps([values.get("data"), values.get("model")], sort_keys=True)        # their sha256
    one_set = dataclasses.replace(settings, seed=0, **dict.fromkeys(PLACE)), data
    run = Run(path.parent, settings, values["encoder"], study, study["dev"][settings.exit]["score"], one_set)
    for criterion in study["dev"]:
        cell([run], criterion)                              # fails here if it cannot be printed
    return run


def finished_runs(root):
    """The Runs of root/*/run.json and root/*.json, of equal settings the newest; what is damaged is named on
    stderr and passed over."""
    runs, paths = {}, [*root.glob("*/run.json"), *root.glob("*.json")]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns):
        try:
            run = read_result(path)
        except (InputError, KeyError, TypeError, ValueError, AttributeError) as error:
            say(f"passed over {path}, which is not what train.py writes ({type(error).__name__}: {error})")
            continue
        if run:
            runs[run.one_set, run.settings.seed] = run
    return list(runs.values())


def system_of(settings):
    """What makes a run one row: method, exit and threshold, beta, prior, Lambda, layers, classifiers."""
    named = [(name, value) for name, value in dataclasses.asdict(settings).items() if name not in FREE]
    return (*named, ("lambda_rate", settings.lambda_lr is not None))


def cells(runs):
    """{(task, model, system): runs}, the one rule for tables, figures and submissions: the runs of a cell are
    the seeds of ONE set of settings, the set with the most seeds, then the best mean."""
    sets = {}
    for run in runs:
        key = run.settings.task, Path(run.settings.model).name, system_of(run.settings)
        sets.setdefault(key, {}).setdefault(run.one_set, []).append(run)

    def rank(seeds):
        return len(seeds), statistics.mean(run.score for run in seeds)

    return {key: max(choices.values(), key=rank) for key, choices in sorted(sets.items(), key=str)}


def seeds_of(found, task, model, given):
    """The runs of the cell whose settings differ from the defaults as given: {"method": "pabee"}"""
    return found.get((task, model, system_of(make_settings(task=task, model=model, **given))), [])


# ---- tables ----

NAMES = {"sst2": "SST-2", "rte": "RTE", "qnli": "QNLI", "cola": "CoLA", "mrpc": "MRPC", "mnli": "MNLI",
         "qqp": "QQP", "stsb": "STS-B"}
PLAIN, PABEE = {"method": "finetune"}, {"method": "pabee"}
PONDERNET, PALBERT, ONE_LAYER = {"method": "pondernet"}, {"method": "palbert"}, {"lambda_layers": 1}
TABLE_1 = (     # system, encoder, settings, the paper's SST-2, RTE, CoLA
    ("ALBERT", "albert", PLAIN, "92.7±0.3 77.0±1.9 57.0±2.1"),
    ("PonderNet, sampling", "albert", PONDERNET, "91.1±0.6 73.5±1.9 50.8±2.2"),
    ("PonderNet, expectation", "albert", PONDERNET | {"exit": "expectation"}, "92.3±0.4 76.8±3.0 55.9±2.2"),
    ("Q-exit", "albert", PONDERNET | {"exit": "q"}, "92.2±0.3 77.3±1.4 55.7±0.9"),
    ("+ Lambda rate", "albert", ONE_LAYER | {"lambda_input": "current"}, "92.7±0.4 77.3±1.4 56.5±1.2"),
    ("+ 3 layers", "albert", {"lambda_input": "current"}, "92.6±0.3 77.0±1.4 56.3±2.4"),
    ("+ concatenation instead", "albert", ONE_LAYER, "93.0±0.3 76.5±1.6 56.9±1.9"),
    ("all: PALBERT", "albert", PALBERT, "92.9±0.2 77.8±1.2 57.4±1.7"),
)
TABLE_2 = (     # system, encoder, settings, the paper's dev scores and their mean, its test scores (Table 3)
    ("ALBERT", "albert", PLAIN,
     "92.7 76.5 91.5 56.6 90.5 84.8 88.9 90.6 84.0", "93.4 70.0 92.1 50.5 85.6 79.0 84.7 87.4 80.3"),
    ("ALBERT, 9 layers", "albert", PLAIN | {"layers": 9},
     "91.1 74.2 91.2 56.9 89.7 84.3 89.7 90.1 83.4", None),
    ("PABEE (t = 6)", "albert", PABEE,
     "92.7 76.9 91.5 55.6 88.3 84.5 88.9 89.9 83.5", "92.7 71.1 91.3 46.0 84.3 79.2 83.7 86.5 79.3"),
    ("PonderNet (sampling)", "albert", PONDERNET,
     "91.3 74.0 88.3 51.3 87.1 81.7 87.7 88.2 81.2", "90.2 68.6 88.5 43.7 84.3 81.1 77.4 83.6 77.2"),
    ("PALBERT", "albert", PALBERT,
     "93.1 78.3 91.0 58.1 89.3 84.7 88.9 89.9 84.2", "93.0 73.5 91.7 48.6 87.1 79.8 84.4 86.5 80.6"),
    ("RoBERTa", "roberta", PLAIN,
     "94.5 79.4 92.4 63.1 91.3 86.7 89.8 90.7 86.0", "94.5 74.1 93.1 58.9 89.1 86.5 80.9 88.4 83.2"),
    ("RoBERTa PABEE", "roberta", PABEE,
     "93.8 76.9 91.9 60.7 89.6 86.4 91.1 89.9 85.0", "95.4 71.7 92.0 51.2 87.6 86.2 80.4 86.2 81.3"),
    ("PRoBERTa", "roberta", PALBERT,
     "93.7 79.1 91.6 62.2 90.2 86.7 91.1 89.9 85.6", "94.5 72.1 91.8 58.6 88.3 86.1 79.6 85.7 82.1"),
)


def cell(seeds, criterion=None, median=False):
    """median, or mean ± std, of dev scores by the runs' own exit or the one given; mean layer, dealt score"""
    if not seeds:
        return "not run"
    results = [run.study["dev"][criterion or run.settings.exit] for run in seeds]
    values, mean = [result["score"] for result in results], mean_of(results)
    text = f"{statistics.median(values):.1f}" if median else f"{mean['score']:.1f}"
    if len(values) > 1 and not median:
        text += f" ± {statistics.stdev(values):.1f}"
    return f"{text} (n = {len(seeds)}, layer {mean['mean_layer']:.1f}, dealt {mean['dealt']:.1f})"


def print_table(title, columns, rows):
    print(f"\n{title}\n\n| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def paper_table(found, title, table, tasks, median):
    """A table of the paper, and under each of its rows ours for each model that was run"""
    encoders = {model: seeds[0].encoder for (task, model, _), seeds in found.items() if task in NAMES}
    rows = []
    for name, encoder, given, numbers, *_ in table:
        rows.append([name, "paper", *(number.replace("±", " ± ") for number in numbers.split())])
        for model in encoders:
            if encoders[model] == encoder:
                ours = [seeds_of(found, task, model, given) for task in tasks]
                row = ["", f"ours, {model}", *(cell(seeds, median=median) for seeds in ours)]
                if median:
                    medians = [statistics.median(run.score for run in seeds) for seeds in ours if seeds]
                    row.append(f"{statistics.mean(medians):.1f}" if all(ours) else "not run")
                rows.append(row)
    columns = ["system", "whose", *(NAMES[task] for task in tasks)]
    print_table(title, columns + ["mean"] if median else columns, rows)


def print_tables(root):
    """Tables 1, 2 and 3 of the paper in Markdown with ours beside it. Then every system that was run, by each
    of its exits, with what says whether the exit has learned anything: the same layers dealt out to random
    rows, every fixed layer, and the first layer that is right."""
    found = cells(finished_runs(root))
    paper_table(found, "Table 1. Ablation, GLUE dev, mean ± std", TABLE_1, ("sst2", "rte", "cola"), False)
    paper_table(found, "Table 2. GLUE dev, median over seeds", TABLE_2, NAMES, True)
    tested = [(name, None, None, numbers) for name, _, _, _, numbers in TABLE_2 if numbers]
    paper_table(found, "Table 3. GLUE test; ours: not run, see eval.py --submit", tested, NAMES, True)
    run_tasks = {task for task, _, _ in found}
    tasks = [*(task for task in NAMES if task in run_tasks), *sorted(run_tasks - NAMES.keys())]
    rows = {}
    for (task, model, system), seeds in found.items():
        settings, mean = seeds[0].settings, mean_of([run.study for run in seeds])
        preset = system_of(make_settings(task=task, model=model, method=settings.method))
        changed = [f"{key} {value}" for key, value in system if (key, value) not in preset]
        name = ", ".join([settings.method, *changed])
        texts = {criterion: cell(seeds, criterion) for criterion in mean["dev"]}
        texts["every fixed layer"] = " ".join(f"{score:.1f}" for score in mean["by_layer"])
        oracle = mean["oracle"]
        texts["first right layer"] = f"{oracle['score']:.1f} (layer {oracle['mean_layer']:.1f})"
        for what, text in texts.items():
            rows.setdefault((model, name, what), dict.fromkeys(tasks, "not run"))[task] = text
    print_table("Every system that was run, dev, mean ± std; dealt: the same layers given to random rows",
                ("model", "system", "exit", *tasks), [[*key, *row.values()] for key, row in rows.items()])


# ---- figures ----

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")    # Okabe and Ito's
MARKERS = "osD^vP"
CURVES = {"PALBERT, Q-exit": ("palbert", "q"), "PABEE, patience": ("pabee", "patience"),
          "PABEE's heads, entropy": ("pabee", "entropy"), "BERxiT": ("berxit", "learned"),
          "plain model": ("finetune", "last")}


def plot(kind, root, out, device, batch_size, changed):
    """One of the figures below over the finished runs under root, as out or as root/KIND.png. Those that read
    the models do it with the settings `changed`: the folder of the data, the precision."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise InputError("--plot: matplotlib is not installed, and draws; pip install matplotlib") from None
    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
                            "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True})
    found = cells(finished_runs(root))

    def read(run, split):
        """(labels, logits, lam) of the run's model over a split"""
        say(f"reading {run.folder}")
        settings, tokenizer, model = load_run(run.folder, device)
        settings = dataclasses.replace(settings, **changed)
        inputs, labels = read_split(settings, tokenizer, split)
        return labels, *all_layers(model, inputs, batch_size, settings.precision)

    if kind == "distribution":
        figure = plot_distribution(pyplot, found, read)
    elif kind == "negations":
        figure = plot_negations(pyplot, found, read)
    else:
        figure = plot_panels(pyplot, found, kind)
    out = Path(out or root / f"{kind}.png")
    with atomic_write(out) as file:
        figure.savefig(file, dpi=150, bbox_inches="tight", format="png")
    pyplot.close(figure)
    print(out)


def chosen(found, lines):
    """{(task, model): {label: runs}} of the lines {label: what differs from the defaults} that were run"""
    panels = {}
    for task, model in sorted({key[:2] for key in found}):
        for label, given in lines.items():
            seeds = seeds_of(found, task, model, given)
            if seeds:
                panels.setdefault((task, model), {})[label] = seeds
    if not panels:
        raise InputError("--plot: expected finished runs of its systems, found none; train.py makes them")
    return panels


def plot_panels(pyplot, found, kind):
    """Figs. 2, 3 and 4: a panel for each task and model, from run.json alone, without the model"""
    if kind == "q":
        draw, lines = draw_q, {"palbert": PALBERT, "pondernet": PONDERNET}
    elif kind == "speedup":
        draw = draw_speedup
        lines = {label: {"method": method} for label, (method, _) in CURVES.items()}
    else:
        priors = sorted({run.settings.prior for seeds in found.values() for run in seeds})
        draw, lines = draw_prior, {f"λ {prior:g}": {"prior": prior} for prior in priors}
    panels = chosen(found, lines)
    columns = min(2, len(panels))
    height = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(height, columns, squeeze=False, layout="constrained",
                                   figsize=(4.8 * columns, 3.4 * height))
    for extra in axes.flat[len(panels):]:
        extra.set_visible(False)
    for axis, ((task, model), members) in zip(axes.flat, panels.items()):
        axis.set(title=f"{NAMES.get(task, task)}, {model}", ylabel="dev score")
        for n, (label, seeds) in enumerate(members.items()):
            draw(axis, n, label, seeds, len(members))
        axis.legend(frameon=False, fontsize=9)
    return figure


def draw_q(axis, n, label, seeds, lines):
    """Fig. 2: dev score against q, mean ± std over seeds"""
    curves = torch.tensor([[float(row["score"]) for row in run.study["sweep"]["q"]] for run in seeds])
    mean, std = curves.mean(0), curves.std(0, correction=min(1, len(seeds) - 1))
    axis.plot(SWEEPS["q"], mean, color=COLOURS[n], marker=MARKERS[n], markersize=3,
              label=f"{label}, n = {len(seeds)}")
    axis.fill_between(SWEEPS["q"], mean - std, (mean + std).clamp(max=100), color=COLOURS[n], alpha=0.2)
    axis.set(xlabel="threshold q")


def draw_speedup(axis, n, label, seeds, lines):
    """Fig. 3: dev score against L / mean layer by threshold, means over seeds; q = 0.5, t = 6 are ringed"""
    criterion, values = CURVES[label][1], mean_of([run.study for run in seeds])
    ticks = (1, 1.5, 2, 3, 4, 6, 8, 12)
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set(xlabel="speed-up, L / mean layer")
    if criterion == "last":
        axis.axhline(values["by_layer"][-1], color="black", linewidth=1, linestyle="--", label=label)
    rows = values["sweep"].get(criterion, ())               # none for entropy on a task without classes
    for row in rows:
        if (criterion, row[criterion]) in (("q", 0.5), ("patience", 6)):
            axis.plot(row["speed_up"], row["score"], "ko", fillstyle="none", markersize=9)
    if rows:
        axis.plot([row["speed_up"] for row in rows], [row["score"] for row in rows], color=COLOURS[n],
                  marker=MARKERS[n], markersize=4, label=label)


def draw_prior(axis, n, label, seeds, lines):
    """Fig. 4: histogram of exit layers by the prior's lambda, with the dev score in the legend"""
    result, width = mean_of([run.study for run in seeds])["dev"]["q"], 0.8 / lines
    layers = range(1, len(result["histogram"]) + 1)
    shares = [100 * share for share in result["histogram"]]
    axis.bar([layer - 0.4 + (n + 0.5) * width for layer in layers], shares, width, color=COLOURS[n % 6],
             label=f"{label}: {result['score']:.1f}")
    axis.set(xlabel="exit layer", ylabel="share of dev rows (%)", xticks=layers)
    axis.margins(y=0.4)                                     # room for the legend


def plot_distribution(pyplot, found, read):
    """Fig. 5: mean p(i|x) over the training set by task, means over all seeds, and the prior"""
    figure, axis = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    priors = {}
    for n, ((task, model), members) in enumerate(chosen(found, {"palbert": PALBERT}).items()):
        seeds = members["palbert"]
        p = torch.stack([exit_distribution(read(run, "train")[2]).mean(0) for run in seeds]).mean(0)
        layers, prior = range(1, len(p) + 1), seeds[0].settings.prior
        axis.plot(layers, p, color=COLOURS[n % 6], marker=MARKERS[n % 6],
                  label=f"{NAMES.get(task, task)}, {model}")
        priors[f"prior {prior:g}, L = {len(p)}"] = layers, geometric_prior(prior, len(p))
    for label, (layers, prior) in priors.items():
        axis.plot(layers, prior, color="black", linewidth=1, linestyle="--", label=label)
    axis.set(xlabel="layer i", ylabel="mean p(i|x), training set")
    axis.legend(frameon=False)
    return figure


def plot_negations(pyplot, found, read):
    """parity by the number of nested negations, means over all seeds: cumulative exit probability, mean exit
    layer, and accuracy at the exit beside that of layer 1"""
    panels = chosen({key: seeds for key, seeds in found.items() if key[0] == "parity"}, {"palbert": PALBERT})
    seeds = list(panels.values())[-1]["palbert"]
    k = torch.tensor([negations(example.text_b) for example in load("parity", "dev")])
    counts, tables = k.unique().tolist(), []
    for run in seeds:
        labels, logits, lam = read(run, "dev")
        outputs, layers = apply_exit("q", run.settings, logits, lam)
        predicted = torch.stack([outputs, logits[:, 0]], 1).argmax(2)                       # (N,2)
        right = 100 * (predicted == torch.tensor(labels)[:, None])
        table = torch.cat([exit_distribution(lam).cumsum(1), layers[:, None], right], 1)    # (N,L+3)
        tables.append(torch.stack([table[k == n].mean(0) for n in counts]))
    mean, L = torch.stack(tables).mean(0).tolist(), lam.shape[1]    # K rows of L+3
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for n, row in zip(counts, mean):                        # thinner ones lie above: no line hides another
        left.plot(range(1, L + 1), row[:L], color=COLOURS[n], marker=MARKERS[n], markersize=10 - 2 * n,
                  linewidth=5 - 1.2 * n, label=n)
    left.axhline(seeds[0].settings.q, color="black", linewidth=1, linestyle="--", label="q")
    left.set(xlabel="layer", ylabel="mean cumulative exit probability", title=f"n = {len(seeds)} seeds")
    left.legend(frameon=False, title="negations")
    middle.bar_label(middle.bar(counts, [row[L] for row in mean], color=COLOURS), fmt="%.2f")
    middle.set(xlabel="nested negations", ylabel="mean exit layer", xticks=counts)
    for shift, column, label, grey in ((-0.2, L + 1, "at the exit", "0.4"), (0.2, L + 2, "layer 1", "0.75")):
        places, heights = [n + shift for n in counts], [row[column] for row in mean]
        right.bar_label(right.bar(places, heights, 0.4, label=label, color=grey), fmt="%.0f", fontsize=8)
    right.set(xlabel="nested negations", ylabel="accuracy (%)", xticks=counts, ylim=(0, 125))
    right.legend(frameon=False, ncols=2, loc="upper center")
    return figure


# ---- speed ----

def full_depth(model, inputs, batch_size):
    """The plain model: every layer whole, then pool and classifier; logits (N,C) in the order of batches"""
    L, device, outputs = model.num_layers, next(model.parameters()).device, []
    for batch in buckets([len(ids) for ids, _ in inputs], batch_size):
        ids, mask, segments = pad([inputs[row] for row in batch], model.encoder, device)
        h = model.encoder.embed(ids, segments)
        for i in range(1, L + 1):
            h = model.encoder.layer(i, h, mask)
        pooled = model.encoder.pool(h)
        outputs.append(model.heads(torch.full((len(batch),), L, device=device), pooled, pooled)[0])
    return torch.cat(outputs)


def released_way(model, inputs, layers):
    """The released code's inference: one row at a time, padded to 128, down to its exit; logits (N,C)"""
    device, outputs = next(model.parameters()).device, []
    for row, layer in zip(inputs, layers.tolist()):
        outputs.append(model.predict(*pad([row], model.encoder, device, 128), FixedExit(layer))[0])
    return torch.cat(outputs)


def flops(model, operations, work):
    """FLOP/s of work(), the median of 5; calls that take 50 ms lie between two waits, or those would count"""
    calls, seconds = 1, 0
    while seconds < 0.05:
        calls *= 2
        seconds, _ = timed(model, lambda: [work() for _ in range(calls)])
    rounds = [timed(model, lambda: [work() for _ in range(calls)])[0] for _ in range(5)]
    return operations * calls / statistics.median(rounds)


def flops_of_layer(model, B, T, dtype):
    """What one layer on (B,T) reaches, beside the best product that the device gives in the dtype"""
    H, F = model.encoder.hidden_size, model.encoder.config.intermediate_size
    new = partial(torch.randn, device=next(model.parameters()).device, dtype=dtype)
    h, mask, best = new(B, T, H), new(B, T) < float("inf"), 0
    layer = flops(model, 2 * B * T * H * (4 * H + 2 * F + 2 * T), lambda: model.encoder.layer(1, h, mask))
    for m, k, n in ((B * T, H, F), (B * T, F, H), (1024, 1024, 1024), (2048, 2048, 2048)):
        x, w = new(m, k), new(k, n)
        best = max(best, flops(model, 2 * m * k * n, lambda: x @ w))
    reached = f"{layer / 1e9:.0f} GFLOP/s, {layer / best:.0%} of the best product's {best / 1e9:.0f}"
    return f"one layer on {B} x {T}: {reached}"


@torch.no_grad()
def bench(model, settings, tokenizer, criterion, split, rows=128, rounds=5):
    """Examples per second by batch size, all ways in turn in one process: medians, on rows of the split"""
    device, L = next(model.parameters()).device, model.num_layers
    inputs, _ = read_split(settings, tokenizer, splits_of(settings.task, split)[0])
    picked = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))[:rows].tolist()
    inputs = [inputs[row] for row in sorted(picked)]
    length = statistics.mean(len(ids) for ids, _ in inputs)

    usual = fast.FIRST_TOKENS

    def early(batch_size, depthwise=False, first_tokens=usual):
        fast.FIRST_TOKENS = first_tokens            # from so many tokens a layer is decided before it is done
        try:
            return model.predict_many(inputs, make_rule(criterion, settings, L), batch_size, depthwise)
        finally:
            fast.FIRST_TOKENS = usual

    with autocast(device, settings.precision):
        _, layers = early(32)
        mean_layer = layers.double().mean().item()
        dtype = torch.bfloat16 if torch.is_autocast_enabled(device.type) else torch.float32
        print(f"{settings.task} {split}: {len(inputs)} rows of {length:.1f} tokens, exit by {criterion} at "
              f"{mean_layer:.2f} of {L}; PyTorch {torch.__version__}, {device_name(device)}, {dtype}")
        print_table(flops_of_layer(model, 32, round(length), dtype),
                    ("batch", "way", "examples/s", "against full depth", "over L / mean layer"), [])
        for batch_size in (1, 8, 32, 128):
            ways = {"full depth": partial(full_depth, model, inputs, batch_size),
                    "rows dropped": partial(early, batch_size, first_tokens=10**9),
                    "decided first": partial(early, batch_size)}
            if model.encoder.shared:
                ways["depth-wise"] = partial(early, batch_size, depthwise=True)
            if batch_size == 32:
                ways["one by one at length 128, as released"] = partial(released_way, model, inputs, layers)
            seconds = {way: [] for way in ways}
            for _ in range(1 + rounds):                     # the first round warms up
                for way, work in ways.items():
                    seconds[way].append(timed(model, work)[0])
            median = {way: statistics.median(values[1:]) for way, values in seconds.items()}
            for way in ways:
                ratio = median["full depth"] / median[way]
                over_formula = 1 if way == "full depth" else ratio * mean_layer / L
                print(f"| {batch_size} | {way} | {len(inputs) / median[way]:.1f} | {ratio:.2f} | "
                      f"{over_formula:.2f} |", flush=True)
