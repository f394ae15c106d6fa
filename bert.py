"""BERT (Devlin et al. 2019), and RoBERTa (Liu et al. 2019) as a BERT that counts positions otherwise.

L Transformer layers with weights of their own, and the contract of albert.py; letters as in ponder.py.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn as nn

from albert import Block, hub_table, start_weights
from checkpoint import check_sizes, load_pretrained, make_config


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT, named as in config.json; the defaults are bert-base-uncased's; no dropout."""

    model_type = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"              # "gelu" is the exact form with erf, "gelu_new" the tanh one
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0

    __post_init__ = check_sizes
    from_json = classmethod(make_config)
    # Keys of config.json that would change the computation, with the one value that is computed here.
    must_be = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}


@dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """Sizes of a RoBERTa; the defaults are roberta-base's."""

    model_type = "roberta"
    vocab_size: int = 50265
    max_position_embeddings: int = 514    # pad_token_id + 1 of them are no token's, so 512 tokens
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-5
    pad_token_id: int = 1


LARGE = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 24}
SIZES = {
    "bert-base-uncased": BertConfig(), "bert-large-uncased": BertConfig(**LARGE),
    "roberta-base": RobertaConfig(), "roberta-large": RobertaConfig(**LARGE),
}


class Bert(nn.Module):
    """Encoder without a head; T up to max_length tokens."""

    shared = False    # layer(i, ...) is another function for every i
    config_class = BertConfig

    def __init__(self, config):
        super().__init__()
        H = config.hidden_size
        self.config = config
        self.num_layers, self.hidden_size, self.pad_id = config.num_hidden_layers, H, config.pad_token_id
        self.max_length = config.max_position_embeddings
        self.words = nn.Embedding(config.vocab_size, H)
        self.positions = nn.Embedding(config.max_position_embeddings, H)
        self.types = nn.Embedding(config.type_vocab_size, H)
        self.norm = nn.LayerNorm(H, config.layer_norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.pooler = nn.Linear(H, H)
        start_weights(self, config.initializer_range)

    def keep(self, layers):
        """The encoder of the first layers alone"""
        self.blocks, self.num_layers = self.blocks[:layers], layers
        self.config = dataclasses.replace(self.config, num_hidden_layers=layers)

    def position_ids(self, ids):
        """ids (B,T) -> the positions 0..T-1 (T,)"""
        return torch.arange(ids.shape[1], device=ids.device)

    def embed(self, ids, segments):
        """ids, segments (B,T) int64 -> h_0 (B,T,H); ValueError for more tokens than positions"""
        if ids.shape[1] > self.max_length:
            raise ValueError(f"{ids.shape[1]} tokens, but this encoder has {self.max_length} positions")
        e = self.words(ids) + self.types(segments) + self.positions(self.position_ids(ids))     # (B,T,H)
        return self.norm(e)

    def layer(self, i, h, mask):
        """h_{i-1} (B,T,H), mask (B,T) bool, True = a real token -> h_i (B,T,H), for 1 <= i <= L"""
        return self.blocks[i - 1](h, mask)

    def first(self, i, h, mask):
        """h_i of the first token alone (B,1,H), at the price of little more than one row"""
        return self.blocks[i - 1].first(h, mask)

    def finish(self, i, h, mask, cls):
        """h_i (B,T,H), given that of the first token, cls (B,1,H); rows may have been dropped from all"""
        return self.blocks[i - 1].rest(h, mask, cls)

    def pool(self, h):
        """(B,T,H) or (B,1,H) -> tanh(W h[:,0] + b) (B,H)"""
        return torch.tanh(self.pooler(h[:, 0]))

    @classmethod
    def from_pretrained(cls, name_or_path):
        """Encoder with the weights of a hub name, or of a folder or file in the hub's form."""
        return load_pretrained(cls, name_or_path, SIZES, name_table)


class Roberta(Bert):
    """A BERT whose positions count the tokens that are not padding, from pad_id + 1 on."""

    config_class = RobertaConfig

    def __init__(self, config):
        super().__init__(config)
        self.max_length = config.max_position_embeddings - config.pad_token_id - 1

    def position_ids(self, ids):
        """ids (B,T) -> pad_id where a token is padding, else pad_id plus its number among the others (B,T)"""
        real = ids != self.pad_id
        return real.cumsum(1) * real + self.pad_id


# ---- the names of weights, ours against the hub's; BERT's and RoBERTa's are the same ----

def name_table(config):
    """The weights of a BERT, as albert.hub_table gives them"""
    return hub_table(
        {"norm": "embeddings.LayerNorm", "pooler": "pooler.dense"},
        {f"blocks.{i}": f"encoder.layer.{i}" for i in range(config.num_hidden_layers)},
        {"qkv": "attention.self.query attention.self.key attention.self.value",
         "attn_out": "attention.output.dense", "attn_norm": "attention.output.LayerNorm",
         "ffn_in": "intermediate.dense", "ffn_out": "output.dense", "ffn_norm": "output.LayerNorm"})
