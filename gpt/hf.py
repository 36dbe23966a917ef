"""Our weights under the names and shapes of transformers' GPT2LMHeadModel, and back, or of its Qwen3ForCausalLM.

transformers is not needed. GPT-2's Conv1D keeps a linear layer's weight as (in, out), the transpose of nn.Linear's (transformers/pytorch_utils.py).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gpt.errors import GPTError
from gpt.model import GPT, GPTConfig
from gpt.modern import NORM_EPS, ROTARY_BASE

# arch -> (model_type, class) that compute the same logits
CLASSES = {"gpt2": ("gpt2", "GPT2LMHeadModel"), "modern": ("qwen3", "Qwen3ForCausalLM")}

# Ours -> theirs, inside one block.
_QWEN3_BLOCK = {
    "ln_1.weight": "input_layernorm.weight",
    "attn.qk_norm.q": "self_attn.q_norm.weight",
    "attn.qk_norm.k": "self_attn.k_norm.weight",
    "attn.proj.weight": "self_attn.o_proj.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
_BLOCK = {
    "ln_1": "ln_1",
    "attn.qkv": "attn.c_attn",
    "attn.proj": "attn.c_proj",
    "ln_2": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
# Settings that change what GPT-2 computes, with the value our model has; where absent, transformers' default fits.
_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def to_hf(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(keyword arguments for the config, state dict for the model) of CLASSES[arch] that give the same logits.

    A bias the model lacks is exported as zeros, a tied head not at all (transformers ties it itself). The tensors are
    contiguous and share no memory with one another, as safetensors asks, but may share the model's. Token ids for
    bos, eos and pad are the tokenizer's matter: add them to the keyword arguments.
    """
    config = model.config
    if config.modern:
        return _to_qwen3(model)
    kwargs = {
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.n_ff,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "tie_word_embeddings": config.tied,
        **{name: values[0] for name, values in _FIXED.items()},
    }
    ours = model.state_dict()
    theirs = {}
    for our_name, their_name, transposed in _names(config):
        if our_name in ours:
            tensor = ours[our_name].detach()
            theirs[their_name] = (tensor.t() if transposed else tensor).contiguous()
        else:  # a bias that this model does without
            weight = ours[our_name.removesuffix("bias") + "weight"]
            theirs[their_name] = weight.new_zeros(weight.shape[0])
    return kwargs, theirs


def _to_qwen3(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = model.config
    kwargs = {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_head,
        "head_dim": config.head_width,
        "intermediate_size": config.ff_width,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROTARY_BASE,  # transformers 4 and llama.cpp read this, transformers 5 the next
        "rope_parameters": {"rope_type": "default", "rope_theta": ROTARY_BASE},
        "attention_bias": False,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tied,
    }
    ours = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    theirs = {"model.embed_tokens.weight": ours["wte.weight"], "model.norm.weight": ours["ln_f.weight"]}
    for i in range(config.n_layer):
        block, layer = f"blocks.{i}.", f"model.layers.{i}."
        theirs |= {layer + name: ours[block + our_name] for our_name, name in _QWEN3_BLOCK.items()}
        for name, part in zip("qkv", ours[block + "attn.qkv.weight"].chunk(3), strict=True):
            theirs[f"{layer}self_attn.{name}_proj.weight"] = part.clone()  # the three share memory else
    if not config.tied:
        theirs["lm_head.weight"] = ours["head.weight"]
    return kwargs, {name: tensor.contiguous() for name, tensor in theirs.items()}


def from_hf(config_kwargs: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> GPT:
    """The float32 model of a GPT-2 config (a config.json's content will do) and its state dict, on the CPU.

    Copies, and draws no random numbers. All biases are kept, zero or not, so the config has bias=True and
    qkv_bias=True. Other architectures, missing, unknown or misshapen tensors raise GPTError.
    """
    config = _config_from(config_kwargs)
    # The published gpt2 files hold the bare GPT2Model, and old ones its constant causal masks.
    given = {
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
        for name, tensor in state_dict.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }
    if config.tied:
        given.pop("lm_head.weight", None)  # a second view of wte
    if config.n_layer > len(given):  # a claim: names are made and layers built only for what can be there
        raise GPTError(f"n_layer={config.n_layer} with {len(given)} tensors: the state dict is not of this config")
    expected = {theirs for _, theirs, _ in _names(config)}
    for problem, names in (("lacks", expected - given.keys()), ("has unknown", given.keys() - expected)):
        if names:
            raise GPTError(f"state dict {problem} {sorted(names)[0]} ({len(names)} such): it is not of this config")
    with torch.device("meta"):
        model = GPT(config)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    ours = {}
    for our_name, their_name, transposed in _names(config):
        tensor = given[their_name].t() if transposed else given[their_name]
        if tensor.shape != shapes[our_name]:
            raise GPTError(f"{their_name} is {tuple(given[their_name].shape)}: it does not fit this config")
        ours[our_name] = torch.empty(tensor.shape).copy_(tensor)
    model.load_state_dict(ours, assign=True)
    return model


def _config_from(kwargs: Mapping[str, Any]) -> GPTConfig:
    if kwargs.get("model_type", "gpt2") != "gpt2":
        raise GPTError(f"model_type {kwargs['model_type']!r}: only gpt2 can be read")
    for name, values in _FIXED.items():
        if kwargs.get(name, values[0]) not in values:
            raise GPTError(f"{name}={kwargs[name]!r}: this model computes only {values[0]!r}")
    missing = [name for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head") if name not in kwargs]
    if missing:
        raise GPTError(f"config lacks {', '.join(missing)}: pass that of a GPT2LMHeadModel")
    return GPTConfig(
        vocab_size=kwargs["vocab_size"],
        block_size=kwargs["n_positions"],
        n_layer=kwargs["n_layer"],
        n_head=kwargs["n_head"],
        n_embd=kwargs["n_embd"],
        n_ff=kwargs.get("n_inner"),
        dropout=kwargs.get("resid_pdrop", 0.1),  # transformers' default; it has three, ours is one
        tied=kwargs.get("tie_word_embeddings", True),
    )


def _names(config: GPTConfig) -> list[tuple[str, str, bool]]:
    """(our name, their name, whether the shape is transposed) of every tensor of a model with all its biases."""
    names = [("wte.weight", "transformer.wte.weight", False), ("wpe.weight", "transformer.wpe.weight", False)]
    for i in range(config.n_layer):
        for ours, theirs in _BLOCK.items():
            names.append((f"blocks.{i}.{ours}.weight", f"transformer.h.{i}.{theirs}.weight", "ln_" not in ours))
            names.append((f"blocks.{i}.{ours}.bias", f"transformer.h.{i}.{theirs}.bias", False))
    names += [(f"ln_f.{part}", f"transformer.ln_f.{part}", False) for part in ("weight", "bias")]
    return names if config.tied else [*names, ("head.weight", "lm_head.weight", False)]
