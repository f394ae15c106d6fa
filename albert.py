"""The Transformer block of every encoder, and ALBERT (Lan et al. 2020), which applies one block L times.

Letters as in ponder.py, and E for the size of ALBERT's embedding.
"""

import itertools
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import check, guard, load_pretrained, shorten


@dataclass(frozen=True)
class EncoderConfig:
    """The sizes that every encoder has, named as in config.json
    Dropout rates are left out on purpose: dropout stands before the heads only, whatever a config.json says.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"              # the exact form with erf; "gelu_new" is the tanh form
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0

    # Keys of config.json that would change the computation, with the one value that is computed here.
    must_be = {"position_embedding_type": "absolute", "net_structure_type": 0, "gap_size": 0,
               "num_memory_blocks": 0, "down_scale_factor": 1, "is_decoder": False,
               "add_cross_attention": False}

    def __post_init__(self):
        for field in fields(self):
            name, value, kind = field.name, getattr(self, field.name), type(field.default)
            if kind is int:
                good = type(value) is int and (0 if name == "pad_token_id" else 1) <= value <= 2**24
            elif kind is float:
                good = type(value) is float and 0 < value < 1
            else:
                good = value in ("gelu", "gelu_new")
            check(good, f"{name} is {shorten(value)}, of another type or out of range")
        heads, last = self.num_attention_heads, min(self.vocab_size, self.max_position_embeddings - 1)
        check(self.num_hidden_layers <= 1000, "num_hidden_layers is over 1,000")
        check(self.hidden_size % heads == 0, f"hidden_size is no multiple of num_attention_heads, {heads}")
        check(self.pad_token_id < last, "pad_token_id is over vocab_size or max_position_embeddings - 2")

    @classmethod
    def from_json(cls, values, source="config.json"):
        """From the dict of a config.json; keys without a field are ignored. InputError for a bad value."""
        with guard(source, "config of such a model"):
            for key, only in {"model_type": cls.model_type, **cls.must_be}.items():
                found = values.get(key, only)
                check(found == only, f"{key} is {shorten(found)}, and only {only} is built here")
            known = {field.name for field in fields(cls)}
            return cls(**{key: value for key, value in values.items() if key in known})


@dataclass(frozen=True)
class AlbertConfig(EncoderConfig):
    """Sizes of an ALBERT; the defaults are albert-base-v2's."""

    model_type = "albert"
    vocab_size: int = 30000
    hidden_act: str = "gelu_new"
    embedding_size: int = 128
    num_hidden_groups: int = 1            # layers with weights of their own; 1 shares one set among all
    inner_group_num: int = 1              # Transformer blocks inside one layer

    def __post_init__(self):
        super().__post_init__()
        groups = self.num_hidden_groups
        good = groups <= self.num_hidden_layers and groups * self.inner_group_num <= 1000
        check(good, "num_hidden_groups is over num_hidden_layers, or holds over 1,000 blocks")


GROWN = {
    "base": {},
    "large": dict(hidden_size=1024, num_attention_heads=16, intermediate_size=4096, num_hidden_layers=24),
    "xlarge": dict(hidden_size=2048, num_attention_heads=16, intermediate_size=8192, num_hidden_layers=24),
    "xxlarge": dict(hidden_size=4096, num_attention_heads=64, intermediate_size=16384),
}
SIZES = {f"albert-{size}-{version}": AlbertConfig(hidden_act=act, **changes)
         for version, act in (("v1", "gelu"), ("v2", "gelu_new")) for size, changes in GROWN.items()}
# This project's own, trained from scratch; the vocabulary is the tokenizer's, trained on the task's text.
OWN = dict(num_attention_heads=4, initializer_range=0.05)
SIZES["tiny"] = AlbertConfig(vocab_size=1000, embedding_size=64, hidden_size=64, intermediate_size=256, **OWN)
SIZES["mini"] = AlbertConfig(vocab_size=8000, hidden_size=128, intermediate_size=512, **OWN)


