"""A model as GGUF, which llama.cpp and Ollama run: weights, tokenizer and chat template in one file, and a Modelfile."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cli.errors import UserError
from gpt.model import GPT
from gpt.modern import NORM_EPS, ROTARY_BASE
from gpt.tokenizer import CHAT_TEMPLATE, END_OF_TEXT, END_OF_TURN, ROLE_TOKENS, SPLIT_PATTERNS, Tokenizer

FloatType = Literal["f32", "f16"]

# llama.cpp knows ways to cut words by name (src/llama-vocab.cpp). Llama 3's own name for cl100k would also let a word that
# is in the vocabulary pass over the merges, which `tokenizers` does not do; DBRX's is the same pattern without that.
PRE_TOKENIZERS = {"gpt2": "gpt-2", "cl100k": "dbrx", "o200k": "gpt-4o"}

# Ours -> GGUF's (gguf.constants.TENSOR_NAMES), inside one block and outside; nn.Linear's (out, in) is GGUF's own order.
_BLOCK = {
    "ln_1": "attn_norm",
    "attn.qkv": "attn_qkv",
    "attn.proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
_OUTSIDE = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "head": "output"}
WITHOUT_BIAS = ("token_embd", "position_embd", "output")
_QK_NORM = {"q": "attn_q_norm", "k": "attn_k_norm"}

MODELFILE = """\
FROM ./{file}
TEMPLATE \"\"\"{{{{ range .Messages }}}}<|{{{{ .Role }}}}|>{{{{ .Content }}}}{end}{{{{ end }}}}{reply}\"\"\"
PARAMETER stop "{end}"
PARAMETER stop "{end_of_text}"
PARAMETER num_ctx {block_size}
PARAMETER temperature 0.8
PARAMETER top_k 50
"""


def write_gguf(path: Path, model: GPT, tokenizer: Tokenizer, *, float_type: FloatType) -> None:
    """Write a float32 model with llama.cpp's architecture gpt2, or qwen3 where it is modern.

    With f16 only matrices are halved: vectors and positions stay f32, as in llama.cpp's own converter. A tied head is not
    written: llama.cpp then takes the embedding. Raises UserError for what the format cannot hold exactly.
    """
    gguf = _library()
    writer = gguf.GGUFWriter(path, "qwen3" if model.config.modern else "gpt2")
    writer.add_name(f"perennial {model.num_params() / 1e6:.1f}M")  # shown by programs that list models
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if float_type == "f16" else gguf.LlamaFileType.ALL_F32)
    _add_shape(writer, model)
    _add_tokenizer(writer, tokenizer)
    for name, tensor in gguf_tensors(model).items():
        writer.add_tensor(name, _numbers(name, tensor, float_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: Any, model: GPT) -> None:
    config = model.config
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.ff_width)
    writer.add_head_count(config.n_head)
    if config.modern:
        writer.add_head_count_kv(config.n_head)
        writer.add_key_length(config.head_width)
        writer.add_value_length(config.head_width)
        writer.add_rope_freq_base(ROTARY_BASE)
        writer.add_layer_norm_rms_eps(NORM_EPS)
    else:
        writer.add_layer_norm_eps(model.ln_f.eps)


def _add_tokenizer(writer: Any, tokenizer: Tokenizer) -> None:
    tokens, types, merges, pre = vocabulary(tokenizer)
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name for byte-level BPE
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([_library().TokenType[name] for name in types])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(tokenizer.end_of_turn)
    writer.add_pad_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(True)  # every document begins with it
    writer.add_chat_template(CHAT_TEMPLATE)


def gguf_tensors(model: GPT) -> dict[str, Tensor]:
    """The weights under GGUF's names; a bias that GPT-2 has and this model does without as zeros."""
    ours, tensors = model.state_dict(), {}
    for name, tensor in ours.items():
        module, _, part = name.rpartition(".")
        block = ""
        if module.startswith("blocks."):
            _, i, module = module.split(".", 2)
            block = f"blk.{i}."
        if module == "attn.qk_norm":
            tensors[f"{block}{_QK_NORM[part]}.weight"] = tensor
        elif module == "attn.qkv" and model.config.modern:
            tensors |= {f"{block}attn_{which}.weight": t for which, t in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            tensors[f"{block}{(_BLOCK if block else _OUTSIDE)[module]}.{part}"] = tensor
    if not model.config.modern:
        for name in [n for n in tensors if n.endswith(".weight") and n.split(".")[0] not in WITHOUT_BIAS]:
            tensors.setdefault(name.replace(".weight", ".bias"), tensors[name].new_zeros(tensors[name].shape[0]))
    return tensors


def _numbers(name: str, tensor: Tensor, float_type: FloatType) -> np.ndarray:
    halved = float_type == "f16" and tensor.ndim == 2 and not name.startswith("position_embd")
    if halved and tensor.abs().max() > torch.finfo(torch.float16).max:
        raise UserError(f"--float-type f16: {name} holds a number that f16 cannot: use f32")
    return tensor.to(torch.float16 if halved else torch.float32).contiguous().numpy()


def vocabulary(tokenizer: Tokenizer) -> tuple[list[str], list[str], list[str], str]:
    """(token of each id, its gguf.TokenType, merges in order, llama.cpp's name for how words are cut).

    Raises UserError unless it is a byte-level BPE with one of our split patterns and nothing else that changes text.
    """
    data = json.loads(tokenizer.json_text)
    pattern = _split_pattern(data.get("pre_tokenizer") or {})
    name = next((n for n, p in SPLIT_PATTERNS.items() if p == pattern), None)
    bpe = data["model"]
    if bpe["type"] != "BPE" or name is None or data.get("normalizer") or bpe.get("ignore_merges"):
        raise UserError("--to gguf: llama.cpp has no name for the way this tokenizer.json cuts text: expected the patterns "
                        f"{', '.join(SPLIT_PATTERNS)} of prep/tokenize_bpe.py --split-pattern")  # fmt: skip
    kinds = dict.fromkeys(bpe["vocab"].values(), "NORMAL")
    kinds |= {t["id"]: "CONTROL" if t["special"] else "USER_DEFINED" for t in data["added_tokens"]}
    words = {i: token for token, i in bpe["vocab"].items()} | {t["id"]: t["content"] for t in data["added_tokens"]}
    ids = range(tokenizer.vocab_size)
    tokens, types = [words.get(i, f"[unused{i}]") for i in ids], [kinds.get(i, "UNUSED") for i in ids]
    merges = [m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]]
    return tokens, types, merges, PRE_TOKENIZERS[name]


