"""Ask a finished run, or all of them: python eval.py evaluates the newest run on
its dev set, with early exit for real; with one of the first flags it does that."""

import contextlib
import dataclasses
import itertools
import json
import os
import sys
import time
from pathlib import Path

import torch

import paper
from checkpoint import InputError, atomic_write, say
from glue import SUBMISSION, answers, get_task, load, read_inputs, write_submission
from ponder import exit_distribution
from run import (RUNS, THRESHOLDS, Parser, Settings, all_layers, apply_exit, choose_device, device_name,
                 exit_result, find_run, flag, full_depth, load_run, make_rule, make_settings, mean_of,
                 predict_all, read_run, read_splits, run_main, study, timed)

CHUNK = 4096        # rows of --input that are held at a time


# ---- one run, one split ----

def exit_name(settings, criterion):
    """An exit, and its threshold if it has one"""
    threshold = THRESHOLDS.get(criterion)
    return f"{criterion} {getattr(settings, threshold):g}" if threshold else criterion


def report(model, settings, criterion, splits, split, batch_size, as_json):
    """A table of every exit of a run on a split. Scores and layers are those of one pass of full depth. Then
    each exit runs for real and is timed, and the rows are counted that leave elsewhere than that pass says.
    as_json: the exit that is asked about is an object on stdout, and the table is on stderr."""
    L, out = model.num_layers, sys.stderr if as_json else sys.stdout
    inputs = [row for rows, _ in splits.values() for row in rows]
    sizes = [len(rows) for rows, _ in splits.values()]

    def measure(work):
        work(inputs[:batch_size])                                   # every way runs once before it is timed
        return timed(model, lambda: work(inputs))

    whole_seconds, arrays = measure(lambda rows: all_layers(model, rows, batch_size, settings.precision))
    labels = [labels for _, labels in splits.values()]
    # Of each split what exit_result() takes: logits, lam, labels, name.
    parts = [*zip(*(array.split(sizes) for array in arrays), labels, splits)]
    print(f"{settings.task} {split}, {L} layers, batch {batch_size}\n  exit             score  mean layer  "
          "    speed-up  seconds  full depth  faster  rows that differ", file=out)
    for name in settings.exits:
        seconds, (_, layers) = measure(lambda rows: predict_all(model, settings, name, rows, batch_size))
        differ = int((apply_exit(name, settings, *arrays)[1] != layers).sum())
        found = mean_of([exit_result(name, settings, *part) for part in parts])
        print(f"{'>' if name == criterion else ' '} {exit_name(settings, name):<15} {found['score']:>6.1f} "
              f"{found['mean_layer']:>11.2f} {L / found['mean_layer']:>12.2f}x {seconds:>8.2f} "
              f"{whole_seconds:>11.2f} {whole_seconds / seconds:>6.2f}x {differ:>17}", file=out)
        if as_json and name == criterion:
            found["metrics"] = mean_of(list(found["metrics"].values()))   # MNLI's two splits as one
            found["layers"] = [round(share * len(inputs), 2) for share in found.pop("histogram")]
            asked = {"task": settings.task, "split": split, "exit": name, "q": settings.q, "differ": differ}
            print(json.dumps(asked | found | {"seconds": seconds, "seconds_full_depth": whole_seconds}))


def print_sweep(model, settings, criterion, splits, batch_size):
    """Every threshold of an exit from one pass, and what says whether the exit has learned anything"""
    if criterion not in THRESHOLDS:
        others = " or ".join(f"--exit {name}" for name in settings.exits if name in THRESHOLDS)
        raise InputError(f"--sweep: exit {criterion} has no threshold; use {others or 'another run'}")
    found = study(settings, full_depth(model, settings, splits, batch_size))
    print(f"{criterion:>9}  score  mean layer  speed-up  same layers dealt to random rows")
    for row in found["sweep"][criterion]:
        print(f"{row[criterion]:>9g} {row['score']:>6.1f} {row['mean_layer']:>11.2f} {row['speed_up']:>8.2f}x"
              f"{row['dealt']:>34.1f}")
    fixed, oracle = " ".join(f"{score:.1f}" for score in found["by_layer"]), found["oracle"]
    print(f"\nevery fixed layer, from 1 on: {fixed}\n"
          f"the first right layer of each row: {oracle['score']:.1f} at {oracle['mean_layer']:.2f}")


