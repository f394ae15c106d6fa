"""PALBERT (Balagansky and Gavrilov, NeurIPS 2022): an encoder that learns after which layer to stop.

Read from top to bottom it follows section 3 of the paper: the distribution over exit layers, its prior, the loss, the exit rules, the
module, and inference that really stops. Letters, everywhere in this project:

    B batch   T tokens   H hidden   L layers (the paper's n)   C classes, 1 for regression
    h     hidden states after a layer        lam   lambda_i, the probability to stop at layer i if layer i is reached
    p     p(i|x), exit distribution          q     threshold of Q-exit

Batch first, layers second; layers count 1..L in prose and in every result. The encoder is anything with num_layers, hidden_size,
shared, embed, layer and pool (and, for speed, first and finish) as albert.py has them; nothing else is known of it here.
"""

import itertools
import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F


# ---- the exit distribution and the loss (section 3) ----

def exit_distribution(lam):
    """p(i|x) = lam_i * prod_{j<i} (1 - lam_j)   (section 3), with lam_L counted as 1: the last layer takes what is left.

    lam (B,L) in [0,1] -> p (B,L), rows sum to 1. Left open, p could throw mass away and the loss below would reward it.
    """
    reach, p = torch.ones_like(lam[:, 0]), []                       # (B,) the probability to reach layer i
    for i in range(lam.shape[1] - 1):
        p.append(reach * lam[:, i])
        reach = reach * (1 - lam[:, i])
    return torch.stack(p + [reach], dim=1)                          # (B,L)


def geometric_prior(lam_p, L):
    """p(i|lam_p) = lam_p * (1 - lam_p)^(i-1) for i < L, and p(L|lam_p) = 1 - sum_{i<L} p(i|lam_p)   (section 3) -> (L,)"""
    if not 0 < lam_p < 1:
        raise ValueError(f"the prior's lambda must lie in (0, 1), not {lam_p}")
    return exit_distribution(torch.full((1, L), lam_p, dtype=torch.float64))[0].float()


def kl_divergence(p, q):
    """KL(p || q) = sum_i p_i * log(p_i / q_i), with 0 log 0 = 0; p (B,L), q (L,) or (B,L) -> (B,) in nats, at least 0"""
    return (torch.xlogy(p, torch.where(p > 0, p, 1)) - torch.xlogy(p, q)).sum(-1)


def layer_losses(logits, labels):
    """-log p(y|x,i), or (y - y_i)^2 for C = 1; logits (B,L,C), labels (B,) int64 or float -> (B,L)"""
    logits = at_least_float32(logits)
    if logits.shape[2] == 1:
        return (logits[..., 0] - labels[:, None]) ** 2
    return F.cross_entropy(logits.transpose(1, 2), labels[:, None].expand(-1, logits.shape[1]), reduction="none")


def elbo_loss(logits, lam, labels, prior, beta):
    """-E_{i ~ p(i|x)} [log p(y|x,i)] + beta * KL(p(.|x) || p(.|lam_p))   (Eq. 1, negated; mean over the batch)

    logits (B,L,C), lam (B,L), labels (B,) int64 or float, prior (L,), beta >= 0 -> loss (), and a dict of its parts, detached:
    task () and kl (), whose weighted sum the loss is; expected_layer (), the mean of sum_i i p_i; cut_at_1 (), the share of rows
    whose distribution is cut at layer 1, which get no gradient for lambda. For C = 1, -log p(y|x,i) is (y - y_i)^2.

    Section 3 truncates p at the lowest j with sum_{i<=j} p_i >= 1 - 0.05. Layer j takes what is left, so that p stays a
    distribution: lam counts as 1 from j on, as it does at L. The prior is not folded at j: the bound needs it as it is.
    """
    L, lam = logits.shape[1], at_least_float32(lam)
    eps = torch.finfo(lam.dtype).eps
    lam = lam.clamp(eps, 1 - eps)                                   # a saturated lambda still has a finite loss and gradient
    cdf = exit_distribution(lam).cumsum(1)                          # (B,L)
    cut = (cdf[:, :-1] < 0.95).sum(1)                               # (B,) index of the first layer with cdf >= 0.95, or L-1
    p = exit_distribution(torch.where(torch.arange(L, device=lam.device) >= cut[:, None], 1, lam))
    task = (p * layer_losses(logits, labels)).sum(1).mean()         # weighted per example before any mean
    kl = kl_divergence(p, prior).mean()
    layers = torch.arange(1, L + 1, device=p.device)
    parts = {"task": task, "kl": kl, "expected_layer": (p * layers).sum(1).mean(), "cut_at_1": (cut == 0).float().mean()}
    return task + beta * kl, {name: value.detach() for name, value in parts.items()}


