"""Ask a finished run: its scores and exit layers, its speed, one sentence explained, tables, figures, a submission.

    python eval.py --q 0.5                             the newest run on its dev set, with early exit for real
    python eval.py --text "A." --text-b "B."           where one input exits, and why
    python eval.py --sweep                             score and mean layer for every q, from one pass
    python eval.py --bench                             examples per second, full depth and early exit, by batch size
    python eval.py --table | --plot q | --submit glue.zip    over all runs under runs/
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

import torch

import paper
from checkpoint import InputError
from glue import TASKS, write_submission
from ponder import exit_distribution
from run import (EXITS, SWEEPS, Parser, all_layers, apply_exit, autocast, choose_device, find_run, load_run, make_rule, predict_all,
                 read_split, run_main, say, scores, splits_of, sweep, timed)


# ---- one run, one split ----

def undecided(exit, settings, logits, lam):
    """(N,L) bool: where the rule decides by less than 1e-5, so that another order of summation may decide otherwise"""
    if exit == "q":
        return (exit_distribution(lam).cumsum(1) - settings.q).abs() < 1e-5
    if exit == "sample":
        u, = make_rule(exit, settings, lam.shape[1]).start(*lam.shape, lam.device)
        return (lam - u).abs() < 1e-5
    if exit == "entropy":
        return (torch.special.entr(logits.softmax(2)).sum(2) - settings.entropy).abs() < 1e-5
    if exit == "patience" and logits.shape[2] > 1:
        best, second = logits.topk(2, dim=2).values.unbind(2)
        return best - second < 1e-5
    if exit == "patience":
        return (logits[:, :, 0].diff(dim=1, prepend=logits[:, :1, 0]).abs() - settings.tolerance).abs() < 1e-5
    return torch.zeros_like(lam, dtype=torch.bool)


def exit_statistics(model, settings, split, inputs, labels, exits, batch_size):
    """{exit: result} over a split. Each exit is computed from one pass of full depth, run again with real early exit, and compared: in
    float32 a row that leaves elsewhere, undecided() aside, is an error; in bf16 such rows are counted."""
    all_layers(model, inputs[:batch_size], batch_size)                  # the first call pays for what later ones reuse
    full_seconds, (logits, lam) = timed(model, lambda: all_layers(model, inputs, batch_size))
    results = {}
    for exit in exits:
        outputs, layers = apply_exit(exit, settings, logits, lam)
        seconds = full_seconds
        if exit != "expectation":                                       # which needs every layer
            seconds, (real_outputs, real_layers) = timed(model, lambda: predict_all(model, settings, exit, inputs, batch_size))
            differ = (layers != real_layers) & ~undecided(exit, settings, logits, lam).any(1)
            differ |= (layers == real_layers) & ~torch.isclose(outputs, real_outputs, rtol=1e-3, atol=1e-3).all(1)
            count = int(differ.sum())
            if count and autocast(next(model.parameters()).device)._enabled:
                say(f"{exit}: in bf16 {count} of {len(inputs)} rows leave elsewhere than the pass of full depth says")
            elif count:
                raise RuntimeError(f"early exit by {exit} disagrees with the pass of full depth on {count} rows of {split}, the first "
                                   f"row {int(differ.nonzero()[0])}: a fault in this code; please report it")
            outputs, layers = real_outputs, real_layers
        metrics = scores(settings.task, outputs, labels) if labels[0] is not None else {"score": None}
        results[exit] = {"metrics": metrics, "score": metrics.pop("score"), "mean_layer": layers.float().mean().item(),
                         "layers": torch.bincount(layers, minlength=model.num_layers + 1)[1:].tolist(),
                         "seconds": seconds, "seconds_full_depth": full_seconds}
    return results


def over_splits(results):
    """One result of several splits' (MNLI has two): scores and mean layers averaged by split, counts and seconds added."""
    if len(results) == 1:
        return next(iter(results.values()))
    mean = lambda key: None if any(r[key] is None for r in results.values()) else statistics.mean(r[key] for r in results.values())
    return {"metrics": {f"{name}_{split}": value for split, r in results.items() for name, value in r["metrics"].items()},
            "score": mean("score"), "mean_layer": mean("mean_layer"), "layers": [sum(c) for c in zip(*(r["layers"] for r in results.values()))],
            "seconds": sum(r["seconds"] for r in results.values()), "seconds_full_depth": sum(r["seconds_full_depth"] for r in results.values())}