# ---- sentences ----

def criterion_values(criterion, settings, logits, lam):
    """What an exit looks at in one input, logits (1,L,C), lam (1,L) -> its name, and a value for each layer.
    The exit "last" looks at nothing; the entropy stands there."""
    rule = make_rule(criterion, settings, lam.shape[1])
    state = rule.start(1, lam.shape[1], lam.device)
    if criterion == "q":
        return "CDF", exit_distribution(lam)[0].cumsum(0).tolist()
    if criterion == "sample":
        return "u < lambda", state[0][0].tolist()
    if criterion == "learned":
        return "certainty", lam[0].tolist()
    if criterion == "patience":
        agreed = []
        for i in range(lam.shape[1]):
            state, _ = rule.step(state, torch.tensor([i + 1]), lam[:, i], logits[:, i])
            agreed.append(int(state[1]))
        return "agreed", agreed
    return "entropy", torch.special.entr(logits[0].softmax(1)).sum(1).tolist()


def worded(task, outputs, are_logits=True):
    """Outputs (N,C) as [(word, probability)], of regression [(number, None)]"""
    if task.num_labels == 1:
        return [(f"{value:.3f}", None) for value in outputs[:, 0].tolist()]
    best = (outputs.softmax(1) if are_logits else outputs).max(1)
    return [(task.labels[index], p) for p, index in zip(best.values.tolist(), best.indices.tolist())]


def explain(model, settings, tokenizer, criterion, text_a, text_b):
    """One input, layer by layer: lambda and p if there are, what the exit looks at, the prediction"""
    task, L = get_task(settings.task), model.num_layers
    if task.pair != (text_b is not None):
        wanted = "two texts, --text and --text-b" if task.pair else "one text, --text alone"
        raise InputError(f"--text-b: {task.name} takes {wanted}")
    if criterion == "expectation":
        raise InputError("--exit expectation: it reads every layer, so no exit explains it; use another")
    ids, segments = tokenizer.encode(text_a, text_b, settings.max_length)
    logits, lam = all_layers(model, [(ids, segments)], precision=settings.precision)
    p, layer = exit_distribution(lam)[0], int(apply_exit(criterion, settings, logits, lam)[1])
    name, values = criterion_values(criterion, settings, logits, lam)
    predictions = [word if share is None else f"{word} ({share:.0%})"
                   for word, share in worded(task, logits[0])]
    ponders = "q" in settings.exits                                 # else there is no p, and lambda is 0
    print(f"{' '.join(tokenizer.tokens(ids))}\n"
          f"{predictions[layer - 1]} at layer {layer} of {L}, by exit {exit_name(settings, criterion)}\n")
    print(f"layer  {' lambda      p' if ponders else ''} {name:>10}  prediction")
    for i, value in enumerate(values):
        method = f"{lam[0, i]:>7.3f} {p[i]:>6.3f}" if ponders else ""
        print(f"{i + 1:>5}  {method} {value:>10.3f}  {predictions[i]}{'  <- exit' if i + 1 == layer else ''}")


def answer_file(model, settings, tokenizer, criterion, path, output, batch_size):
    """Label, probability and exit layer of each row of a file, in its order, CHUNK rows at a time"""
    task, started, done = get_task(settings.task), time.time(), 0
    if output is not None and os.path.exists(output) and os.path.samefile(path, output):
        raise InputError(f"--output {output}: it is the file of --input; give another")
    total = sum(1 for _ in read_inputs(path, settings.task))        # a bad row ends it before any work
    rows = read_inputs(path, settings.task)
    target = contextlib.nullcontext(sys.stdout.buffer) if output is None else atomic_write(Path(output))
    with target as file:
        file.write(b"value\tlayer\n" if task.num_labels == 1 else b"label\tprobability\tlayer\n")
        while chunk := list(itertools.islice(rows, CHUNK)):
            inputs = tokenizer.encode_all(chunk, settings.max_length)
            drawn = dataclasses.replace(settings, seed=settings.seed + done)    # sampling draws anew
            outputs, layers = predict_all(model, drawn, criterion, inputs, batch_size)
            for (word, p), layer in zip(worded(task, outputs, criterion != "expectation"), layers.tolist()):
                file.write((f"{word}\t{layer}\n" if p is None else f"{word}\t{p:.4f}\t{layer}\n").encode())
            done += len(chunk)
            pace = (time.time() - started) / done
            say(f"{done} of {total} rows, {1 / pace:.0f} a second, {pace * (total - done):.0f} s to go")
        file.flush()


