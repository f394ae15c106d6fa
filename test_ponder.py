"""What this project claims, shown: python -m pytest test_ponder.py (a CPU, no download, under five minutes).

First the method and the commands, then encoders, text and scores, files and downloads. Oracles: plain loops,
float64, transformers, SciPy, scikit-learn, a checkpoint that TensorFlow wrote.
"""

import contextlib
import copy
import dataclasses
import errno
import functools
import gc
import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import unicodedata
import warnings
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import scipy.stats
import torch
import torch.nn.functional as F
import transformers
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from safetensors.torch import save_file

import albert
import bert
import checkpoint
import eval as evaluation
import fast
import glue
import ponder
import paper
import run as run_module
import text as text_module
import train
from albert import Albert, AlbertConfig
from checkpoint import InputError, assign, read_safetensors
from ponder import (EntropyExit, FixedExit, LambdaHead, LearnedExit, PatienceExit, Ponder, QExit,
                    SampleExit, berxit_loss, elbo_loss, exit_distribution, exit_layers, expected_prediction,
                    geometric_prior, kl_divergence, layer_losses, layer_weighted_loss)
from bert import Bert, BertConfig, Roberta, RobertaConfig
from fast import pad
from testdata.make_tf_checkpoint import CONFIG as TF_CONFIG, values as tf_values


HERE = Path(ponder.__file__).parent
settings.register_profile("house", deadline=None)       # a busy machine is no failure
settings.load_profile("house")


# ==== ponder.py: the method, against plain loops in float64 ====

def plain_distribution(lam):
    """p(i|x) of one row, a list of floats, with the last lambda counted as 1"""
    p, reach = [], 1.0
    for value in [*lam[:-1], 1.0]:
        p.append(reach * value)
        reach *= 1 - value
    return p


def plain_loss(z, label):
    if len(z) == 1:
        return (z[0] - label) ** 2
    return max(z) + math.log(sum(math.exp(value - max(z)) for value in z)) - z[label]


def plain_elbo(logits, lam, labels, prior, beta, cut):
    """Eq. 1 row by row and layer by layer, in Python floats -> loss, task, kl"""
    task = kl = 0.0
    for row_logits, row_lam, label in zip(logits, lam, labels):
        p, total, j = plain_distribution(row_lam), 0.0, 0
        while j < len(p) - 1 and total + p[j] < 1 - cut:    # to the lowest j where p has summed to 1 - cut
            total += p[j]
            j += 1
        for i, weight in enumerate(p[:j] + [1 - sum(p[:j])]):
            expected = sum(prior[j:]) if i == j else prior[i]       # the prior of a model of j layers
            task += weight * plain_loss(row_logits[i], label) / len(lam)
            kl += weight * math.log(weight / expected) / len(lam) if weight > 0 else 0
    return task + beta * kl, task, kl


def plain_pabee(logits, lam, labels):
    L = len(logits[0])
    losses = [(i + 1) * plain_loss(row[i], label) for row, label in zip(logits, labels) for i in range(L)]
    return [sum(losses) / len(logits) / (L * (L + 1) / 2)] * 2


def plain_berxit(logits, lam, labels):
    task = certainty = 0.0
    for row_logits, row_lam, label in zip(logits, lam, labels):
        for z, value in zip(row_logits, row_lam):
            right = 1 - math.tanh(abs(label - z[0])) if len(z) == 1 else float(z.index(max(z)) == label)
            task += plain_loss(z, label) / len(logits)
            certainty += (value - right) ** 2 / len(logits)
    return task + certainty, task, certainty


unit = st.floats(0.001, 0.999)


@st.composite
def arrays(draw, classes=st.integers(1, 4)):
    """logits (B,L,C), lam (B,L), labels (B,) in float64"""
    B, L, C = draw(st.integers(1, 6)), draw(st.integers(1, 9)), draw(classes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    randn = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    logits, lam = 3 * randn(B, L, C), (draw(st.floats(0.1, 4)) * randn(B, L) - 1).sigmoid()
    return logits, lam, randn(B) if C == 1 else torch.randint(C, (B,), generator=generator)


def elbo(lam, C=2, prior=0.1, beta=0.5, cut=0.05, logits=None):
    """elbo_loss of these lambdas, (B,L) or nested lists; all layers are equal unless logits are given"""
    lam = torch.as_tensor(lam)
    logits = torch.zeros(*lam.shape, C) if logits is None else logits
    labels = torch.arange(len(lam)) % C
    return elbo_loss(logits, lam, labels, geometric_prior(prior, lam.shape[1]).to(lam.dtype), beta, cut)


@given(arrays())
def test_exit_distribution_is_the_plain_product_and_sums_to_one(data):
    p = exit_distribution(data[1])
    plain = torch.tensor([plain_distribution(row) for row in data[1].tolist()], dtype=torch.float64)
    assert torch.allclose(p, plain, atol=1e-14) and (p.sum(1) - 1).abs().max() < 1e-14


def test_exit_distribution_is_closed_at_lambda_zero_and_one():
    assert exit_distribution(torch.tensor([[0.0] * 4, [1.0] * 4])).tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]


@given(unit, st.integers(1, 30))
def test_prior_is_scipys_geometric_with_its_tail_folded_into_the_last_layer(lam, L):
    prior = geometric_prior(lam, L)
    want = [scipy.stats.geom.pmf(i, lam) for i in range(1, L)] + [scipy.stats.geom.sf(L - 1, lam)]
    assert np.allclose(prior, want, atol=1e-6) and abs(prior.sum().item() - 1) < 1e-6


def test_prior_of_the_paper_expects_layer_7_176_of_12():
    assert abs((geometric_prior(0.1, 12) * torch.arange(1, 13)).sum().item() - 7.176) < 1e-3


@pytest.mark.parametrize("lam", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_prior_refuses_a_lambda_outside_0_1(lam):
    with pytest.raises(ValueError, match="must lie in"):
        geometric_prior(lam, 12)


@given(arrays(), unit)
def test_kl_is_scipys_and_points_from_posterior_to_prior(data, lam_p):
    p, prior = exit_distribution(data[1]), geometric_prior(lam_p, data[1].shape[1]).double()
    want = [scipy.stats.entropy(row, prior) for row in p.numpy()]
    assert np.allclose(kl_divergence(p, prior), want, atol=1e-6)


def test_kl_takes_zero_times_log_zero_as_zero_also_in_the_gradient():
    p = torch.tensor([[0.0, 1.0]], requires_grad=True)
    kl = kl_divergence(p, torch.tensor([0.5, 0.5]))
    kl.sum().backward()
    assert abs(kl.item() - math.log(2)) < 1e-6 and p.grad.isfinite().all()


@pytest.mark.parametrize("loss, plain", [(elbo_loss, plain_elbo), (layer_weighted_loss, plain_pabee),
                                         (berxit_loss, plain_berxit)])
@given(st.data())
def test_every_loss_equals_a_plain_loop_over_rows_and_layers(loss, plain, data):
    logits, lam, labels = data.draw(arrays())
    more = ()
    if loss is elbo_loss:                                   # a cut of 0 truncates nothing
        prior = geometric_prior(data.draw(unit), lam.shape[1]).double()
        more = prior, data.draw(st.floats(0, 3)), data.draw(st.sampled_from([0.05, 0.3, 0.0]))
    found, parts = loss(logits, labels) if loss is layer_weighted_loss else loss(logits, lam, labels, *more)
    wanted = plain(*(x.tolist() for x in (logits, lam, labels, *more[:1])), *more[1:])
    found = [value.item() for value in (found, *parts.values())][:3]
    assert np.allclose(found, wanted, rtol=1e-9, atol=1e-9)


@given(arrays())
def test_berxits_certainty_sends_no_gradient_to_the_logits_through_its_target(data):
    logits, lam, labels = data[0].requires_grad_(), data[1].requires_grad_(), data[2]
    berxit_loss(logits, lam, labels)[0].backward()
    want, = torch.autograd.grad(layer_losses(logits, labels).sum(1).mean(), logits)
    torch.testing.assert_close(logits.grad, want)
    assert lam.grad.abs().min() > 0


@given(arrays(), unit)
def test_elbo_in_float32_is_that_of_float64_to_rounding(data, lam_p):
    narrow = [x.float() if x.is_floating_point() else x for x in data]
    narrow[1] = narrow[1].clamp(1e-6, 1 - 1e-6)
    wide = [x.double() if x.is_floating_point() else x for x in narrow]
    cdf = exit_distribution(wide[1]).cumsum(1)[:, :-1]
    assume(((cdf - 0.95).abs() > 1e-5).all())               # nearer, rounding may cut one layer off
    prior = geometric_prior(lam_p, cdf.shape[1] + 1)
    want = elbo_loss(*wide, prior.double(), 0.5)[0].item()
    assert abs(elbo_loss(*narrow, prior, 0.5)[0].item() - want) < 2e-4 * max(1, abs(want))


@pytest.mark.parametrize("C", [1, 3])
def test_elbo_gradients_are_those_of_finite_differences(C):
    torch.manual_seed(0)
    lam = (torch.rand(4, 6, dtype=torch.float64) * 0.3 + 0.05).requires_grad_()
    logits = torch.randn(4, 6, C, dtype=torch.float64, requires_grad=True)
    assert ((exit_distribution(lam).cumsum(1)[:, :-1] - 0.95).abs() > 0.001).all()      # none crosses the cut
    assert torch.autograd.gradcheck(lambda z, l: elbo(l, C, logits=z)[0], (logits, lam))


@pytest.mark.parametrize("C", [1, 2])
@pytest.mark.parametrize("size", [0.0, 1e4, -1e4])
def test_elbo_and_its_gradient_are_finite_at_lambda_zero_and_one_and_huge_logits(C, size):
    lam = torch.tensor([[0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 0.5]]).requires_grad_()
    logits = (torch.ones(4, 3, C) * size * torch.tensor([1.0, -1.0][:C])).requires_grad_()
    loss, parts = elbo(lam, C, logits=logits)
    loss.backward()
    assert all(value.isfinite().all() for value in (loss, lam.grad, logits.grad, *parts.values()))


def test_elbo_weights_each_row_by_its_own_p_before_any_mean():
    logits = torch.tensor([[[9.0, -9.0], [-9.0, 9.0]], [[9.0, -9.0], [-9.0, 9.0]]])
    assert elbo([[0.9, 0.9], [0.1, 0.9]], beta=0, logits=logits)[0] < 0.11 * 18     # where each row is right
    assert elbo([[0.1, 0.9], [0.9, 0.9]], beta=0, logits=logits)[0] > 0.89 * 18


CUT_AT_2 = [[0.5, 0.95, 0.3, 0.2]]                          # sums to 0.5, 0.975


@pytest.mark.parametrize("cut", [0.05, 0.0])
def test_the_truncated_distribution_stays_closed_so_that_no_mass_can_be_thrown_away(cut):
    assert abs(elbo(CUT_AT_2, cut=cut)[1]["task"].item() - math.log(2)) < 1e-6      # ln 2 for any closed p


@pytest.mark.parametrize("cut, learning", [(0.05, 1), (0.0, 3)])
def test_lambda_from_the_cut_on_gets_no_gradient_and_before_it_does(cut, learning):
    lam = torch.tensor(CUT_AT_2, requires_grad=True)
    elbo(lam, logits=torch.randn(1, 4, 2, generator=torch.Generator().manual_seed(0)), cut=cut)[0].backward()
    assert (lam.grad[0] != 0).tolist() == [i < learning for i in range(4)]


def test_the_share_of_rows_cut_at_layer_1_is_reported():
    assert elbo([[0.951, 0.1, 0.1], [0.949, 0.1, 0.1]])[1]["cut_at_1"] == 0.5


@pytest.mark.parametrize("cut", [0.05, 0.0])
@pytest.mark.parametrize("lam_p", [0.05, 0.1, 0.2, 0.25, 0.3, 0.5, 0.7, 0.8, 0.9])
def test_at_lambda_equal_to_the_prior_p_is_the_prior_and_kl_and_its_gradient_are_0(lam_p, cut):
    for L in range(2, 49):
        lam = torch.full((3, L), lam_p, requires_grad=True)
        loss, parts = elbo(lam, prior=lam_p, beta=1, cut=cut)
        loss.backward()
        assert torch.allclose(exit_distribution(lam), geometric_prior(lam_p, L).expand(3, L), atol=1e-7)
        assert abs(parts["kl"].item()) < 1e-6 and lam.grad.abs().max() < 1e-6


@pytest.mark.parametrize("cut", [0.05, 0.0])
@pytest.mark.parametrize("lam_p, layer", [(0.125, 6), (0.25, 3), (0.5, 2), (0.75, 1)])
def test_ten_steps_of_adam_from_the_prior_move_no_exit_where_all_layers_are_equal(lam_p, layer, cut):
    lam_logit = torch.full((4, 12), lam_p, dtype=torch.float64).logit().requires_grad_()
    optimizer = torch.optim.Adam([lam_logit], lr=0.1, eps=1e-4)     # above float32's rounding of the prior
    for step in range(11):
        lam = lam_logit.sigmoid()
        assert exit_layers(QExit(0.52), torch.zeros(4, 12, 2), lam).tolist() == [layer] * 4, step
        optimizer.zero_grad()
        elbo(lam, prior=lam_p, cut=cut)[0].backward()
        optimizer.step()


@given(arrays())
def test_expected_prediction_is_the_weighted_sum_of_probabilities_or_values(data):
    logits, p = data[0], exit_distribution(data[1])
    values = logits.numpy() if logits.shape[2] == 1 else scipy.special.softmax(logits.numpy(), axis=2)
    want = [sum(weight * value for weight, value in zip(*row)) for row in zip(p.tolist(), values)]
    assert np.allclose(expected_prediction(logits, p), want, atol=1e-12)


# ---- exit rules, each against a plain version of one row ----

def plain_exit(name, logits, lam, argument):
    """The rule as published, row by row at batch 1, on lists of floats"""
    cdf, agreed, before = 0.0, 0, None
    for i, (z, weight) in enumerate(zip(logits, plain_distribution(lam))):
        cdf = min(1, cdf + weight)
        now = z[0] if len(z) == 1 else z.index(max(z))
        same = before is not None and (abs(now - before) < 0.5 if len(z) == 1 else now == before)
        agreed, before = (agreed + 1 if same else 0), now
        stop = ((name == "q" and cdf > argument) or (name == "sample" and argument[i] < lam[i])
                or (name == "patience" and agreed == argument) or (name == "learned" and lam[i] > argument)
                or (name == "entropy" and scipy.stats.entropy(scipy.special.softmax(z)) < argument)
                or (name == "fixed" and i + 1 == argument))
        if stop:
            return i + 1
    return len(logits)


ARGUMENTS = {"q": st.floats(0.01, 1), "sample": st.integers(0, 1000), "patience": st.integers(1, 8),
             "entropy": st.floats(0.01, 1.4), "learned": unit, "fixed": st.integers(1, 12)}


def make_rule(name, argument):
    if name == "sample":
        return SampleExit(torch.Generator().manual_seed(argument))
    if name == "patience":
        return PatienceExit(argument, 0.5)
    return {"q": QExit, "entropy": EntropyExit, "learned": LearnedExit, "fixed": FixedExit}[name](argument)


@pytest.mark.parametrize("name", ARGUMENTS)
@given(st.data())
def test_every_rule_stops_where_its_plain_loop_at_batch_1_does(name, data):
    logits, lam, _ = data.draw(arrays(st.integers(2, 4)) if name == "entropy" else arrays())
    argument = data.draw(ARGUMENTS[name])
    arguments = [argument] * len(lam)
    if name == "sample":
        arguments = torch.rand(lam.shape, generator=torch.Generator().manual_seed(argument)).tolist()
    want = [plain_exit(name, *row) for row in zip(logits.tolist(), lam.tolist(), arguments)]
    assert exit_layers(make_rule(name, argument), logits, lam).tolist() == want


@pytest.mark.parametrize("lam, q, layer", [(0.5, 0.5, 2), (0.1, 0.5, 7), (0.1, 0.1, 2), (0.0, 0.5, 12),
                                           (0.9, 1.0, 12), (1.0, 1.0, 12), (1.0, 0.99, 1)])
def test_q_exit_needs_the_cdf_above_q_and_not_equal(lam, q, layer):
    assert exit_layers(QExit(q), torch.zeros(3, 12, 2), torch.full((3, 12), lam)).tolist() == [layer] * 3


def test_sampled_exits_are_distributed_as_p():
    lam, n = torch.tensor([0.1, 0.3, 0.05, 0.5, 0.2]), 50_000
    layers = exit_layers(SampleExit(torch.Generator().manual_seed(1)), torch.zeros(n, 5, 2), lam.expand(n, 5))
    counts = torch.bincount(layers, minlength=6)[1:]
    assert scipy.stats.chisquare(counts, np.array(plain_distribution(lam.tolist())) * n).pvalue > 0.01


@pytest.mark.parametrize("kind, argument", [(QExit, 0), (QExit, 1.01), (QExit, math.nan), (PatienceExit, 0)])
def test_rules_refuse_arguments_outside_their_range(kind, argument):
    with pytest.raises(ValueError, match="must (lie in|be at least)"):
        kind(argument)


@pytest.mark.parametrize("rule, needs", [(EntropyExit(0.5), "classes"), (PatienceExit(2), "a tolerance")])
def test_rules_that_need_classes_or_a_tolerance_say_so_on_regression(rule, needs):
    with pytest.raises(ValueError, match=f"needs {needs}"):
        exit_layers(rule, torch.zeros(2, 4, 1), torch.zeros(2, 4))


# ---- the model and inference that stops ----

ENCODERS = {AlbertConfig: (Albert, albert, transformers.AlbertConfig, transformers.AlbertModel),
            BertConfig: (Bert, bert, transformers.BertConfig, transformers.BertModel),
            RobertaConfig: (Roberta, bert, transformers.RobertaConfig, transformers.RobertaModel)}
SHAPE = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 6, "num_attention_heads": 3,
         "intermediate_size": 40, "max_position_embeddings": 66, "initializer_range": 0.2}
ALBERT_CONFIG, BERT_CONFIG = AlbertConfig(embedding_size=12, **SHAPE), BertConfig(**SHAPE)
ROBERTA_CONFIG = RobertaConfig(**SHAPE)
KINDS = {"albert": {}, "regression": {"labels": 1}, "bert": {"config": BERT_CONFIG},
         "roberta": {"config": ROBERTA_CONFIG},
         "pabee": {"lambda_layers": 0, "per_layer": True, "seed": 4},
         "berxit": {"lambda_layers": 1, "per_layer": True}}
RULES = [("q", 0.1), ("q", 0.5), ("q", 0.9), ("q", 1), ("sample", 5), ("patience", 2), ("entropy", 0.5),
         ("learned", 0.6), ("fixed", 4)]
TELLING = [("albert", ("q", 0.5)), ("bert", ("q", 0.9)), ("roberta", ("patience", 2)),
           ("regression", ("sample", 5)), ("pabee", ("entropy", 0.5)), ("berxit", ("learned", 0.6))]
WITHOUT = {"regression": ["entropy"], "pabee": ["q", "sample", "learned"]}
KINDS_AND_RULES = [(kind, rule) for kind in KINDS for rule in RULES if rule[0] not in WITHOUT.get(kind, [])]
WAYS = {"predict": {}, "decided first": {"first_tokens": 1}, "layer whole": {},
        "small pools": {"pool_tokens": 300}, "depth-wise": {"depthwise": True}}


def make(labels=3, config=ALBERT_CONFIG, seed=0, **keywords):
    """A small Ponder whose lambdas and logits differ from row to row, so that rows stop at every layer"""
    torch.manual_seed(seed)
    model = Ponder(ENCODERS[type(config)][0](config), labels, **keywords).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.startswith("encoder."):
                parameter.normal_(std=1.0)
        if model.lambda_head:
            model.lambda_head.last.bias.fill_(-1.0)
    return model