def report(model, settings, tokenizer, exit, split, batch_size, as_json):
    """The table of every exit of a run on a split; with as_json the chosen exit as one JSON object on stdout, the table on stderr."""
    by_split = {}
    for name in splits_of(settings.task, split):
        inputs, labels = read_split(settings, tokenizer, name)
        by_split[name] = exit_statistics(model, settings, name, inputs, labels, settings.exits, batch_size)
    results = {name: over_splits({split: result[name] for split, result in by_split.items()}) for name in settings.exits}
    out = sys.stderr if as_json else sys.stdout
    print(f"{settings.task} {split}, {model.num_layers} layers, batch {batch_size}", file=out)
    print(f"{'':2}{'exit':<16} {'score':>6} {'mean layer':>11} {'layers saved':>13} {'seconds':>9} {'full depth':>11} {'faster':>7}", file=out)
    for name, r in results.items():
        label = name + {"q": f" {settings.q:g}", "patience": f" {settings.patience}", "entropy": f" {settings.entropy:g}"}.get(name, "")
        score = "-" if r["score"] is None else f"{r['score']:.1f}"
        print(f"{'>' if name == exit else '':2}{label:<16} {score:>6} {r['mean_layer']:>11.2f} {model.num_layers / r['mean_layer']:>12.2f}x "
              f"{r['seconds']:>9.2f} {r['seconds_full_depth']:>11.2f} {r['seconds_full_depth'] / r['seconds']:>6.2f}x", file=out)
    if as_json:
        print(json.dumps({"task": settings.task, "split": split, "exit": exit, "q": settings.q} | results[exit]))


def explain(model, settings, tokenizer, exit, text_a, text_b):
    """One input, layer by layer: lambda, p, the CDF as a bar against q, and that layer's prediction."""
    task = TASKS[settings.task]
    if task.pair and text_b is None or not task.pair and text_b is not None:
        raise InputError(f"--text-b: {task.name} takes {'two texts, --text and --text-b' if task.pair else 'one text, --text alone'}")
    if exit == "expectation":
        raise InputError("--exit expectation: it reads every layer, so there is no exit to explain; use q, sample or last")
    inputs = [tokenizer.encode(text_a, text_b, settings.max_length)]
    logits, lam = all_layers(model, inputs)
    _, (layer,) = apply_exit(exit, settings, logits, lam)
    p = exit_distribution(lam)[0]
    cdf = p.cumsum(0)

    def prediction(i):
        if task.num_labels == 1:
            return f"{logits[0, i, 0]:.2f}"
        probabilities = logits[0, i].softmax(0)
        return f"{task.labels[int(probabilities.argmax())]} ({probabilities.max():.0%})"

    print(f"{' '.join(tokenizer.tokens(inputs[0][0]))}\n{prediction(layer - 1)} at layer {layer} of {model.num_layers}, by {exit} exit\n")
    print(f"{'layer':>5} {'lambda':>7} {'p':>6} {'CDF':>6}  {f'against q = {settings.q:g}':<42} prediction")
    for i in range(model.num_layers):
        bar = ["█" if n < round(cdf[i].item() * 40) else "·" for n in range(40)]
        bar.insert(round(settings.q * 40), "|")
        print(f"{i + 1:>5} {lam[0, i]:>7.3f} {p[i]:>6.3f} {cdf[i]:>6.3f}  {''.join(bar):<42} {prediction(i)}{'  <- exit' if i + 1 == layer else ''}")


def print_sweep(model, settings, tokenizer, exit, split, batch_size, as_json):
    if exit not in SWEEPS:
        others = [name for name in settings.exits if name in SWEEPS]
        raise InputError(f"--sweep: exit {exit} has nothing to sweep; " + (f"expected --exit {' or '.join(others)}" if others else
                         f"nor has any other exit of {settings.method}"))
    tables = []
    for name in splits_of(settings.task, split):
        inputs, labels = read_split(settings, tokenizer, name)
        if labels[0] is None:
            raise InputError(f"--sweep: {settings.task} {name} has no labels; use --split dev")
        tables.append(sweep(settings, exit, *all_layers(model, inputs, batch_size), labels))
    rows = [{key: statistics.mean(row[key] for row in same) for key in same[0]} for same in zip(*tables)]
    best = max(rows, key=lambda row: (row["score"], -row["mean_layer"]))
    if as_json:
        print(json.dumps({"task": settings.task, "split": split, "exit": exit, "rows": rows, "best": best}))
        return
    print(f"{exit:>9} {'score':>6} {'mean layer':>11} {'speed-up':>9}")
    for row in rows:
        print(f"{row[exit]:>9g} {row['score']:>6.1f} {row['mean_layer']:>11.2f} {row['speed_up']:>8.2f}x{'  <- best' if row is best else ''}")


