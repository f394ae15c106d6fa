"""BERT (Devlin et al. 2019), and RoBERTa (Liu et al. 2019), a BERT that counts positions in its own way.

A BERT is an ALBERT without a projection, each of whose layers is a block with weights of its own.
"""

from dataclasses import dataclass, replace

import torch.nn as nn

from albert import GROWN, Albert, Block, EncoderConfig, hub_table


@dataclass(frozen=True)
class BertConfig(EncoderConfig):
    """Sizes of a BERT; the defaults are bert-base-uncased's."""

    model_type = "bert"
    embedding_size = property(lambda self: self.hidden_size)


@dataclass(frozen=True)
class RobertaConfig(BertConfig):
    """Sizes of a RoBERTa; the defaults are roberta-base's."""

    model_type = "roberta"
    vocab_size: int = 50265
    max_position_embeddings: int = 514    # the first pad_token_id + 1 belong to no token, so 512 tokens fit
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-5
    pad_token_id: int = 1


SIZES = {"bert-base-uncased": BertConfig(), "bert-large-uncased": BertConfig(**GROWN["large"]),
         "roberta-base": RobertaConfig(), "roberta-large": RobertaConfig(**GROWN["large"])}


class Bert(Albert):
    """Encoder without a head; layer(i, ...) is another function for every i."""

    config_class, sizes = BertConfig, SIZES

    def add_layers(self, config):
        self.shared, self.project = False, nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))

    def layer_blocks(self, i):
        return [self.blocks[i - 1]]

    def truncate(self, layers):
        """Keeps the first layers alone."""
        self.blocks, self.num_layers = self.blocks[:layers], layers
        self.config = replace(self.config, num_hidden_layers=layers)

    @staticmethod
    def name_table(config):
        return hub_table(
            {"pooler": "pooler.dense"},
            {f"blocks.{i}": f"encoder.layer.{i}" for i in range(config.num_hidden_layers)},
            {"qkv": "attention.self.query attention.self.key attention.self.value",
             "attn_out": "attention.output.dense", "attn_norm": "attention.output.LayerNorm",
             "ffn_in": "intermediate.dense", "ffn_out": "output.dense", "ffn_norm": "output.LayerNorm"})


class Roberta(Bert):
    """A BERT whose positions count the tokens that are not padding, from pad_id + 1 on."""

    config_class = RobertaConfig

    def __init__(self, config):
        super().__init__(config)
        self.max_length = config.max_position_embeddings - config.pad_token_id - 1

    def position_embeddings(self, ids):
        """Padding is at position pad_id, a token at pad_id plus its place among the tokens, from 1."""
        real = ids != self.pad_id
        return self.positions(real.cumsum(1) * real + self.pad_id)                  # (B,T,H)
