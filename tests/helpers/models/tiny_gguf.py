"""A llama language model with random weights and a tokenizer of a few letters in one GGUF file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

WIDTH, LAYERS, HEADS, INNER = 32, 2, 2, 64
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "\u0120", "ab", "ba"]
SHAPES = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (WIDTH, WIDTH),
    "attn_v": (WIDTH, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (INNER, WIDTH),
    "ffn_up": (INNER, WIDTH),
    "ffn_down": (WIDTH, INNER),
}
TENSORS = LAYERS * (len(SHAPES) + 2) + 2  # two norms a layer; embedding and last norm
PARAMETERS = (
    LAYERS * (sum(rows * columns for rows, columns in SHAPES.values()) + 2 * WIDTH) + (len(TOKENS) + 1) * WIDTH
)


def write(path: Path) -> None:
    """Write the file; its matrices are rounded to 8 bits, as files of that kind are."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["a b", "b a"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3))
    for name, token in (("unk", 0), ("bos", 1), ("eos", 2), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(token)
    draw = np.random.default_rng(0)
    matrices = {f"blk.{i}.{part}.weight": shape for i in range(LAYERS) for part, shape in SHAPES.items()}
    matrices["token_embd.weight"] = (len(TOKENS), WIDTH)
    eight_bits = gguf.GGMLQuantizationType.Q8_0
    for name, shape in matrices.items():
        weight = draw.standard_normal(shape).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(weight, eight_bits), raw_dtype=eight_bits)
    norms = [f"blk.{i}.{part}_norm.weight" for i in range(LAYERS) for part in ("attn", "ffn")]
    for name in (*norms, "output_norm.weight"):
        writer.add_tensor(name, 1 + 0.1 * draw.standard_normal(WIDTH).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