# ---- all runs: a submission ----

def submit(path, root, method, model, device, batch_size, changed):
    """The zip for GLUE's server of one system, with one model: the best seed on dev of each task. MNLI's run
    predicts AX, too. All files are read, and the zip's place is tried, before anything is predicted."""
    best, predictions = {}, {}
    for (task, name), members in paper.main_cells(paper.cells(root)).items():
        if method in members and any(task == other for other, _ in SUBMISSION):
            best.setdefault(name, {})[task] = max(members[method], key=lambda run: run.score)
    name = Path(model or (list(best)[0] if len(best) == 1 else "albert-base-v2")).name
    if name not in best:
        raise InputError(f"--submit: expected finished GLUE runs of {method} with {name} in {root}/, found "
                         f"models: {', '.join(best) or 'none'}; train them, or give --method and --model")
    runs = best[name]
    if "mnli" in runs:
        runs["ax"] = runs["mnli"]
    chosen = {key: dataclasses.replace(runs[key[0]].settings, **changed)
              for key in SUBMISSION if key[0] in runs}
    files = {key: load(*key, settings.data_dir) for key, settings in chosen.items()}
    with atomic_write(Path(path)) as file:
        for key, settings in chosen.items():
            run = runs[key[0]]
            say(f"{' '.join(key)}: {run.folder}, dev {run.score:.1f} by {settings.exit}")
            _, tokenizer, model = load_run(run.folder, device)
            inputs = tokenizer.encode_all(files[key], settings.max_length)
            predictions[key] = answers(predict_all(model, settings, settings.exit, inputs, batch_size)[0])
        missing = ", ".join(write_submission(file, predictions)) or "none"
    print(f"{path}: {len(predictions)} files; not in it, for want of a run: {missing}")


# ---- the command ----

ONE, MODEL = "report text input bench sweep", "report text input bench sweep plot submit"
FLAGS = {       # flag: what it takes, the uses of the command that read it, what it means
    "text": (str, "text", "explain one input"),
    "input": (str, "input", "answer a file; its header has sentence, or sentence1 and sentence2"),
    "sweep": (None, "sweep", "each threshold, every fixed layer, and what choosing rows is worth"),
    "bench": (None, "bench", "rows a second by every way, in float32 and bf16, and a layer's FLOP/s"),
    "table": (None, "table", "Tables 1 to 3 and every system that was run, in Markdown"),
    "plot": (paper.FIGURES, "plot", "Fig. 2, 3, 4, 5, or parity's"),
    "submit": (str, "submit", "write the zip for GLUE's server, of one system"),
    "run": (str, ONE, "name or folder of the run [the newest]"),
    "exit": (str, ONE, "the exit that is asked about [the run's own, or that of a given threshold]"),
    "q": (float, "report text input bench", "threshold of Q-exit [the run's]"),
    "patience": (int, "report text input bench", "PABEE's t, layers in a row that agree [the run's]"),
    "entropy": (float, "report text input bench", "threshold of entropy exit in nats [the run's]"),
    "certainty": (float, "report text input bench", "threshold of BERxiT's exit [the run's]"),
    "split": (str, "report bench sweep", "dev, test or train [dev]"),
    "json": (None, "report", "one JSON object on stdout, all else on stderr"),
    "text_b": (str, "text", "the second text, for tasks of pairs"),
    "output": (str, "input", "the file of the answers [stdout]"),
    "runs": (str, "table plot submit", "the folder of all runs, or of their run.json files [runs]"),
    "out": (str, "plot", "the figure's file [RUNS/FIGURE.png]"),
    "method": (str, "submit", "whose main system is submitted [palbert]"),
    "model": (str, "submit", "with which model [albert-base-v2, or the only one]"),
    "batch_size": (int, "report input sweep plot submit", "rows computed together [32, on CUDA 256]"),
    "device": (str, MODEL, "cuda, cuda:N, mps or cpu [the first that is there]"),
    "precision": (str, MODEL, "float32 or bf16 [the run's]"),
    "data_dir": (str, "report bench sweep plot submit", "folder with the GLUE files [the run's]"),
}


