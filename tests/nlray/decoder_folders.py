"""Folders of small random decoders, as the transformers library saves them."""

from pathlib import Path

import torch
import transformers

COMMON = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SOURCES = {
    "llama": ("Llama", COMMON | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-3": ("Llama", COMMON | {"num_key_value_heads": 1, "rms_norm_eps": 1e-5, "rope_parameters": LLAMA3, "head_dim": 16}),
    "llama-biased": ("Llama", COMMON | {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", COMMON | {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("Qwen3", COMMON | {"num_key_value_heads": 2, "head_dim": 12, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", {"vocab_size": 61, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 48}),
}


def save_source(folder: Path, name: str) -> torch.nn.Module:
    """Write a random decoder, every one of its parameters other than at a usual start, as transformers does; return it."""
    kind, options = SOURCES[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")
    model = model_class(getattr(transformers, f"{kind}Config")(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model