def layer_weighted_loss(logits, labels):
    """sum_i i * CE_i / sum_i i   (PABEE, Zhou et al. 2020); (B,L,C), (B,) -> loss (), {"task": ()}"""
    losses = layer_losses(logits, labels)                           # (B,L)
    weight = torch.arange(1, losses.shape[1] + 1, device=losses.device, dtype=losses.dtype)
    loss = (losses * (weight / weight.sum())).sum(1).mean()
    return loss, {"task": loss.detach()}


def expected_prediction(logits, p):
    """sum_i p(i|x) * softmax(logits_i), or sum_i p(i|x) * y_i for regression   (section 4.1); (B,L,C), (B,L) -> (B,C)"""
    return (p[..., None] * (logits.softmax(-1) if logits.shape[-1] > 1 else logits)).sum(1)


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- exit rules ----
# A rule has start(B, L, device) -> state, a tuple of tensors with rows first, and step(state, i, lam, logits) -> (state, done), where
# i (B,) int64 is the layer at which each row stands, lam (B,), logits (B,C), done (B,) bool. So the same few lines serve arrays of
# full depth, a batch that shrinks, and a batch whose rows stand at different layers. The last layer ends every row, whatever the rule.
# A rule that cannot stop before some layer says so in `earliest`, and inference then does not look for rows that stop before it.

class QExit:
    """Stop at the first layer i with sum_{j<=i} p(j|x) > q   (section 3.1); q in (0,1], where 1 never stops early."""

    def __init__(self, q):
        if not 0 < q <= 1:
            raise ValueError(f"q must lie in (0, 1], not {q}")
        self.q = q

    def start(self, B, L, device):
        return torch.ones(B, device=device), torch.zeros(B, device=device)

    def step(self, state, i, lam, logits):
        reach, cdf = state
        cdf = (cdf + reach * lam).clamp(max=1)                      # rounding must not carry it past q = 1
        return (reach * (1 - lam), cdf), cdf > self.q


class SampleExit:
    """Stop at layer i with probability lam_i   (PonderNet, section 3.1): where u_i < lam_i, with u (B,L) drawn once in start()."""

    def __init__(self, generator):
        self.generator = generator

    def start(self, B, L, device):
        return (torch.rand(B, L, generator=self.generator, device=self.generator.device).to(device),)

    def step(self, state, i, lam, logits):
        return state, state[0].gather(1, i[:, None] - 1)[:, 0] < lam


class PatienceExit:
    """Stop when t layers in a row have agreed with the one before (PABEE): at layer t + 1 at the earliest.

    Classes agree when equal; regression agrees when it moved by less than the tolerance, which it therefore needs.
    """

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
        agreed = torch.where(same & (i > 1), agreed + 1, 0)
        return (now, agreed), agreed >= self.t


class EntropyExit:
    """Stop where the entropy of softmax(logits_i), in nats, is below the threshold (BranchyNet, DeeBERT, FastBERT)."""

    def __init__(self, threshold):
        self.threshold = threshold

    def start(self, B, L, device):
        return ()

    def step(self, state, i, lam, logits):
        if logits.shape[1] == 1:
            raise ValueError("entropy exit needs classes, and a regression task has none")
        return state, torch.special.entr(logits.softmax(1)).sum(1) < self.threshold


class FixedExit:
    """Stop at the given layer: the plain model, and the paper's "ALBERT (9 layers)"."""

    def __init__(self, layer):
        self.layer = self.earliest = layer

    def start(self, B, L, device):
        return ()

    def step(self, state, i, lam, logits):
        return state, i >= self.layer


def exit_layers(rule, logits, lam):
    """The rule run over arrays of full depth: logits (B,L,C), lam (B,L) -> exit layer (B,) int64 in 1..L"""
    B, L = lam.shape
    state, layers = rule.start(B, L, lam.device), torch.full((B,), L, device=lam.device)
    for i in range(1, L):
        state, done = rule.step(state, torch.full_like(layers, i), lam[:, i - 1], logits[:, i - 1])
        layers = torch.where(done & (layers == L), i, layers)
    return layers


# ---- the model ----