class Block(nn.Module):
    """One Transformer block with the layer norm after each residual sum, as in BERT."""

    def __init__(self, config):
        super().__init__()
        H = config.hidden_size
        self.heads = config.num_attention_heads
        self.approximate = "tanh" if config.hidden_act == "gelu_new" else "none"
        self.qkv = nn.Linear(H, 3 * H)
        self.attn_out = nn.Linear(H, H)
        self.attn_norm = nn.LayerNorm(H, config.layer_norm_eps)
        self.ffn_in = nn.Linear(H, config.intermediate_size)
        self.ffn_out = nn.Linear(config.intermediate_size, H)
        self.ffn_norm = nn.LayerNorm(H, config.layer_norm_eps)

    def forward(self, h, mask):
        return self.after(self.attend(self.qkv(h), mask[:, None, None, :]), h)  # (B,T,H)

    def attend(self, qkv, mask=None):
        """Attention to tokens where the mask is True, or to all: qkv (B,T,3H), mask (B,1,1,T) -> (B,T,H)"""
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B,heads,T,d) each
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    def first(self, h, mask):
        """The output for the first token alone (B,1,H)
        For a single query, q (W_k h_t) is (W_k^T q) h_t and sum_t a_t (W_v h_t) is W_v (sum_t a_t h_t), so
        the keys and values of the other tokens are not computed. The keys' bias adds the same number to all
        scores, which softmax ignores."""
        B, _, H = h.shape
        d = H // self.heads
        w_q, w_k, w_v = self.qkv.weight.view(3, self.heads, d, H)               # (heads,d,H) each
        b_q, _, b_v = self.qkv.bias.view(3, self.heads, 1, d)
        q = h[:, 0] @ w_q.transpose(1, 2) + b_q                                 # (heads,B,d)
        scores = (q @ w_k).transpose(0, 1) @ h.transpose(1, 2) / d**0.5         # (B,heads,T)
        a = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
        a = (a @ h).transpose(0, 1) @ w_v.transpose(1, 2) + b_v                 # (heads,B,d)
        return self.after(a.transpose(0, 1).reshape(B, 1, H), h[:, :1])

    def rest(self, h, mask, cls):
        """The output (B,T,H), given that of the first token, cls (B,1,H)
        On a CPU nothing is computed for padding, whose output is 0: the real tokens are packed into one
        array, and neighbouring rows with equally many tokens attend together."""
        if h.device.type != "cpu" or mask.all():
            a = self.attend(self.qkv(h), mask[:, None, None, :])
            return torch.cat([cls, self.after(a[:, 1:], h[:, 1:])], dim=1)
        real = mask.flatten().nonzero()[:, 0]                                   # (n,)
        x = h.flatten(0, 1).index_select(0, real)                               # (n,H)
        runs = [(T, len(list(same))) for T, same in itertools.groupby(mask.sum(1).tolist())]
        parts = self.qkv(x).split([n * T for T, n in runs])                     # (n T,3H) each
        parts = [part.unflatten(0, (n, T)) for part, (T, n) in zip(parts, runs)]
        a = torch.cat([self.attend(part).flatten(0, 1) for part in parts])      # (n,H)
        todo = (real % mask.shape[1]).nonzero()[:, 0]                           # (m,) without first ones
        x = self.after(a.index_select(0, todo), x.index_select(0, todo))
        out = x.new_zeros(h.shape)
        out.flatten(0, 1).index_copy_(0, real[todo], x)
        out[:, :1] = cls
        return out

    def after(self, a, h):
        """What follows the attention a (...,H) of tokens h (...,H): projection, feed-forward net, norms"""
        h = self.attn_norm(h + self.attn_out(a))                                # (...,H)
        # PyTorch computes GELU in float32 also for bf16, so the tanh form cannot overflow under autocast.
        f = F.gelu(self.ffn_in(h), approximate=self.approximate)                # (...,F)
        return self.ffn_norm(h + self.ffn_out(f))                               # (...,H)


