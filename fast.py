"""The answers of Ponder.predict for any number of inputs, fast.

`descend` takes a pool of rows, longest first, down the layers together: rows that stop are dropped, and where it pays a
layer is decided from its first token, before its other tokens are computed. `stream` keeps a batch full instead, with
every row at a layer of its own; it needs shared layers, and is the way of CUDA, where one graph replays its step.
"""

import itertools

import numpy as np
import torch

POOL_TOKENS = 24576     # tokens that go down together, so that few rows are left alone when most have stopped
CHUNK_TOKENS = 1024     # tokens of a layer at a time on a CPU, measured against 512 to 1,536
FIRST_TOKENS = 384      # tokens in a pool from which deciding a layer first pays on a CPU; on a GPU it does not


def predict_many(model, inputs, rule, batch_size=32, depthwise=None):
    """Early exit for a list of (ids, segments) -> logits (N,C), layers (N,) int64 in 1..L, in the order of the inputs.

    Whole layers are computed for at most batch_size rows at a time. depthwise None means: on CUDA, if the layers are shared.
    """
    encoder, parameter = model.encoder, next(model.parameters())
    if depthwise is None:
        depthwise = encoder.shared and parameter.device.type == "cuda"
    if depthwise and not encoder.shared:
        raise ValueError("rows at different depths can share a batch only where the layers share their weights")
    N = len(inputs)
    state = rule.start(N, model.num_layers, parameter.device)
    answers = parameter.new_zeros(N + 1, model.num_labels)             # row N takes what nobody asked for
    layers = torch.zeros(N + 1, dtype=torch.int64, device=parameter.device)
    order = sorted(range(N), key=lambda row: -len(inputs[row][0]))
    with torch.no_grad():
        if depthwise and N:
            stream(model, inputs, order, rule, state, min(batch_size, N), answers, layers)
        while order and not depthwise:
            n = max(batch_size, POOL_TOKENS // max(1, len(inputs[order[0]][0])))
            descend(model, inputs, order[:n], rule, state, batch_size, answers, layers)
            order = order[n:]
    return answers[:N], layers[:N]


def descend(model, inputs, pool, rule, state, batch_size, answers, layers):
    """One pool, a list of rows, longest first, down the layers together; fills answers and layers where rows stop."""
    encoder, device = model.encoder, answers.device
    ids, mask, segments = pad([inputs[row] for row in pool], encoder, device)
    lengths = [padded(len(inputs[row][0]), encoder, device) for row in pool]
    rows = upload(pool, device)
    state = tuple(s[rows] for s in state)
    h = answers.new_zeros(*ids.shape, encoder.hidden_size)             # (B,T,H), written over below
    previous = torch.zeros_like(h[:, 0])                               # (B,H) pooled h_{i-1}
    for c, T in chunks(lengths, batch_size, device):
        h[c, :T] = encoder.embed(ids[c, :T], segments[c, :T])
    for i in range(1, model.num_layers + 1):
        last, tokens = i == model.num_layers, h.shape[0] * h.shape[1]
        may_stop = device.type == "cpu" and tokens >= FIRST_TOKENS and i >= getattr(rule, "earliest", 1)
        decide_first = hasattr(encoder, "first") and (last or may_stop)
        if decide_first:
            cls = encoder.first(i, h, mask)                            # (B,1,H)
        else:
            for c, T in chunks(lengths, batch_size, device):
                h[c, :T] = encoder.layer(i, h[c, :T], mask[c, :T])
            cls = h[:, :1]
        pooled, depth = encoder.pool(cls), torch.full_like(rows, i)
        logits, lam = model.heads(depth, pooled, previous)             # (B,C), (B,)
        state, done = rule.step(state, depth, lam, logits)
        stop, go = split(done, last)
        if stop:
            left = upload(stop, device)
            answers[rows[left]], layers[rows[left]] = logits[left], i
        if not go:
            return
        previous = pooled
        if stop:
            keep, lengths = upload(go, device), [lengths[b] for b in go]
            rows, mask, previous, state = rows[keep], mask[keep], pooled[keep], tuple(s[keep] for s in state)
        if decide_first:
            for c, T in chunks(lengths, batch_size, device):           # written over rows that are not read again
                if stop:
                    h[c, :T] = encoder.finish(i, h[:, :T].index_select(0, keep[c]), mask[c, :T], cls[keep[c]])
                else:
                    h[c, :T] = encoder.finish(i, h[c, :T], mask[c, :T], cls[c])
            h = h[:len(go)]
        elif stop:
            h = h[keep]
        h, mask = h[:, :lengths[0]], mask[:, :lengths[0]]


def stream(model, inputs, order, rule, start, size, answers, layers):
    """Depth-wise batching: inputs in the given order, longest first, through `size` places; fills answers and layers."""
    places, queue, N = Places(model, inputs, rule, start, size, answers, layers), iter(order), len(inputs)
    free, n = range(size), size                                         # n: the places that are still computed
    while True:
        for place, row in zip(free, itertools.islice(queue, len(free))):
            places.fill(place, row)
        alive = np.flatnonzero(places.plan[:n, 0] < N)
        if len(alive) == 0:
            return
        if len(alive) <= n // 2:                                        # only once the queue is empty
            places.move(alive)
            while len(alive) <= n // 2:
                n //= 2
        free = places.run(n, -(-int(places.plan[:n, 1].max()) // 16) * 16)


class Places:
    """The places of a batch that stays full, each with a row at a layer of its own; a row that stops frees its place.

    A step is the same work for every place, so it comes in few shapes: n places, T tokens. On CUDA a shape that comes
    again is recorded as a graph, which a host starts in a fraction of the time of its sixty kernels.
    """

    def __init__(self, model, inputs, rule, start, size, answers, layers):
        self.model, self.inputs, self.rule, self.start = model, inputs, rule, start
        self.answers, self.layers, self.device, self.N = answers, layers, answers.device, len(inputs)
        longest = max(len(ids) for ids, _ in inputs)
        self.width = min(-(-longest // 16) * 16, getattr(model.encoder, "max_length", longest))
        self.host = torch.zeros(size, 3 + 2 * self.width, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        self.plan = self.host.numpy()                                   # row, length, fresh, ids, segments by place
        self.plan[:, :2] = self.N, 1
        self.sent = torch.empty_like(self.host, device=self.device)
        nobody = layers.new_zeros(size)
        self.depth, self.stop = nobody.clone(), nobody.bool()           # (size,) each
        self.h = answers.new_zeros(size, self.width, model.encoder.hidden_size)
        self.pooled, self.state = torch.zeros_like(self.h[:, 0]), tuple(s[nobody] for s in start)
        self.seen, self.graphs = set(), {}

    def fill(self, place, row):
        ids, segments = self.inputs[row]
        T, W = len(ids), self.width
        self.plan[place, :3] = row, T, 1
        self.plan[place, 3:3 + T], self.plan[place, 3 + W:3 + W + T] = ids, segments

    def move(self, alive):
        """The rows that are left move to the first places."""
        self.plan[:len(alive)], self.plan[len(alive):, :2] = self.plan[alive], (self.N, 1)
        keep = upload(alive.tolist(), self.device)
        for tensor in (self.h, self.pooled, self.depth, *self.state):
            tensor[:len(alive)] = tensor[keep]

    def step(self, n, T):
        """Everything between two looks of the host: rows that are fresh start, all go one layer on, some stop."""
        encoder, W = self.model.encoder, self.width
        row, length, fresh = self.sent[:n, :3].long().unbind(1)         # (n,) each
        ids, segments = self.sent[:n, 3:3 + T].long(), self.sent[:n, 3 + W:3 + W + T].long()
        mask = torch.arange(T, device=self.device) < length[:, None]    # (n,T)
        first = (encoder.embed(ids, segments), torch.zeros_like(self.pooled[:n]), torch.zeros_like(self.depth[:n]),
                 *(s[row.clamp(max=self.N - 1)] for s in self.start))
        held = (self.h[:n, :T], self.pooled[:n], self.depth[:n], *(s[:n] for s in self.state))
        h, previous, i, *state = (torch.where(fresh.view(-1, *[1] * (old.dim() - 1)) > 0, new, old)
                                  for new, old in zip(first, held))
        i = (i + 1).clamp(max=self.model.num_layers)                    # an empty place stays where it is
        h = encoder.layer(1, h, mask)                                   # (n,T,H) every layer is this one
        pooled = encoder.pool(h)                                        # (n,H)
        logits, lam = self.model.heads(i, pooled, previous)
        state, done = self.rule.step(tuple(state), i, lam, logits)
        stop = done | (i == self.model.num_layers)
        for old, new in zip((*held, self.stop[:n]), (h, pooled, i, *state, stop)):
            old.copy_(new)
        target = torch.where(stop, row, self.N)
        self.answers.index_copy_(0, target, logits.to(self.answers.dtype))
        self.layers.index_copy_(0, target, i)

    def run(self, n, T):
        """One step for n places and T tokens -> the places that are free after it; the host waits for the device once."""
        T = min(T, self.width)
        self.sent.copy_(self.host, non_blocking=True)
        if self.device.type != "cuda" or (n, T) not in self.seen:
            self.step(n, T)                                             # also warms up what a graph must not do
            self.seen.add((n, T))
        else:
            if (n, T) not in self.graphs:
                self.graphs[n, T] = graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self.step(n, T)
            self.graphs[n, T].replay()
        free = [place for place, stop in enumerate(self.stop[:n].tolist()) if stop]
        self.plan[:n, 2], self.plan[free, :2] = 0, (self.N, 1)          # an empty place has one token
        return free


def first(encoder, i, h, mask):
    """h_i of the first token alone (B,1,H), by the encoder's own way or as a part of the whole layer"""
    if hasattr(encoder, "first"):
        return encoder.first(i, h, mask)
    return encoder.layer(i, h, mask)[:, :1]


def pad(inputs, encoder, device, length=None):
    """list of (ids, segments) -> ids (B,T) int64, mask (B,T) bool, True = a real token, segments (B,T) int64

    T is the given length, or that of the longest, padded.
    """
    lengths = np.array([len(ids) for ids, _ in inputs])
    T = length or padded(int(lengths.max()), encoder, device)
    mask = np.arange(T) < lengths[:, None]
    both = np.zeros((2, len(inputs), T), dtype=np.int64)
    both[0] = getattr(encoder, "pad_id", 0)
    for values, column in zip(both, zip(*inputs)):
        values[mask] = np.fromiter(itertools.chain.from_iterable(column), np.int64, lengths.sum())
    ids, segments = upload(both, device)
    return ids, upload(mask, device), segments


def upload(values, device, dtype=None):
    """Numbers, nested or an array -> a tensor on the device; memory is pinned for a GPU, so that the host need not wait"""
    x = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def padded(T, encoder, device):
    """The length to which a longest row of T tokens is padded: on a GPU a multiple of 8, which its kernels want"""
    if torch.device(device).type == "cpu":
        return T
    whole = -(-T // 8) * 8
    return min(whole, getattr(encoder, "max_length", whole))


def chunks(lengths, batch_size, device):
    """Rows of the given lengths, longest first, in slices of at most batch_size, on a CPU of CHUNK_TOKENS tokens or one row

    -> slice, T, its longest row
    """
    start = 0
    while start < len(lengths):
        T, n = lengths[start], batch_size
        if device.type == "cpu":
            n = min(n, max(1, CHUNK_TOKENS // T))
        yield slice(start, min(start + n, len(lengths))), T
        start += n


def split(done, last):
    """done (B,) bool -> lists of the rows that stop, all at the last layer, and that go on; the host waits for the device once"""
    if last:
        return list(range(len(done))), []
    waited = done.tolist()
    return [b for b, stop in enumerate(waited) if stop], [b for b, stop in enumerate(waited) if not stop]