class LambdaHead(nn.Module):
    """lam_i = sigmoid(MLP([h_i, h_{i-1}]))   (section 3.2), on the tanh-pooled first token; returns the logit of lam_i.

    num_layers 3: three Linear(n,n) with tanh and a Linear(n,1); num_layers 1: the Linear(n,1) alone. n is 2H with concat, else H and
    h_i alone is read (PonderNet). The last bias starts at logit(prior), so that p starts near the prior and no layer is cut off.
    """

    def __init__(self, hidden_size, num_layers=3, concat=True, prior=0.1, dropout=0.1):
        super().__init__()
        n = 2 * hidden_size if concat else hidden_size
        self.concat, self.dropout = concat, dropout
        self.hidden = nn.ModuleList(nn.Linear(n, n) for _ in range(num_layers if num_layers > 1 else 0))
        self.last = nn.Linear(n, 1)
        for linear in self.hidden:
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.last.weight, std=0.001)
        nn.init.constant_(self.last.bias, math.log(prior / (1 - prior)))

    def forward(self, pooled, previous):
        """pooled h_i (...,H), pooled h_{i-1} (...,H), zeros before layer 1 -> logit of lam_i (...)"""
        x = torch.cat([pooled, previous], dim=-1) if self.concat else pooled
        x = F.dropout(x, self.dropout, self.training)               # a mask of its own, fresh for each layer
        for linear in self.hidden:
            x = torch.tanh(linear(x))
        return self.last(x)[..., 0]


POOL_TOKENS = 24576     # tokens that go down the layers together, so that few rows are left alone when most have left
CHUNK_TOKENS = 1024     # on a CPU, tokens of a layer at a time; measured against 512 to 1,536


