"""The answers of Ponder.predict for any number of inputs, fast.

`descend` takes a pool of rows, longest first, down the layers together. Rows that stop are dropped, and where
it pays a layer is decided from its first token, before its other tokens are computed. `Places` keeps a batch
full instead, with every row at a depth of its own, so all layers must share their weights.
"""

import collections
import itertools

import numpy as np
import torch

POOL_TOKENS = 24576     # tokens that go down together, so that few rows are left alone when most have stopped
CHUNK_TOKENS = 1024     # tokens of a layer at a time on a CPU, measured against 512 to 1,536
FIRST_TOKENS = 384      # tokens in a pool from which a CPU gains by deciding a layer first; an H100 does not
STREAM_ROWS = 4000      # inputs from which full batches pay on an H200, whose graphs are recorded first
STREAM_BATCHES = 128    # batches of inputs from which they pay, too


@torch.no_grad()
def predict_many(model, inputs, rule, batch_size=32, depthwise=None):
    """Early exit for N inputs (ids, segments) -> logits (N,C), layers (N,) int64 in 1..L, in the same order
    Whole layers are computed for at most batch_size rows at a time. depthwise=None is True on CUDA for shared
    layers and many inputs."""
    N, shared, parameter = len(inputs), model.encoder.shared, next(model.parameters())
    device = parameter.device
    if depthwise is None:
        depthwise = shared and device.type == "cuda" and N >= min(STREAM_ROWS, STREAM_BATCHES * batch_size)
    if depthwise and not shared:
        raise ValueError("rows at different depths can share a batch only where layers share their weights")
    order = np.argsort([-len(ids) for ids, _ in inputs], kind="stable")     # longest first
    inputs, rows = [inputs[row] for row in order], upload(order, device)
    state = tuple(s[rows] for s in rule.start(N, model.num_layers, device))
    answers = parameter.new_zeros(N + 1, model.num_labels)      # row N is what Places drops
    layers = torch.zeros(N + 1, dtype=torch.int64, device=device)
    if depthwise and N:
        Places(model, inputs, rows, rule, state, min(batch_size, N), answers, layers).run()
        return answers[:N], layers[:N]
    start = 0
    while start < N:
        c = slice(start, start + max(batch_size, POOL_TOKENS // len(inputs[start][0])))
        descend(model, inputs[c], rows[c], rule, tuple(s[c] for s in state), batch_size, answers, layers)
        start = c.stop
    return answers[:N], layers[:N]


def descend(model, inputs, rows, rule, state, batch_size, answers, layers):
    """One pool goes down the layers together. Fills answers and layers at its rows (B,)."""
    encoder, device = model.encoder, answers.device
    ids, mask, segments = pad(inputs, encoder, device)
    lengths = [padded(len(tokens), encoder, device) for tokens, _ in inputs]
    h = answers.new_zeros(*ids.shape, encoder.hidden_size)      # (B,T,H), written over below
    previous = torch.zeros_like(h[:, 0])                        # (B,H) pooled h_{i-1}
    for c, T in chunks(lengths, batch_size, device):
        h[c, :T] = encoder.embed(ids[c, :T], segments[c, :T])
    for i in range(1, model.num_layers + 1):
        last, may_stop = i == model.num_layers, i >= getattr(rule, "earliest", 1)
        pays = may_stop and device.type == "cpu" and mask.numel() >= FIRST_TOKENS
        decide_first = hasattr(encoder, "first") and (last or pays)
        if decide_first:
            cls = encoder.first(i, h, mask)                     # (B,1,H)
        else:
            for c, T in chunks(lengths, batch_size, device):
                h[c, :T] = encoder.layer(i, h[c, :T], mask[c, :T])
            cls = h[:, :1]
        pooled, depth = encoder.pool(cls), torch.full_like(rows, i)
        logits, lam = model.heads(depth, pooled, previous)      # (B,C), (B,)
        state, done = rule.step(state, depth, lam, logits)
        # The host waits for the device here, and nowhere else.
        stopped = [True] * len(rows) if last else done.tolist()
        stop = [b for b, out in enumerate(stopped) if out]
        go = [b for b, out in enumerate(stopped) if not out]
        if stop:
            ends = upload(stop, device)
            answers[rows[ends]], layers[rows[ends]] = logits[ends], i
        if not go:
            return
        keep, lengths = upload(go, device) if stop else slice(None), [lengths[b] for b in go]
        rows, mask, previous, state = rows[keep], mask[keep], pooled[keep], tuple(s[keep] for s in state)
        if decide_first:
            for c, T in chunks(lengths, batch_size, device):
                source = keep[c] if stop else c     # keep ascends, so no row is read after it was overwritten
                h[c, :T] = encoder.finish(i, h[source, :T], mask[c, :T], cls[source])
            h = h[:len(go), :lengths[0]]                        # the finished rows have moved up
        else:
            h = h[keep, :lengths[0]]
        mask = mask[:, :lengths[0]]


class Places:
    """A batch that is kept full (continuous batching): each place has a row at a layer of its own, and a row
    that stops frees it. A step is the same work for every place, so its shape depends on T alone, the longest
    row in steps of 16. On CUDA a shape that keeps coming is recorded as a graph, because its sixty kernels
    take the host longer to start than the device to run. Within the step the next rows of the queue take the
    free places."""

    def __init__(self, model, inputs, rows, rule, state, size, answers, layers):
        encoder, device, self.N = model.encoder, answers.device, len(inputs)
        self.model, self.rule, self.answers, self.layers = model, rule, answers, layers
        # The queue, and at its end row N, one token without a question, for places left over.
        self.widths = [padded(len(ids), encoder, device, 16) for ids, _ in inputs]
        self.batch = pad([*inputs, ([0], [0])], encoder, device, self.widths[0])
        self.rows = torch.cat([rows, torch.full_like(rows[:1], self.N)])    # (N+1,)
        self.state = [torch.cat([s, s[:1]]) for s in state]
        # The places: where their rows stand in the queue, the layers they have reached, and the outputs.
        self.position = torch.arange(size, device=device)             # (n,)
        self.depth = torch.zeros_like(self.position)                  # (n,)
        self.h = answers.new_zeros(size, self.widths[0], encoder.hidden_size)
        self.pooled = torch.zeros_like(self.h[:, 0])            # (n,H)
        self.uses, self.graphs = collections.Counter(), {}

    def run(self):
        """Answers every row."""
        first = 0
        while first < self.N:
            self.launch(self.widths[first])         # the longest row that has a place
            first = min(self.position.tolist())           # nowhere else does the host wait for the device

    def launch(self, T):
        """Starts one step."""
        self.uses[T] += 1
        if self.position.device.type != "cuda" or self.uses[T] < 4:   # recording takes as long as some steps
            return self.step(T)
        if T not in self.graphs:
            self.graphs[T] = record(lambda: self.step(T))
        self.graphs[T].replay()

    def step(self, T):
        """All rows go one layer on; those that stop are answered and give their places to the next."""
        encoder, position, i = self.model.encoder, self.position, self.depth + 1
        new = self.depth == 0                                   # (n,) as position and i
        ids, mask, segments = (x[position, :T] for x in self.batch)   # (n,T)
        h = torch.where(new[:, None, None], encoder.embed(ids, segments), self.h[:, :T])
        h = encoder.layer(1, h, mask)                           # (n,T,H) all layers are this one
        pooled = encoder.pool(h)                                # (n,H)
        previous = torch.where(new[:, None], 0, self.pooled)
        logits, lam = self.model.heads(i, pooled, previous)     # (n,C), (n,)
        state, done = self.rule.step(tuple(s[position] for s in self.state), i, lam, logits)
        stop = done | (i == self.model.num_layers)
        target = torch.where(stop, self.rows[position], self.N)
        self.answers.index_copy_(0, target, logits.to(self.answers.dtype))
        self.layers.index_copy_(0, target, i)
        for old, now in zip(self.state, state):
            old.index_copy_(0, position, now.to(old.dtype))
        self.h[:, :T] = h
        self.pooled.copy_(pooled)
        self.depth.copy_(torch.where(stop, 0, i))
        following = position.max() + stop.cumsum(0)     # (n,) behind the last row that has a place
        position.copy_(torch.where(stop, following.clamp(max=self.N), position))


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
    T is the given length, or that of the longest, padded."""
    lengths = np.array([len(ids) for ids, _ in inputs])
    T = length or padded(int(lengths.max()), encoder, device)
    mask = np.arange(T) < lengths[:, None]
    both = np.zeros((2, *mask.shape), np.int64)
    both[0] = getattr(encoder, "pad_id", 0)
    for values, column in zip(both, zip(*inputs)):
        values[mask] = np.fromiter(itertools.chain.from_iterable(column), np.int64, lengths.sum())
    ids, segments = upload(both, device)
    return ids, upload(mask, device), segments


def upload(values, device):
    """Numbers or an array -> a tensor on the device; memory is pinned for a GPU, so the host need not wait"""
    x = torch.as_tensor(values)
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def padded(T, encoder, device, step=None):
    """T rounded up to a multiple, on a GPU of 8 for its kernels, but not beyond the encoder's positions"""
    if step is None:
        step = 1 if torch.device(device).type == "cpu" else 8
    whole = -(-T // step) * step
    return max(T, min(whole, getattr(encoder, "max_length", whole)))


def chunks(lengths, batch_size, device):
    """Slices of rows, longest first, each with the length T of its longest row
    A slice has at most batch_size rows, and on a CPU at most CHUNK_TOKENS tokens or one row."""
    start = 0
    while start < len(lengths):
        T, n = lengths[start], batch_size
        if device.type == "cpu":
            n = min(n, max(1, CHUNK_TOKENS // T))
        yield slice(start, min(start + n, len(lengths))), T
        start += n
