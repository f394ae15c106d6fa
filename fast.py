"""The answers of Ponder.predict for any number of inputs, fast.

`descend` takes a pool of rows, longest first, down the layers together. Rows that stop are dropped, and where
it pays a layer is decided from its first token, before its other tokens are computed. `stream` keeps a batch
full instead, with every row at a layer of its own. It needs shared layers, and is the way of CUDA, where a
graph replays its step.
"""

import collections
import itertools

import numpy as np
import torch

POOL_TOKENS = 24576     # tokens that go down together, so that few rows are left alone when most have stopped
CHUNK_TOKENS = 1024     # tokens of a layer at a time on a CPU, measured against 512 to 1,536
FIRST_TOKENS = 384      # tokens in a pool from which a CPU gains by deciding a layer first; an H100 does not
STREAM_ROWS = 4000      # inputs from which `stream` pays on an H100, where its graphs are recorded first


def predict_many(model, inputs, rule, batch_size=32, depthwise=None):
    """Early exit for a list of (ids, segments) -> logits (N,C), layers (N,) int64 in 1..L, in the same order

    Whole layers are computed for at most batch_size rows at a time. depthwise=None is True on CUDA for shared
    layers and STREAM_ROWS inputs or more; True without shared layers is a ValueError.
    """
    encoder, parameter = model.encoder, next(model.parameters())
    if depthwise is None:
        depthwise = encoder.shared and parameter.device.type == "cuda" and len(inputs) >= STREAM_ROWS
    if depthwise and not encoder.shared:
        raise ValueError("rows at different depths can share a batch only where layers share their weights")
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
        flags = [True] * len(rows) if last else done.tolist()          # where the host waits for the device
        stop = [b for b, flag in enumerate(flags) if flag]
        go = [b for b, flag in enumerate(flags) if not flag]
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
            for c, T in chunks(lengths, batch_size, device):           # over rows that are not read again
                if stop:
                    h[c, :T] = encoder.finish(i, h[:, :T].index_select(0, keep[c]), mask[c, :T], cls[keep[c]])
                else:
                    h[c, :T] = encoder.finish(i, h[c, :T], mask[c, :T], cls[c])
            h = h[:len(go)]
        elif stop:
            h = h[keep]
        h, mask = h[:, :lengths[0]], mask[:, :lengths[0]]


def stream(model, inputs, order, rule, start, size, answers, layers):
    """Depth-wise batching: rows in order, longest first, through `size` places; fills answers and layers."""
    places = Places(model, inputs, order, rule, start, size, answers, layers)
    places.prepare()
    while places.admit():
        places.launch()
        places.prepare()                                                # while the device computes
        places.wait()


class Places:
    """The places of a batch that is kept full, each with a row at a layer of its own

    A step is the same work for every place, so it comes in few shapes: n places (all, a half, a quarter, ...)
    and T tokens in steps of 16. On CUDA a shape that keeps coming is recorded as a graph, because the host
    takes longer to start its seventy kernels than the device to run them. Rows arrive within a step.
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
        nobody = layers.new_zeros(size + 1)                           # the last place is for who did not come
        self.row, self.length, self.depth = nobody + self.N, nobody + 1, nobody.clone()
        self.stop = nobody.bool()
        self.h = answers.new_zeros(size + 1, W, model.encoder.hidden_size)
        self.pooled, self.state = torch.zeros_like(self.h[:, 0]), tuple(s[nobody] for s in start)
        self.uses, self.graphs = collections.Counter(), {}

    def prepare(self):
        """Packs the rows that come next."""
        rows = list(itertools.islice(self.queue, len(self.host) - len(self.ready)))
        if rows:
            both, mask = table([self.inputs[row] for row in rows], self.width, 0)
            packed = np.column_stack([np.zeros(len(rows)), rows, mask.sum(1), *both]).astype(np.int32)
            self.ready = np.concatenate([self.ready, packed])

    def admit(self):
        """Rows that are ready take free places -> whether any place is taken"""
        alive = np.flatnonzero(self.taken)
        coming = min(len(self.ready), self.size - len(alive))
        if len(alive) and self.shape(len(alive) + coming) < self.shape(alive[-1] + 1):
            self.move(alive)
        free = np.flatnonzero(self.taken == 0)[:coming]
        plan = self.host.numpy()
        plan[:, :3] = self.size, self.N, 1
        plan[:coming] = self.ready[:coming]
        plan[:coming, 0], self.taken[free] = free, self.ready[:coming, 2]
        self.ready = self.ready[coming:]
        return self.taken.any()

    def shape(self, count):
        """The least of all places, a half, a quarter, ... that holds so many"""
        n = self.size
        while count <= n // 2:
            n //= 2
        return n

    def move(self, alive):
        """The rows in the places `alive` move to the first places."""
        k, keep = len(alive), upload(alive, self.device)
        for tensor in (self.row, self.length, self.depth, self.h, self.pooled, *self.state):
            tensor[:k] = tensor[keep]
        self.row[k:], self.taken[:k], self.taken[k:] = self.N, self.taken[alive], 0

    def launch(self):
        """Starts one step for all places that are taken."""
        n = self.n = self.shape(np.flatnonzero(self.taken)[-1] + 1)
        T = min(-(-int(self.taken.max()) // 16) * 16, self.width)
        self.sent.copy_(self.host, non_blocking=True)
        self.uses[n, T] += 1
        if not self.cuda or self.uses[n, T] < 4:                       # recording takes as long as some steps
            return self.step(n, T)
        if (n, T) not in self.graphs:
            self.graphs[n, T] = record(lambda: self.step(n, T))
        self.graphs[n, T].replay()

    def wait(self):
        """Frees the places whose rows have stopped; the host waits for the device here alone."""
        self.taken[:self.n][self.stop[:self.n].cpu().numpy()] = 0

    def step(self, n, T):
        """Everything between two looks of the host: rows arrive, all go one layer on, some stop."""
        encoder, W, L = self.model.encoder, self.width, self.model.num_layers
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


def upload(values, device, dtype=None):
    """Numbers or an array -> a tensor on the device; pinned on its way to a GPU, so that no one need wait"""
    x = torch.as_tensor(values, dtype=dtype)
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
    """Slices of at most batch_size rows, longest first, on a CPU of CHUNK_TOKENS too -> slice, longest T"""
    start = 0
    while start < len(lengths):
        T, n = lengths[start], batch_size
        if device.type == "cpu":
            n = min(n, max(1, CHUNK_TOKENS // T))
        yield slice(start, min(start + n, len(lengths))), T
        start += n
