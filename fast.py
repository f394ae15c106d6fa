"""The answers of Ponder.predict for any number of inputs, fast.

`descend` takes a pool of rows, longest first, down the layers together. Rows that stop are dropped, and where
it pays a layer is decided from its first token, before its other tokens are computed. `Places` keeps a batch
full instead, with every row at a layer of its own; it needs shared layers, and on CUDA a graph replays its
step.
"""

import collections
import itertools

import numpy as np
import torch

POOL_TOKENS = 24576     # tokens that go down together, so that few rows are left alone when most have stopped
CHUNK_TOKENS = 1024     # tokens of a layer at a time on a CPU, measured against 512 to 1,536
FIRST_TOKENS = 384      # tokens in a pool from which a CPU gains by deciding a layer first; an H100 does not
STREAM_ROWS = 4000      # inputs from which full batches pay on an H100, whose graphs are recorded first


@torch.no_grad()
def predict_many(model, inputs, rule, batch_size=32, depthwise=None):
    """Early exit for N inputs (ids, segments) -> logits (N,C), layers (N,) int64 in 1..L, in the same order

    Whole layers are computed for at most batch_size rows at a time. depthwise=None is True on CUDA for shared
    layers and STREAM_ROWS inputs or more. ValueError for depthwise=True without shared layers.
    """
    encoder, parameter = model.encoder, next(model.parameters())
    if depthwise is None:
        depthwise = encoder.shared and parameter.device.type == "cuda" and len(inputs) >= STREAM_ROWS
    if depthwise and not encoder.shared:
        raise ValueError("rows at different depths can share a batch only where layers share their weights")
    N = len(inputs)
    state = rule.start(N, model.num_layers, parameter.device)
    answers = parameter.new_zeros(N + 1, model.num_labels)             # row N takes what empty places give
    layers = torch.zeros(N + 1, dtype=torch.int64, device=parameter.device)
    order = sorted(range(N), key=lambda row: -len(inputs[row][0]))
    if depthwise and N:
        Places(model, inputs, order, rule, state, min(batch_size, N), answers, layers).run()
        order = []
    while order:
        n = max(batch_size, POOL_TOKENS // max(1, len(inputs[order[0]][0])))
        descend(model, inputs, order[:n], rule, state, batch_size, answers, layers)
        order = order[n:]
    return answers[:N], layers[:N]


def descend(model, inputs, pool, rule, state, batch_size, answers, layers):
    """One pool, a list of rows, longest first, goes down the layers together; fills answers and layers."""
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
        stopped = done.tolist() if not last else [True] * len(rows)     # the host waits for the device here
        stop = [b for b, it in enumerate(stopped) if it]
        go = [b for b, it in enumerate(stopped) if not it]
        if stop:
            ends = upload(stop, device)
            answers[rows[ends]], layers[rows[ends]] = logits[ends], i
        if not go:
            return
        previous = pooled
        if stop:
            keep, lengths = upload(go, device), [lengths[b] for b in go]
            rows, mask, previous, state = rows[keep], mask[keep], pooled[keep], tuple(s[keep] for s in state)
        if decide_first:
            for c, T in chunks(lengths, batch_size, device):
                source = keep[c] if stop else c     # it ascends, so no row is read after it was overwritten
                h[c, :T] = encoder.finish(i, h[source, :T], mask[c, :T], cls[source])
            h = h[:len(go)]
        elif stop:
            h = h[keep]
        h, mask = h[:, :lengths[0]], mask[:, :lengths[0]]


class Places:
    """A batch that is kept full: each place holds a row at a layer of its own, and a row that stops frees it.

    A step is the same work for every place, so its shape depends on T alone, the longest row in steps of 16.
    On CUDA a shape that keeps coming is recorded as a graph, because its seventy kernels take the host longer
    to start than the device to run. Rows arrive within the step, at most a quarter of the places.
    """

    def __init__(self, model, inputs, order, rule, start, size, answers, layers):
        self.model, self.inputs, self.queue, self.rule, self.start = model, inputs, iter(order), rule, start
        self.answers, self.layers, self.device = answers, layers, answers.device
        self.cuda, self.size, self.N = self.device.type == "cuda", size, len(inputs)
        longest = max(len(ids) for ids, _ in inputs)
        self.width = W = min(-(-longest // 16) * 16, getattr(model.encoder, "max_length", longest))
        most = -(-size // 4) if self.cuda else size              # arrivals a step, embedded even if none come
        self.ready = np.zeros((0, 3 + 2 * W), np.int32)            # place, row, length, ids, segments of each
        self.host = torch.zeros(most, 3 + 2 * W, dtype=torch.int32, pin_memory=self.cuda)
        self.sent = torch.empty_like(self.host, device=self.device)
        self.taken = np.zeros(size, np.int64)                    # tokens of the row in a place, 0: it is free
        nobody = layers.new_zeros(size + 1)            # the last place is for those that did not come
        self.row, self.length, self.depth = nobody + self.N, nobody + 1, nobody.clone()
        self.stop = nobody[:-1].bool()
        self.h = answers.new_zeros(size + 1, W, model.encoder.hidden_size)
        self.pooled, self.state = torch.zeros_like(self.h[:, 0]), tuple(s[nobody] for s in start)
        self.uses, self.graphs = collections.Counter(), {}

    def run(self):
        """Answers every row."""
        self.prepare()
        while self.admit():
            self.launch()
            self.prepare()                                              # while the device computes
            self.free()

    def prepare(self):
        """Packs the rows that come next."""
        rows = list(itertools.islice(self.queue, len(self.host) - len(self.ready)))
        if rows:
            both, mask = table([self.inputs[row] for row in rows], self.width, 0)
            packed = np.column_stack([np.zeros(len(rows)), rows, mask.sum(1), *both]).astype(np.int32)
            self.ready = np.concatenate([self.ready, packed])

    def admit(self):
        """Rows that are ready take free places -> whether any place is taken"""
        free = np.flatnonzero(self.taken == 0)[:len(self.ready)]
        coming = len(free)
        plan = self.host.numpy()
        plan[:, :3] = self.size, self.N, 1
        plan[:coming] = self.ready[:coming]
        plan[:coming, 0], self.taken[free] = free, self.ready[:coming, 2]
        self.ready = self.ready[coming:]
        return self.taken.any()

    def launch(self):
        """Starts one step for all places that are taken."""
        T = min(-(-int(self.taken.max()) // 16) * 16, self.width)
        self.sent.copy_(self.host, non_blocking=True)
        self.uses[T] += 1
        if not self.cuda or self.uses[T] < 4:                      # recording takes as long as some steps
            return self.step(T)
        if T not in self.graphs:
            self.graphs[T] = record(lambda: self.step(T))
        self.graphs[T].replay()

    def free(self):
        """Frees the places whose rows have stopped; nowhere else does the host wait for the device."""
        self.taken[self.stop.cpu().numpy()] = 0

    def step(self, T):
        """Everything between two looks of the host: rows arrive, all go one layer on, some stop."""
        encoder, W, L, n = self.model.encoder, self.width, self.model.num_layers, self.size
        place, row, length = self.sent[:, :3].long().unbind(1)
        h = encoder.embed(self.sent[:, 3:3 + T].long(), self.sent[:, 3 + W:3 + W + T].long())
        first = [s[row.clamp(max=self.N - 1)] for s in self.start]
        new = (row, length, torch.zeros_like(row), h, torch.zeros_like(h[:, 0]), *first)
        held = (self.row, self.length, self.depth, self.h[:, :T], self.pooled, *self.state)
        for old, arriving in zip(held, new):
            old.index_copy_(0, place, arriving.to(old.dtype))
        row, length, i, h, previous, *state = (old[:n] for old in held)
        i = (i + 1).clamp(max=L)                                        # (n,) an empty place goes no further
        mask = torch.arange(T, device=self.device) < length[:, None]    # (n,T)
        h = encoder.layer(1, h, mask)                                   # (n,T,H) every layer is this one
        pooled = encoder.pool(h)                                        # (n,H)
        logits, lam = self.model.heads(i, pooled, previous)             # (n,C), (n,)
        state, done = self.rule.step(tuple(state), i, lam, logits)
        stop = done | (i == L)
        target = torch.where(stop, row, self.N)
        self.answers.index_copy_(0, target, logits.to(self.answers.dtype))
        self.layers.index_copy_(0, target, i)
        row = torch.where(stop, self.N, row)
        for old, now in zip((*held, self.stop), (row, length, i, h, pooled, *state, stop)):
            old[:n].copy_(now)


def record(work):
    """What work() would start on the GPU, as a graph; it is not run"""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin()
        work()
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def pad(inputs, encoder, device, length=None):
    """list of (ids, segments) -> ids (B,T) int64, mask (B,T) bool, True = a real token, segments (B,T) int64

    T is the given length, or that of the longest, padded.
    """
    T = length or padded(max(len(ids) for ids, _ in inputs), encoder, device)
    both, mask = table(inputs, T, getattr(encoder, "pad_id", 0))
    ids, segments = upload(both, device)
    return ids, upload(mask, device), segments


def table(inputs, T, pad_id):
    """list of (ids, segments) -> array of ids and segments (2,B,T), mask (B,T)"""
    lengths = np.array([len(ids) for ids, _ in inputs])
    mask = np.arange(T) < lengths[:, None]
    both = np.zeros((2, len(inputs), T), dtype=np.int64)
    both[0] = pad_id
    for values, column in zip(both, zip(*inputs)):
        values[mask] = np.fromiter(itertools.chain.from_iterable(column), np.int64, lengths.sum())
    return both, mask


def upload(values, device):
    """Numbers or an array -> a tensor on the device; memory is pinned for a GPU, so the host need not wait"""
    x = torch.as_tensor(values)
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def padded(T, encoder, device):
    """The length to which rows of at most T tokens are padded: on a GPU a multiple of 8, for its kernels"""
    if torch.device(device).type == "cpu":
        return T
    whole = -(-T // 8) * 8
    return min(whole, getattr(encoder, "max_length", whole))


def chunks(lengths, batch_size, device):
    """Slices of rows, longest first, and the length T of each slice's longest row. A slice has at most
    batch_size rows, and on a CPU at most CHUNK_TOKENS tokens, unless one row alone has more."""
    start = 0
    while start < len(lengths):
        T, n = lengths[start], batch_size
        if device.type == "cpu":
            n = min(n, max(1, CHUNK_TOKENS // T))
        yield slice(start, min(start + n, len(lengths))), T
        start += n