def parse_flags(argv):
    """Returns the use of the command, and {flag: value} of those given. InputError for a flag that this use
    does not read and for a value out of its range, before anything is looked for."""
    parser = Parser("eval.py", __doc__)
    for name, (kind, _, meaning) in FLAGS.items():
        more = {"choices": kind} if kind == paper.FIGURES else {"type": kind, "metavar": "X"}
        if kind is None:
            more = {"action": "store_true"}
        parser.add_argument(flag(name), help=meaning, **more)
    given = vars(parser.parse_args(argv))
    use = next((name for name in FLAGS if name in given and FLAGS[name][1] == name), "report")
    for name in given:
        uses = FLAGS[name][1].split()
        if use not in uses:
            others = " or ".join(map(flag, uses))
            where = f"beside {flag(use)}" if use != "report" else f"alone; give it with {others}"
            raise InputError(f"{flag(name)} does nothing {where}")
    names = {field.name for field in dataclasses.fields(Settings)}
    make_settings(**{name: value for name, value in given.items() if name in names})
    return use, given


def main(argv=None):
    use, given = parse_flags(argv)
    device, root = choose_device(given.get("device")), Path(given.get("runs", RUNS))
    batch_size = given.get("batch_size", 256 if device.type == "cuda" else 32)
    changed = {name: given[name] for name in (*THRESHOLDS.values(), "data_dir", "precision") if name in given}
    if "runs" in given and not root.is_dir():
        raise InputError(f"--runs {root}: expected a folder of runs, or of their run.json files, found none")
    if use == "table":
        return paper.print_tables(root)
    if use == "plot":
        return paper.plot(given["plot"], root, given.get("out"), device, batch_size, changed)
    if use == "submit":
        method, model = given.get("method", "palbert"), given.get("model")
        return submit(given["submit"], root, method, model, device, batch_size, changed)
    folder, split, as_json = find_run(given.get("run")), given.get("split", "dev"), "json" in given
    settings, tokenizer, model = load_run(folder, device)
    settings, values = dataclasses.replace(settings, **changed), read_run(folder)[1]
    thresholds = [name for name in THRESHOLDS if THRESHOLDS[name] in given]
    criterion = given.get("exit", thresholds[0] if thresholds else settings.exit)
    for name in [criterion, *thresholds]:
        if name not in settings.exits:
            raise InputError(f"--exit {name}: a run of {settings.method} on {settings.task} exits by "
                             f"{', '.join(settings.exits)}")
        if name != criterion and use != "report":
            raise InputError(f"{flag(THRESHOLDS[name])} does nothing with --exit {criterion}")
    epoch = f"epoch {values['best_epoch']}" if values.get("finished") else "UNFINISHED, its best epoch so far"
    print(f"{folder}, {epoch}, on {device_name(device)}",
          file=sys.stderr if as_json or use == "input" else sys.stdout)
    asked = (model, settings, tokenizer, criterion)
    if use == "text":
        return explain(*asked, given["text"], given.get("text_b"))
    if use == "input":
        return answer_file(*asked, given["input"], given.get("output"), batch_size)
    if use == "bench":
        return paper.bench(*asked, split)
    splits = read_splits(settings, tokenizer, split)
    if any(labels[0] is None for _, labels in splits.values()):
        raise InputError(f"--split {split}: {settings.task} has no labels there; use --split dev")
    if use == "sweep":
        return print_sweep(model, settings, criterion, splits, batch_size)
    report(model, settings, criterion, splits, split, batch_size, as_json)


if __name__ == "__main__":
    run_main(main)