class Albert(nn.Module):
    """Encoder without a head. `shared` is True where layer(i, ...) is the same function for every i."""

    config_class, sizes = AlbertConfig, SIZES
    from_pretrained = classmethod(load_pretrained)      # of a hub name, folder, file, or Google's checkpoint

    def __init__(self, config):
        super().__init__()
        E, H = config.embedding_size, config.hidden_size
        self.config = config
        self.num_layers, self.hidden_size = config.num_hidden_layers, H
        self.max_length, self.pad_id = config.max_position_embeddings, config.pad_token_id
        self.words = nn.Embedding(config.vocab_size, E)
        self.positions = nn.Embedding(config.max_position_embeddings, E)
        self.types = nn.Embedding(config.type_vocab_size, E)
        self.norm = nn.LayerNorm(E, config.layer_norm_eps)
        self.add_layers(config)
        self.pooler = nn.Linear(H, H)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def add_layers(self, config):
        self.shared = config.num_hidden_groups == 1
        self.project = nn.Linear(config.embedding_size, config.hidden_size)
        self.groups = nn.ModuleList(nn.ModuleList(Block(config) for _ in range(config.inner_group_num))
                                    for _ in range(config.num_hidden_groups))

    def layer_blocks(self, i):
        """The blocks of layer i; the layers are dealt out to the groups evenly and in order."""
        if self.shared:
            return self.groups[0]               # for any i: Ponder may run more layers than num_layers
        return self.groups[(i - 1) * len(self.groups) // self.num_layers]

    def position_embeddings(self, ids):
        return self.positions.weight[:ids.shape[1]]                             # (T,E)

    def embed(self, ids, segments):
        """ids, segments (B,T) int64 -> h_0 (B,T,H); ValueError for more tokens than positions"""
        if ids.shape[1] > self.max_length:
            raise ValueError(f"{ids.shape[1]} tokens, but this encoder has {self.max_length} positions")
        e = self.words(ids) + self.types(segments) + self.position_embeddings(ids)  # (B,T,E)
        return self.project(self.norm(e))                                       # (B,T,H)

    def last_block(self, i, h, mask):
        """The last block of layer i and its input (B,T,H); a layer of a published ALBERT is one block"""
        *others, last = self.layer_blocks(i)
        for block in others:
            h = block(h, mask)
        return last, h

    def layer(self, i, h, mask):
        """h_{i-1} (B,T,H), mask (B,T) bool, True = a real token -> h_i (B,T,H), for 1 <= i <= L"""
        block, h = self.last_block(i, h, mask)
        return block(h, mask)

    def first(self, i, h, mask):
        """h_i of the first token alone (B,1,H), for little more than the work of that token"""
        block, h = self.last_block(i, h, mask)
        return block.first(h, mask)

    def finish(self, i, h, mask, cls):
        """h_i (B,T,H), given that of the first token, cls (B,1,H); all may hold only the rows that go on"""
        block, h = self.last_block(i, h, mask)
        return block.rest(h, mask, cls)

    def pool(self, h):
        """(B,T,H) or (B,1,H) -> tanh(W h[:,0] + b) (B,H)"""
        return torch.tanh(self.pooler(h[:, 0]))

    @staticmethod
    def name_table(config):
        """The names of an encoder's weights; see hub_table"""
        return hub_table(
            {"project": "encoder.embedding_hidden_mapping_in", "pooler": "pooler"},
            {f"groups.{g}.{b}": f"encoder.albert_layer_groups.{g}.albert_layers.{b}"
             for g in range(config.num_hidden_groups) for b in range(config.inner_group_num)},
            {"qkv": "attention.query attention.key attention.value", "attn_out": "attention.dense",
             "attn_norm": "attention.LayerNorm", "ffn_in": "ffn", "ffn_out": "ffn_output",
             "ffn_norm": "full_layer_layer_norm"})


def hub_table(modules, blocks, parts):
    """Our parameter -> the hub's tensors that make it; three of them stacked make one GEMM for Q, K and V
    modules and blocks: our name -> the hub's; parts: our name in a block -> the hub's names there."""
    embeddings = {"words": "word", "positions": "position", "types": "token_type"}
    table = {f"{ours}.weight": [f"embeddings.{hub}_embeddings.weight"] for ours, hub in embeddings.items()}
    pairs = [("norm", ["embeddings.LayerNorm"]), *((ours, [hub]) for ours, hub in modules.items())]
    for ours, hub in blocks.items():
        pairs += [(f"{ours}.{part}", [f"{hub}.{name}" for name in names.split()])
                  for part, names in parts.items()]
    return table | {f"{ours}.{kind}": [f"{name}.{kind}" for name in names]
                    for ours, names in pairs for kind in ("weight", "bias")}
