"""PALBERT (Balagansky and Gavrilov, NeurIPS 2022): an encoder that learns after which layer to stop.

In the order of the paper's section 3: the distribution over exit layers, its prior, the losses, the exit
rules, and the model with two loops: `forward` runs every layer, and `predict` stops.

    B batch   T tokens   H hidden   L layers (the paper's n)   C classes, 1 for regression
    h  hidden states after a layer       lam  lambda_i, the probability to stop at layer i once it is reached
    p  p(i|x), the exit distribution     q    the threshold of Q-exit

The letters hold in every file. Batch comes first, layers second, and layers count from 1 to L. An encoder
has num_layers, hidden_size, shared, embed, layer and pool, and for speed first and finish, as in albert.py.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import fast


# ---- the exit distribution and its prior (section 3) ----

def exit_distribution(lam):
    """p(i|x) = lam_i * prod_{j<i} (1 - lam_j)   (section 3); lam (B,L) in [0,1] -> p (B,L), rows sum to 1
    lam_L counts as 1: layer L takes what is left. Were the sum of p free, the loss would shrink it."""
    reach, p = torch.ones_like(lam[:, 0]), []           # (B,) the probability to reach layer i
    for i in range(lam.shape[1] - 1):
        p.append(reach * lam[:, i])
        reach = reach * (1 - lam[:, i])
    return torch.stack(p + [reach], dim=1)              # (B,L)


def geometric_prior(lam_p, L):
    """p(i|lam_p) = lam_p * (1 - lam_p)^(i-1) for i < L, p(L|lam_p) = 1 - sum_{i<L} p(i|lam_p)   (section 3)
    lam_p in (0,1), else ValueError -> (L,) float32, sums to 1."""
    if not 0 < lam_p < 1:
        raise ValueError(f"the prior's lambda must lie in (0, 1), not {lam_p}")
    return exit_distribution(torch.full((1, L), lam_p, dtype=torch.float64))[0].float()


def kl_divergence(p, q):
    """KL(p || q) = sum_i p_i * log(p_i / q_i), 0 log 0 = 0; p (B,L), q (L,) or (B,L) -> (B,) in nats, >= 0"""
    # At p_i = 0 the gradient of p log p is minus infinity, so log is taken of 1 there.
    return (torch.xlogy(p, torch.where(p > 0, p, 1)) - torch.xlogy(p, q)).sum(-1)


# ---- the losses ----

def layer_losses(logits, labels):
    """-log p(y|x,i), or (y - y_i)^2 for C = 1; logits (B,L,C), labels (B,) int64 or float -> (B,L)"""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if logits.shape[2] == 1:
        return (logits[..., 0] - labels[:, None]) ** 2
    labels = labels[:, None].expand(-1, logits.shape[1])        # (B,L)
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def elbo_loss(logits, lam, labels, prior, beta, cut=0.05):
    """-E_{i ~ p(i|x)} [log p(y|x,i)] + beta * KL(p(.|x) || p(.|lam_p))   (Eq. 1, negated; the batch's mean)
    logits (B,L,C), lam (B,L), labels (B,) int64 or float, prior (L,) -> loss (), and its parts by name: task,
    kl, expected_layer (sum_i i p_i), cut_at_1 (the share of rows cut at layer 1, which teach lambda nothing).

    Section 3 truncates p at the lowest j with sum_{i<=j} p_i >= 1 - cut; with a cut of 0 nothing is cut. The
    model cut at j is a model of j layers, so layer j takes what remains of p and of the prior. Were the prior
    not folded so, KL would have a gradient even where lambda is the prior's."""
    L, lam = logits.shape[1], lam.to(torch.promote_types(lam.dtype, torch.float32))
    eps = torch.finfo(lam.dtype).eps
    lam = lam.clamp(eps, 1 - eps)                           # else a lambda of 1 is a cut, even where cut is 0
    layers = torch.arange(1, L + 1, device=lam.device)
    cdf = exit_distribution(lam).cumsum(1)                  # (B,L)
    j = 1 + (cdf[:, :-1] < 1 - cut).sum(1, keepdim=True)    # (B,1) the layer of the cut, or L
    p = exit_distribution(torch.where(layers < j, lam, 1))  # (B,L) 0 after layer j
    tail = prior.flip(0).cumsum(0).flip(0)                  # (L,) the prior from each layer on
    folded = torch.where(layers == j, tail, prior)          # (B,L) counts only where p is not 0
    losses = p * layer_losses(logits, labels)               # (B,L) weighted per row, before any mean
    task, kl = losses.sum(1).mean(), kl_divergence(p, folded).mean()
    parts = {"task": task, "kl": kl, "expected_layer": (p * layers).sum(1).mean(),
             "cut_at_1": (j == 1).float().mean()}
    return task + beta * kl, {name: value.detach() for name, value in parts.items()}


def layer_weighted_loss(logits, labels):
    """sum_i i * CE_i / sum_i i   (PABEE, Zhou et al. 2020); (B,L,C), (B,) -> loss (), {"task": ()}"""
    losses = layer_losses(logits, labels)               # (B,L)
    weight = torch.arange(1, losses.shape[1] + 1, device=losses.device, dtype=losses.dtype)
    loss = (losses * (weight / weight.sum())).sum(1).mean()
    return loss, {"task": loss.detach()}


def berxit_loss(logits, lam, labels):
    """sum_i CE_i + sum_i (lam_i - t_i)^2   (BERxiT, Xin et al. 2021, who alternate it with CE_L)
    lam_i is layer i's certainty. Its target t_i, without a gradient, is 1 where layer i is right, else 0; for
    C = 1 it is 1 - tanh|y - y_i|."""
    losses = layer_losses(logits, labels)                       # (B,L)
    if logits.shape[2] == 1:
        target = 1 - torch.tanh(losses.detach().sqrt())         # (B,L)
    else:
        target = (logits.argmax(2) == labels[:, None]).float()  # (B,L)
    task, certainty = losses.sum(1).mean(), ((lam - target) ** 2).sum(1).mean()
    return task + certainty, {"task": task.detach(), "certainty": certainty.detach()}


def expected_prediction(logits, p):
    """sum_i p(i|x) * softmax(logits_i), or sum_i p(i|x) * y_i   (section 4.1); (B,L,C), (B,L) -> (B,C)"""
    return (p[..., None] * (logits.softmax(-1) if logits.shape[-1] > 1 else logits)).sum(1)


# ---- exit rules ----
# start(B, L, device) -> a rule's state: a tuple of tensors, rows first. step(state, i, lam, logits) -> the
# next state, done (B,) bool; i (B,) int64 is the layer each row has reached, lam (B,), logits (B,C). Each row
# stands alone, so one step serves full arrays, shrinking batches and rows at different layers. The last layer
# ends every row. A rule that cannot stop early names its `earliest` layer.

class QExit:
    """Stop at the first layer i with sum_{j<=i} p(j|x) > q   (section 3.1); q in [0,1], 1 is layer L."""

    def __init__(self, q):
        if not 0 <= q <= 1:
            raise ValueError(f"q must lie in [0, 1], not {q}")
        self.q = q

    def start(self, B, L, device):
        return torch.ones(B, device=device), torch.zeros(B, device=device)

    def step(self, state, i, lam, logits):
        reach, cdf = state
        cdf = (cdf + reach * lam).clamp(max=1)      # rounding must not carry it past q = 1
        return (reach * (1 - lam), cdf), cdf > self.q


class SampleExit:
    """Stop at layer i with probability lam_i   (PonderNet): where u_i < lam_i, u (B,L) drawn in start()."""

    def __init__(self, generator):
        self.generator = generator

    def start(self, B, L, device):
        return (torch.rand(B, L, generator=self.generator, device=self.generator.device).to(device),)

    def step(self, state, i, lam, logits):
        return state, state[0].gather(1, i[:, None] - 1)[:, 0] < lam


class PatienceExit:
    """Stop when t layers in a row have agreed with the one before (PABEE): at layer t + 1 at the earliest.
    Classes agree when equal, values when they differ by less than the tolerance."""

    def __init__(self, t, tolerance=None):
        if t < 1:
            raise ValueError(f"patience must be at least 1, not {t}")
        self.t, self.tolerance, self.earliest = t, tolerance, t + 1

    def start(self, B, L, device):
        return torch.zeros(B, device=device), torch.zeros(B, dtype=torch.int64, device=device)

    def step(self, state, i, lam, logits):
        before, agreed = state
        if logits.shape[1] > 1:
            now = logits.argmax(1).to(before.dtype)
            same = now == before
        elif self.tolerance is None:
            raise ValueError("patience on a regression task needs a tolerance within which two layers agree")
        else:
            now = logits[:, 0]
            same = (now - before).abs() < self.tolerance
        agreed = torch.where(same & (i > 1), agreed + 1, 0)         # before layer 1 there is none
        return (now, agreed), agreed >= self.t


class StatelessExit:
    """What the rules below share, which look at one layer alone."""

    def __init__(self, threshold):
        self.threshold = threshold

    def start(self, B, L, device):
        return ()


class EntropyExit(StatelessExit):
    """Stop where the entropy of softmax(logits_i), in nats, is below the threshold (DeeBERT)."""

    def step(self, state, i, lam, logits):
        if logits.shape[1] == 1:
            raise ValueError("entropy exit needs classes, and a regression task has none")
        return state, torch.special.entr(logits.softmax(1)).sum(1) < self.threshold


class LearnedExit(StatelessExit):
    """Stop where the certainty, which stands in lam, is above the threshold (BERxiT)."""

    def step(self, state, i, lam, logits):
        return state, lam > self.threshold


class FixedExit(StatelessExit):
    """Stop at the given layer: the plain model, and the paper's "ALBERT (9 layers)"."""

    def __init__(self, layer):
        self.earliest = layer

    def step(self, state, i, lam, logits):
        return state, i >= self.earliest


def exit_layers(rule, logits, lam):
    """The rule run over arrays of full depth: logits (B,L,C), lam (B,L) -> exit layer (B,) int64 in 1..L"""
    B, L = lam.shape
    state, layers = rule.start(B, L, lam.device), torch.full((B,), L, device=lam.device)
    for i in range(1, L):
        state, done = rule.step(state, torch.full_like(layers, i), lam[:, i - 1], logits[:, i - 1])
        layers = torch.where(done & (layers == L), i, layers)       # L: has not stopped yet
    return layers


# ---- the model ----

class LambdaHead(nn.Module):
    """lam_i = sigmoid(MLP([h_i, h_{i-1}]))   (section 3.2), on tanh-pooled first tokens; gives lam_i's logit.
    As published, num_layers=3 is three Linear(W,W) with tanh before the Linear(W,1), and 1 that one alone.
    W is 2H; without concat only h_i is read (PonderNet) and W is H. The last bias starts at logit(prior), so
    p starts near the prior, where no layer is cut off from the gradient."""

    def __init__(self, hidden_size, num_layers=3, concat=True, prior=0.1, dropout=0.1):
        super().__init__()
        width = 2 * hidden_size if concat else hidden_size
        self.concat, self.dropout = concat, dropout
        layers = num_layers if num_layers > 1 else 0
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.last = nn.Linear(width, 1)
        for linear in self.hidden:
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.last.weight, std=0.001)
        nn.init.constant_(self.last.bias, math.log(prior / (1 - prior)))

    def forward(self, pooled, previous):
        """pooled h_i (...,H), pooled h_{i-1} (...,H), zeros before layer 1 -> logit of lam_i (...)"""
        x = torch.cat([pooled, previous], dim=-1) if self.concat else pooled
        x = F.dropout(x, self.dropout, self.training)       # a mask of its own, fresh for each layer
        for linear in self.hidden:
            x = torch.tanh(linear(x))
        return self.last(x)[..., 0]


