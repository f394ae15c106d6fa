"""Writes testdata/albert_tf and testdata/shards_tf with TensorFlow, so that the tests can read true files of it without it.

    pip install tensorflow-cpu==2.21.0 && python testdata/make_tf_checkpoint.py

albert_tf has the variable names of Google's ALBERT checkpoints at tiny sizes, with optimizer slots that a reader must leave
out; values are RandomState(0).standard_normal(shape) / 2 in the sorted order of the names (global_step is 7). shards_tf is a
checkpoint in two shards, of the types other than float32, with a string tensor.
"""

import json
from pathlib import Path

import numpy as np

CONFIG = {
    "attention_probs_dropout_prob": 0, "hidden_act": "gelu", "hidden_dropout_prob": 0, "embedding_size": 4, "hidden_size": 8,
    "initializer_range": 0.02, "intermediate_size": 12, "max_position_embeddings": 16, "num_attention_heads": 2,
    "num_hidden_layers": 4, "num_hidden_groups": 2, "net_structure_type": 0, "gap_size": 0, "num_memory_blocks": 0,
    "inner_group_num": 2, "down_scale_factor": 1, "type_vocab_size": 2, "vocab_size": 16,
}


def shapes(config=CONFIG):
    """Name -> shape of every float variable, kernels as (in, out)."""
    v, e, h, f = (config[key] for key in ("vocab_size", "embedding_size", "hidden_size", "intermediate_size"))
    table = {
        "bert/embeddings/word_embeddings": (v, e),
        "bert/embeddings/token_type_embeddings": (config["type_vocab_size"], e),
        "bert/embeddings/position_embeddings": (config["max_position_embeddings"], e),
        "bert/embeddings/LayerNorm/beta": (e,), "bert/embeddings/LayerNorm/gamma": (e,),
        "bert/encoder/embedding_hidden_mapping_in/kernel": (e, h), "bert/encoder/embedding_hidden_mapping_in/bias": (h,),
        "bert/pooler/dense/kernel": (h, h), "bert/pooler/dense/bias": (h,),
        "cls/predictions/output_bias": (v,), "cls/predictions/transform/LayerNorm/beta": (e,),
        "cls/predictions/transform/LayerNorm/gamma": (e,), "cls/predictions/transform/dense/kernel": (h, e),
        "cls/predictions/transform/dense/bias": (e,),
        "cls/seq_relationship/output_weights": (2, h), "cls/seq_relationship/output_bias": (2,),
    }
    for group in range(config["num_hidden_groups"]):
        for inner in range(config["inner_group_num"]):
            layer = f"bert/encoder/transformer/group_{group}/inner_group_{inner}/"
            for dense, (rows, columns) in {
                "attention_1/self/query": (h, h), "attention_1/self/key": (h, h), "attention_1/self/value": (h, h),
                "attention_1/output/dense": (h, h), "ffn_1/intermediate/dense": (h, f), "ffn_1/intermediate/output/dense": (f, h),
            }.items():
                table[layer + dense + "/kernel"], table[layer + dense + "/bias"] = (rows, columns), (columns,)
            for norm in ("LayerNorm", "LayerNorm_1"):
                table[layer + norm + "/beta"], table[layer + norm + "/gamma"] = (h,), (h,)
    for name in ("bert/pooler/dense/bias", "bert/embeddings/LayerNorm/beta"):
        table[name + "/adam_m"] = table[name + "/adam_v"] = table[name]
    return table


def values():
    """Name -> float32 array, without TensorFlow."""
    random = np.random.RandomState(0)
    return {name: (random.standard_normal(shape) / 2).astype(np.float32) for name, shape in sorted(shapes().items())}


def shard_values():
    """Name -> array of the two shards' checkpoint (bfloat16 aside, which numpy lacks)."""
    return [{"f16": np.array([[1, -2.5]], np.float16), "f64": np.array(np.pi), "u8": np.arange(3, dtype=np.uint8)},
            {"bool": np.array([True, False, True]), "i32": np.array([[-1], [2]], np.int32), "i64": np.array(-2 ** 40),
             "empty": np.zeros((0, 3), np.float32)}]


def main():
    import tensorflow as tf

    folder = Path(__file__).parent / "albert_tf"
    folder.mkdir(exist_ok=True)
    (folder / "albert_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    arrays = values()
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        variables = [tf.compat.v1.get_variable(name, initializer=array) for name, array in arrays.items()]
        variables.append(tf.compat.v1.get_variable("global_step", initializer=np.int64(7)))
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver(variables).save(session, str(folder / "model.ckpt-best"), write_meta_graph=False)
    (folder / "checkpoint").unlink()  # TensorFlow's note of the newest one, which holds this machine's path

    folder = Path(__file__).parent / "shards_tf"
    folder.mkdir(exist_ok=True)
    prefixes = []
    for i, shard in enumerate(shard_values()):
        tensors = {name: tf.constant(array) for name, array in shard.items()}
        tensors |= {"bf16": tf.constant([0.5, -3], tf.bfloat16)} if i else {"text": tf.constant(["left", "out", ""])}
        prefixes.append(str(folder / f"part{i}"))
        tf.raw_ops.SaveV2(prefix=prefixes[-1], tensor_names=list(tensors), tensors=list(tensors.values()),
                          shape_and_slices=[""] * len(tensors))
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=prefixes, destination_prefix=str(folder / "two.ckpt"),
                                  delete_old_dirs=False)


if __name__ == "__main__":
    main()