def differs(tokenizer: Tokenizer) -> str:
    """Where llama.cpp's ids are not those of this tokenizer; empty when they always are."""
    if vocabulary(tokenizer)[3] != "gpt-4o":
        return ""
    return ("llama.cpp cuts accented capitals (ÉCOLE) and combining marks otherwise than o200k: where text has many, "
            "prepare it with --split-pattern cl100k")  # fmt: skip


def _split_pattern(pre_tokenizer: dict) -> str | None:
    """The regular expression by which it cuts words; None where it does something else."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    match [step.get("type") for step in steps]:
        case ["ByteLevel"] if steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
            return SPLIT_PATTERNS["gpt2"]  # what ByteLevel has built in
        case ["Split", "ByteLevel"] if not steps[1].get("use_regex", True) and not steps[1].get("add_prefix_space"):
            whole = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
            return steps[0]["pattern"].get("Regex") if whole else None
    return None


def modelfile(model: GPT, file: str) -> str:
    """What `ollama create` reads. The beginning of a text, <|endoftext|>, is not in it: the runner adds that itself."""
    return MODELFILE.format(file=file, end=END_OF_TURN, end_of_text=END_OF_TEXT, reply=ROLE_TOKENS["assistant"],
                            block_size=model.config.block_size)  # fmt: skip


def _library() -> Any:
    try:
        import gguf
    except ImportError as e:
        raise UserError("--to gguf: the gguf package is not installed: pip install -r requirements-extra.txt") from e
    return gguf