class Ponder(nn.Module):
    """An encoder with a classifier, or with per_layer one for each layer, and a Lambda head after each layer.
    With lambda_layers=0 there is none, and lam is 0, so all of p is on L. Only an encoder whose layers share
    their weights can run another num_layers than its own, else ValueError."""

    def __init__(self, encoder, num_labels, num_layers=None, lambda_layers=3, concat=True, per_layer=False,
                 prior=0.1, dropout=0.1):
        super().__init__()
        self.encoder, self.num_labels, self.dropout = encoder, num_labels, dropout
        self.num_layers = encoder.num_layers if num_layers is None else num_layers
        if self.num_layers < 1 or (self.num_layers != encoder.num_layers and not encoder.shared):
            raise ValueError(f"found {self.num_layers} layers, expected {encoder.num_layers}, or any number "
                             "from 1 on of an encoder whose layers share their weights")
        H = encoder.hidden_size
        linears = nn.ModuleList(nn.Linear(H, num_labels) for _ in range(self.num_layers if per_layer else 1))
        for linear in linears:
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.classifier = linears if per_layer else linears[0]
        self.lambda_head = None
        if lambda_layers and self.num_layers > 1:               # one layer alone is where every row stops
            self.lambda_head = LambdaHead(H, lambda_layers, concat, prior, dropout)

    def heads(self, i, pooled, previous):
        """pooled h_i and h_{i-1} (...,n,H) at layers i (n,) int64 -> logits (...,n,C), lam (...,n)"""
        # In bf16 all lambdas of a batch would start as one number, so autocast is off for the heads.
        with torch.autocast(pooled.device.type, enabled=False):
            dtype = next(self.parameters()).dtype
            pooled, previous = pooled.to(dtype), previous.to(dtype)
            x = F.dropout(pooled, self.dropout, self.training)
            if isinstance(self.classifier, nn.Linear):
                logits = self.classifier(x)
            else:
                weight = torch.stack([linear.weight for linear in self.classifier])[i - 1]  # (n,C,H)
                bias = torch.stack([linear.bias for linear in self.classifier])[i - 1]      # (n,C)
                logits = torch.einsum("...nh,nch->...nc", x, weight) + bias
            if self.lambda_head is None:
                return logits, torch.zeros_like(pooled[..., 0])
            return logits, self.lambda_head(pooled, previous).sigmoid()

    def forward(self, ids, mask, segments):
        """Every layer: ids, segments (B,T) int64, mask (B,T) True = a token -> logits (B,L,C), lam (B,L)"""
        L, h, firsts = self.num_layers, self.encoder.embed(ids, segments), []   # h (B,T,H)
        for i in range(1, L):
            h = self.encoder.layer(i, h, mask)              # (B,T,H)
            firsts.append(h[:, 0])                          # (B,H)
        last_layer = getattr(self.encoder, "first", self.encoder.layer)
        firsts.append(last_layer(L, h, mask)[:, 0])         # nothing else is read of layer L
        firsts = torch.stack(firsts, 1)                     # (B,L,H)
        pooled = self.encoder.pool(firsts.flatten(0, 1)[:, None]).view_as(firsts)
        previous = F.pad(pooled[:, :-1], (0, 0, 1, 0))      # (B,L,H) zeros for h_0
        return self.heads(torch.arange(1, L + 1, device=ids.device), pooled, previous)

    @torch.no_grad()
    def predict(self, ids, mask, segments, rule):
        """Early exit, after eval(): a row that stops leaves the batch. -> logits (B,C), layers (B,)"""
        B, L, device = len(ids), self.num_layers, ids.device
        rows, state = torch.arange(B, device=device), rule.start(B, L, device)
        answers, layers = next(self.parameters()).new_zeros(B, self.num_labels), torch.zeros_like(rows)
        h = self.encoder.embed(ids, segments)                       # (B,T,H)
        previous = torch.zeros_like(h[:, 0])                        # (B,H)
        for i in range(1, L + 1):
            h = self.encoder.layer(i, h, mask)                      # (n,T,H) for the n rows still here
            pooled, depth = self.encoder.pool(h), torch.full_like(rows, i)
            logits, lam = self.heads(depth, pooled, previous)       # (n,C), (n,)
            state, done = rule.step(state, depth, lam, logits)      # done (n,)
            stop = done | (i == L)
            answers[rows[stop]], layers[rows[stop]] = logits[stop], i
            go = ~stop
            rows, h, mask, previous = rows[go], h[go], mask[go], pooled[go]
            state = tuple(s[go] for s in state)
            if len(rows) == 0:
                return answers, layers

    predict_many = fast.predict_many    # predict for a list of (ids, segments) -> logits (N,C), layers (N,)