# ---- all runs: a submission ----

def submit(path, device, data_dir, batch_size):
    """The zip for GLUE's server from the best run of each task on dev, by its own exit; AX is predicted by the MNLI run."""
    best = {}
    for folder, settings, dev in paper.finished_runs():
        if settings.task not in best or dev[settings.exit]["score"] > best[settings.task][1]:
            best[settings.task] = folder, dev[settings.exit]["score"]
    best.pop("parity", None)
    predictions = {}
    for task, (folder, score) in best.items():
        settings, tokenizer, model = load_run(folder, device)
        settings = dataclasses.replace(settings, data_dir=data_dir or settings.data_dir)
        say(f"{task}: {folder}, dev {score:.1f} by {settings.exit}")
        for name, split in [(task, split) for split in TASKS[task].test_splits] + ([("ax", "test")] if task == "mnli" else []):
            inputs, _ = read_split(dataclasses.replace(settings, task=name) if name == "ax" else settings, tokenizer, split)
            if settings.exit == "expectation":
                outputs, _ = apply_exit("expectation", settings, *all_layers(model, inputs, batch_size))
            else:
                outputs, _ = predict_all(model, settings, settings.exit, inputs, batch_size)
            predictions[name, split] = outputs[:, 0].numpy() if outputs.shape[1] == 1 else outputs.argmax(1).numpy()
    missing = write_submission(path, predictions)
    print(f"{path}: {len(predictions)} files" + (f"; not in it, for want of a run: {', '.join(missing)}" if missing else ""))


# ---- the command ----

def main(argv=None):
    parser = Parser("eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--run", help="name or folder of the run (default: the newest)")
    parser.add_argument("--q", type=float, help="threshold of Q-exit, above 0 and up to 1 (default: the run's)")
    parser.add_argument("--patience", type=int, help="PABEE's t, from 1 (default: the run's)")
    parser.add_argument("--entropy", type=float, help="threshold of entropy exit in nats, above 0 (default: the run's)")
    parser.add_argument("--exit", choices=EXITS, help="the exit that --json, --text and --sweep speak of (default: the run's own, or the one "
                                                      "whose threshold is given)")
    parser.add_argument("--split", default="dev", help="the split, e.g. dev, test or train (default: dev; for MNLI dev and test mean both)")
    parser.add_argument("--batch-size", type=int, default=32, help="rows computed together, from 1 (default: 32)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")
    parser.add_argument("--data-dir", help="folder with the GLUE files (default: the run's)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, everything else on stderr")
    parser.add_argument("--text", metavar="A", help="explain one input")
    parser.add_argument("--text-b", metavar="B", help="its second text, for tasks of pairs")
    parser.add_argument("--bench", action="store_true", help="examples per second of every way of inference, by batch size")
    parser.add_argument("--sweep", action="store_true", help="score, mean layer and speed-up for every q (or patience, or entropy)")
    parser.add_argument("--table", action="store_true", help="Tables 1 to 3 of the paper in Markdown, with all runs under runs/")
    parser.add_argument("--plot", choices=("q", "speedup", "prior", "distribution", "negations"), help="draw a figure over all runs under runs/")
    parser.add_argument("--submit", metavar="FILE.zip", help="write the zip for GLUE's server from the best run of each task")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise InputError(f"--batch-size {args.batch_size}: expected a whole number from 1")
    device = choose_device(args.device)
    if args.table:
        return paper.print_tables()
    if args.plot:
        return paper.plot(args.plot, device, args.data_dir, args.batch_size)
    if args.submit:
        return submit(Path(args.submit), device, args.data_dir, args.batch_size)
    settings, tokenizer, model = load_run(find_run(args.run), device)
    given = {name: getattr(args, name) for name in ("q", "patience", "entropy", "data_dir") if getattr(args, name) is not None}
    settings = dataclasses.replace(settings, **given)
    exit = args.exit or next((name for name in ("q", "patience", "entropy") if name in given), settings.exit)
    if exit not in settings.exits:
        raise InputError(f"--exit {exit}: a run of {settings.method} on {settings.task} exits by {', '.join(settings.exits)}")
    if args.text is not None:
        explain(model, settings, tokenizer, exit, args.text, args.text_b)
    elif args.bench:
        paper.bench(model, settings, tokenizer, exit, args.split)
    elif args.sweep:
        print_sweep(model, settings, tokenizer, exit, args.split, args.batch_size, args.json)
    else:
        report(model, settings, tokenizer, exit, args.split, args.batch_size, args.json)


if __name__ == "__main__":
    run_main(main)