class Ponder(nn.Module):
    """An encoder with a classifier and, if lambda_layers is not 0, a Lambda head after each layer.

    num_layers other than the encoder's needs an encoder with shared layers. per_layer=True gives each layer a classifier of its own
    (PABEE). Without a Lambda head lam is 0, so that p sits on L: that is the plain model.
    """

    first_tokens = 384      # B * T from which deciding before finishing a layer pays; measured on a CPU (README, Speed)

    def __init__(self, encoder, num_labels, num_layers=None, lambda_layers=3, concat=True, per_layer=False, prior=0.1, dropout=0.1):
        super().__init__()
        self.encoder, self.num_labels, self.dropout = encoder, num_labels, dropout
        self.num_layers = encoder.num_layers if num_layers is None else num_layers
        if self.num_layers != encoder.num_layers and not encoder.shared or self.num_layers < 1:
            raise ValueError(f"{self.num_layers} layers asked of an encoder that has {encoder.num_layers}; only one whose layers "
                             "share their weights can run another number, from 1 up")
        H = encoder.hidden_size
        heads = nn.ModuleList(nn.Linear(H, num_labels) for _ in range(self.num_layers if per_layer else 1))
        for linear in heads:
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        self.classifier = heads if per_layer else heads[0]
        self.lambda_head = LambdaHead(H, lambda_layers, concat, prior, dropout) if lambda_layers else None
        self.can_decide_first = getattr(encoder, "first", None) is not None

    def heads(self, i, pooled, previous):
        """pooled h_i and h_{i-1} (...,n,H) at layers i (n,) -> logits (...,n,C), lam (...,n)"""
        x = F.dropout(pooled, self.dropout, self.training)
        if isinstance(self.classifier, nn.Linear):
            logits = self.classifier(x)
        else:
            weight = torch.stack([linear.weight for linear in self.classifier])[i - 1]      # (n,C,H)
            bias = torch.stack([linear.bias for linear in self.classifier])[i - 1]          # (n,C)
            logits = torch.einsum("...nh,nch->...nc", x, weight) + bias
        if self.lambda_head is None:
            return logits, torch.zeros_like(pooled[..., 0], dtype=torch.float32)
        return logits, at_least_float32(self.lambda_head(pooled, previous)).sigmoid()

    def forward(self, ids, mask, segments):
        """Every layer: ids (B,T) int64, mask (B,T) bool, True = a real token, segments (B,T) int64 -> logits (B,L,C), lam (B,L)"""
        L, B = self.num_layers, len(ids)
        h, cls = self.encoder.embed(ids, segments), []              # (B,T,H)
        for i in range(1, L + 1):
            if i == L and self.can_decide_first:
                cls.append(self.encoder.first(i, h, mask)[0])       # (B,1,H); nobody reads the last layer's other tokens
            else:
                h = self.encoder.layer(i, h, mask)                  # (B,T,H)
                cls.append(h[:, :1])
        pooled = self.encoder.pool(torch.cat(cls, 1).flatten(0, 1)[:, None]).view(B, L, -1)     # (B,L,H)
        previous = F.pad(pooled[:, :-1], (0, 0, 1, 0))              # (B,L,H), zeros for h_0
        return self.heads(torch.arange(1, L + 1, device=ids.device), pooled, previous)

    # ---- inference that stops ----

    @torch.no_grad()
    def predict(self, ids, mask, segments, rule):
        """Early exit for real: computes a layer only for the rows that the rule lets go on -> logits (B,C), layers (B,) in 1..L"""
        state = rule.start(len(ids), self.num_layers, ids.device)
        rows = lengths_of(mask).argsort(descending=True)
        return in_order(self.descend(rows, ids[rows], mask[rows], segments[rows], rule, tuple(s[rows] for s in state), len(ids)))

    @torch.no_grad()
    def predict_many(self, inputs, rule, batch_size=32, depthwise=False):
        """Early exit over any number of inputs, a list of (ids, segments) -> logits (N,C), layers (N,), in the order of the input.

        Rows of like length share a batch. With depthwise (shared layers only) the place of a row that exits goes to the next input
        at once, so that the batch stays full: meant for accelerators, and not the default until a measurement there says so.
        """
        if depthwise and not self.encoder.shared:
            raise ValueError("rows at different depths can share a batch only in an encoder whose layers share their weights")
        device = next(self.parameters()).device
        state = rule.start(len(inputs), self.num_layers, device)
        order = sorted(range(len(inputs)), key=lambda row: -len(inputs[row][0]))
        if not inputs:
            return torch.empty(0, self.num_labels, device=device), torch.empty(0, dtype=torch.int64, device=device)
        if depthwise:
            return in_order(self.stream(order, inputs, rule, state, batch_size))
        finished = []
        while order:
            n = max(batch_size, POOL_TOKENS // max(1, len(inputs[order[0]][0])))
            pool, order = order[:n], order[n:]
            rows = upload(pool, device)
            batch = pad([inputs[row] for row in pool], self.encoder, device)
            finished += self.descend(rows, *batch, rule, tuple(s[rows] for s in state), batch_size)
        return in_order(finished)

    def descend(self, rows, ids, mask, segments, rule, state, batch_size):
        """Rows (B,), longest first, that go down the layers together and leave as they exit; whole layers are computed for at most
        batch_size of them at a time. Yields for those that exit: rows (n,), logits (n,C), layers (n,)"""
        lengths, H = lengths_of(mask).tolist(), self.encoder.hidden_size
        h = next(self.parameters()).new_zeros(*ids.shape, H)        # (B,T,H), written over below
        chunked = partial(chunks, batch_size=batch_size, cpu=h.device.type == "cpu")
        for c, T in chunked(lengths):
            h[c, :T] = self.encoder.embed(ids[c, :T], segments[c, :T])
        previous = h.new_zeros(len(rows), H)                        # (B,H) pooled h_{i-1}
        for i in range(1, self.num_layers + 1):
            many = h.shape[0] * h.shape[1] >= self.first_tokens and i >= getattr(rule, "earliest", 1)
            first = self.can_decide_first and (i == self.num_layers or many)
            if first:
                cls, kv = self.encoder.first(i, h, mask)            # (B,1,H); the rule reads no other token
            else:
                for c, T in chunked(lengths):
                    h[c, :T] = self.encoder.layer(i, h[c, :T], mask[c, :T])
                cls = h[:, :1]
            pooled, at = self.encoder.pool(cls), torch.full_like(rows, i)
            logits, lam = self.heads(at, pooled, previous)          # (B,C), (B,)
            state, done = rule.step(state, at, lam, logits)
            leave, go = split(done | (at == self.num_layers))
            if leave:
                left = upload(leave, rows.device)
                yield rows[left], logits[left], at[left]
                if not go:
                    return
            lengths, go = [lengths[b] for b in go], upload(go, rows.device)
            rows, mask, previous, state = rows[go], mask[go], pooled[go], tuple(s[go] for s in state)
            if first:
                width = [h.shape[1]] * len(go) if kv.numel() else lengths   # what first() has kept may be laid out for T tokens
                for c, T in chunked(width):                         # written over rows that are not read again: go[b] >= b
                    h[c, :T] = self.encoder.finish(i, h[:, :T].index_select(0, go[c]), mask[c, :T], cls[go[c]], kv[go[c]])
                h = h[:len(go)]
            elif leave:
                h = h[go]
            h, mask = h[:, :lengths[0]], mask[:, :lengths[0]]

    def stream(self, order, inputs, rule, states, batch_size):
        """Depth-wise batching: inputs in the given order, longest first, through a batch whose rows stand at different layers.

        Rows that go on move up, and the next inputs, none of them longer, join below: the batch stays full until no input is left,
        and then shrinks. On a CPU it is many batches large, as in descend, and goes through the layer batch_size rows at a time.
        Yields as descend does. The host waits for the device once a step, in split().
        """
        h = next(self.parameters()).new_zeros(0, len(inputs[order[0]][0]), self.encoder.hidden_size)
        device, pooled, state, batch, queue = h.device, h[:, 0], tuple(s[:0] for s in states), [], iter(order)
        size = batch_size * (max(1, POOL_TOKENS // (batch_size * h.shape[1])) if device.type == "cpu" else 1)
        while True:
            new = list(itertools.islice(queue, size - len(batch)))
            batch += [(row, 1, len(inputs[row][0])) for row in new]
            if not batch:
                return
            lengths = [length for _, _, length in batch]
            h, previous = h[:, :lengths[0]], F.pad(pooled, (0, 0, 0, len(new)))     # (B,H)
            if new:
                ids, _, segments = pad([inputs[row] for row in new], self.encoder, device, lengths[0])
                h = torch.cat([h, self.encoder.embed(ids, segments)])               # (B,T,H)
            rows, at, ends = upload(batch, device).unbind(1)                        # (B,) each
            mask = torch.arange(lengths[0], device=device) < ends[:, None]          # (B,T)
            state = tuple(torch.cat([s, start[rows[len(s):]]]) for s, start in zip(state, states))
            for c, T in chunks(lengths, batch_size, cpu=False):
                h[c, :T] = self.encoder.layer(1, h[c, :T], mask[c, :T])             # one layer is like another
            pooled = self.encoder.pool(h)                                           # (B,H)
            logits, lam = self.heads(at, pooled, previous)
            state, done = rule.step(state, at, lam, logits)
            leave, go = split(done | (at == self.num_layers))
            if leave:
                left, keep = upload(leave, device), upload(go, device)
                yield rows[left], logits[left], at[left]
                h, pooled, state = h.index_select(0, keep), pooled[keep], tuple(s[keep] for s in state)
            batch = [(row, i + 1, length) for row, i, length in (batch[b] for b in go)]


def pad(inputs, encoder, device, length=None):
    """list of (ids, segments) -> ids (B,T) int64, mask (B,T) bool, True = a real token, segments (B,T) int64; T the longest, or length"""
    T = length or max(len(ids) for ids, _ in inputs)
    pad_id = getattr(encoder, "pad_id", 0)
    packed = upload([[ids + [pad_id] * (T - len(ids)), segments + [0] * (T - len(ids))] for ids, segments in inputs], device)
    lengths = upload([len(ids) for ids, _ in inputs], device)
    ids, segments = packed.unbind(1)
    return ids, torch.arange(T, device=device) < lengths[:, None], segments


def upload(values, device, dtype=torch.int64):
    """Nested lists of numbers -> a tensor on the device; the host does not wait for a GPU, as it would for memory that is not pinned"""
    x, cuda = torch.tensor(values, dtype=dtype), torch.device(device).type == "cuda"
    return (x.pin_memory() if cuda else x).to(device, non_blocking=cuda)


def lengths_of(mask):
    """mask (B,T) -> the number of tokens up to the last real one (B,), at least 1"""
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1).clamp(min=1)


def chunks(lengths, batch_size, cpu):
    """Rows of the given lengths, longest first, as slices of at most batch_size, on a CPU also of at most CHUNK_TOKENS tokens or one row
    -> slice, T, its longest row"""
    start = 0
    while start < len(lengths):
        T = lengths[start]
        end = min(len(lengths), start + (min(batch_size, max(1, CHUNK_TOKENS // T)) if cpu else batch_size))
        yield slice(start, end), T
        start = end


def split(done):
    """done (B,) bool -> lists of the rows that are done, and of the others; the host waits for the device once"""
    waited = done.tolist()
    return [b for b, stop in enumerate(waited) if stop], [b for b, stop in enumerate(waited) if not stop]


def in_order(finished):
    """Rows as they finished, [(rows (n,), logits (n,C), layers (n,))], -> logits (N,C), layers (N,) by row"""
    rows, logits, layers = (torch.cat(column) for column in zip(*finished))
    by_row = rows.argsort()
    return logits[by_row], layers[by_row]