def rows(n, config=ALBERT_CONFIG):
    """A list of (ids, segments) of 2 to 30 tokens"""
    draw, inputs = random.Random(0), []
    for T in [draw.randint(2, 30) for _ in range(n)]:
        segments = [int(t > T // 2) % config.type_vocab_size for t in range(T)]
        inputs.append(([draw.randint(5, 59) for _ in range(T)], segments))
    return inputs


@torch.no_grad()
def run_full(model, inputs, T=None):
    return model(*pad(inputs, model.encoder, "cpu", T))


@functools.lru_cache(maxsize=None)
def case(kind, rule, n=64):
    """-> a model, its inputs, and by the rule on forward the logits (n,C) at the exits and the layers (n,)"""
    model = make(**KINDS[kind])
    inputs = rows(n, model.encoder.config)
    logits, lam = run_full(model, inputs)
    layers = exit_layers(make_rule(*rule), logits, lam)
    return model, inputs, (logits[torch.arange(n), layers - 1], layers)


def answer(way, model, inputs, rule, n, first_tokens=10**9, pool_tokens=24576, depthwise=False):
    """The answers by a way, in batches of n rows; predict has one batch, with up to n tokens of padding"""
    if way == "predict":
        return model.predict(*pad(inputs, model.encoder, "cpu", min(30 + n, 64)), rule)
    with mock.patch.multiple(fast, FIRST_TOKENS=first_tokens, POOL_TOKENS=pool_tokens):
        return model.predict_many(inputs, rule, n, depthwise)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind, rule", KINDS_AND_RULES)
def test_every_way_to_predict_equals_the_rule_on_forward_at_any_batch_size_and_padding(kind, rule, way):
    model, inputs, (logits, layers) = case(kind, rule)
    for n in (1, 7, 32, 100) if model.encoder.shared or way != "depth-wise" else ():
        found, found_layers = answer(way, model, inputs, make_rule(*rule), n, **WAYS[way])
        assert found_layers.tolist() == layers.tolist()
        torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind, rule", TELLING)
def test_the_rows_of_these_tests_stop_at_many_layers(kind, rule):
    assert len(case(kind, rule)[2][1].unique()) >= 4


class Scripted:
    """Row n stops at layer n % 6 + 1; another rule is asked as well."""

    def __init__(self, rule):
        self.rule, self.started = rule, []

    def start(self, B, L, device):
        self.started.append((B, L))
        return torch.arange(B, device=device) % 6 + 1, *self.rule.start(B, L, device)

    def step(self, state, i, lam, logits):
        return (state[0], *self.rule.step(state[1:], i, lam, logits)[0]), i == state[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_starts_once_with_rows_in_the_callers_order_and_state_travels_with_its_row(rule, way):
    scripted = Scripted(make_rule(*rule))
    layers = answer(way, make(), rows(50), scripted, 8, **WAYS[way])[1]
    assert scripted.started == [(50, 6)] and layers.tolist() == [n % 6 + 1 for n in range(50)]


class Counting(Albert):
    """An ALBERT that counts the rows by call and layer"""

    def __init__(self, encoder):
        super().__init__(encoder.config)
        self.load_state_dict(encoder.state_dict())
        self.calls = []

    def layer(self, i, h, mask):
        self.calls.append(("layer", i, len(h)))
        return super().layer(i, h, mask)

    def first(self, i, h, mask):
        self.calls.append(("first", i, len(h)))
        return super().first(i, h, mask)

    def finish(self, i, h, mask, cls):
        self.calls.append(("finish", i, len(h)))
        return super().finish(i, h, mask, cls)

    def rows(self, call):
        return [sum(n for name, j, n in self.calls if (name, j) == (call, i)) for i in range(1, 7)]


@pytest.mark.parametrize("way", ["predict", "decided first", "layer whole", "small pools"])
def test_no_layer_is_computed_for_a_row_that_has_stopped(way):
    model, inputs, (_, layers) = case("albert", ("q", 0.5))
    reach, none = [int((layers >= i).sum()) for i in range(1, 7)], [0] * 6
    wanted = {"predict": [reach, none, none], "decided first": [none, reach, reach[1:] + [0]]}
    model = copy.deepcopy(model)
    model.encoder = Counting(model.encoder)
    answer(way, model, inputs, QExit(0.5), 64, **WAYS[way])
    found = [model.encoder.rows(call) for call in ("layer", "first", "finish")]
    assert found == wanted.get(way, [reach[:5] + [0], [0] * 5 + reach[5:], none])


def test_depthwise_keeps_the_batch_full_until_the_queue_is_empty():
    model = make()
    model.encoder = Counting(model.encoder)
    layers = model.predict_many(rows(300), QExit(0.5), 16, depthwise=True)[1]
    sizes = [n for _, _, n in model.encoder.calls]
    full = sizes.count(16)
    assert set(sizes) <= {16, 8, 4, 2, 1} and sizes == sorted(sizes, reverse=True)
    assert 300 * 16 > 16 * full > int(layers.sum()) - 16 * 6 and len(sizes) - full <= 6


@given(st.lists(st.integers(1, 8) | st.integers(1, 600) | st.integers(900, 1200), min_size=1, max_size=60),
       st.integers(1, 40), st.sampled_from(["cpu", "cuda"]))
def test_chunks_cover_the_rows_keep_their_bounds_and_are_as_few_as_those_allow(lengths, batch_size, kind):
    def fits(start, end):
        n = end - start
        return n == 1 or (n <= batch_size and (kind == "cuda" or n * lengths[start] <= fast.CHUNK_TOKENS))

    lengths, fewest = sorted(lengths, reverse=True), [0]
    for end in range(1, len(lengths) + 1):
        fewest.append(1 + min(fewest[start] for start in range(end) if fits(start, end)))
    found = list(fast.chunks(lengths, batch_size, torch.device(kind)))
    assert [n for c, _ in found for n in range(c.start, c.stop)] == list(range(len(lengths)))
    assert all(fits(c.start, c.stop) and T == max(lengths[c]) for c, T in found)
    assert len(found) == fewest[-1]


@pytest.mark.parametrize("depthwise", [False, True])
def test_predict_many_of_nothing_is_nothing(depthwise):
    assert [x.shape for x in make().predict_many([], QExit(0.5), depthwise=depthwise)] == [(0, 3), (0,)]


def test_other_depths_and_depthwise_need_shared_layers():
    assert run_full(make(num_layers=9), rows(2))[1].shape == (2, 9)
    for config, num_layers in ((ROBERTA_CONFIG, 4), (ALBERT_CONFIG, 0), (ROBERTA_CONFIG, None)):
        with pytest.raises(ValueError, match="share their weights"):
            make(3, config, num_layers=num_layers).predict_many(rows(4, config), QExit(0.5), depthwise=True)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_heads_read_the_pooled_state_and_lambda_the_one_before_too_undropped_and_zeros_before_layer_1(kind):
    model, batch = make(**KINDS[kind]), rows(5, KINDS[kind].get("config", ALBERT_CONFIG))
    (logits, lam), before = run_full(model, batch), torch.zeros(5, 24)
    for i, h in enumerate(all_states(model.encoder, *pad(batch, model.encoder, "cpu"))[1:]):
        pooled = model.encoder.pool(h)
        classifier = model.classifier[i] if "per_layer" in KINDS[kind] else model.classifier
        assert torch.allclose(logits[:, i], classifier(pooled), atol=1e-5)
        if model.lambda_head is None:                       # then p sits on the last layer
            assert kind == "pabee" and (lam == 0).all() and (exit_distribution(lam)[:, -1] == 1).all()
            continue
        x, before = torch.cat([pooled, before], 1), pooled
        for linear in model.lambda_head.hidden:
            x = (x @ linear.weight.T + linear.bias).tanh()
        want = (x @ model.lambda_head.last.weight.T + model.lambda_head.last.bias)[:, 0].sigmoid()
        assert torch.allclose(lam[:, i], want, atol=1e-5)


@pytest.mark.parametrize("layers, concat, parameters", [(3, True, 3 * (48 * 48 + 48) + 49), (1, True, 49),
                                                        (3, False, 3 * (24 * 24 + 24) + 25), (1, False, 25)])
def test_lambda_head_has_the_published_sizes(layers, concat, parameters):
    assert sum(p.numel() for p in LambdaHead(24, layers, concat).parameters()) == parameters


def at_the_start(C=3):
    """An untrained model and its loss on 64 rows -> model, lam, loss, parts"""
    torch.manual_seed(0)
    model = Ponder(Albert(ALBERT_CONFIG), C, prior=0.1)
    logits, lam = model(*pad(rows(64), model.encoder, "cpu"))
    return model, lam, *elbo(lam, C, logits=logits)


def test_p_starts_at_the_prior_and_gradients_reach_every_parameter_there():
    model, lam, loss, parts = at_the_start()
    loss.backward()
    assert (lam - 0.1).abs().max() < 0.01 and parts["cut_at_1"] == 0
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


@pytest.mark.parametrize("C", [2, 3, 7])
def test_the_task_loss_at_initialisation_is_ln_c(C):
    assert abs(at_the_start(C)[3]["task"].item() - math.log(C)) < 0.05


METHODS = [("palbert", 2), ("palbert", 1), ("pondernet", 2), ("pabee", 3), ("finetune", 2)]


def trainee(method, labels, **keywords):
    chosen = run_module.make_settings(method=method, **keywords)
    torch.manual_seed(1)
    lambda_layers = chosen.lambda_layers if chosen.has_lambda else 0
    model = Ponder(Albert(ALBERT_CONFIG), labels, lambda_layers=lambda_layers, per_layer=method == "pabee")
    return model, chosen


def trained_on(labels, n=16):
    return rows(n), [float(row % 2) if labels == 1 else row % labels for row in range(n)]


@pytest.mark.parametrize("method, labels", METHODS)
def test_one_batch_overfits_to_zero(method, labels):
    model, chosen = trainee(method, labels, task="parity", lr=3e-3, beta=0.0, dropout=0.0,
                            lambda_lr=3e-3 if method == "palbert" else None)
    optimizer = train.make_optimizer(model, chosen)
    for step in range(300):
        parts = train.train_step(model, optimizer, chosen, step, *trained_on(labels), geometric_prior(0.1, 6))
    assert parts[0].item() < 0.02


# ---- bfloat16 ----

bf16 = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("kind, way", [*(("albert", way) for way in WAYS), ("roberta", "decided first"),
                                       ("roberta", "layer whole")])
def test_early_exit_in_bf16_stops_where_full_depth_does_but_for_a_few_rows(kind, way):
    model, inputs, _ = case(kind, ("q", 0.5))
    with bf16():
        logits, lam = run_full(model, inputs)
        found, found_layers = answer(way, model, inputs, QExit(0.5), 16, **WAYS[way])
    layers = exit_layers(QExit(0.5), logits, lam)
    same = found_layers == layers
    assert same.float().mean() > 0.9
    assert torch.allclose(found[same], logits[torch.arange(64), layers - 1][same], atol=0.1)


def test_heads_lambda_and_loss_are_float32_under_bf16_autocast_and_near_float32():
    model, inputs = make(), rows(64)
    with bf16():
        logits, lam = run_full(model, inputs)
        loss = elbo(lam, 3, logits=logits)[0]
    assert logits.dtype == lam.dtype == loss.dtype == torch.float32
    assert (lam - run_full(model, inputs)[1]).abs().mean() < 0.02   # bf16 has 8 bits: 0.4% a rounding


def test_under_bf16_autocast_lambda_starts_as_many_values_and_its_gradient_is_that_of_float32():
    exact = at_the_start()
    with bf16():
        rough = at_the_start()
    exact[2].backward(), rough[2].backward()
    assert all(len(layer.unique()) > 20 for layer in rough[1].T)    # as bf16 they would be one
    for a, b in zip(exact[0].lambda_head.parameters(), rough[0].lambda_head.parameters()):
        assert (a.grad - b.grad).norm() < 0.05 * a.grad.norm()


# ---- a pretended CUDA device: mixed devices raise, waits of the host are counted, graphs are replayed ----

tree_map, tree_leaves = torch.utils._pytree.tree_map, torch.utils._pytree.tree_leaves
WAITS = ("tolist", "item", "numpy", "nonzero", "unique", "__bool__", "__int__", "__float__", "__index__")


class Pretended(torch.Tensor):
    """A tensor of the CPU that PretendedCuda takes for one of cuda:0"""

    __torch_function__ = torch._C._disabled_torch_function_impl


class Pinned(Pretended):
    """Memory of the host from which a copy to cuda:0 need not be waited for"""


class PretendedCuda(torch.overrides.TorchFunctionMode):
    """Within it cuda:0 computes on the CPU; `waits` counts what the host waits for."""

    def __init__(self):
        super().__init__()
        self.waits, self.graphs, self.recording = 0, [], None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__, kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        on_cuda = any(type(x) is Pretended for x in tensors)
        if func == torch.Tensor.device.__get__:
            return torch.device("cuda:0" if on_cuda else "cpu")
        if func is torch.device:
            return func(*args, **kwargs)
        if name == "pin_memory":
            return args[0].as_subclass(Pinned)
        device = next((x.type for x in leaves if isinstance(x, torch.device)), "cuda" if on_cuda else "cpu")
        device = "cpu" if name == "cpu" else device
        others = [x for x in tensors if x.dim() > 0 and type(x) is not Pretended]
        assert not on_cuda or not others or name in ("to", "copy_"), f"{name} mixes devices"
        masked = name in ("__getitem__", "__setitem__") and torch.bool in [x.dtype for x in tensors[1:]]
        ready = kwargs.get("non_blocking") and all(isinstance(x, Pinned) for x in others)
        sends = device == "cuda" and name in ("to", "copy_") and others and not ready
        if sends or (on_cuda and (device == "cpu" or masked or name in WAITS)):
            assert self.recording is None, f"{name} waits while a graph is recorded"
            self.waits += 1
        kind = Pretended if device == "cuda" else Pinned if kwargs.get("pin_memory") else torch.Tensor
        kwargs = {key: kwargs[key] for key in kwargs if key != "pin_memory"}
        out = func(*tree_map(to_cpu, args), **tree_map(to_cpu, kwargs))
        if name == "to":
            out = out.clone()                               # another device has another memory
        if on_cuda or kind is not torch.Tensor:
            out = tree_map(lambda x: x.as_subclass(kind) if isinstance(x, torch.Tensor) else x, out)
        if self.recording is not None:
            self.recording.calls.append((func, args, kwargs, out))
        return out


def to_cpu(x):
    return torch.device("cpu") if isinstance(x, torch.device) else x


class Graph:
    """What was called while it was recorded is called again, into the same memory."""

    def __init__(self, device):
        self.device, self.calls, self.ran = device, [], True    # unlike on CUDA, recording has run it once
        device.graphs.append(self)

    def capture_begin(self):
        self.device.recording = self

    def capture_end(self):
        self.device.recording = None

    def replay(self):
        for func, args, kwargs, old in self.calls if not self.ran else ():
            for a, b in zip(tree_leaves(old), tree_leaves(func(*args, **kwargs))):
                if isinstance(a, torch.Tensor):
                    a.copy_(b)
        self.ran = False


@pytest.fixture
def cuda(monkeypatch):
    with PretendedCuda() as pretended:
        monkeypatch.setattr(torch.cuda, "CUDAGraph", functools.partial(Graph, pretended))
        for name in ("Stream", "stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
        yield pretended


def moved(model):
    """A copy of the model on cuda:0, which module.to cannot make"""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = torch.Tensor._make_subclass(Pretended, p.data, p.requires_grad)
    return model


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("kind, rule", TELLING)
def test_on_cuda_predict_many_equals_the_cpu_and_waits_once_a_layer_or_step(kind, rule, depthwise, cuda):
    model, inputs, (logits, layers) = case(kind, rule)
    if depthwise and not model.encoder.shared:
        depthwise = None                                    # CUDA's own choice, which must drop rows there
    with mock.patch.object(fast.Places, "launch", autospec=True, side_effect=fast.Places.launch) as step:
        found, found_layers = moved(model).predict_many(inputs, make_rule(*rule), 8, depthwise)
    assert found.device.type == found_layers.device.type == "cuda"
    assert cuda.waits == (step.call_count or min(5, int(layers.max()))) + (rule[0] == "sample")
    assert (step.call_count > 0) == (len(cuda.graphs) > 0) == bool(depthwise)
    assert found_layers.tolist() == layers.tolist()
    torch.testing.assert_close(found.cpu(), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method, labels", METHODS)
def test_on_cuda_a_training_step_equals_the_cpus_and_waits_for_nothing(method, labels, cuda):
    model, chosen = trainee(method, labels, task="mrpc")
    parts, prior = [], geometric_prior(0.1, 6)
    for model, prior in ((model, prior), (moved(model), prior.to(torch.device("cuda")))):
        optimizer, cuda.waits = train.make_optimizer(model, chosen), 0
        for step in range(3):
            parts.append(train.train_step(model, optimizer, chosen, step, *trained_on(labels), prior))
    assert cuda.waits == 0 and parts[3].device.type == "cuda"
    torch.testing.assert_close(torch.stack(parts[3:]).cpu(), torch.stack(parts[:3]))


# ==== train.py and eval.py ====

@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to run in, without a network and without a cache"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PALBERT_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def shell(*arguments, **keywords):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=240, **keywords)


def settled(result):
    """The one sentence of a command that failed as it should: exit code 1, nothing else on stderr that looks like a fault"""
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


QUICK = ["--max-steps", "3", "--device", "cpu"]


@pytest.fixture
def small_parity(monkeypatch):
    """The built-in task with fewer rows, for tests of the machinery around it"""
    real = glue.load
    sizes = {"train": 320, "dev": 40, "test": 20}
    for module in (run_module, train, paper):
        monkeypatch.setattr(module, "load", lambda task, split, data_dir=None: real(task, split, data_dir)[:sizes.get(split, 40)])


@pytest.mark.parametrize("method, exits", [("palbert", ("q", "sample", "expectation", "last")), ("pondernet", ("sample", "q")), ("pabee", ("patience", "entropy", "last")), ("finetune", ("last",))])
def test_every_preset_trains_evaluates_and_explains(method, exits, here, small_parity, capsys):
    train.main(["--method", method, *QUICK])
    run, = (here / "runs").iterdir()
    values = json.loads((run / "run.json").read_text())
    assert values["finished"] and values["steps"] == 3 and set(exits) <= set(values["dev"])
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "metrics.jsonl", "model.safetensors", "run.json", "spiece.model"]
    for exit in exits:
        capsys.readouterr()
        evaluation.main(["--exit", exit, "--json", "--device", "cpu"])
        result = json.loads(capsys.readouterr().out)
        assert {"task", "split", "exit", "q", "metrics", "score", "mean_layer", "layers", "seconds", "seconds_full_depth"} == set(result)
        assert sum(result["layers"]) == 40 and result["exit"] == exit and len(result["layers"]) == 12
        assert abs(sum(n * c for n, c in enumerate(result["layers"], 1)) / 40 - result["mean_layer"]) < 1e-5
        if exit != "expectation":
            evaluation.main(["--exit", exit, "--text", "the red cat sleeps", "--text-b", "they deny that the red cat sleeps", "--device", "cpu"])
            assert capsys.readouterr().out.count("\n") == 16
        if exit in run_module.SWEEPS:
            evaluation.main(["--exit", exit, "--sweep", "--json", "--device", "cpu"])
            rows_ = json.loads(capsys.readouterr().out)["rows"]
            assert all(a["mean_layer"] <= b["mean_layer"] for a, b in zip(rows_, rows_[1:])) or exit == "entropy"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3] and "dev" in lines[-1] and len(lines[-1]["p"]) == 12


def test_the_benchmarks_ways_answer_alike_and_its_table_has_a_line_for_each(here, small_parity, capsys):
    train.main(QUICK)
    capsys.readouterr()
    evaluation.main(["--bench", "--device", "cpu"])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + 4 * 4 + 1 and {line[0] for line in lines[2:]} == {"| 1", "| 8", "| 32", "| 128"}
    assert all(float(line[2]) > 0 and float(line[3]) > 0 for line in lines[2:])
    settings_, tokenizer, model = run_module.load_run(run_module.find_run(), torch.device("cpu"))
    inputs, _ = run_module.read_split(settings_, tokenizer, "dev")
    logits, layers = model.predict_many(inputs, QExit(0.5))
    with torch.no_grad():
        assert torch.allclose(paper.released_way(model, inputs, layers), logits, atol=1e-4)
        whole = paper.full_depth(model, inputs, 8)
    order = [row for batch in glue.buckets([len(ids) for ids, _ in inputs], 8) for row in batch]
    assert torch.allclose(whole, model.predict_many([inputs[row] for row in order], FixedExit(12))[0], atol=1e-4)


def test_the_expectation_is_computed_from_the_same_pass_as_every_q(here, small_parity):
    train.main(QUICK)
    settings_, tokenizer, model = run_module.load_run(run_module.find_run(), torch.device("cpu"))
    inputs, labels = run_module.read_split(settings_, tokenizer, "dev")
    logits, lam = run_module.all_layers(model, inputs)
    outputs, layers = run_module.apply_exit("expectation", settings_, logits, lam)
    assert torch.allclose(outputs, expected_prediction(logits, exit_distribution(lam))) and (layers == 12).all()
    one_by_one = [model(*pad([row], model.encoder, "cpu")) for row in inputs[:5]]
    assert all(torch.allclose(logits[n], one[0][0], atol=1e-4) for n, one in enumerate(one_by_one))


@pytest.mark.parametrize("flags, words", [
    (["--q", "0"], "--q"), (["--q", "1.5"], "--q"), (["--q", "nan"], "--q"), (["--prior", "1"], "--prior"), (["--prior", "0"], "--prior"), (["--beta", "-1"], "--beta"),
    (["--beta", "inf"], "--beta"), (["--patience", "0"], "--patience"), (["--max-length", "7"], "--max-length"), (["--max-length", "513"], "--max-length"),
    (["--layers", "0"], "--layers"), (["--lr", "0"], "--lr"), (["--lr", "fast"], "--lr"), (["--batch-size", "0"], "--batch-size"), (["--batch-size", "2.5"], "--batch-size"),
    (["--epochs", "0"], "--epochs"), (["--dropout", "1"], "--dropout"), (["--lambda-layers", "2"], "1 or 3"), (["--lambda-input", "both"], "current, concat"),
    (["--method", "bert"], "palbert, pondernet, pabee, finetune"), (["--task", "squad"], "mrpc"), (["--model", "bert-base"], "albert-base-v2"), (["--model", "roberta-base", "--layers", "9"], "--layers 9"), (["--exit", "entropy"], "q or sample"),
    (["--method", "finetune", "--exit", "q"], "last"), (["--device", "tpu"], "cuda, mps or cpu"), (["--seed", "-1"], "--seed"), (["--save-every", "0"], "--save-every"),
    (["--turbo"], "--turbo"), (["--lr"], "--lr"), (["--seeds", "0"], "--seeds"), (["--dry-run"], "--seeds or --grid"), (["--name", "x", "--seeds", "2"], "--name"),
    (["--resume", "x", "--lr", "1"], "--resume"), (["--resume", "nowhere"], "no run"), (["--resume"], "no run"), (["--max-steps", "0"], "--max-steps"), (["--tolerance", "-1"], "--tolerance")])
def test_a_wrong_argument_is_named_with_its_range_before_anything_is_loaded(flags, words, here, monkeypatch):
    monkeypatch.setattr(train, "load", lambda *_: pytest.fail("loaded first"))
    with pytest.raises(InputError) as caught:
        train.main(flags)
    assert words in str(caught.value) and "\n" not in str(caught.value) and not (here / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_cuda_that_is_not_there_is_said_at_once(here):
    assert "--device cuda" in settled(shell(HERE / "train.py", "--device", "cuda")) and not (here / "runs").exists()
    assert "--device cuda" in settled(shell(HERE / "eval.py", "--device", "cuda"))


@pytest.mark.parametrize("flags, words", [(["--q", "0"], "no run"), (["--run", "x"], "no run"), (["--batch-size", "0"], "--batch-size"), (["--exit", "never"], "--exit")])
def test_eval_without_a_run_or_with_wrong_arguments_says_so(flags, words, here):
    with pytest.raises(InputError, match=words):
        evaluation.main(flags)


def test_without_a_network_mrpc_ends_in_one_sentence_with_the_two_ways_to_hand_it_over(here):
    sentence = settled(shell(HERE / "train.py", "--task", "mrpc"))
    assert "msr_paraphrase" in sentence and "--data-dir" in sentence
    assert not any(path.name.endswith((".txt", ".tsv")) for path in here.rglob("*"))


def test_only_the_four_packages_are_imported_at_run_time():
    code = "import sys, train, eval; print(sorted({name.split('.')[0] for name in sys.modules} & {'transformers', 'scipy', 'sklearn', 'matplotlib', 'hypothesis', 'pytest', 'safetensors', 'tensorflow', 'tokenizers'}))"
    result = shell("-c", code, cwd=HERE)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def digest(run):
    """Weights and metrics of a run, wall times aside"""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return ({name: tensor.numpy().tobytes() for name, tensor in read_safetensors(run / "model.safetensors").items()},
            [{key: value for key, value in line.items() if key != "seconds"} for line in lines])


PARITY = ["--batch-size", "256", "--max-steps", "12", "--device", "cpu", "--save-every", "2"]


def test_the_same_seed_gives_the_same_bits_and_another_does_not(here, small_parity):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        train.main([*QUICK, "--name", name, "--seed", seed])
    a, b, c = (digest(here / "runs" / name) for name in "abc")
    assert a == b and a != c


def test_stopped_at_any_step_and_resumed_a_run_ends_with_the_same_bits(here, small_parity, monkeypatch):
    flags = ["--batch-size", "64", "--epochs", "3", "--device", "cpu", "--save-every", "2"]
    train.main([*flags, "--name", "whole"])
    real = train.train_step
    for stop in (0, 1, 2, 5, 7, 14):
        class Killed(BaseException):
            pass

        def step_or_die(model, optimizer, settings_, step, *rest):
            if step == stop:
                raise Killed
            return real(model, optimizer, settings_, step, *rest)

        monkeypatch.setattr(train, "train_step", step_or_die)
        with pytest.raises(Killed):
            train.main([*flags, "--name", f"cut{stop}"])
        monkeypatch.setattr(train, "train_step", real)
        if stop == 0:
            train.main([*flags, "--name", "cut0"])             # nothing saved yet: the same command starts again
        else:
            train.main(["--resume", f"cut{stop}"])
        assert digest(here / "runs" / f"cut{stop}") == digest(here / "runs" / "whole"), stop


def test_a_run_killed_by_sigkill_or_sigint_resumes_to_the_same_bits(here):
    whole = shell(HERE / "train.py", *PARITY, "--name", "whole")
    assert whole.returncode == 0, whole.stderr
    for name, how in (("killed", signal.SIGKILL), ("interrupted", signal.SIGINT)):
        process = subprocess.Popen([sys.executable, HERE / "train.py", *PARITY, "--name", name], stderr=subprocess.PIPE, text=True)
        while not (here / "runs" / name / "resume.pt").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(how)
        _, said = process.communicate(timeout=120)
        if how == signal.SIGINT:
            assert process.returncode == 130 and f"python train.py --resume {name}" in said and "Traceback" not in said
        result = shell(HERE / "train.py", "--resume", name)
        assert result.returncode == 0 and digest(here / "runs" / name) == digest(here / "runs" / "whole"), result.stderr


def test_evaluating_more_often_changes_no_training_step(here, small_parity):
    inputs, prior = rows(32), geometric_prior(0.1, 6)
    settings_ = run_module.make_settings(task="parity", lr=1e-3)
    ends = []
    for evaluate in (False, True):
        torch.manual_seed(0)
        model = Ponder(Albert(ALBERT_CONFIG), 2)
        optimizer = train.make_optimizer(model, settings_)
        for step in range(4):
            train.train_step(model, optimizer, settings_, step, inputs, [n % 2 for n in range(32)], prior)
            if evaluate:
                run_module.evaluate(model, settings_, {"dev": (inputs, [n % 2 for n in range(32)])}, settings_.exits)
        ends.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_rows(here, small_parity, monkeypatch):
    real = train.loss_of
    calls = []

    def broken(*arguments):
        calls.append(1)
        loss, parts = real(*arguments)
        return (loss * float("nan"), parts | {"task": parts["task"] * float("nan")}) if len(calls) == 2 else (loss, parts)

    monkeypatch.setattr(train, "loss_of", broken)
    with pytest.raises(InputError, match=r"step 2: the loss is not finite .* rows \[\d+, "):
        train.main([*QUICK, "--name", "bad"])
    assert not json.loads((here / "runs" / "bad" / "run.json").read_text())["finished"]


def test_a_named_run_is_skipped_when_finished_and_refused_with_other_settings(here, small_parity, capsys):
    train.main([*QUICK, "--name", "one"])
    before = digest(here / "runs" / "one")
    train.main([*QUICK, "--name", "one"])
    assert "finished already" in capsys.readouterr().err and digest(here / "runs" / "one") == before
    with pytest.raises(InputError, match="other settings"):
        train.main([*QUICK, "--name", "one", "--lr", "1"])
    train.main(QUICK)
    train.main(QUICK)
    assert len(list((here / "runs").iterdir())) == 3           # a run without a name is always a new one


def test_a_grid_by_dry_run_lines_in_any_order_and_half_of_them_twice_gives_the_same_table(here, small_parity, monkeypatch, capsys):
    monkeypatch.setattr(train, "GRID", {"lr": (1e-3, 3e-3), "lambda_lr": (1e-3,)})
    flags = ["--grid", "--seeds", "2", *QUICK]
    train.main(flags)
    want = capsys.readouterr().out
    (here / "runs").rename(here / "runs in one go")
    for _ in range(2):                                          # the grid's lines, then the seeds' lines
        train.main([*flags, "--dry-run"])
        lines = capsys.readouterr().out.splitlines()
        assert lines and all(line.startswith("python train.py ") for line in lines)
        for line in [*reversed(lines), *lines[::2]]:
            train.main(shlex.split(line)[2:])
        capsys.readouterr()
    train.main([*flags, "--dry-run"])
    assert capsys.readouterr().out == want and "± " in want and "median" in want


def test_two_processes_give_the_loss_curve_of_one(here):
    flags = ["--batch-size", "15", "--dropout", "0", "--max-steps", "20", "--device", "cpu"]
    one = shell(HERE / "train.py", *flags, "--name", "one")
    two = shell("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(random.Random(os.getpid()).randint(20000, 60000)), HERE / "train.py", *flags, "--name", "two")
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
    curves = [[json.loads(line)["task"] for line in (here / "runs" / name / "metrics.jsonl").read_text().splitlines()[:20]] for name in ("one", "two")]
    assert len(curves[0]) == 20 and np.abs(np.subtract(*curves)).max() < 1e-5


def glue_folder(folder, sizes=(("CoLA", 1063), ("WNLI", 146), ("MRPC", 1725), ("RTE", 3000), ("STS-B", 1379))):
    """A --data-dir with small made-up train and dev files and test files of the published length"""
    draw = random.Random(0)
    sentence = lambda: " ".join(draw.choice(["a", "dog", "ran", "home", "the", "big", "cat", "saw", "it", "well"]) for _ in range(draw.randint(3, 8)))
    for task, test_rows in sizes:
        (folder / task).mkdir(parents=True)
        for split, n in (("train", 64), ("dev", 24), ("test", test_rows)):
            if task == "CoLA":
                lines = ["index\tsentence"] * (split == "test") + [f"{i}\t{sentence()}" if split == "test" else f"gj04\t{i % 2}\t\t{sentence()}" for i in range(n)]
            elif task == "MRPC":
                lines = ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String" if split != "test" else "index\t#1 ID\t#2 ID\t#1 String\t#2 String"]
                lines += [f"{i if split == 'test' else i % 2}\t{i}\t{i + 9}\t{sentence()}\t{sentence()}" for i in range(n)]
            elif task == "STS-B":
                end = [] if split == "test" else ["score"]
                lines = ["\t".join(["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", *end])]
                lines += ["\t".join([str(i), *["x"] * 6, sentence(), sentence(), *([f"{i % 6}.0"] if end else [])]) for i in range(n)]
            else:
                words = ("0", "1") if task == "WNLI" else ("entailment", "not_entailment")
                lines = ["index\tsentence1\tsentence2" + ("" if split == "test" else "\tlabel")]
                lines += [f"{i}\t{sentence()}\t{sentence()}" + ("" if split == "test" else f"\t{words[i % 2]}") for i in range(n)]
            (folder / task / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_a_submission_from_four_tasks_passes_a_checker_written_from_the_servers_rules(here, capsys):
    glue_folder(here / "glue")
    for task in ("cola", "wnli", "rte", "stsb"):
        train.main(["--task", task, "--model", "tiny", "--layers", "2", "--data-dir", "glue", "--max-length", "16", *QUICK])
    evaluation.main(["--submit", "glue.zip", "--device", "cpu"])
    said = capsys.readouterr().out
    assert all(name in said for name in ("SST-2.tsv", "MRPC.tsv", "QQP.tsv", "MNLI-m.tsv", "MNLI-mm.tsv", "QNLI.tsv", "AX.tsv"))
    with zipfile.ZipFile("glue.zip") as archive:
        assert sorted(archive.namelist()) == ["CoLA.tsv", "RTE.tsv", "STS-B.tsv", "WNLI.tsv"]
        for name, n, valid in (("CoLA", 1063, {"0", "1"}), ("WNLI", 146, {"0", "1"}), ("RTE", 3000, {"entailment", "not_entailment"}), ("STS-B", 1379, None)):
            header, *lines = archive.read(f"{name}.tsv").decode().rstrip("\n").split("\n")
            index, predictions = zip(*(line.split("\t") for line in lines))
            assert header == "index\tprediction" and list(index) == [str(i) for i in range(n)]
            assert set(predictions) <= valid if valid else all(0 <= float(value) <= 5 for value in predictions)


def test_regression_trains_and_evaluates_by_every_method(here, capsys):
    glue_folder(here / "glue", [("STS-B", 5)])
    for method in run_module.METHODS:
        train.main(["--task", "stsb", "--model", "tiny", "--layers", "3", "--data-dir", "glue", "--method", method, *QUICK])
        capsys.readouterr()
        evaluation.main(["--json", "--device", "cpu"])
        assert set(json.loads(capsys.readouterr().out)["metrics"]) == {"pearson", "spearman"}
    with pytest.raises(InputError, match="regression"):
        train.main(["--task", "stsb", "--method", "pabee", "--exit", "entropy"])


def test_tables_and_figures_are_made_from_the_runs_that_there_are(here, small_parity, capsys):
    with pytest.raises(InputError, match="expected finished runs"):
        evaluation.main(["--plot", "q"])
    glue_folder(here / "glue", [("RTE", 5)])
    for seed in ("0", "1"):
        train.main(["--task", "rte", "--model", "tiny", "--layers", "3", "--data-dir", "glue", "--epochs", "1", "--seed", seed, "--device", "cpu"])
    train.main(QUICK)
    train.main([*QUICK, "--method", "pabee"])
    capsys.readouterr()
    evaluation.main(["--table"])
    said = capsys.readouterr().out
    assert "Table 1" in said and "Table 2" in said and "Table 3" in said and "not run" in said
    for kind in ("q", "speedup", "prior", "distribution", "negations"):
        evaluation.main(["--plot", kind, "--device", "cpu"])
        assert (here / "runs" / f"{kind}.png").read_bytes().startswith(b"\x89PNG")


def test_damaged_run_folders_are_one_sentence(here, small_parity):
    train.main([*QUICK, "--name", "good"])
    good = here / "runs" / "good"
    damages = {"run.json": b"{", "config.json": b"[]", "spiece.model": b"no", "model.safetensors": b"\0" * 100}
    for name, damage in damages.items():
        kept = (good / name).read_bytes()
        for bad in (damage, kept[:len(kept) // 2], b""):
            (good / name).write_bytes(bad)
            with pytest.raises(InputError) as caught:
                evaluation.main(["--run", "good", "--device", "cpu"])
            assert "\n" not in str(caught.value)
        (good / name).unlink()
        with pytest.raises(InputError):
            evaluation.main(["--run", "good", "--device", "cpu"])
        (good / name).write_bytes(kept)
    evaluation.main(["--run", "good", "--device", "cpu"])
    other = json.loads((good / "run.json").read_text())
    for settings_ in ({"q": 7}, {"unknown": 1}, {"layers": "two"}, {"task": "cola"}, {"method": "pabee"}):
        (good / "run.json").write_text(json.dumps(other | {"settings": other["settings"] | settings_}))
        with pytest.raises(InputError):
            evaluation.main(["--run", "good", "--device", "cpu"])


def readme_commands():
    """Every command of README.md that starts a file of ours, from blocks and tables, comments cut off"""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^(?:python (?:train|eval)\.py|torchrun .*? train\.py)[^\n#]*", text, re.M) + re.findall(r"`(python (?:train|eval)\.py[^`]*)`", text)
    return sorted({command.strip() for command in found})


def test_the_readmes_first_commands_run_word_for_word_but_for_max_steps(here, capsys):
    commands = readme_commands()
    first = ["python train.py", "python eval.py --q 0.5", 'python eval.py --text "the red cat sleeps" --text-b "it is false that the red cat sleeps"',
             "python eval.py --sweep", "python eval.py --table"]
    assert set(first) <= set(commands)
    for command in first:
        program, *flags = shlex.split(command)[1:]
        if program == "train.py":
            flags += ["--max-steps", "2"]
        result = shell(HERE / program, *flags)
        assert result.returncode == 0 and "Traceback" not in result.stderr, command + result.stderr
        assert program == "train.py" or result.stdout.strip()
    assert all(word in shell(HERE / "eval.py", "--q", "0.5").stdout for word in ("q 0.5", "sample", "expectation", "mean layer"))


def test_every_other_command_of_the_readme_has_flags_and_values_that_exist(here, monkeypatch):
    parsed = []
    monkeypatch.setattr(train, "run", lambda settings_, name=None: parsed.append(settings_))
    monkeypatch.setattr(train, "protocol", lambda given, *_: parsed.append(run_module.make_settings(**given)))
    monkeypatch.setattr(train, "choose_device", lambda name: torch.device("cpu"))
    eval_help = shell(HERE / "eval.py", "--help").stdout
    for command in readme_commands():
        words = shlex.split(command.replace("…", "").replace("FOLDER", str(here)).replace("--task T", "--task rte"))
        if "train.py" in words and "--resume" not in words:
            before = len(parsed)
            train.main(words[words.index("train.py") + 1:])
            assert len(parsed) == before + 1, command
        elif "eval.py" in words:
            assert all(f"{word} " in eval_help or f"{word}]" in eval_help for word in words if word.startswith("--")), command
    assert len(parsed) > 10


# ---- encoders: the same numbers as transformers, from every file form ----

SIZES = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3,
         "intermediate_size": 40, "max_position_embeddings": 20}
SMALL_ALBERT, SMALL_BERT = AlbertConfig(embedding_size=12, **SIZES), BertConfig(**SIZES)
SMALL_ROBERTA = RobertaConfig(**SIZES)
SMALL = [SMALL_ALBERT, SMALL_ROBERTA]
ODD = [SMALL_ALBERT, SMALL_BERT, SMALL_ROBERTA] + [dataclasses.replace(config, **other) for config, other in (
    (SMALL_ALBERT, {"hidden_act": "gelu", "num_attention_heads": 1, "pad_token_id": 3}),
    (SMALL_ALBERT, {"num_hidden_groups": 2, "num_hidden_layers": 5, "embedding_size": 30}),
    (SMALL_ALBERT, {"num_hidden_groups": 3}),
    (SMALL_ALBERT, {"num_hidden_groups": 2, "inner_group_num": 2, "num_hidden_layers": 4}),
    (SMALL_ALBERT, {"inner_group_num": 2, "type_vocab_size": 3, "num_attention_heads": 24}),
    (SMALL_ALBERT, {"hidden_act": "gelu", "layer_norm_eps": 1e-6}),
    (SMALL_ROBERTA, {"hidden_act": "gelu_new", "num_attention_heads": 8, "pad_token_id": 0}),
    (SMALL_ROBERTA, {"pad_token_id": 4, "type_vocab_size": 2, "num_hidden_layers": 1}))]
WHOLE = [AlbertConfig(), BertConfig(vocab_size=200), RobertaConfig(vocab_size=200), albert.SIZES["tiny"],
         albert.SIZES["mini"]]
PARAMETERS = {"albert-base-v2": 11_683_584, "bert-base-uncased": 109_482_240, "roberta-base": 124_645_632}


def is_albert(config):
    return isinstance(config, AlbertConfig)


def encoder(config, seed=0):
    """An encoder with random weights, biases and layer norms too, so that none could be left out unseen"""
    torch.manual_seed(seed)
    model = ENCODERS[type(config)][0](config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.04 if config.hidden_size > 100 else 0.1).add_("norm.weight" in name)
    return model


def name_table(config):
    return ENCODERS[type(config)][1].name_table(config)


def hub_weights(model):
    """Our weights under transformers' names for a model without a head"""
    own, named = model.state_dict(), {}
    for name, hubs in name_table(model.config).items():
        named |= {hub: part.detach().clone() for hub, part in zip(hubs, own[name].chunk(len(hubs)))}
    return named


def hub_config(config, **more):
    more |= {f"{name}_prob": 0 for name in ("hidden_dropout", "attention_probs_dropout")}
    return ENCODERS[type(config)][2](**dataclasses.asdict(config), **more)


def hub_model(model, attention="sdpa"):
    """transformers' model with the weights of ours"""
    theirs = ENCODERS[type(model.config)][3](hub_config(model.config, attn_implementation=attention)).eval()
    theirs.load_state_dict(hub_weights(model))
    return theirs


def random_batch(config, B, T, seed=0):
    """ids, mask, segments; the lengths of rows go from T down to 2, the padding lies behind"""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size - 5, (B, T), generator=generator) + 5
    mask = torch.arange(T) < torch.linspace(T, 2, B).long()[:, None]
    segments = torch.randint(config.type_vocab_size, (B, T), generator=generator)
    return ids.where(mask, config.pad_token_id), mask, segments * mask


def all_states(model, ids, mask, segments):
    states = [model.embed(ids, segments)]
    for i in range(1, model.num_layers + 1):
        states.append(model.layer(i, states[-1], mask))
    return states


def weighted_sum(states, pooled, mask):
    """A scalar to which every real token of every layer and the pooled output contribute, each by a weight"""
    generator = torch.Generator().manual_seed(1)
    parts = [h[mask] for h in states] + [pooled]
    return sum((part * torch.randn(part.shape, generator=generator)).mean() for part in parts)


@functools.lru_cache(maxsize=None)
def against_transformers(config, attention, B, T):
    """Largest differences -> hidden states, pooled output, by parameter (the gradient's, its size)"""
    ours = encoder(config)
    theirs = hub_model(ours, attention)
    ids, mask, segments = random_batch(config, B, T)
    states = all_states(ours, ids, mask, segments)
    out = theirs(ids, attention_mask=mask.long(), token_type_ids=segments, output_hidden_states=True)
    assert len(states) == len(out.hidden_states) == config.num_hidden_layers + 1
    hidden = max((a - b)[mask].abs().max().item() for a, b in zip(states, out.hidden_states))
    pooled = ours.pool(states[-1])
    weighted_sum(states, pooled, mask).backward()
    weighted_sum(out.hidden_states, out.pooler_output, mask).backward()
    table, found, gradients = name_table(config), dict(theirs.named_parameters()), {}
    assert sorted(name for names in table.values() for name in names) == sorted(found)
    for name, parameter in ours.named_parameters():
        want = torch.cat([found[hub].grad for hub in table[name]])
        gradients[name] = (parameter.grad - want).abs().max().item(), want.abs().max().item()
    return hidden, (pooled - out.pooler_output).abs().max().item(), gradients


CASES = [*((config, how, 7, 13) for config in ODD for how in ("eager", "sdpa")),
         *((config, "sdpa", 3, 17) for config in WHOLE)]


@pytest.mark.parametrize("case", CASES)
def test_every_hidden_state_and_the_pooled_output_equal_transformers(case):
    hidden, pooled, _ = against_transformers(*case)
    assert hidden < 1e-5 and pooled < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_every_parameter_and_equal_transformers(case):
    for name, (difference, size) in against_transformers(*case)[2].items():
        assert size > 0 and difference < 1e-4 and difference < 1e-4 * size + 1e-8, name


@pytest.mark.parametrize("name", [*albert.SIZES, *bert.SIZES])
def test_every_named_size_has_the_shapes_of_transformers_model_and_the_published_parameters(name):
    config = (albert.SIZES | bert.SIZES)[name]
    ours, _, _, kind = ENCODERS[type(config)]
    with torch.device("meta"):
        theirs, own = kind(hub_config(config)).state_dict(), ours(config).state_dict()
    assert name not in PARAMETERS or sum(parameter.numel() for parameter in own.values()) == PARAMETERS[name]
    for parameter, hubs in name_table(config).items():
        assert own[parameter].shape[1:] == theirs[hubs[0]].shape[1:], parameter
        assert own[parameter].shape[0] == sum(theirs.pop(hub).shape[0] for hub in hubs), parameter
    assert not theirs


@pytest.mark.parametrize("config", [config for config in ODD if config.num_hidden_layers >= 3])
def test_shared_is_true_only_where_every_layer_is_the_same_function(config):
    model = encoder(config)
    ids, mask, segments = random_batch(config, 3, 8)
    h = model.embed(ids, segments)
    assert model.shared is (is_albert(config) and config.num_hidden_groups == 1)
    assert torch.equal(model.layer(1, h, mask), model.layer(model.num_layers, h, mask)) is model.shared


# ---- encoders: what the early exit relies on ----

@pytest.mark.parametrize("config", ODD)
@pytest.mark.parametrize("T", [1, 2, 13])
def test_first_and_finish_together_are_the_layer_whichever_rows_were_dropped(config, T):
    model = encoder(config)
    ids, mask, segments = random_batch(config, 7, T)
    h = model.embed(ids, segments)
    for i in range(1, model.num_layers + 1):
        layer, cls = model.layer(i, h, mask), model.first(i, h, mask)
        assert cls.shape == (7, 1, 24)
        torch.testing.assert_close(cls, layer[:, :1], atol=2e-6, rtol=0)
        for keep in ([0, 1, 2, 3, 4, 5, 6], [1, 4], [6], torch.tensor([], dtype=torch.int64)):
            finished = model.finish(i, h[keep], mask[keep], cls[keep])
            torch.testing.assert_close(finished[mask[keep]], layer[keep][mask[keep]], atol=2e-6, rtol=0)
        h = layer


@pytest.mark.parametrize("config", ODD)
def test_finish_packs_many_tokens_and_gives_the_layer_at_all_that_are_real(config):
    model = encoder(config)
    ids, mask, segments = random_batch(config, 30, 13)
    mask[::3, 5] = False                                            # holes too
    h = model.embed(ids, segments).detach().requires_grad_()
    layer, finished = model.layer(1, h, mask), model.finish(1, h, mask, model.first(1, h, mask))
    torch.testing.assert_close(finished[mask], layer[mask], atol=2e-6, rtol=0)
    assert not mask.all() and (finished[:, 1:][~mask[:, 1:]] == 0).all()
    weight = torch.randn(layer[mask].shape, generator=torch.Generator().manual_seed(0))
    want, got = (torch.autograd.grad((out[mask] * weight).sum(), h)[0] for out in (layer, finished))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", ODD)
def test_padding_changes_no_state_of_an_encoder(config):
    model, batch = encoder(config), random_batch(config, 7, 13)
    padded = all_states(model, *batch)
    for row, length in enumerate(batch[1].sum(1).tolist()):
        for a, b in zip(all_states(model, *(x[row:row + 1, :length] for x in batch)), padded):
            torch.testing.assert_close(a[0], b[row, :length], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("config", SMALL)
def test_evaluating_an_encoder_twice_is_bitwise_equal_also_in_training_mode(config):
    model, batch = encoder(config), random_batch(config, 7, 13)
    once, twice = all_states(model, *batch), all_states(model, *batch)
    for a, b, training in zip(once, twice, all_states(model.train(), *batch)):
        assert torch.equal(a, b) and torch.equal(a, training)


@pytest.mark.parametrize("config, longest", [(SMALL_ALBERT, 20), (SMALL_BERT, 20), (SMALL_ROBERTA, 18),
                                             (dataclasses.replace(SMALL_ROBERTA, pad_token_id=4), 15)])
def test_more_tokens_than_positions_is_an_error_that_gives_both_numbers(config, longest):
    model = encoder(config)
    assert model.max_length == longest
    ids, _, segments = random_batch(config, 2, longest + 1)
    model.embed(ids[:, :-1], segments[:, :-1])
    with pytest.raises(ValueError, match=rf"{longest + 1} tokens.* {longest} positions"):
        model.embed(ids, segments)


def test_roberta_counts_positions_from_the_first_real_token_wherever_padding_stands():
    model = encoder(SMALL_ROBERTA)
    ids, _, segments = random_batch(SMALL_ROBERTA, 3, 13)
    ids = torch.cat([ids[:, 8:], ids[:, :8]], 1)    # padding before and between the tokens too
    want = hub_model(model).embeddings(ids, token_type_ids=segments)
    torch.testing.assert_close(model.embed(ids, segments), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_of_bfloat16_is_the_float32_gelu_rounded(approximate):
    """So the tanh form's cube cannot overflow under autocast. Every bfloat16 number up to 1e38 is tried."""
    x = torch.arange(-2**15, 2**15).to(torch.int16).view(torch.bfloat16)
    x = x[x.abs() < 1e38]
    want = F.gelu(x.float(), approximate=approximate).bfloat16().float()
    error = (F.gelu(x, approximate=approximate).float() - want).abs()
    assert (error <= 2**-7 * want.abs() + 1e-37).all()  # a unit in the last place: libraries differ


@pytest.mark.parametrize("config", [albert.SIZES["tiny"],
                                    dataclasses.replace(SMALL_ROBERTA, hidden_size=64, num_attention_heads=4,
                                                        num_hidden_layers=12)])
def test_bfloat16_autocast_stays_within_3_percent_of_float32(config):
    """Root mean square over the real tokens of each of 12 layers, relative to the deviation of h_i"""
    model = encoder(config)
    ids, mask, segments = random_batch(config, 7, 13)
    exact = all_states(model, ids, mask, segments)
    with bf16():
        rough = all_states(model, ids, mask, segments)
    for a, b in zip(exact[1:], rough[1:]):
        assert 0 < (a - b)[mask].square().mean().sqrt() / a[mask].std() < 0.03


# ---- encoders: files ----

def write_folder(folder, config, weights, form):
    """A folder in the hub's form; config is a dict."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if form == "safetensors":
        save_file({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}, folder / "model.safetensors")
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    return folder


def folder_of(tmp_path, config, weights=None, form="safetensors", **changes):
    values = {"model_type": "albert" if is_albert(config) else "roberta"} | dataclasses.asdict(config) | changes
    return write_folder(tmp_path / "model", values, hub_weights(encoder(config)) if weights is None else weights, form)


def load(folder, config):
    return (Albert if is_albert(config) else Roberta).from_pretrained(folder).eval()


@pytest.mark.parametrize("form", ["safetensors", "pytorch"])
@pytest.mark.parametrize("kind", ["AlbertModel", "AlbertForMaskedLM", "AlbertForSequenceClassification", "AlbertForPreTraining",
                                  "RobertaModel", "RobertaForMaskedLM", "RobertaForSequenceClassification"])
def test_folders_that_transformers_saves_load_to_its_outputs(kind, form, tmp_path, capsys):
    config = SMALL_ALBERT if kind.startswith("Albert") else SMALL_ROBERTA
    torch.manual_seed(0)
    theirs = getattr(transformers, kind)(hub_config(config, num_labels=2)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.1)
    theirs.config.save_pretrained(tmp_path)
    if form == "safetensors":
        theirs.save_pretrained(tmp_path)
    else:
        prefix = "" if kind.endswith("Model") else f"{theirs.base_model_prefix}."
        torch.save(theirs.state_dict() | {f"{prefix}embeddings.position_ids": torch.arange(20)[None]}, tmp_path / "pytorch_model.bin")
    ours = load(tmp_path, config)
    ids, mask, segments = random_batch(config, 5, 9)
    out = theirs.base_model(ids, attention_mask=mask.long(), token_type_ids=segments)
    h = all_states(ours, ids, mask, segments)[-1]
    torch.testing.assert_close(h[mask], out[0][mask], atol=1e-5, rtol=0)
    if theirs.base_model.pooler is not None:
        torch.testing.assert_close(ours.pool(h), out.pooler_output, atol=1e-5, rtol=0)
        assert capsys.readouterr().err == ""
    else:
        assert "no pooler" in capsys.readouterr().err
        assert not ours.pooler.bias.any() and 0.017 < ours.pooler.weight.std() < 0.023


def as_the_hub_names_it(arrays):
    """Google's variables -> the hub's names, written from the hub's side and tensor by tensor."""
    def dense(hub, google):
        return {f"{hub}.weight": torch.tensor(arrays[f"{google}/kernel"]).T, f"{hub}.bias": torch.tensor(arrays[f"{google}/bias"])}

    def norm(hub, google):
        return {f"{hub}.weight": torch.tensor(arrays[f"{google}/gamma"]), f"{hub}.bias": torch.tensor(arrays[f"{google}/beta"])}

    weights = {f"embeddings.{name}_embeddings.weight": torch.tensor(arrays[f"bert/embeddings/{name}_embeddings"])
               for name in ("word", "position", "token_type")}
    weights |= norm("embeddings.LayerNorm", "bert/embeddings/LayerNorm") | dense("pooler", "bert/pooler/dense")
    weights |= dense("encoder.embedding_hidden_mapping_in", "bert/encoder/embedding_hidden_mapping_in")
    for group in range(2):
        for inner in range(2):
            google = f"bert/encoder/transformer/group_{group}/inner_group_{inner}"
            hub = f"encoder.albert_layer_groups.{group}.albert_layers.{inner}"
            for name in ("query", "key", "value"):
                weights |= dense(f"{hub}.attention.{name}", f"{google}/attention_1/self/{name}")
            weights |= dense(f"{hub}.attention.dense", f"{google}/attention_1/output/dense")
            weights |= norm(f"{hub}.attention.LayerNorm", f"{google}/LayerNorm")
            weights |= dense(f"{hub}.ffn", f"{google}/ffn_1/intermediate/dense")
            weights |= dense(f"{hub}.ffn_output", f"{google}/ffn_1/intermediate/output/dense")
            weights |= norm(f"{hub}.full_layer_layer_norm", f"{google}/LayerNorm_1")
    return weights


def test_weights_of_tensorflow_safetensors_and_pytorch_load_to_the_outputs_of_transformers(tmp_path):
    config = AlbertConfig.from_json(TF_CONFIG | {"hidden_act": "gelu_new"})
    weights = as_the_hub_names_it(tf_values())
    theirs = transformers.AlbertModel(hub_config(config)).eval()
    theirs.load_state_dict(weights)
    batch = ids, mask, segments = random_batch(config, 7, 13)
    out = theirs(ids, attention_mask=mask.long(), token_type_ids=segments, output_hidden_states=True)
    folders = [HERE / "testdata/albert_tf", HERE / "testdata/albert_tf/model.ckpt-best", HERE / "testdata/albert_tf/model.ckpt-best.index",
               write_folder(tmp_path / "a", dataclasses.asdict(config), weights, "safetensors"),
               write_folder(tmp_path / "b", dataclasses.asdict(config), {f"albert.{name}": w for name, w in weights.items()}, "pytorch")]
    first = all_states(Albert.from_pretrained(folders[0]), *batch)
    for folder in folders:
        model = Albert.from_pretrained(folder)
        assert model.config == config
        states = all_states(model, *batch)
        assert all(torch.equal(a, b) for a, b in zip(states, first))
        for a, b in zip(states, out.hidden_states):
            torch.testing.assert_close(a[mask], b[mask], atol=1e-5, rtol=0)
        torch.testing.assert_close(model.pool(states[-1]), out.pooler_output, atol=1e-5, rtol=0)


def test_gelu_means_tanh_in_googles_files_and_erf_in_the_hubs(tmp_path):
    assert TF_CONFIG["hidden_act"] == "gelu"
    folder = write_folder(tmp_path / "hub", TF_CONFIG, as_the_hub_names_it(tf_values()), "safetensors")
    google, hub = Albert.from_pretrained(HERE / "testdata/albert_tf"), Albert.from_pretrained(folder)
    assert (google.config.hidden_act, hub.config.hidden_act) == ("gelu_new", "gelu")
    batch = random_batch(hub.config, 7, 13)
    difference = (all_states(google, *batch)[-1] - all_states(hub, *batch)[-1]).abs().max()
    assert 1e-5 < difference < 1e-1


def test_googles_archive_is_read_and_another_of_the_same_name_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PALBERT_CACHE", str(tmp_path / "cache"))
    paths = []
    for i, config in enumerate([TF_CONFIG, TF_CONFIG | {"num_hidden_layers": 3}]):
        path = tmp_path / f"{i}" / "albert_base.tar.gz"
        path.parent.mkdir()
        (path.parent / "albert_config.json").write_text(json.dumps(config))
        with tarfile.open(path, "w:gz") as archive:
            for file in [*(HERE / "testdata/albert_tf").glob("model.*"), path.parent / "albert_config.json"]:
                archive.add(file, f"albert_base/{file.name}")
        paths.append(path)
    models = [Albert.from_pretrained(path) for path in [*paths, *paths]]
    assert [model.num_layers for model in models] == [4, 3, 4, 3]
    expected = Albert.from_pretrained(HERE / "testdata/albert_tf").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in models[0].state_dict().items())


@pytest.mark.parametrize("config", SMALL)
def test_an_odd_tensor_is_an_error_that_names_it(config, tmp_path):
    good = hub_weights(encoder(config))
    some = [name for name in good if re.search(r"key\.weight|LayerNorm\.bias|ffn\.weight|intermediate.*weight|pooler.*bias|word", name)]
    prefix = "albert" if is_albert(config) else "roberta"
    cases = [({**good, "encoder.extra.weight": torch.ones(2)}, "encoder.extra.weight"),
             ({**good, f"{prefix}.{some[0]}": good[some[0]]}, "two tensors"), ({}, "embeddings")]
    for name in some:
        cases += [({n: w for n, w in good.items() if n != name}, name), ({**good, name: good[name][:-1]}, name),
                  ({**good, name: good[name][None]}, name), ({**good, name: good[name].long()}, name),
                  ({**good, name: good[name] * float("nan")}, name)]
    assert len(some) > 5
    for i, (weights, named) in enumerate(cases):
        folder = tmp_path / str(i)
        folder.mkdir()
        with pytest.raises(InputError, match=re.escape(named) if weights else None):
            load(folder_of(folder, config, weights), config)


def test_tensorflow_weights_for_roberta_are_an_error(tmp_path):
    folder = folder_of(tmp_path, SMALL_ROBERTA)
    (folder / "model.safetensors").unlink()
    for file in (HERE / "testdata/albert_tf").glob("model.*"):
        (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="TensorFlow"):
        Roberta.from_pretrained(folder)


@pytest.mark.parametrize("config", SMALL)
def test_a_folder_without_config_or_without_weights_is_an_error(config, tmp_path):
    folder = folder_of(tmp_path, config)
    (folder / "config.json").rename(tmp_path / "away.json")
    with pytest.raises(InputError, match="config.json"):
        load(folder, config)
    (tmp_path / "away.json").rename(folder / "config.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="model.safetensors"):
        load(folder, config)


@pytest.mark.parametrize("config, key, value", [
    *[(SMALL_ALBERT, key, value) for key, value in [
        ("model_type", "bert"), ("position_embedding_type", "relative_key"), ("net_structure_type", 1), ("gap_size", 1),
        ("num_memory_blocks", 1), ("down_scale_factor", 2), ("is_decoder", True), ("add_cross_attention", True), ("hidden_act", "relu"),
        ("num_attention_heads", 5), ("num_hidden_groups", 4), ("pad_token_id", 50)]],
    *[(SMALL_ROBERTA, key, value) for key, value in [
        ("model_type", "xlm-roberta"), ("position_embedding_type", "relative_key"), ("is_decoder", True), ("add_cross_attention", True),
        ("hidden_act", "silu"), ("num_attention_heads", 5), ("pad_token_id", 50), ("max_position_embeddings", 2)]]])
def test_a_config_that_asks_for_another_computation_is_an_error_that_names_the_key(config, key, value, tmp_path):
    with pytest.raises(InputError, match=f"config.json: .*{key}"):
        load(folder_of(tmp_path, config, **{key: value}), config)


@pytest.mark.parametrize("config", SMALL)
def test_keys_that_change_nothing_and_dropout_are_ignored(config, tmp_path):
    plain = load(folder_of(tmp_path, config), config)
    other = load(folder_of(tmp_path, config, hidden_dropout_prob=0.9, attention_probs_dropout_prob=0.9, classifier_dropout_prob=0.9,
                           architectures=["X"], transformers_version="9", bos_token_id=17, torch_dtype="float16"), config)
    batch = random_batch(config, 3, 8)
    assert other.config == config
    assert torch.equal(all_states(plain.train(), *batch)[-1], all_states(other.train(), *batch)[-1])


@pytest.mark.parametrize("name", ["albert-base-v3", "nowhere/albert-base-v2", "", "bert-base-uncased", "tiny", "a\0b", "x" * 5000])
def test_an_unknown_model_lists_the_known_ones(name):
    with pytest.raises(InputError, match="albert-base-v2, .*albert-xxlarge-v1") as caught:
        Albert.from_pretrained(name or "no/such/folder")
    assert "mini" not in str(caught.value).split("known are")[1]
    with pytest.raises(InputError, match="roberta-base, roberta-large"):
        Roberta.from_pretrained(name or "no/such/folder")


@pytest.mark.parametrize("prefix", ["", "albert/", "FacebookAI/"])
def test_a_hub_name_is_fetched_from_the_hub_with_its_published_checksums(prefix, tmp_path, monkeypatch):
    module, config, name = (bert, SMALL_ROBERTA, "roberta-base") if prefix != "albert/" else (albert, SMALL_ALBERT, "albert-base-v2")
    source, asked = folder_of(tmp_path, config), {}

    def fake_download(url, path, sha256=None):
        asked[url] = sha256
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((source / path.name).read_bytes() if (source / path.name).exists() else b"")

    monkeypatch.setenv("PALBERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoint, "download", fake_download)
    monkeypatch.chdir(tmp_path)
    assert load(prefix + name, config).config == config
    owner = "albert" if is_albert(config) else "FacebookAI"
    files = ["config.json", "spiece.model", "model.safetensors"] if is_albert(config) else [
        "config.json", "vocab.json", "merges.txt", "model.safetensors"]
    assert list(asked) == [f"https://huggingface.co/{owner}/{name}/resolve/main/{file}" for file in files]
    assert all(sha256 is not None and len(sha256) == 64 for url, sha256 in asked.items() if not url.endswith("config.json"))


NOT_A_SIZE = st.one_of(st.none(), st.booleans(), st.text(max_size=5), st.lists(st.integers(), max_size=3), st.floats(), st.integers(max_value=-1),
                       st.integers(min_value=2**24), st.just(10**400), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
                       st.integers(100, 900).map(lambda depth: functools.reduce(lambda inner, _: [inner], range(depth), 1)))
NOT_A_RATE = NOT_A_SIZE.filter(lambda value: not (type(value) is float and 0 < value < 1)) | st.integers()


@pytest.fixture(scope="module")
def small_folders(tmp_path_factory):
    return [folder_of(tmp_path_factory.mktemp("small"), config) for config in SMALL]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_config_with_values_of_wrong_type_or_range_is_an_input_error_and_nothing_else(small_folders, data):
    which = data.draw(st.integers(0, 1))
    field = data.draw(st.sampled_from(dataclasses.fields(SMALL[which])))
    bad = data.draw({int: NOT_A_SIZE, float: NOT_A_RATE, str: NOT_A_SIZE.filter(lambda v: v not in ("gelu", "gelu_new"))}[type(field.default)])
    path = small_folders[which] / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(SMALL[which]) | {field.name: bad}))
    with pytest.raises(InputError):
        load(small_folders[which], SMALL[which])
    with pytest.raises(InputError):
        type(SMALL[which]).from_json({field.name: bad})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_size_that_only_the_config_claims_is_refused_without_its_memory(small_folders, data):
    which = data.draw(st.integers(0, 1))
    claims = ["vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "type_vocab_size"]
    claims += ["embedding_size", "inner_group_num", "num_hidden_groups"] if which == 0 else ["num_hidden_layers"]
    changed = {key: data.draw(st.integers(2**12, 2**23)) for key in data.draw(st.sets(st.sampled_from(claims), min_size=1))}
    if "hidden_size" in changed:
        changed["hidden_size"] = changed["hidden_size"] // 3 * 3
    if "num_hidden_groups" in changed:
        changed["num_hidden_layers"] = 2**24 - 1
    path = small_folders[which] / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(SMALL[which]) | changed))

    def normal(weight, *_, **__):
        assert weight.is_meta, "memory was taken before the shapes were compared"

    with mock.patch.object(torch.nn.init, "normal_", normal), pytest.raises(InputError):
        load(small_folders[which], SMALL[which])


# ---- text.py ----

SENTENCES = [
    "The cat sat on the mat, and 3,000 dogs looked on.", "In 1999, 12,345 people paid $3.0, or 7, or 9,9.",
    "``Quoted'' text isn't \"rare\".", "Café naïve résumé Ångström \ufb01ne ½", "", " ", "x", "a" * 300,
    "ΟΔΟΣ σας Σ", "brand-new well-known", "你好，世界 3，", "nul\0inside", "\ufeffbom", "  lead and trail  ",
    "\u05e9\u05dc\u05d5\u05dd \u0627\u0644\u0633\u0644\u0627\u0645 \u0663,", "1, 2, 3, 44, 5,5,5,",
    "\U0001f600 smile \U0001f468\u200d\U0001f469\u200d\U0001f467", "they're we'll I'd it's 'S 'LL 've",
    "tabs\tand\nlines\r\nand\x1cfs\x85nel\xa0nbsp\u2028ls\u3000wide", "\u2460, \u00b2, \u0661, ,,, 1,,",
    "\u0130stanbul \u1e9e \u212a \u2126", "\u2581under\u2581score", "für $5 [brackets] don't_split @home #3",
    "e\ufffd\u0301 e\u200b\u0301 世\u0301", "漢字 kanjiとkana \uac00\ub098",
]


def words(n, seed=0):
    draw = random.Random(seed)
    pool = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(1, 7))) for _ in range(60)]
    pool += ["3,", "12,", "7", "'s", ","]
    return [" ".join(draw.choices(pool, k=draw.randint(1, 14))) for _ in range(n)]


@pytest.fixture(scope="module")
def albert_folder(tmp_path_factory):
    """A folder with a SentencePiece model of a few hundred pieces, some like "3,"."""
    folder = tmp_path_factory.mktemp("albert")
    texts = words(400) + SENTENCES + ["year 3, 12, 3,000 1,234, 9,9,"] * 30
    text_module.train_tokenizer(texts, folder, vocab_size=500)
    return folder


@pytest.fixture(scope="module")
def roberta_folder(tmp_path_factory):
    """vocab.json and merges.txt that grow some of the words of a few sentences from their first byte on."""
    symbols = transformers.models.roberta.tokenization_roberta.bytes_to_unicode()
    parts = re.findall(r" ?\w+|\s+|\S", " ".join(words(60, 3) + SENTENCES))
    parts = ["".join(symbols[byte] for byte in part.encode()) for part in parts if len(part) < 9]
    merges = dict.fromkeys((part[:i], part[i]) for part in parts[::2] for i in range(1, len(part)))
    pieces = [*symbols.values(), *map("".join, merges)]
    pieces = dict.fromkeys(["<s>", "<pad>", "</s>", "<unk>", *pieces, "<mask>"])
    folder = tmp_path_factory.mktemp("roberta")
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    """vocab.txt of the characters and some of the words and halves of words of a few sentences."""
    parts = {part for text in words(60, 3) + SENTENCES for part in re.findall(r"\w+|\S", text + text.lower())}
    pieces = {*parts, *(part[:len(part) // 2] for part in parts), *"".join(parts)} - {""}
    pieces = sorted(pieces | {"##" + piece for piece in pieces if random.Random(piece).random() < 0.9})
    folder = tmp_path_factory.mktemp("bert")
    lines = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, ""]
    (folder / "vocab.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


TOKENIZERS = {
    "albert": {}, "albert with accents": {"keep_accents": True}, "albert with case": {"do_lower_case": False},
    "roberta": {}, "bert": {}, "bert with case": {"do_lower_case": False},
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizers(request, tmp_path_factory):
    """Our tokenizer of a folder, and the slow one that transformers makes of it."""
    kind, settings = request.param.split()[0], TOKENIZERS[request.param]
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copytree(request.getfixturevalue(f"{kind}_folder"), folder, dirs_exist_ok=True)
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    oracle = getattr(transformers, kind.title() + "Tokenizer").from_pretrained(folder)
    return text_module.load_tokenizer(folder), oracle


def oracle_inputs(oracle, a, b, max_length):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids_a = oracle.convert_tokens_to_ids(oracle.tokenize(a))
        ids_b = None if b is None else oracle.convert_tokens_to_ids(oracle.tokenize(b))
        out = oracle.prepare_for_model(ids_a, ids_b, truncation="longest_first", max_length=max_length,
                                       return_token_type_ids=True, verbose=False)
    return out["input_ids"], out["token_type_ids"]


def mnli_rows(folder, rows=40):
    draw, labels = random.Random(0), ["entailment", "neutral", "contradiction"]
    for split in ("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched"):
        names = ["index", "sentence1", "sentence2"] + ["gold_label"] * (not split.startswith("test"))
        lines = [[str(n), *draw.choices(SENTENCES, k=2), draw.choice(labels)][:len(names)] for n in range(rows)]
        write_file(folder, f"MNLI/{split}.tsv", "\n".join("\t".join(" ".join(x.split()) for x in line) for line in [names, *lines]) + "\n")


@pytest.mark.parametrize("kind", ["albert", "roberta"])
def test_a_folder_of_pretrained_weights_is_fine_tuned_on_a_task_with_two_dev_sets(kind, albert_folder, roberta_folder, here, capsys):
    import transformers

    tokenizer = text_module.load_tokenizer(albert_folder if kind == "albert" else roberta_folder)
    small = {"vocab_size": tokenizer.vocab_size, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    config, model = {
        "albert": (transformers.AlbertConfig, transformers.AlbertModel),
        "roberta": (transformers.RobertaConfig, transformers.RobertaModel),
    }[kind]
    special = {} if kind == "albert" else {"pad_token_id": 1, "max_position_embeddings": 140, "type_vocab_size": 1}
    model(config(**small, **special)).save_pretrained(here / "weights")
    tokenizer.save(here / "weights")
    mnli_rows(here / "data")
    flags = ["--task", "mnli", "--model", str(here / "weights"), "--data-dir", str(here / "data"), "--batch-size", "16", "--max-steps", "2", "--device", "cpu"]
    train.main(flags)
    capsys.readouterr()
    evaluation.main(["--json", "--device", "cpu"])
    both = json.loads(capsys.readouterr().out)
    parts = []
    for split in ("dev_matched", "dev_mismatched"):
        evaluation.main(["--json", "--device", "cpu", "--split", split])
        parts.append(json.loads(capsys.readouterr().out))
    assert both["score"] == pytest.approx(np.mean([part["score"] for part in parts]))
    assert both["layers"] == np.sum([part["layers"] for part in parts], axis=0).tolist() and sum(both["layers"]) == 80
    assert set(both["metrics"]) == {"accuracy_dev_matched", "accuracy_dev_mismatched"}
    evaluation.main(["--sweep", "--json", "--device", "cpu"])
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 20
    with pytest.raises(InputError, match="no labels"):
        evaluation.main(["--sweep", "--split", "test", "--device", "cpu"])
    too_long, sentence = {"albert": ("513", "expected a whole number from 8 to 512"), "roberta": ("512", "has positions for 138 tokens")}[kind]
    with pytest.raises(InputError, match=sentence):
        train.main([*flags, "--max-length", too_long])
    text = (here / "weights" / "config.json").read_text()
    (here / "weights" / "config.json").write_text(text.replace(f'"vocab_size": {tokenizer.vocab_size}', '"vocab_size": 9'))
    with pytest.raises(InputError, match=r"word_embeddings\.weight' of shape \(9, .*check that config and weights belong together"):
        train.main([*flags, "--seed", "1"])


ODD_TEXT = st.text(st.one_of(
    st.characters(exclude_categories=("Cs", "Cn")),
    st.sampled_from("abcde  \t\n\x1c\x85\u2028'`,.\"013Σ\u0301\u0130\ufffd"),
), max_size=60)
# What is plain text for us is a token for the oracles; so it has a test of its own.
SPECIAL = re.compile(r"<(unk|pad|mask|s|/s)>|\[(cls|sep|mask|unk|pad)\]", re.IGNORECASE)
ODD_TEXT = ODD_TEXT.filter(lambda text: not SPECIAL.search(text))


@pytest.mark.parametrize("max_length", [128, 64, 16, 5])
def test_ids_and_segments_equal_the_slow_tokenizers_of_transformers(tokenizers, max_length):
    ours, oracle = tokenizers
    texts = SENTENCES + words(30, 1) + [" ".join(words(20, 2))]
    rows = [(a, None) for a in texts] + [(a, b) for a in texts for b in random.Random(a).sample(texts, 4)]
    batch = ours.encode_all(rows, max_length)
    assert max(len(ids) for ids, _ in batch) == max_length
    for (a, b), got in zip(rows, batch):
        assert got == oracle_inputs(oracle, a, b, max_length), ascii((a, b))
        assert got == ours.encode(a, b, max_length)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ODD_TEXT, st.none() | ODD_TEXT, st.integers(4, 40))
def test_ids_and_segments_equal_the_slow_tokenizers_on_any_text(tokenizers, a, b, max_length):
    ours, oracle = tokenizers
    assert ours.encode(a, b, max_length) == oracle_inputs(oracle, a, b, max_length)


@pytest.mark.parametrize("tokenizers", ["albert", "bert", "bert with case"], indirect=True)
def test_ids_equal_the_slow_tokenizers_at_every_character_with_case_marks_or_punctuation(tokenizers):
    ours, oracle = tokenizers
    points = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
    points = [c for c in points if unicodedata.category(c) != "Lo" or ord(c) % 16 == 0]
    for start in range(0, len(points), 64):
        text = "".join(f"a{c}1 {c}{c}. " for c in points[start:start + 64])
        expected = oracle.convert_tokens_to_ids(oracle.tokenize(text))
        assert ours.encode(text, None, 10_000)[0][1:-1] == expected, ascii(points[start])


def test_alberts_pieces_of_a_digit_and_a_comma_are_cut(albert_folder):
    tokenizer = text_module.load_tokenizer(albert_folder)
    assert tokenizer.model.encode("in 12, 7", out_type=str)[-2] == "\u258112,"
    assert tokenizer.tokens(tokenizer.encode("in 12, 7")[0])[-5:-1] == ["\u25811", "2", ",", "\u25817"]


def test_roberta_cuts_words_where_the_published_pattern_does(roberta_folder):
    tokenizer = text_module.load_tokenizer(roberta_folder)
    published = transformers.RobertaTokenizer.from_pretrained(roberta_folder).pat
    points = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
    for start in range(0, len(points), 64):  # before and after a letter, a number, a space and an apostrophe
        text = "".join(f"a{c}1{c} {c}{c}. '{c}s" for c in points[start:start + 64])
        assert tokenizer.words(text) == published.findall(text), ascii(points[start])


def test_bpe_merges_equal_transformers_for_ranks_that_no_training_gives(roberta_folder):
    oracle, draw = transformers.RobertaTokenizer.from_pretrained(roberta_folder), random.Random(0)
    for _ in range(300):
        parts = list("abc") + ["".join(draw.choices("abc", k=draw.randint(2, 4))) for _ in range(12)]
        pairs = list({(draw.choice(parts), draw.choice(parts)) for _ in range(30)})
        draw.shuffle(pairs)
        oracle.bpe_ranks, oracle.cache = {pair: i for i, pair in enumerate(pairs)}, {}
        word = "".join(draw.choices("abc", k=draw.randint(1, 40)))
        assert text_module.merge(list(word), oracle.bpe_ranks) == oracle.bpe(word).split(" ")


@pytest.mark.parametrize("text", [
    "", " ", "x", "word " * 10_000, "x" * 10_000, "\U0001f600" * 50, "\ud800", "a\udfffb\ud83d\ude00",
    "\0", "\r\n", "\ufeff", "\t\"'", "\x85\u2028", "[SEP] [CLS] <pad> </s> <s> <unk> [MASK]", "[sep]",
    "[pad]", "</s>", "<mask>",
])
def test_odd_text_is_encoded_within_the_length_and_never_becomes_a_special_token(tokenizers, text):
    tokenizer, oracle = tokenizers
    for b in (None, "", "x y", text):
        ids, segments = tokenizer.encode(text, b, 64)
        frame, zeros_and_ones = oracle_inputs(oracle, "", None if b is None else "", 64)
        special = {*oracle.all_special_ids} - {oracle.unk_token_id}
        assert [i for i in ids if i in special] == frame
        assert len(ids) == len(segments) <= 64 and ids[-1] == tokenizer.sep_id
        assert segments == sorted(segments) and set(segments) == set(zeros_and_ones)


def test_a_lone_surrogate_is_the_replacement_character_and_an_empty_second_text_is_a_text(tokenizers):
    ours, oracle = tokenizers
    assert ours.encode("a\udfffb \ud800") == oracle_inputs(oracle, "a\ufffdb \ufffd", None, 128)
    assert ours.encode("x", "") == oracle_inputs(oracle, "x", "", 128) != ours.encode("x")


def test_a_special_token_in_a_text_whose_characters_albert_does_not_know_is_unknown(tmp_path):
    text_module.train_tokenizer(["x y z"] * 9, tmp_path)    # unknown characters side by side are one piece
    tokenizer = text_module.AlbertTokenizer(tmp_path / "spiece.model", lower_case=False)
    for token in ("[SEP]", "<pad>", "[CLS]"):
        assert tokenizer.model.encode(token, out_type=str)[-1] == token
        assert tokenizer.tokens(tokenizer.encode(token)[0])[1:] == ["▁", "<unk>", "[SEP]"]


def test_a_text_of_marks_alone_is_encoded_like_the_reference_and_in_linear_time(tokenizers):
    ours, oracle = tokenizers
    marks = "\u0301\u0323\u302e\U0001d165"    # the last two stay where accents go, and have to change places
    for text in (marks * 200, "e" + marks * 20, f"e{marks} {marks}e", "\u1e0b\u0323" * 9):
        assert ours.encode(text) == oracle_inputs(oracle, text, None, 128)
    started = time.perf_counter()
    ours.encode(marks * 50_000)
    assert time.perf_counter() - started < 8    # about 0.5 s; normalize() alone would take 30 s


def test_a_length_without_room_for_the_special_tokens_is_refused(tokenizers):
    ours, oracle = tokenizers
    for b, least in ((None, 2), ("c", oracle.num_special_tokens_to_add(pair=True))):
        assert len(ours.encode("a b c", b, least)[0]) == least
        with pytest.raises(InputError, match=f"expected at least {least}"):
            ours.encode("a b c", b, least - 1)


def test_a_saved_tokenizer_is_the_same_bytes_and_gives_the_same_ids(tokenizers, tmp_path):
    ours, oracle = tokenizers
    (tmp_path / "new").mkdir()
    ours.save(tmp_path / "new")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert ours.files.items() <= saved.items()
    again = text_module.load_tokenizer(tmp_path / "new")
    assert [again.encode(text) for text in SENTENCES] == [ours.encode(text) for text in SENTENCES]
    assert again.tokens(range(9)) == oracle.convert_ids_to_tokens(range(9))


@pytest.mark.parametrize("examples", [["a film", "b"], "a film", [("a", None), "film"]])
def test_encode_all_refuses_strings_where_examples_belong(tokenizers, examples):
    with pytest.raises(TypeError, match=r"\(text, None\)"):
        tokenizers[0].encode_all(examples)


def test_encode_all_takes_any_iterable_and_leaves_the_garbage_collector_as_it_was(tokenizers):
    rows = [("a", None, 1), ("a", "b", 0)]
    assert tokenizers[0].encode_all(iter(rows)) == [tokenizers[0].encode(*row[:2]) for row in rows]
    assert gc.isenabled() and tokenizers[0].encode_all([]) == []


def test_a_trained_tokenizer_has_alberts_special_ids_whole_words_and_is_repeatable(tmp_path):
    texts = [text for example in glue.load("parity", "dev") for text in example[:2]]
    for name in "ab":
        (tmp_path / name).mkdir()
    one, two = (text_module.train_tokenizer(texts, tmp_path / name, 8000, seed=3) for name in "ab")
    assert one.files == two.files and one.vocab_size < 8000
    assert one.tokens(range(5)) == ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"] and one.pad_id == 0
    a, b = glue.load("parity", "test")[0][:2]
    assert len(one.encode(a, b)[0]) == 3 + len(a.split()) + len(b.split())


@pytest.mark.parametrize("texts, size, found", [(["", " "], 8000, "these 0 texts"), (["a b"], 3, "3 pieces")])
def test_texts_that_no_tokenizer_can_be_trained_on_are_refused(texts, size, found, tmp_path):
    with pytest.raises(InputError, match=found):
        text_module.train_tokenizer(texts, tmp_path, size)


# ---- text.py: folders and files ----

@pytest.fixture(params=["albert", "roberta", "bert"])
def tokenizer_folder(request, tmp_path):
    """A folder that a test may change, named after its tokenizer."""
    return Path(shutil.copytree(request.getfixturevalue(f"{request.param}_folder"), tmp_path / request.param))


def test_a_folder_is_known_by_its_files_and_one_without_any_is_refused(tmp_path, albert_folder):
    with pytest.raises(InputError, match="spiece.model.*vocab.json.*vocab.txt"):
        text_module.load_tokenizer(tmp_path)
    shutil.copy(albert_folder / "spiece.model", tmp_path / "30k-clean.model")
    assert isinstance(text_module.load_tokenizer(tmp_path), text_module.AlbertTokenizer)
    with pytest.raises(InputError, match="cannot read .*nowhere"):
        text_module.BertTokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("tokenizer_folder, settings, named", [
    ("albert", {"remove_space": False}, "remove_space"),
    ("albert", {"do_lower_case": "no"}, "do_lower_case"),
    ("albert", {"cls_token": "<s>"}, "cls_token"),
    ("roberta", {"pad_token": {"__type": "AddedToken", "content": "</s>"}}, "pad_token"),
    ("albert", {"sp_model_kwargs": {"enable_sampling": True}}, "sp_model_kwargs"),
    ("roberta", {"add_prefix_space": True}, "add_prefix_space"),
    ("roberta", {"additional_special_tokens": ["[E1]"]}, r"\[E1\]"),
    ("bert", {"strip_accents": False}, "strip_accents"),
    ("bert", {"do_lower_case": False, "strip_accents": True}, "strip_accents"),
    ("bert", {"tokenize_chinese_chars": False}, "tokenize_chinese_chars"),
    ("bert", {"added_tokens_decoder": {"7": {"content": "E1"}, "8": {"content": "[E2]"}}}, r"E1, \[E2\]"),
    ("bert", {"added_tokens_decoder": [1]}, "tokenizer_config.json: not a whole"),
], indirect=["tokenizer_folder"])
def test_settings_that_change_the_ids_in_another_way_are_refused_by_name(tokenizer_folder, settings, named):
    (tokenizer_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=named):
        text_module.load_tokenizer(tokenizer_folder)


def test_added_tokens_are_refused_by_name(tokenizer_folder):
    (tokenizer_folder / "added_tokens.json").write_text('{"covid": 999, "[MASK]": 4, "<mask>": 4}')
    with pytest.raises(InputError, match="covid"):
        text_module.load_tokenizer(tokenizer_folder)


def test_settings_that_transformers_writes_by_itself_change_nothing(tokenizer_folder):
    ours = text_module.load_tokenizer(tokenizer_folder)
    kind = getattr(transformers, tokenizer_folder.name.title() + "Tokenizer")
    kind.from_pretrained(tokenizer_folder).save_pretrained(tokenizer_folder)
    assert (tokenizer_folder / "tokenizer_config.json").exists()
    again = text_module.load_tokenizer(tokenizer_folder)
    assert [again.encode(text) for text in SENTENCES] == [ours.encode(text) for text in SENTENCES]


@pytest.mark.parametrize("tokenizer_folder", ["roberta"], indirect=True)
def test_robertas_vocabulary_of_2019_leaves_out_three_ids(tokenizer_folder):
    vocab = json.loads((tokenizer_folder / "vocab.json").read_text())
    last = max(vocab.values())
    (tokenizer_folder / "vocab.json").write_text(json.dumps(vocab | {"<mask>": last + 3}))
    tokenizer = text_module.load_tokenizer(tokenizer_folder)
    assert tokenizer.vocab_size == last + 4 and tokenizer.tokens([last, last + 3]) == ["<unk>", "<mask>"]
    (tokenizer_folder / "vocab.json").write_text(json.dumps(vocab | {"<mask>": last + 20}))
    with pytest.raises(InputError, match="vocab.json: not a whole .*at most 10 left out.*get it again"):
        text_module.load_tokenizer(tokenizer_folder)


@pytest.fixture(params=["spiece.model", "vocab.json", "merges.txt", "vocab.txt"])
def damaged_tokenizer(request, tmp_path):
    """The bytes of a small file, and a function of other bytes: True if they are refused by one sentence that
    names the file, False if they make a tokenizer that works."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *map(chr, range(33, 127)), "ab", "abc", "\u0120ab"]
    files = {"vocab.json": json.dumps({piece: i for i, piece in enumerate(pieces)}).encode(),
             "merges.txt": "#version: 0.2\na b\nab c\n\u0120 ab\n".encode()}
    if request.param == "vocab.txt":
        files = {"vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\ncaf\u00e9\n##b\n".encode()}
    if request.param == "spiece.model":
        files = text_module.train_tokenizer(["a bad cab 3, bead", "dab 3, cab"] * 5, tmp_path, 30).files
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)

    def refused(data):
        (tmp_path / request.param).write_bytes(data)
        try:
            tokenizer = text_module.load_tokenizer(tmp_path)
            for text in ("the cat, 3,000", "caf\u00e9 \u4e2d \U0001f600 a\0b", ""):
                tokenizer.tokens(tokenizer.encode(text, "x")[0])
        except InputError as error:
            assert request.param in str(error) and "\n" not in str(error) and len(str(error)) < 500
            return True
        return False

    return files[request.param], refused


def test_a_tokenizers_file_cut_at_any_byte_is_refused_or_works(damaged_tokenizer):
    whole, refused = damaged_tokenizer
    works = [n for n in range(len(whole)) if not refused(whole[:n])]
    assert len(works) < len(whole) / 2 and (b"<pad>\x15" in whole or all(whole[n - 1] == 10 for n in works))


def test_a_tokenizers_file_with_flipped_bits_is_refused_or_works(damaged_tokenizer):
    whole, refused = damaged_tokenizer
    draw, count = random.Random(0), 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 3))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        count += refused(bytes(data))
    assert count > 50


def test_a_tokenizers_file_of_other_content_is_refused(damaged_tokenizer):
    whole, refused = damaged_tokenizer
    bad = [
        b"", b"\0" * 100, b"\xff" * 1000, b"<html>not found</html>", b"[]", b"null", b"[" * 100_000, b"\n",
        b"1" * 10_000, b'{"a": true}', b'{"<s>": 0, "a": 1.5}', b'{"<s>": NaN}', b'{"<s>": 9999999999999999}',
        b"a b\n", b"#version: 0.2\na b", b"#version: 0.2\na b c\n", b"#version: 0.2\na\xff b\n",
        b"#version: 0.2\n\n", b"#version: 0.2\na z\n", b"\x0a\xff\xff\x7f", whole + b"x", b"\xff" + whole,
        whole.replace(b"<mask>", b"<s>"), whole.replace(b"[MASK]", b"[SEP]") + b"[SEP]\n",
    ]
    assert [data[:40] for data in bad if data != whole and not refused(data)] == []


# ---- glue.py: files ----

# Rows of each test set, as FACTS and GLUE's own pages state them, written down a second time on purpose.
GLUE_TEST_ROWS = {"CoLA": 1063, "SST-2": 1821, "MRPC": 1725, "STS-B": 1379, "QQP": 390965, "MNLI-m": 9796,
                  "MNLI-mm": 9847, "QNLI": 5463, "RTE": 3000, "WNLI": 146, "AX": 1104}


def tsv(text):
    """A table in one line: "|" is a tab and "/" ends a row."""
    return text.replace("|", "\t").replace("/", "\n")


MRPC_HEADER = tsv("\ufeffQuality|#1 ID|#2 ID|#1 String|#2 String/")
LABELLED = {    # a labelled file of each task as GLUE writes it, and its labels; its texts are a, b, c and d
    "cola": ("source|1|*|a/source|0||c/", (1, 0)),
    "sst2": ("sentence|label/a|1/c|0/", (1, 0)),
    "mrpc": (MRPC_HEADER + "1|1|2|a|b/0|3|4|c|d/", (1, 0)),
    "stsb": ("index|genre|sentence1|sentence2|score/0|g|a|b|5.000/1|g|c|d|0.8/", (5.0, 0.8)),
    "qqp": ("id|question1|question2|is_duplicate\r/1|a|b|0\r/1|c|d|1\r/", (0, 1)),
    "mnli": ("index|sentence1|sentence2|label1|gold_label/0|a|b|neutral|contradiction/"
             "0|c|d|neutral|entailment/", (2, 0)),
    "qnli": ("index|question|sentence|label/0|a|b|entailment/0|c|d|not_entailment/", (0, 1)),
    "rte": ("index|sentence1|sentence2|label/0|a|b|entailment/0|c|d|not_entailment/", (0, 1)),
    "wnli": ("index|sentence1|sentence2|label/0|a|b|0/0|c|d|1/", (0, 1)),
}


def write_file(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


@contextlib.contextmanager
def one_sentence(*patterns):
    """What runs inside must end in an InputError of one short sentence in which every pattern is found."""
    with pytest.raises(InputError) as error:
        yield
    said = str(error.value)
    assert "\n" not in said and len(said) < 600 and all(re.search(p, said) for p in patterns), said


@pytest.mark.parametrize("name", LABELLED)
def test_every_task_is_read_from_the_layout_of_the_zips(name, tmp_path):
    task, (text, labels) = glue.TASKS[name], LABELLED[name]
    expected = [(a, b if task.pair else None, label) for a, b, label in zip("ac", "bd", labels)]
    labelled = ("train", *task.dev_splits)
    paths = [write_file(tmp_path, f"{task.folder}/{split}.tsv", tsv(text)) for split in labelled]
    for split in labelled:
        for folder in (tmp_path, tmp_path / task.folder):    # the task's own folder will do
            assert glue.load(name, split, folder) == expected
    assert glue.sources(name, tmp_path) == paths
    for split in task.test_splits:
        table = tsv("|".join(["index", *task.columns]) + ("/0|a|b/" if task.pair else "/0|a/"))
        write_file(tmp_path, f"{task.folder}/{split}.tsv", table)
        assert glue.load(name, split, tmp_path) == [("a", "b" if task.pair else None, None)]


def test_the_table_of_tasks_says_what_glue_says():
    tasks = glue.TASKS
    assert " ".join(tasks) == "cola sst2 mrpc stsb qqp mnli qnli rte wnli ax parity"
    assert [task.num_labels for task in tasks.values()] == [2, 2, 2, 1, 2, 3, 2, 2, 2, 3, 2]
    assert tasks["mnli"].dev_splits == ("dev_matched", "dev_mismatched") and tasks["ax"].splits == ("test",)
    assert tasks["mnli"].labels == tasks["ax"].labels == ("entailment", "neutral", "contradiction")
    assert tasks["rte"].labels == tasks["qnli"].labels == ("entailment", "not_entailment")
    rows = {file[:-4]: tasks[name].rows[split] for file, (name, split) in glue.SUBMISSION.items()}
    assert rows == GLUE_TEST_ROWS


@pytest.mark.parametrize("ids", ["mrpc_dev_ids.tsv", "dev_ids.tsv"])
def test_mrpc_is_made_from_the_raw_files_and_the_dev_ids(ids, tmp_path):
    rows = [f"{i % 2}\t{i}\t{i + 100}\ta{i} \"\tb{i}\r\n" for i in range(6)]
    write_file(tmp_path, "MRPC/msr_paraphrase_train.txt", MRPC_HEADER + "".join(rows))
    write_file(tmp_path, "MRPC/msr_paraphrase_test.txt", MRPC_HEADER + "".join(rows[:3]))
    write_file(tmp_path, f"MRPC/{ids}", tsv("2|102/5|105/2|102/"))    # an id twice is the id
    assert glue.load("mrpc", "dev", tmp_path) == [('a2 "', "b2", 0), ('a5 "', "b5", 1)]
    assert [row.text_b for row in glue.load("mrpc", "train", tmp_path)] == ["b0", "b1", "b3", "b4"]
    assert glue.load("mrpc", "test", tmp_path)[0] == ('a0 "', "b0", None)    # its labels are not GLUE's
    assert len(glue.sources("mrpc", tmp_path)) == 3
    for damage, said in ("2|102/7|999/", "1 of the 2 dev ids"), ("2 102/", "1 of the 1"), ("", "0 of the 0"):
        write_file(tmp_path, f"MRPC/{ids}", tsv(damage))
        for split in ("train", "dev"):
            with one_sentence(said, "msr_paraphrase_train"):
                glue.load("mrpc", split, tmp_path)


@pytest.mark.parametrize("name", ["AX.tsv", "AX/AX.tsv", "diagnostic/diagnostic.tsv", "diagnostic.tsv"])
def test_ax_is_found_under_each_of_its_names(name, tmp_path):
    write_file(tmp_path, name, tsv("index|sentence1|sentence2/0|a|b"))
    assert glue.load("ax", "test", tmp_path) == [("a", "b", None)]


def test_lines_end_at_newlines_alone_and_quotes_and_later_boms_are_text(tmp_path):
    texts = ['"open', "nel\x85 ls\u2028 ff\x0c vt\x0b fs\x1c cr\r.", "\ufeffbom", "''", '""']
    rows = "\n\n".join(f"{text}\t1" for text in texts)
    write_file(tmp_path, "SST-2/train.tsv", "\ufeffsentence\tlabel\r\n" + rows)
    assert [row.text_a for row in glue.load("sst2", "train", tmp_path)] == texts


def test_rows_with_too_few_or_too_many_fields_are_dropped_with_a_count(tmp_path, capsys):
    rows = "0|a|b|entailment/1|a/2|a|b|c|entailment/3|a|b|/3|a|b|not_entailment/"
    path = write_file(tmp_path, "RTE/train.tsv", tsv("index|sentence1|sentence2|label/" + rows))
    assert len(glue.load("rte", "train", tmp_path)) == 2
    message = capsys.readouterr().err
    assert "dropped 3 of 5" in message and "line 3" in message and str(path) in message
    write_file(tmp_path, "RTE/test.tsv", tsv("index|sentence1|sentence2/0|a|b|stray/"))
    assert glue.load("rte", "test", tmp_path) == [("a", "b", None)] and not capsys.readouterr().err


@pytest.mark.parametrize("task, data, expected", [
    *(("sst2", data, "no column 'sentence'")
      for data in (b"", b"\xef\xbb\xbf", b"\n\n", b"\0" * 500, b"<html>" * 1000)),
    ("sst2", b"sentence,label\na,1\n", "no column"), ("sst2", b"sentence\tlabel\n", "no usable row"),
    ("sst2", b"text\tlabel\na\t1\n", "'sentence' in 'text, label'"),
    ("sst2", b"sentence\tlabel\na\nb\n", "no usable row, line 3"),
    ("sst2", b"sentence\tlabel\n\xff\xfe\t1\n", "UTF-8.*line 2"),
    ("sst2", "sentence\tlabel\na\t1\n".encode("utf-16"), "UTF-8"),
    *(("sst2", f"sentence\tlabel\na\t{label}\n", "label.*0, 1.*line 2")
      for label in ("2", "b c", "9" * 1000, "\xb2")),
    *(("stsb", f"sentence1\tsentence2\tscore\na\tb\t{label}\n", f"{label}.*from 0 to 5.*line 2")
      for label in ("5.1", "-0.1", "nan", "inf", "one", "1e400"))])
def test_a_file_that_is_no_task_file_is_one_sentence_with_path_and_fault(task, data, expected, tmp_path):
    path = write_file(tmp_path, f"{glue.TASKS[task].folder}/dev.tsv", data)
    with one_sentence(expected, re.escape(str(path)), "again"):
        glue.load(task, "dev", tmp_path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_task_file_gives_rows_or_an_input_error(tmp_path_factory, data):
    name = data.draw(st.sampled_from(sorted(LABELLED)))
    text = bytearray(tsv(LABELLED[name][0]).encode("utf-8"))
    for place in data.draw(st.lists(st.integers(0, len(text) - 1), max_size=3)):
        text[place] = data.draw(st.integers(0, 255))
    text = bytes(text[:data.draw(st.integers(0, len(text)))])
    path = write_file(tmp_path_factory.mktemp("damaged"), f"{glue.TASKS[name].folder}/train.tsv", text)
    try:
        assert glue.load(name, "train", path.parent)
    except InputError as error:
        assert "\n" not in str(error) and str(path) in str(error)


@pytest.mark.parametrize("task, split, expected", [
    ("mnli", "dev", "dev_matched, dev_mismatched"), ("mnli", "test", "test_matched"), ("ax", "dev", "test"),
    ("parity", "valid", "train, dev, test"), ("sst2", "", "train, dev, test"), ("SST-2", "dev", "sst2"),
    ("nope", "dev", "cola.*parity"), ("rte", "dev", r"RTE/dev\.tsv.*--data-dir.*network")])
def test_wrong_names_and_missing_files_are_one_sentence_that_says_what_is(task, split, expected, tmp_path):
    for folder in (tmp_path, tmp_path / "none", "a\0b"):
        with one_sentence(expected):
            glue.load(task, split, folder)
    assert glue.sources("parity", tmp_path) == glue.sources("rte", tmp_path) == []


@pytest.fixture
def fake_download(tmp_path, monkeypatch):
    """Takes the place of the network and of the cache, and gives the calls (url, sha256, size) so far."""
    calls = []

    def download(url, path, sha256=None, size=None):
        calls.append((url, sha256, size))
        write_file(path.parent, path.name, tsv(LABELLED["mrpc" if "msr" in path.name else "rte"][0]))
        if "dev_ids" in path.name:
            path.write_text("1\t2\n")
        if path.suffix == ".zip":
            with zipfile.ZipFile(path, "w") as archive:
                for name in ("train.tsv", "dev.tsv", "test.tsv", "original/big.jsonl"):
                    archive.writestr(f"QNLI/{name}", tsv(LABELLED["qnli"][0]))

    monkeypatch.setenv("PALBERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(glue, "download", download)
    return calls


def test_without_data_dir_a_zip_is_downloaded_once_and_unpacked(fake_download, tmp_path):
    for split, labels in (("train", [0, 1]), ("dev", [0, 1]), ("test", [None, None])):
        assert [row.label for row in glue.load("qnli", split)] == labels
    assert [path.name for path in glue.sources("qnli")] == ["train.tsv", "dev.tsv", "test.tsv"]
    assert fake_download == [("https://dl.fbaipublicfiles.com/glue/data/QNLIv2.zip",
                              "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5", 10627589)]
    assert not list((tmp_path / "cache").rglob("*.jsonl"))


def test_ax_and_mrpc_are_downloaded_as_single_files(fake_download):
    assert [row.label for row in glue.load("ax", "test")] == [None, None]
    assert glue.load("mrpc", "dev") == [("a", "b", 1)] and glue.load("mrpc", "train") == [("c", "d", 0)]
    assert len(glue.load("mrpc", "test")) == 2
    assert {url.removeprefix("https://dl.fbaipublicfiles.com/") for url, _, _ in fake_download} == {
        "glue/data/AX.tsv", "glue/data/mrpc_dev_ids.tsv", "senteval/senteval_data/msr_paraphrase_train.txt",
        "senteval/senteval_data/msr_paraphrase_test.txt"}


@pytest.mark.parametrize("name", [name for name in glue.TASKS if name != "parity"])
def test_without_a_network_the_sentence_says_so_and_names_data_dir(name, tmp_path, monkeypatch):
    def download(url, path, sha256, size):
        assert len(sha256) == 64 and size > 6000
        raise InputError(f"no connection to {url}")

    monkeypatch.setenv("PALBERT_CACHE", str(tmp_path))
    monkeypatch.setattr(glue, "download", download)
    with one_sentence("no connection to https://", f"--data-dir that holds {glue.TASKS[name].folder}/"):
        glue.load(name, glue.TASKS[name].splits[0])


# ---- glue.py: own data ----

COLOURS = tsv("label|sentence/red|fire/green|grass/blue|sea/red|rose/")
HEIGHTS = tsv("sentence1|sentence2|score/a|b|-1.5/c|d|70/")


def own_folder(folder, **files):
    for split, text in files.items():
        write_file(folder, f"{split}.tsv", text)
    return str(folder)


def test_a_folder_of_words_as_labels_is_a_task_with_the_training_files_classes_sorted(tmp_path):
    dev, test = tsv("sentence|label/sky|blue/"), tsv("sentence/leaf//mud/")
    folder = own_folder(tmp_path, train=COLOURS, dev=dev, test=test)
    task = glue.get_task(folder)
    assert (task.labels, task.num_labels, task.pair) == (("blue", "green", "red"), 3, False)
    assert (task.metrics, task.dev_splits, task.test_splits) == (("accuracy",), ("dev",), ("test",))
    assert glue.load(folder, "train")[:2] == [("fire", None, 2), ("grass", None, 1)]
    assert glue.load(task, "dev") == [("sky", None, 0)] and glue.get_task(task) is task
    assert glue.load(folder, "test") == [("leaf", None, None), ("", None, None), ("mud", None, None)]
    assert [path.name for path in glue.sources(folder)] == ["train.tsv", "dev.tsv", "test.tsv"]
    assert glue.score(folder, [0, 1, 2], [0, 1, 1])["score"] == pytest.approx(200 / 3)
    own_folder(tmp_path, test=COLOURS)    # a test file may have labels
    assert [row.label for row in glue.load(folder, "test")] == [2, 1, 0, 2]


def test_a_folder_with_scores_is_a_regression_on_pairs(tmp_path):
    folder = own_folder(tmp_path, train=HEIGHTS, dev=HEIGHTS)
    task = glue.get_task(folder)
    assert (task.labels, task.num_labels, task.pair, task.test_splits) == (None, 1, True, ())
    assert glue.load(folder, "dev") == [("a", "b", -1.5), ("c", "d", 70.0)]
    assert set(glue.score(folder, [1, 2], [1, 3])) == {"pearson", "spearman", "score"}


@pytest.mark.parametrize("train, dev, split, expected", [
    (COLOURS, None, "train", "unknown task.*train.tsv and dev.tsv"), (None, None, "train", "unknown task"),
    (COLOURS, tsv("sentence|label/sky|grey/"), "dev", "dev.tsv.*'grey'.*blue, green, red.*line 2"),
    (tsv("sentence|label/a|x/b|x/"), COLOURS, "train", r"train.tsv.*\['x'\].*two"),
    (tsv("text|label/a|x/"), COLOURS, "train", "no column 'sentence'"), ("", "", "dev", "no column"),
    (tsv("sentence1|label/a|x/"), COLOURS, "train", "no column 'sentence2'"),
    (tsv("sentence|class/a|x/"), COLOURS, "train", "no column 'label'"), (COLOURS, HEIGHTS, "dev", "column"),
    *((HEIGHTS, HEIGHTS.replace("70", word), "dev", f"'{word}'.*finite number.*line 3")
      for word in ("nan", "inf", "tall", "1e999"))])
def test_own_data_that_is_wrong_is_one_sentence(train, dev, split, expected, tmp_path):
    files = {name: text for name, text in (("train", train), ("dev", dev)) if text is not None}
    with one_sentence(expected):
        glue.load(own_folder(tmp_path / "own", **files), split)


@pytest.mark.parametrize("task, text, expected", [
    ("sst2", "sentence|label/fine|nobody knows//bad/", [("fine", None, None), ("bad", None, None)]),
    ("sst2", "sentence/fine//bad", [("fine", None, None), ("", None, None), ("bad", None, None)]),
    ("qqp", "question1|question2/why|how", [("why", "how", None)]),
    ("mrpc", "sentence2|id|sentence1/b|7|a\r/", [("a", "b", None)])])
def test_inputs_are_read_in_order_by_the_tasks_own_columns_or_the_plain_ones(task, text, expected, tmp_path):
    assert list(glue.read_inputs(write_file(tmp_path, "in.tsv", tsv(text)), task)) == expected


@pytest.mark.parametrize("text, expected", [
    ("text\na\n", "'sentence1'"), (b"sentence1\tsentence2\n\xff\tb\n", "UTF-8.*line 2"),
    ("sentence1\tsentence2\na\tb\nc\n", "line 3")])
def test_an_input_without_a_text_is_one_sentence(text, expected, tmp_path):
    with one_sentence(expected, "in.tsv"):
        list(glue.read_inputs(write_file(tmp_path, "in.tsv", text), "rte"))


def test_inputs_are_read_no_further_than_they_are_asked_for(tmp_path):
    path = write_file(tmp_path, "in.tsv", b"sentence\n" + b"a\n" * 100_000 + b"\xff")
    assert next(glue.read_inputs(path, "sst2")) == ("a", None, None)    # the damage at the end is not reached


# ---- glue.py: parity and batches ----

def test_parity_is_balanced_at_every_length_disjoint_and_the_same_every_time():
    splits = {split: glue.load("parity", split) for split in ("train", "dev", "test")}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 30000, "dev": 1000, "test": 1000}
    assert len({row[:2] for rows in splits.values() for row in rows}) == 32000
    by_length = {}
    for rows in splits.values():
        assert sum(row.label for row in rows) * 2 == len(rows)
        for row in rows:
            assert row.label == (glue.negations(row.text_b) % 2 == 0) and row.text_b.endswith(row.text_a)
            by_length.setdefault(len(row.text_b.split()), []).append(row.label)
    assert {glue.negations(row.text_b) for row in splits["train"]} == {0, 1, 2, 3} and len(by_length) == 3
    for labels in by_length.values():    # no length tells the class: within four standard errors of even
        assert abs(np.mean(labels) - 0.5) < 4 * 0.5 / math.sqrt(len(labels))
    assert glue.parity("dev") == splits["dev"] and glue.parity("dev", seed=1) != splits["dev"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 128), max_size=400), st.integers(1, 40), st.integers(0, 3))
def test_buckets_hold_every_row_once_in_full_batches_but_one(lengths, batch_size, seed):
    for generator in (None, torch.Generator().manual_seed(seed)):
        batches = glue.buckets(lengths, batch_size, generator)
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
        assert sum(len(batch) != batch_size for batch in batches) <= 1 and all(batches)
    flat = [lengths[row] for batch in glue.buckets(lengths, batch_size) for row in batch]
    assert flat == sorted(lengths, reverse=True)


def test_buckets_depend_on_the_generator_alone_change_each_epoch_and_pad_little():
    lengths = np.random.default_rng(0).integers(5, 128, 5000)
    one, two = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    first, second = glue.buckets(lengths, 32, one), glue.buckets(lengths, 32, one)
    assert first != second
    assert first == glue.buckets(lengths, 32, two) and second == glue.buckets(lengths, 32, two)
    assert sum(len(batch) * max(lengths[row] for row in batch) for batch in first) < 1.1 * lengths.sum()
    means = [lengths[batch].mean() for batch in first]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3    # short ones come in between
    same = glue.buckets([7] * 200, 10, torch.Generator().manual_seed(0))
    assert all(max(batch) - min(batch) > 20 for batch in same)    # equal lengths are shuffled
    with one_sentence("batch_size"):
        glue.buckets([1], 0)


# ---- glue.py: scores and submissions ----

def check_scores(task, predictions, labels):
    """score() against scikit-learn and SciPy, whose NaN is 0 here."""
    from sklearn import metrics

    oracles = {"matthews": metrics.matthews_corrcoef, "accuracy": metrics.accuracy_score,
               "f1": functools.partial(metrics.f1_score, zero_division=0),
               "pearson": lambda x, y: scipy.stats.pearsonr(x, y)[0] if len(x) > 1 else 0,
               "spearman": lambda x, y: scipy.stats.spearmanr(x, y)[0] if len(x) > 1 else 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {name: oracles[name](labels, predictions) for name in glue.TASKS[task].metrics}
    expected = {name: 100 * np.nan_to_num(value) for name, value in found.items()}
    expected["score"] = np.mean(list(expected.values()))
    assert glue.score(task, predictions, labels) == pytest.approx(expected, abs=1e-7)


@settings(max_examples=250, deadline=None)
@given(st.data(), st.sampled_from([name for name in glue.TASKS if name != "stsb"]), st.integers(1, 30))
def test_class_metrics_equal_scikit_learns(data, task, n):
    kinds = st.sampled_from([list(range(glue.TASKS[task].num_labels)), [0], [1]])
    rows = [data.draw(st.lists(st.sampled_from(data.draw(kinds)), min_size=n, max_size=n)) for _ in range(2)]
    check_scores(task, *rows)


@settings(max_examples=250, deadline=None)
@given(st.data(), st.integers(1, 30))
def test_regression_metrics_equal_scipys_with_ties_and_constants(data, n):
    kinds = [st.floats(-10, 10).map(lambda x: round(x, 3)), st.integers(0, 3).map(float), st.just(2.5)]
    rows = [data.draw(st.lists(data.draw(st.sampled_from(kinds)), min_size=n, max_size=n)) for _ in range(2)]
    check_scores("stsb", *rows)


def test_scores_by_hand_and_of_large_or_extreme_input():
    assert glue.score("mrpc", [1, 1, 0, 0], [1, 0, 1, 0]) == {"accuracy": 50.0, "f1": 50.0, "score": 50.0}
    assert glue.score("cola", [1, 0], [0, 1])["score"] == pytest.approx(-100)
    assert glue.score("stsb", torch.tensor([[1.0], [2.0]]), torch.tensor([0, 5]))["score"] > 99.999
    for size in (1e-200, 1e200, 4e307):
        assert glue.score("stsb", [size, 2 * size, 4 * size], [1, 2, 4])["pearson"] == pytest.approx(100)
    draw = np.random.default_rng(0)
    check_scores("qqp", draw.integers(0, 2, 390_965), draw.integers(0, 2, 390_965))
    check_scores("cola", draw.integers(0, 2, 100_000), draw.integers(0, 2, 100_000))
    check_scores("stsb", draw.normal(size=20_000), draw.integers(0, 26, 20_000) / 5)


@pytest.mark.parametrize("task, predictions, labels", [
    ("sst2", [1], [1, 0]), ("sst2", [], []), ("sst2", [2], [1]), ("sst2", [-1], [1]), ("sst2", [1], [None]),
    ("sst2", [0.5], [1]), ("sst2", [[0, 1]], [1]), ("sst2", ["a"], [1]), ("nope", [1], [1]), ("sst2", 1, 1),
    *(("stsb", [1.0, bad], [1, 2]) for bad in (math.nan, math.inf, -math.inf, 10**400)),
    *(("stsb", [1, 2], [1.0, bad]) for bad in (math.nan, math.inf)), ("sst2", [math.nan], [1]),
    ("sst2", [1], [math.nan])])
def test_what_is_no_prediction_or_no_label_is_never_scored(task, predictions, labels):
    with one_sentence("."):
        glue.score(task, predictions, labels)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_answers_are_the_best_class_or_the_value_and_never_come_from_logits_that_are_not_finite(bad):
    assert glue.answers(torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, -2.0]])).tolist() == [1, 0]
    assert glue.answers(torch.tensor([[0.5], [-2.0]])).tolist() == [0.5, -2.0]
    for logits in ([[1.0, 2.0], [bad, 0.0]], [[bad], [1.0]]):
        with one_sentence("NaN or infinite", "--lr"):
            glue.answers(torch.tensor(logits))


def check_submission(path, expected_names):
    """What GLUE's server wants, from its description alone: names, header, index and allowed values."""
    allowed = {"MNLI-m": {"entailment", "neutral", "contradiction"}, "QNLI": {"entailment", "not_entailment"}}
    allowed |= {"MNLI-mm": allowed["MNLI-m"], "AX": allowed["MNLI-m"], "RTE": allowed["QNLI"]}
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.namelist() == [f"{name}.tsv" for name in expected_names]
        for name in expected_names:
            header, *lines, last = archive.read(f"{name}.tsv").decode("ascii").split("\n")
            assert header == "index\tprediction" and last == "" and len(lines) == GLUE_TEST_ROWS[name]
            for index, line in enumerate(lines):
                number, prediction = line.split("\t")
                assert number == str(index)
                if name == "STS-B":
                    assert re.fullmatch(r"[0-5]\.\d{3}", prediction) and 0 <= float(prediction) <= 5
                else:
                    assert prediction in allowed.get(name, {"0", "1"})


def test_a_submission_is_what_glues_server_takes_and_the_same_bytes_every_time(tmp_path):
    draw, predictions = np.random.default_rng(0), {}
    for name, split in glue.SUBMISSION.values():
        n, classes = glue.TASKS[name].rows[split], glue.TASKS[name].num_labels
        predictions[name, split] = draw.normal(2.5, 3, n) if classes == 1 else draw.integers(0, classes, n)
    assert glue.write_submission(tmp_path / "a.zip", predictions) == []
    check_submission(tmp_path / "a.zip", list(GLUE_TEST_ROWS))
    glue.write_submission(tmp_path / "b.zip", dict(reversed(predictions.items())))
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    some = {key: predictions[key] for key in [("mrpc", "test"), ("ax", "test"), ("stsb", "test")]}
    some["rte", "test"] = np.r_[[0, 1], np.zeros(2998)]
    missing = " ".join(glue.write_submission(tmp_path / "c.zip", some))
    assert missing == "CoLA.tsv SST-2.tsv QQP.tsv MNLI-m.tsv MNLI-mm.tsv QNLI.tsv WNLI.tsv"
    check_submission(tmp_path / "c.zip", ["MRPC", "STS-B", "RTE", "AX"])
    with zipfile.ZipFile(tmp_path / "c.zip") as archive:
        assert archive.read("RTE.tsv").startswith(b"index\tprediction\n0\tentailment\n1\tnot_entailment\n")


@pytest.mark.parametrize("predictions", [
    {("wnli", "test"): np.zeros(145)}, {("wnli", "test"): np.full(146, 2)}, {("nope", "test"): np.zeros(1)},
    {("wnli", "test"): np.full(146, 0.5)}, {("wnli", "dev"): np.zeros(71)}, {("mnli", "test"): np.zeros(9)},
    {("wnli", "test"): np.zeros(146), ("stsb", "test"): np.full(1379, np.nan)}, {},
    {("parity", "test"): np.zeros(1000)}])
def test_a_wrong_submission_is_refused_and_leaves_the_file_there(predictions, tmp_path):
    goal = write_file(tmp_path, "a.zip", b"old")
    with one_sentence("."):
        glue.write_submission(goal, predictions)
    assert goal.read_bytes() == b"old"


TESTDATA = HERE / "testdata"
TF_PREFIX = TESTDATA / "albert_tf" / "model.ckpt-best"
fuzzing = settings(max_examples=150, deadline=None, derandomize=True,
                   suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
flips = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), min_size=1, max_size=4)


def make_tf():
    """testdata/make_tf_checkpoint.py as a module (it needs TensorFlow only to write)."""
    spec = importlib.util.spec_from_file_location("make_tf_checkpoint", TESTDATA / "make_tf_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refused(function, *arguments, **keywords):
    """Calls; the result must be an InputError of one sentence, which is returned."""
    with pytest.raises(InputError) as caught:
        function(*arguments, **keywords)
    message = str(caught.value)
    assert 20 < len(message) < 1500 and "\n" not in message and "Traceback" not in message
    return message


def either(function, *arguments):
    """Calls; an InputError and a result are both fine, any other exception or a warning is not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return function(*arguments)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500
        return None


def mutated(data, changes):
    data = bytearray(data)
    for position, change in changes:
        data[position % len(data)] ^= change
    return bytes(data)


def put(path, data):
    path.write_bytes(data)
    return path


def some_tensors():
    random = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(3, 4, generator=random), "t": torch.randn(4, 3, generator=random).t(), "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 7), "half": torch.randn(5, generator=random).half(),
        "brain": torch.randn(2, 2, generator=random).bfloat16(), "double": torch.randn(3, generator=random).double(),
        "i64": torch.tensor([-1, 1 << 40]), "i32": torch.tensor([-5], dtype=torch.int32),
        "i16": torch.tensor([-5, 6], dtype=torch.int16), "i8": torch.tensor([-5, 6, 7], dtype=torch.int8),
        "u8": torch.tensor([255], dtype=torch.uint8), "bool": torch.tensor([True, False, True]),
        "strided": torch.arange(10.)[::3],
    }


def same(left, right):
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and left[k].shape == right[k].shape and torch.equal(left[k], right[k]) for k in left)


# ---- safetensors

def header_file(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def test_safetensors_of_every_dtype_survive_a_round_trip_and_the_safetensors_package_agrees(tmp_path):
    tensors = some_tensors() | {
        "u16": torch.tensor([65535], dtype=torch.uint16), "u32": torch.tensor([1 << 31], dtype=torch.uint32),
        "u64": torch.tensor([7], dtype=torch.uint64)}
    checkpoint.write_safetensors(tmp_path / "own", tensors, {"format": "pt"})
    assert same(checkpoint.read_safetensors(tmp_path / "own"), tensors)
    assert same(safetensors.torch.load_file(tmp_path / "own"), {k: v.contiguous() for k, v in tensors.items()})
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "theirs")
    assert same(checkpoint.read_safetensors(tmp_path / "theirs"), tensors)
    f8 = {"a": torch.tensor([1., -2.]).to(torch.float8_e4m3fn), "b": torch.tensor([1., -2.]).to(torch.float8_e5m2)}
    checkpoint.write_safetensors(tmp_path / "f8", f8)
    back = checkpoint.read_safetensors(tmp_path / "f8")
    assert all(torch.equal(back[k].float(), f8[k].float()) and back[k].dtype == f8[k].dtype for k in f8)


def test_the_same_tensors_give_the_same_safetensors_bytes_in_any_order(tmp_path):
    tensors = some_tensors()
    checkpoint.write_safetensors(tmp_path / "a", tensors)
    checkpoint.write_safetensors(tmp_path / "b", dict(reversed(tensors.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_changing_a_tensor_read_from_safetensors_leaves_the_file_as_it_is(tmp_path):
    checkpoint.write_safetensors(tmp_path / "a", {"w": torch.ones(4)})
    before = (tmp_path / "a").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = checkpoint.read_safetensors(tmp_path / "a")["w"]
    tensor += 1
    assert tensor.tolist() == [2, 2, 2, 2] and (tmp_path / "a").read_bytes() == before


def test_safetensors_at_odd_offsets_are_read_right(tmp_path):
    header = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}}
    path = put(tmp_path / "odd", header_file(header, b"\7" + struct.pack("<2f", 1.5, -2)))
    tensors = checkpoint.read_safetensors(path)
    assert tensors["b"].tolist() == [1.5, -2] and tensors["b"].data_ptr() % 4 == 0


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_HEADERS = {
    "a declared header of 2**63 bytes": header_file({"a": ENTRY}, bytes(8), 1 << 63),
    "a declared header longer than the file": header_file({"a": ENTRY}, bytes(8), 200),
    "a header that is no JSON": header_file(b"{" + b"x" * 30),
    "a header that is not UTF-8": header_file(b'{"\xff":1}      '),
    "a header that is a list": header_file(b"[1, 2, 3]"),
    "a header 100,000 levels deep": header_file(b'{"a":' + b"[" * 100000),
    "a number of 10,000 digits": header_file(b'{"a":{"dtype":"F32","shape":[' + b"9" * 10000 + b'],"data_offsets":[0,8]}}', bytes(8)),
    "the same name twice": header_file(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],'
                                       b'"data_offsets":[1,2]}}', bytes(2)),
    "an entry that is a number": header_file({"a": 3}),
    "an entry that is a list": header_file({"a": [1, 2, 3]}),
    "an entry that is a string": header_file({"a": "abc"}),
    "an unknown dtype": header_file({"a": ENTRY | {"dtype": "F33"}}, bytes(8)),
    "a dtype that is a list": header_file({"a": ENTRY | {"dtype": ["F32"]}}, bytes(8)),
    "a missing field": header_file({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "an unknown field": header_file({"a": ENTRY | {"more": 1}}, bytes(8)),
    "a negative offset": header_file({"a": ENTRY | {"data_offsets": [-8, 0]}}, bytes(8)),
    "offsets the wrong way round": header_file({"a": ENTRY | {"data_offsets": [8, 0]}}, bytes(8)),
    "offsets past the end": header_file({"a": ENTRY | {"data_offsets": [8, 16]}}, bytes(8)),
    "offsets that are floats": header_file({"a": ENTRY | {"data_offsets": [0.0, 8.0]}}, bytes(8)),
    "offsets that are booleans": header_file({"a": {"dtype": "U8", "shape": [1], "data_offsets": [False, True]}}, bytes(1)),
    "three offsets": header_file({"a": ENTRY | {"data_offsets": [0, 4, 8]}}, bytes(8)),
    "a shape that does not fit": header_file({"a": ENTRY | {"shape": [3]}}, bytes(8)),
    "a negative shape": header_file({"a": ENTRY | {"shape": [-1, -2]}}, bytes(8)),
    "a shape of 2**80 elements": header_file({"a": ENTRY | {"shape": [1 << 40, 1 << 40]}}, bytes(8)),
    "an empty tensor with a dimension of 2**80": header_file({"a": ENTRY | {"shape": [0, 1 << 80], "data_offsets": [0, 0]}}),
    "a shape of 10,000 dimensions": header_file({"a": ENTRY | {"shape": [1] * 10000, "data_offsets": [0, 4]}}, bytes(4)),
    "a shape that is a string": header_file({"a": ENTRY | {"shape": "2"}}, bytes(8)),
    "a shape of booleans": header_file({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, bytes(1)),
    "overlapping tensors": header_file({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, bytes(12)),
    "the same bytes used twice": header_file({"a": ENTRY, "b": ENTRY}, bytes(8)),
    "a hole between tensors": header_file({"a": ENTRY, "b": ENTRY | {"data_offsets": [12, 20]}}, bytes(20)),
    "bytes after the last tensor": header_file({"a": ENTRY}, bytes(9)),
    "metadata that is a number": header_file({"__metadata__": 1, "a": ENTRY}, bytes(8)),
    "metadata of numbers": header_file({"__metadata__": {"a": 1}, "a": ENTRY}, bytes(8)),
    "an empty file": b"",
}


@pytest.mark.parametrize("what", BAD_HEADERS)
def test_a_safetensors_file_is_refused_for(what, tmp_path):
    path = put(tmp_path / "bad.safetensors", BAD_HEADERS[what])
    assert "bad.safetensors" in refused(checkpoint.read_safetensors, path)


def test_safetensors_cut_at_any_byte_are_refused(tmp_path):
    checkpoint.write_safetensors(tmp_path / "whole", some_tensors())
    data = (tmp_path / "whole").read_bytes()
    for length in range(len(data)):
        refused(checkpoint.read_safetensors, put(tmp_path / "cut", data[:length]))


@fuzzing
@given(changes=flips)
def test_safetensors_with_flipped_bytes_are_refused_or_read_never_more(changes, tmp_path):
    checkpoint.write_safetensors(tmp_path / "whole", {"a": torch.ones(2, 3), "b": torch.ones(3, dtype=torch.bool)}, {"k": "v"})
    data = (tmp_path / "whole").read_bytes()
    tensors = either(checkpoint.read_safetensors, put(tmp_path / "flipped", mutated(data, changes)))
    if tensors is not None:
        assert sum(t.nbytes for t in tensors.values()) <= len(data)


# ---- CRC-32C and TensorFlow

def slow_crc32c(data):
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def test_crc32c_equals_the_known_vectors_of_rfc_3720():
    assert checkpoint.crc32c(b"123456789") == 0xE3069283 and checkpoint.crc32c(b"") == 0
    assert checkpoint.crc32c(bytes(32)) == 0x8A9136AA and checkpoint.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert checkpoint.crc32c(bytes(range(32))) == 0x46DD794E and checkpoint.crc32c(bytes(range(31, -1, -1))) == 0x113FDB5C


def test_crc32c_equals_a_bitwise_loop_at_every_length_around_its_rows():
    data = np.random.default_rng(0).integers(0, 256, 200_001, dtype=np.uint8).tobytes()
    for length in [*range(0, 40), 511, 512, 513, 1023, 1024, 1025, 1537, 131071, 131072, 131073, 200_001]:
        assert checkpoint.crc32c(data[:length]) == slow_crc32c(data[:length]), length
    assert checkpoint.crc32c(memoryview(data)[1:5000]) == slow_crc32c(data[1:5000])  # not aligned


def test_a_checkpoint_that_tensorflow_wrote_is_read_exactly():
    values = make_tf().values()
    weights = checkpoint.read_tf_checkpoint(TF_PREFIX)
    assert weights.pop("global_step").item() == 7 and weights.keys() == values.keys()
    for name, value in values.items():
        assert weights[name].dtype == torch.float32 and np.array_equal(weights[name].numpy(), value), name


def test_a_tensorflow_checkpoint_in_two_shards_with_other_types_is_read_and_its_strings_are_left_out():
    expected = {name: array for shard in make_tf().shard_values() for name, array in shard.items()}
    weights = checkpoint.read_tf_checkpoint(TESTDATA / "shards_tf" / "two.ckpt")
    assert weights.pop("bf16").tolist() == [0.5, -3] and weights.keys() == expected.keys()
    for name, array in expected.items():
        assert weights[name].shape == array.shape and np.array_equal(weights[name].numpy(), array)
        assert weights[name].numpy().dtype == array.dtype


def tf_copy(folder, index=None, data=None, prefix=TF_PREFIX):
    put(folder / "c.ckpt.index", Path(f"{prefix}.index").read_bytes() if index is None else index)
    put(folder / "c.ckpt.data-00000-of-00001", Path(f"{prefix}.data-00000-of-00001").read_bytes() if data is None else data)
    return folder / "c.ckpt"


def test_a_tensorflow_index_cut_at_any_byte_or_with_any_bit_flipped_is_refused(tmp_path):
    prefix = tf_copy(tmp_path)
    large, small = (Path(f"{prefix}.index").read_bytes() for prefix in (TF_PREFIX, TESTDATA / "shards_tf" / "two.ckpt"))
    cases = [small[:length] for length in range(len(small))] + [large[:length] for length in range(0, len(large), 61)]
    cases += [mutated(small, [(bit // 8, 1 << bit % 8)]) for bit in range(8 * len(small))]  # its footer, too, has no checksum
    cases += [mutated(large, [(bit // 8, 1 << bit % 8)]) for bit in range(0, 8 * len(large), 203)]
    for index in cases:
        put(tmp_path / "c.ckpt.index", index)
        assert "c.ckpt.index" in refused(checkpoint.read_tf_checkpoint, prefix)


def test_tensorflow_data_cut_at_any_byte_or_with_a_flipped_bit_in_any_byte_are_refused(tmp_path):
    source = TESTDATA / "shards_tf"
    for shard in range(2):
        for i in range(2):
            put(tmp_path / f"two.ckpt.data-0000{i}-of-00002", (source / f"two.ckpt.data-0000{i}-of-00002").read_bytes())
        put(tmp_path / "two.ckpt.index", (source / "two.ckpt.index").read_bytes())
        path = tmp_path / f"two.ckpt.data-0000{shard}-of-00002"
        data = path.read_bytes()
        for i in range(len(data)):
            path.write_bytes(data[:i])
            refused(checkpoint.read_tf_checkpoint, tmp_path / "two.ckpt")
            for bit in range(8):
                path.write_bytes(mutated(data, [(i, 1 << bit)]))
                assert "checksum" in refused(checkpoint.read_tf_checkpoint, tmp_path / "two.ckpt")
        path.unlink()
        assert path.name in refused(checkpoint.read_tf_checkpoint, tmp_path / "two.ckpt")
    data = Path(f"{TF_PREFIX}.data-00000-of-00001").read_bytes()
    for i in range(0, len(data), 61):
        refused(checkpoint.read_tf_checkpoint, tf_copy(tmp_path, data=data[:i]))
        refused(checkpoint.read_tf_checkpoint, tf_copy(tmp_path, data=mutated(data, [(i, 1 << i % 8)])))


def varint(n):
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def table(pairs, kind=0, entries=None):
    """A LevelDB table of one block, with right checksums around whatever the test puts in."""
    def block(content, kind=0):
        content += bytes(4) + struct.pack("<I", 1) + bytes([kind])
        return content + struct.pack("<I", checkpoint._masked(checkpoint.crc32c(content)))
    body = entries if entries is not None else b"".join(
        varint(0) + varint(len(k)) + varint(len(v)) + k + v for k, v in pairs)
    data = block(body, kind)
    handle = varint(0) + varint(len(data) - 5)
    meta, meta_at = block(b""), len(data)
    index = block(varint(0) + varint(1) + varint(len(handle)) + b"\xff" + handle)
    footer = varint(meta_at) + varint(len(meta) - 5) + varint(meta_at + len(meta)) + varint(len(index) - 5)
    return data + meta + index + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


HEADER = (b"", field(1, 1))


def tf_entry(dtype=1, shape=(2,), shard=0, offset=0, size=8, data=bytes(8), more=b""):
    crc = checkpoint._masked(checkpoint.crc32c(data))
    dims = b"".join(field(2, field(1, n)) for n in shape)
    return (field(1, dtype) + field(2, dims) + field(3, shard) + field(4, offset) + field(5, size)
            + varint(6 << 3 | 5) + struct.pack("<I", crc) + more)


BAD_TABLES = {
    "no header": table([(b"w", tf_entry())]),
    "big-endian data": table([(b"", field(1, 1) + field(2, 1)), (b"w", tf_entry())]),
    "a partitioned variable": table([HEADER, (b"w", tf_entry(more=field(7, b"")))]),
    "a type that is no number": table([HEADER, (b"w", tf_entry(dtype=20))]),
    "a type of 0": table([HEADER, (b"w", tf_entry(dtype=0))]),
    "a size past the file": table([HEADER, (b"w", tf_entry(shape=(1 << 40,), size=1 << 42))]),
    "an offset of 2**63": table([HEADER, (b"w", tf_entry(offset=1 << 63))]),
    "an offset that is negative": table([HEADER, (b"w", tf_entry(offset=(1 << 64) - 8))]),
    "a shape that does not fit": table([HEADER, (b"w", tf_entry(shape=(3,)))]),
    "a shape of 2**80 elements": table([HEADER, (b"w", tf_entry(shape=(1 << 40, 1 << 40)))]),
    "an empty tensor with a dimension of 2**63": table([HEADER, (b"w", tf_entry(shape=(0, 1 << 63), size=0))]),
    "a negative dimension": table([HEADER, (b"w", tf_entry(shape=((1 << 64) - 1,)))]),
    "a shard that is not there": table([HEADER, (b"w", tf_entry(shard=7))]),
    "a million shards": table([(b"", field(1, 10 ** 6)), (b"w", tf_entry(shard=999_999))]),
    "a string tensor of 2**40 strings": table([HEADER, (b"w", tf_entry(dtype=7, shape=(1 << 40,)))]),
    "a string tensor with damaged lengths": table([HEADER, (b"w", tf_entry(dtype=7, shape=(8,), data=b"x"))]),
    "a name that is not UTF-8": table([HEADER, (b"\xff", tf_entry())]),
    "an entry of another wire type": table([HEADER, (b"w", field(1, b"float"))]),
    "an entry cut off": table([HEADER, (b"w", tf_entry()[:-3])]),
    "a group in an entry": table([HEADER, (b"w", b"\x0b\x0c")]),
    "keys out of order": table([HEADER, (b"w", tf_entry()), (b"v", tf_entry())]),
    "a key twice": table([HEADER, (b"w", tf_entry()), (b"w", tf_entry())]),
    "a compressed block": table([HEADER, (b"w", tf_entry())], kind=1),
    "an entry that shares more than there is": table([], entries=varint(5) + varint(1) + varint(0) + b"w"),
    "an entry longer than its block": table([], entries=varint(0) + varint(1 << 40) + varint(0) + b"w"),
    "a number that does not end": table([], entries=b"\xff" * 12),
    "keys that a few bytes spell out to gigabytes": table([], entries=varint(0) + varint(30000) + varint(0) + b"a" * 30000
                                                          + b"".join(varint(30000 + i) + b"\1\0a" for i in range(20000))),
}


def test_the_table_that_these_tests_write_is_read(tmp_path):
    weights = checkpoint.read_tf_checkpoint(tf_copy(tmp_path, table([HEADER, (b"w", tf_entry())]), bytes(8)))
    assert weights["w"].tolist() == [0, 0]


@pytest.mark.parametrize("what", BAD_TABLES)
def test_a_tensorflow_index_with_right_checksums_is_refused_for(what, tmp_path):
    assert "c.ckpt" in refused(checkpoint.read_tf_checkpoint, tf_copy(tmp_path, BAD_TABLES[what], bytes(8)))


@fuzzing
@given(changes=flips)
def test_a_tensorflow_entry_of_any_bytes_under_a_right_checksum_is_refused_or_read(changes, tmp_path):
    index = table([HEADER, (b"w", mutated(tf_entry(), changes)), (b"x", tf_entry(dtype=7, shape=(2,)))])
    either(checkpoint.read_tf_checkpoint, tf_copy(tmp_path, index, bytes(8)))


# ---- PyTorch

def test_pytorch_files_of_both_formats_are_read(tmp_path):
    tensors = some_tensors()
    for zipped in (True, False):
        torch.save(tensors, tmp_path / "w.bin", _use_new_zipfile_serialization=zipped)
        assert same(checkpoint.read_pytorch(tmp_path / "w.bin"), tensors)
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "w.bin")
    assert checkpoint.read_pytorch(tmp_path / "w.bin").keys() == {"weight", "bias"}
    torch.save({"w": torch.nn.Parameter(torch.ones(2))}, tmp_path / "w.bin")
    assert not checkpoint.read_pytorch(tmp_path / "w.bin")["w"].requires_grad


def test_a_training_state_of_tensors_and_numbers_is_read(tmp_path):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    state = {"optimizer": optimizer.state_dict(), "generator": torch.Generator().get_state(), "step": 7, "best": 0.5, "name": "x",
             "none": None, "list": [1, (2, True)]}
    torch.save(state, tmp_path / "state.pt")
    back = checkpoint.read_torch(tmp_path / "state.pt")
    assert torch.equal(back.pop("generator"), state.pop("generator")) and back == state


class Code:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pytorch_file_with_code_is_refused_by_the_name_of_what_it_asks_for_and_nothing_runs(zipped, tmp_path):
    mark = tmp_path / "ran"
    torch.save({"w": Code(os.mkdir, str(mark))}, tmp_path / "evil.bin", _use_new_zipfile_serialization=zipped)
    message = refused(checkpoint.read_pytorch, tmp_path / "evil.bin")
    assert "mkdir" in message and "not run" in message and not mark.exists()
    for protocol in range(6):
        path = put(tmp_path / "evil.bin", pickle.dumps({"w": Code(os.mkdir, str(mark))}, protocol))
        refused(checkpoint.read_pytorch, path)
        assert not mark.exists()
    torch.save({"w": Code(bytearray, 10 ** 12)}, tmp_path / "evil.bin", _use_new_zipfile_serialization=zipped)
    refused(checkpoint.read_pytorch, tmp_path / "evil.bin")
    torch.save({"w": Code(torch.load, str(mark))}, tmp_path / "evil.bin", _use_new_zipfile_serialization=zipped)
    refused(checkpoint.read_pytorch, tmp_path / "evil.bin")


@pytest.mark.parametrize("value", [[torch.ones(1)], {"a": 1}, {1: torch.ones(1)}, {"state_dict": {"a": torch.ones(1)}}, 3,
                                   {"a": torch.ones(2).to_sparse()}, {"a": torch.ones(1).expand(1 << 30)}],
                         ids=["list", "number", "integer key", "nested", "bare", "sparse", "expanded"])
def test_a_pytorch_file_of_anything_but_a_flat_dict_of_plain_tensors_is_refused(value, tmp_path):
    torch.save(value, tmp_path / "w.bin")
    refused(checkpoint.read_pytorch, tmp_path / "w.bin")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pytorch_file_cut_at_any_byte_is_refused(zipped, tmp_path):
    torch.save({"a": torch.ones(2, 3)}, tmp_path / "whole.bin", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "whole.bin").read_bytes()
    for length in range(len(data)):
        refused(checkpoint.read_pytorch, put(tmp_path / "cut.bin", data[:length]))


@fuzzing
@given(changes=flips, zipped=st.booleans())
def test_a_pytorch_file_with_flipped_bytes_is_refused_or_read_never_more(changes, zipped, tmp_path):
    torch.save({"a": torch.ones(2, 3), "b": torch.ones(3)}, tmp_path / "whole.bin", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "whole.bin").read_bytes()
    either(checkpoint.read_pytorch, put(tmp_path / "flipped.bin", mutated(data, changes)))


def test_a_pytorch_file_whose_zip_is_compressed_is_refused(tmp_path):
    torch.save({"a": torch.ones(2, 3)}, tmp_path / "w.bin")
    with zipfile.ZipFile(tmp_path / "w.bin") as source, zipfile.ZipFile(tmp_path / "z.bin", "w", zipfile.ZIP_DEFLATED) as goal:
        for name in source.namelist():
            goal.writestr(name, source.read(name))
    assert "compressed" in refused(checkpoint.read_pytorch, tmp_path / "z.bin")


def test_a_flipped_bit_in_the_weights_of_a_zipped_pytorch_file_is_refused(tmp_path):
    torch.save({"a": torch.full((2, 3), 1.25)}, tmp_path / "w.bin")
    data = (tmp_path / "w.bin").read_bytes()
    at = data.index(struct.pack("<f", 1.25) * 6)
    for i in range(24):
        assert "checksum" in refused(checkpoint.read_pytorch, put(tmp_path / "w.bin", mutated(data, [(at + i, 1 << i % 8)])))


# ---- JSON, atomic writes

@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b"null", b'{"a": NaN}', b'{"a": Infinity}', b'{"a":1,"a":2}', b"\xff\xfe{",
                                  b'{"a":' + b"[" * 200000, b'{"a":' + b"9" * 9999 + b"}", b'{"a":"\xed\xa0\x80"}', b"\0" * 50])
def test_json_that_is_none_is_refused(data, tmp_path):
    assert "config.json" in refused(checkpoint.read_json, put(tmp_path / "config.json", data))


def test_json_is_read_with_or_without_a_byte_order_mark_and_up_to_a_size(tmp_path):
    assert checkpoint.read_json(put(tmp_path / "a", b'{"a": [1, "\xc3\xa4"]}')) == {"a": [1, "ä"]}
    assert checkpoint.read_json(put(tmp_path / "a", b'\xef\xbb\xbf{}')) == {}
    refused(checkpoint.read_json, tmp_path / "a", "settings", 3)


@pytest.mark.parametrize("reader", [checkpoint.read_json, checkpoint.read_safetensors, checkpoint.read_pytorch,
                                    checkpoint.read_tf_checkpoint, checkpoint.load_weights, checkpoint.sha256_file])
def test_a_reader_refuses_what_is_no_file(reader, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "pipe", "/dev/zero", "a\0b", "x" * 300, put(tmp_path / "f", b"") / "g"):
        refused(reader, path)


def test_an_atomic_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = put(tmp_path / "file", b"old")
    with pytest.raises(KeyboardInterrupt), checkpoint.atomic_write(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    with checkpoint.atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_sentence_and_the_old_file_stays(tmp_path, monkeypatch):
    path = put(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", no_space)
    assert "No space left" in refused(checkpoint.write_safetensors, path, {"a": torch.ones(3)})
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
    monkeypatch.undo()

    def save(file):
        with checkpoint.atomic_write(path) as out:
            torch.save({"a": torch.ones(1 << 16)}, file)
            out.write(b"")
    for buffering in (0, -1):
        full = open("/dev/full", "wb", buffering=buffering)
        assert "No space left" in refused(save, full)
        with contextlib.suppress(OSError):
            full.close()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    put(tmp_path / "f", b"")
    for path in (tmp_path / "f" / "g", tmp_path / "no" / "g", tmp_path, tmp_path / ("x" * 300)):
        refused(checkpoint.write_safetensors, path, {"a": torch.ones(1)})
    refused(checkpoint.write_safetensors, tmp_path / "g", {"a": torch.ones(1, dtype=torch.complex64)})
    assert os.listdir(tmp_path) == ["f"]


# ---- archives

def tar_of(entries, end=b""):
    """[(name, data or a dict of TarInfo fields)] -> bytes of a .tar.gz"""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            if isinstance(data, dict):
                for key, value in data.items():
                    setattr(info, key, value)
                archive.addfile(info)
            else:
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return gzip.compress(out.getvalue() + end, mtime=0)


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_tar_is_unpacked_as_a_whole_or_by_names(tmp_path):
    data = tar_of([("./albert_base", {"type": tarfile.DIRTYPE}), ("./albert_base/a.json", b"{}"), ("albert_base/b.meta", b"b" * 70000),
                   ("albert_base/" + "long" * 40, b"c")])
    path = put(tmp_path / "a.tar.gz", data)
    folder = checkpoint.extract_tar(path, tmp_path / "deep" / "all")
    assert (folder / "albert_base" / "b.meta").read_bytes() == b"b" * 70000 and len(tree(folder)) == 4
    folder = checkpoint.extract_tar(path, tmp_path / "some", r"albert_base/.*\.json")
    assert tree(folder) == ["albert_base", "albert_base/a.json"] and os.listdir(tmp_path / "deep") == ["all"]
    path.unlink()
    assert checkpoint.extract_tar(path, tmp_path / "some") == folder  # there already


BAD_TARS = {
    "a name with ..": tar_of([("a/../../x", b"1")]),
    "an absolute name": tar_of([("/tmp/x", b"1")]),
    "a name with a backslash": tar_of([("..\\x", b"1")]),
    "a name with a drive": tar_of([("C:x", b"1")]),
    "a symbolic link": tar_of([("a", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}), ("a/b", b"1")]),
    "a hard link": tar_of([("a", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"})]),
    "a device": tar_of([("a", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3})]),
    "a FIFO": tar_of([("a", {"type": tarfile.FIFOTYPE})]),
    "a name twice": tar_of([("a", b"1"), ("a", b"2")]),
    "a file that is a folder too": tar_of([("a", b"1"), ("a/b", b"2")]),
    "too many bytes": tar_of([("a", bytes(3000))]),
    "no files": tar_of([("a", {"type": tarfile.DIRTYPE})]),
    "too many bytes after its end": tar_of([("a", b"1")], bytes(1 << 17)),
    "a declared size past its end": tar_of([("a", {"size": 1 << 40})]),
    "a long name that it says is of gigabytes": tar_of([("a", {"type": tarfile.GNUTYPE_LONGNAME, "size": 1 << 33})]),
    "a pax header that it says is of gigabytes": tar_of([("a", {"type": tarfile.XHDTYPE, "size": 1 << 33})]),
    "bytes that are no gzip": b"x" * 600,
    "bytes that are no tar": gzip.compress(b"x" * 2000),
    "an empty file": b"",
}


@pytest.mark.parametrize("what", BAD_TARS)
def test_a_tar_is_refused_and_leaves_nothing_for(what, tmp_path):
    path = put(tmp_path / "a.tar.gz", BAD_TARS[what])
    assert "a.tar.gz" in refused(checkpoint.extract_tar, path, tmp_path / "in" / "goal", max_bytes=2500 if "many" in what else 1 << 20)
    assert tree(tmp_path) == ["a.tar.gz", "in"]


def test_a_tar_cut_at_any_byte_is_refused_and_leaves_nothing(tmp_path):
    data = tar_of([("a/b", b"hello"), ("a/c", b"world")])
    for length in range(len(data)):
        refused(checkpoint.extract_tar, put(tmp_path / "a.tar.gz", data[:length]), tmp_path / "goal")
        assert os.listdir(tmp_path) == ["a.tar.gz"]


@fuzzing
@given(changes=flips, inside=st.booleans())
def test_a_tar_with_flipped_bytes_is_refused_or_unpacked_in_its_place(changes, inside, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tar")
    data = tar_of([("a/b", b"hello"), ("a/" + "c" * 120, b"world")])
    data = gzip.compress(mutated(gzip.decompress(data)[:5000], changes)) if inside else mutated(data, changes)
    either(checkpoint.extract_tar, put(folder / "a.tar.gz", data), folder / "goal", None, 1 << 20)
    assert set(os.listdir(folder)) <= {"a.tar.gz", "goal"}


def zip_of(entries, method=zipfile.ZIP_DEFLATED):
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", method) as archive:
        warnings.simplefilter("ignore")  # of a name twice
        for name, data in entries:
            archive.writestr(name, data)
    return out.getvalue()


def link_info():
    info = zipfile.ZipInfo("CoLA/dev.tsv")
    info.external_attr = 0o120777 << 16
    return info


GLUE_ZIP = [("CoLA/", b""), ("CoLA/dev.tsv", b"d" * 50), ("CoLA/train.tsv", b"t" * 999), ("__MACOSX/CoLA/._dev.tsv", b"junk"),
            ("CoLA/original/raw.tsv", b"raw")]
WANTED = {"CoLA/dev.tsv": 50, "CoLA/train.tsv": 1000}


def test_a_zip_is_unpacked_as_a_whole_or_by_names(tmp_path):
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        path = put(tmp_path / "CoLA.zip", zip_of(GLUE_ZIP, method))
        folder = checkpoint.extract_zip(path, tmp_path / f"some{method}", WANTED)
        assert tree(folder) == ["CoLA", "CoLA/dev.tsv", "CoLA/train.tsv"] and (folder / "CoLA/dev.tsv").read_bytes() == b"d" * 50
    folder = checkpoint.extract_zip(path, tmp_path / "all")
    assert tree(folder) == ["CoLA", "CoLA/dev.tsv", "CoLA/original", "CoLA/original/raw.tsv", "CoLA/train.tsv"]
    path.unlink()
    assert checkpoint.extract_zip(path, tmp_path / "all") == folder


def lying_zip():
    """100 MB of zeros that say they are 50 bytes, in both of the archive's headers."""
    data = bytearray(zip_of([("CoLA/dev.tsv", bytes(100_000_000)), ("CoLA/train.tsv", b"t")]))
    for at in (22, data.index(b"PK\1\2") + 24):
        data[at:at + 4] = struct.pack("<I", 50)
    return bytes(data)


BAD_ZIPS = {
    "a member larger than published": zip_of([("CoLA/dev.tsv", b"d" * 51), ("CoLA/train.tsv", b"t")]),
    "a bomb": zip_of([("CoLA/dev.tsv", bytes(10_000_000)), ("CoLA/train.tsv", b"t")]),
    "a bomb that lies about its size": lying_zip(),
    "a missing member": zip_of([("CoLA/dev.tsv", b"d")]),
    "a link": zip_of([(link_info(), b"/etc/passwd"), ("CoLA/train.tsv", b"t")]),
    "a name with ..": zip_of([("CoLA/../../x", b"d"), *GLUE_ZIP]),
    "an absolute name": zip_of([("/tmp/x", b"d"), *GLUE_ZIP]),
    "another compression": zip_of(GLUE_ZIP, zipfile.ZIP_LZMA),
    "bytes that are no zip": b"x" * 600,
    "an empty file": b"",
}


@pytest.mark.parametrize("what", BAD_ZIPS)
def test_a_zip_is_refused_and_leaves_nothing_for(what, tmp_path):
    path = put(tmp_path / "CoLA.zip", BAD_ZIPS[what])
    assert "CoLA.zip" in refused(checkpoint.extract_zip, path, tmp_path / "goal", WANTED)
    assert tree(tmp_path) == ["CoLA.zip"]


def test_a_zip_of_more_than_max_bytes_in_all_or_with_a_name_twice_is_refused(tmp_path):
    path = put(tmp_path / "CoLA.zip", zip_of([("a", b"1" * 60), ("b", b"1" * 60)]))
    refused(checkpoint.extract_zip, path, tmp_path / "goal", None, 100)
    refused(checkpoint.extract_zip, put(path, zip_of([("a", b"1"), ("a", b"2")])), tmp_path / "goal")
    assert tree(tmp_path) == ["CoLA.zip"]


def test_a_zip_cut_at_any_byte_is_refused_and_leaves_nothing(tmp_path):
    data = zip_of([("a/b", b"hello"), ("a/c", b"world")])
    for length in range(len(data)):
        refused(checkpoint.extract_zip, put(tmp_path / "a.zip", data[:length]), tmp_path / "goal")
        assert os.listdir(tmp_path) == ["a.zip"]


def test_a_flipped_bit_in_a_zips_content_is_refused_unless_the_content_stays_the_same(tmp_path):
    content, passed = b"hello world " * 5, 0
    data = zip_of([("a", content)])
    for i in range(8 * 31, 8 * data.index(b"PK\1\2")):
        if either(checkpoint.extract_zip, put(tmp_path / "a.zip", mutated(data, [(i // 8, 1 << i % 8)])), tmp_path / f"goal{i}"):
            assert (tmp_path / f"goal{i}" / "a").read_bytes() == content
            passed += 1
    assert passed < 20  # bits that deflate does not use, such as those behind its last code


@fuzzing
@given(changes=flips)
def test_a_zip_with_flipped_bytes_is_refused_or_unpacked_in_its_place(changes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zip")
    data = mutated(zip_of([("a/b", b"hello" * 20), ("a/c", b"world")]), changes)
    either(checkpoint.extract_zip, put(folder / "a.zip", data), folder / "goal", None, 1 << 20)
    assert set(os.listdir(folder)) <= {"a.zip", "goal"}


def test_a_folder_that_cannot_be_made_or_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    path = put(tmp_path / "a.zip", zip_of([("a", b"1")]))
    tar = put(tmp_path / "a.tar.gz", tar_of([("a", b"1")]))
    for function, source in ((checkpoint.extract_zip, path), (checkpoint.extract_tar, tar)):
        refused(function, source, path / "goal")
        refused(function, tmp_path / "missing", tmp_path / "goal")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", no_space)
            assert "No space left" in refused(function, source, tmp_path / "goal")
    assert tree(tmp_path) == ["a.tar.gz", "a.zip"]


def test_a_folder_that_another_process_unpacked_first_is_taken(tmp_path, monkeypatch):
    path = put(tmp_path / "a.zip", zip_of([("a", b"1")]))
    replace = os.replace

    def late(source, goal):
        goal.mkdir()
        put(goal / "a", b"theirs")
        replace(source, goal)
    monkeypatch.setattr(os, "replace", late)
    assert (checkpoint.extract_zip(path, tmp_path / "goal") / "a").read_bytes() == b"theirs"
    assert sorted(os.listdir(tmp_path)) == ["a.zip", "goal"]


# ---- memory

def test_huge_declared_sizes_take_no_memory(tmp_path):
    put(tmp_path / "0.safetensors", header_file({"a": ENTRY | {"shape": [1 << 33], "data_offsets": [0, 1 << 35]}}, bytes(8)))
    put(tmp_path / "1.index", table([HEADER, (b"w", tf_entry(shape=(1 << 33,), size=1 << 35))]))
    put(tmp_path / "2.index", BAD_TABLES["keys that a few bytes spell out to gigabytes"])
    for prefix in "12":
        put(tmp_path / f"{prefix}.data-00000-of-00001", bytes(8))
    torch.save({"w": torch.ones(1 << 4, dtype=torch.uint8)}, tmp_path / "3.bin", _use_new_zipfile_serialization=False)
    old = (tmp_path / "3.bin").read_bytes()
    put(tmp_path / "4.bin", old.replace(b"K\x10", b"J\0\0\0\x70"))  # 16 elements become 1.9e9, of the storage and of the tensor
    assert (tmp_path / "4.bin").read_bytes() != old
    torch.save({"w": Code(bytearray, 1 << 33)}, tmp_path / "5.bin")
    put(tmp_path / "6.tar.gz", BAD_TARS["a long name that it says is of gigabytes"])
    bomb = io.BytesIO()
    with tarfile.open(fileobj=bomb, mode="w") as archive:
        info = tarfile.TarInfo("a")
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, 400 << 20
        archive.addfile(info)
    put(tmp_path / "7.tar.gz", gzip.compress(bomb.getvalue()[:512] + bytes(400 << 20), 1))
    put(tmp_path / "8.zip", BAD_ZIPS["a bomb that lies about its size"])
    program = f"""
import resource, sys
sys.path.insert(0, {str(HERE)!r})
import checkpoint as c
from pathlib import Path
folder = Path({str(tmp_path)!r})
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
c.load_weights(folder / "3.bin")
before = peak()
for path in sorted(folder.iterdir()):
    if path.name[0] in "3" or ".data" in path.name: continue
    try:
        if path.suffix == ".gz": c.extract_tar(path, folder / "goal")
        elif path.suffix == ".zip": c.extract_zip(path, folder / "goal", {{"CoLA/dev.tsv": 50}})
        else: c.load_weights(path)
        print("read", path.name)
    except c.InputError: pass
    if peak() - before > 60: print(path.name, peak() - before, "MB")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr


# ---- weights into a module

class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.pooler = torch.nn.Linear(2, 6), torch.nn.Linear(2, 2)
        self.register_buffer("positions", torch.arange(3))


def small_weights():
    names = {f"{part}.{kind}": torch.randn((2, 2) if kind == "weight" else (2,))
             for part in ("q", "k", "v", "pooler") for kind in ("weight", "bias")}
    return names | {"ids": torch.arange(3) + 1, "cls.bias": torch.ones(7)}


SMALL_TABLE = {"qkv.weight": ("q.weight", "k.weight", "v.weight"), "qkv.bias": ["q.bias", "k.bias", "v.bias"],
               "pooler.weight": "pooler.weight", "pooler.bias": ("pooler.bias",), "positions": ("ids",)}


def test_assign_fills_every_parameter_by_the_table():
    module, weights = Small(), small_weights()
    weights["q.weight"] = weights["q.weight"].half()
    assert checkpoint.assign(module, weights, SMALL_TABLE, [r"cls\..*"], "w") == set()
    assert torch.equal(module.qkv.weight[:2], weights["q.weight"].float()) and torch.equal(module.qkv.bias[4:], weights["v.bias"])
    assert module.positions.tolist() == [1, 2, 3] and module.qkv.weight.dtype == torch.float32
    del weights["pooler.weight"], weights["pooler.bias"]
    left = checkpoint.assign(module, weights, SMALL_TABLE, [r"cls\..*"], "w", {"pooler.weight", "pooler.bias"})
    assert left == {"pooler.weight", "pooler.bias"}


@pytest.mark.parametrize("change, named", [
    (lambda w: w.update(extra=torch.ones(1)), "extra"), (lambda w: w.pop("k.bias"), "k.bias"),
    (lambda w: w.update({"q.bias": torch.ones(3)}), "q.bias"), (lambda w: w.update({"pooler.weight": torch.ones(4)}), "pooler.weight"),
    (lambda w: w.update({"v.weight": torch.ones(2, 3)}), "v.weight"), (lambda w: w.update({"v.weight": torch.tensor(1.)}), "v.weight"),
    (lambda w: w.update({"q.bias": torch.ones(2, dtype=torch.int64)}), "q.bias"), (lambda w: w.update(ids=torch.ones(3)), "ids"),
    (lambda w: w["k.bias"].fill_(torch.nan), "k.bias"), (lambda w: w.update({"pooler.bias": torch.tensor([1e300, 1], dtype=torch.float64)}), "pooler.bias"),
    (lambda w: w.update({"cls": torch.ones(1)}), "cls"), (lambda w: w.update({"cls.bias\n": torch.ones(1)}), "cls.bias"),
])
def test_assign_refuses_names_shapes_types_and_values_that_do_not_fit_and_changes_nothing(change, named):
    module, weights = Small(), small_weights()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    change(weights)
    assert named in refused(checkpoint.assign, module, weights, SMALL_TABLE, [r"cls\.bias"], "w.bin")
    assert same(module.state_dict(), before)


def test_assign_refuses_a_table_that_does_not_cover_the_module_or_uses_a_name_twice():
    weights = small_weights()
    assert "positions" in refused(checkpoint.assign, Small(), weights, {k: v for k, v in SMALL_TABLE.items() if k != "positions"}, ["cls.*"], "w")
    assert "q.bias" in refused(checkpoint.assign, Small(), weights, SMALL_TABLE | {"pooler.bias": ["q.bias"]}, ["cls.*", "pooler.bias"], "w")


def test_load_weights_picks_by_what_is_there(tmp_path):
    (tmp_path / "albert_base").mkdir()
    for end in (".index", ".data-00000-of-00001"):
        put(tmp_path / "albert_base" / f"model.ckpt-best{end}", Path(f"{TF_PREFIX}{end}").read_bytes())
    assert checkpoint.load_weights(tmp_path)[1] == "tensorflow"
    assert checkpoint.load_weights(tmp_path / "albert_base")[1] == "tensorflow"
    assert len(checkpoint.load_weights(tmp_path / "albert_base" / "model.ckpt-best")[0]) == 85
    assert len(checkpoint.load_weights(tmp_path / "albert_base" / "model.ckpt-best.index")[0]) == 85
    put(tmp_path / "albert_base" / "model.ckpt-2.index", b"")
    assert "2 checkpoints" in refused(checkpoint.load_weights, tmp_path)
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert checkpoint.load_weights(tmp_path)[1] == "pytorch"
    checkpoint.write_safetensors(tmp_path / "model.safetensors", {"b": torch.ones(1)})
    assert checkpoint.load_weights(str(tmp_path)) == ({"b": torch.ones(1)}, "safetensors")
    assert checkpoint.load_weights(tmp_path / "pytorch_model.bin")[1] == "pytorch"
    refused(checkpoint.load_weights, put(tmp_path / "weights.xyz", b"1"))
    (tmp_path / "empty").mkdir()
    assert "model.safetensors" in refused(checkpoint.load_weights, tmp_path / "empty")


# ---- download

BODY = bytes(range(256)) * 2000  # 512,000 bytes
DIGEST = hashlib.sha256(BODY).hexdigest()
FAST = {"tries": 3, "wait": 0.01, "timeout": (5, 5)}


class Server(http.server.BaseHTTPRequestHandler):
    """The path says how to misbehave; the server counts the requests and the Range headers of each path."""
    def log_message(self, *_):
        pass

    def do_GET(self):
        way = self.path.split("?")[0].strip("/")
        first = self.path not in self.server.asked
        start = self.headers.get("Range")
        self.server.asked.setdefault(self.path, []).append(start)
        start = int(start[6:-1]) if start else 0
        if way.isdecimal() or way == "busy" and first:
            return self.answer(int(way) if way.isdecimal() else 503, b"no")
        if way == "html":
            return self.answer(200, b"<html>log in</html>", {"Content-Type": "text/html; charset=utf-8"})
        if way == "hidden-html":
            return self.answer(200, b"\n<!DOCTYPE html><html>log in</html>")
        if way == "no-range":
            return self.answer(200, BODY, cut=300_000 if first else None)
        if way == "wrong-range":
            return self.answer(200, BODY, cut=300_000) if first else self.answer(206, BODY, {"Content-Range": f"bytes 0-511999/{len(BODY)}"})
        if way == "longer":
            return self.answer(200, BODY + b"x")
        if way == "shorter":
            return self.answer(200, BODY[:-1])
        if way == "endless":
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(20_000):
                    self.wfile.write(bytes(65536))
            except OSError:
                self.server.stopped = True
            return
        if way == "stall":
            self.answer(200, BODY, cut=1000)
            return time.sleep(1)
        if way == "drips":
            self.answer(200, BODY, cut=1)
            with contextlib.suppress(OSError):
                for _ in range(300):
                    self.wfile.write(b"x")
                    time.sleep(0.01)
            return
        if way == "always-breaks":
            return self.answer(200, BODY, cut=1000)
        if way == "slow":
            time.sleep(0.2)
        if start >= len(BODY):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(BODY)}"})
        headers = {"Content-Range": f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"} if start else {}
        self.answer(206 if start else 200, BODY[start:], headers, 300_000 if way == "breaks" and first else None)

    def answer(self, status, body, headers={}, cut=None):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(body[:cut])
        self.wfile.flush()


@pytest.fixture(scope="module")
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.asked, server.stopped, server.daemon_threads = {}, False, True
    server.url = f"http://127.0.0.1:{server.server_port}/"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_a_download_is_whole_and_a_file_in_the_cache_touches_no_network(server, tmp_path, monkeypatch, capsys):
    path = checkpoint.download(server.url + "good", tmp_path / "deep" / "file", DIGEST, len(BODY), **FAST)
    assert path.read_bytes() == BODY and os.listdir(path.parent) == ["file"]
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 2 and "0.5 of 0.5 MB" in output.err
    monkeypatch.setattr(checkpoint.requests, "get", None)
    assert checkpoint.download("http://nowhere.invalid/", path, "0" * 64) == path


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("PALBERT_CACHE", "/somewhere")
    assert checkpoint.cache_dir() == Path("/somewhere")
    monkeypatch.delenv("PALBERT_CACHE")
    assert checkpoint.cache_dir() == Path.home() / ".cache" / "palbert"


def test_a_terminal_sees_how_far_and_how_long():
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    out = Terminal()
    show = checkpoint._progress("file", 0, 10_000_000, out)
    time.sleep(0.3)
    show(5_000_000)
    show(5_000_001)
    show(10_000_000, True)
    assert out.getvalue().count("s to go") == 1 and "5.0 of 10.0 MB" in out.getvalue() and out.getvalue().endswith("\n")


@pytest.mark.parametrize("way", ["breaks", "no-range", "wrong-range", "busy", "good"])
@pytest.mark.parametrize("checked", [True, False])
def test_a_download_ends_well_though_the_server(way, checked, server, tmp_path):
    url = f"{server.url}{way}?{checked}"
    path = checkpoint.download(url, tmp_path / "file", DIGEST if checked else None, **FAST)
    assert path.read_bytes() == BODY and os.listdir(tmp_path) == ["file"]
    if way == "breaks":
        assert server.asked[f"/{way}?{checked}"] == [None, "bytes=300000-"]  # nothing that came is asked for again


@pytest.mark.parametrize("way, requests_made, said", [
    ("404", 1, "404"), ("403", 1, "403"), ("429", 3, "429"), ("500", 3, "500"), ("503", 3, "503"), ("html", 1, "web page"),
    ("hidden-html", 1, "web page"), ("longer", 1, "512,001"), ("shorter", 1, "511,999"), ("stall", 3, "0.3 s"), ("endless", 1, "more than"),
    ("always-breaks", 3, "broke off"),
])
def test_a_download_fails_in_one_sentence_and_leaves_nothing_when_the_server_gives(way, requests_made, said, server, tmp_path):
    url = f"{server.url}{way}?fails"
    message = refused(checkpoint.download, url, tmp_path / "file", None, None if way == "hidden-html" else len(BODY), **{**FAST, "timeout": (5, 0.3 if way == "stall" else 5)})
    assert said in message and url in message and not list(tmp_path.iterdir())
    assert len(server.asked[f"/{way}?fails"]) == requests_made
    if way == "endless":
        time.sleep(0.2)
        assert server.stopped


def test_a_server_that_drips_is_given_up_though_it_never_falls_silent(server, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SLOWEST", (1000, 0.2))
    began = time.monotonic()
    message = refused(checkpoint.download, server.url + "drips", tmp_path / "file", tries=2, wait=0.01)
    assert "1,000 bytes a second" in message and 0.4 < time.monotonic() - began < 3
    assert len(server.asked["/drips"]) == 2 and not list(tmp_path.iterdir())


def test_a_wrong_checksum_is_refused_and_the_next_mirror_is_tried(server, tmp_path):
    assert "SHA-256" in refused(checkpoint.download, server.url + "good", tmp_path / "file", "0" * 64, **FAST)
    assert not list(tmp_path.iterdir())
    mirrors = [server.url + way for way in ("404", "longer", "shorter", "html", "good")]
    assert checkpoint.download(mirrors, tmp_path / "file", DIGEST, **FAST).read_bytes() == BODY


def test_a_part_from_an_earlier_run_is_gone_on_from_only_where_a_checksum_judges(server, tmp_path):
    for n, (old, asked) in enumerate({BODY[:1000]: ["bytes=1000-"], b"x" * 1000: ["bytes=1000-", None], BODY: ["bytes=512000-"],
                                      BODY + b"x": ["bytes=512001-", None]}.items()):
        put(tmp_path / "file.part", old)
        assert checkpoint.download(f"{server.url}good?part{n}", tmp_path / "file", DIGEST, **FAST).read_bytes() == BODY
        assert server.asked[f"/good?part{n}"] == asked
        (tmp_path / "file").unlink()
    put(tmp_path / "file.part", b"x" * 1000)
    assert checkpoint.download(f"{server.url}good?fresh", tmp_path / "file", **FAST).read_bytes() == BODY
    assert server.asked["/good?fresh"] == [None]


def test_without_a_network_one_sentence_names_each_address(tmp_path):
    message = refused(checkpoint.download, ["http://127.0.0.1:9/a", "https://no-such-host.invalid/b", "nonsense", "http://[::1/"],
                      tmp_path / "file", tries=2, wait=0.01)
    for part in ("http://127.0.0.1:9/a (the connection was refused)", "https://no-such-host.invalid/b (", "nonsense (", "urllib3"):
        assert (part in message) != (part == "urllib3")
    assert not list(tmp_path.iterdir())


def test_tls_is_always_verified(server, tmp_path, monkeypatch):
    asked = []
    get = checkpoint.requests.get
    monkeypatch.setattr(checkpoint.requests, "get", lambda *a, **k: asked.append(k) or get(*a, **k))
    checkpoint.download(server.url + "good", tmp_path / "file", **FAST)
    assert asked and "verify" not in asked[0] and "verify=False" not in Path(checkpoint.__file__).read_text()


def test_a_goal_that_cannot_be_written_is_one_sentence(server, tmp_path, monkeypatch):
    put(tmp_path / "f", b"")
    refused(checkpoint.download, server.url + "good", tmp_path / "f" / "file", **FAST)
    refused(checkpoint.download, server.url + "good", tmp_path, **FAST)
    refused(checkpoint.download, server.url + "good", "a\0b", **FAST)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_open_part", lambda path: (open("/dev/full", "r+b"), path))
        assert "No space left" in refused(checkpoint.download, server.url + "good", tmp_path / "g", DIGEST, **FAST)
    monkeypatch.setattr(os, "fsync", no_space)
    assert "No space left" in refused(checkpoint.download, server.url + "good", tmp_path / "g", **FAST)


def fetch_in_process(url, path):
    checkpoint.download(url, path, DIGEST, **FAST)


def test_two_processes_that_download_the_same_file_at_once_both_end_with_it(server, tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=fetch_in_process, args=(server.url + "slow?two", tmp_path / "file")) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == BODY
    assert len(server.asked["/slow?two"]) == 1


def test_without_file_locks_downloads_work_too(server, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "fcntl", None)
    assert checkpoint.download(server.url + "good", tmp_path / "file", DIGEST, **FAST).read_bytes() == BODY
