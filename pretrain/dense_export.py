"""Writes a Hugging Face folder out of a consolidated model, and compares what it computes with the factored model.

The weights are streamed: shapes are known beforehand, so a file's header comes first, and then one product W = B A at a
time is computed in fp32, rounded and written. The comparison loads the written folder with transformers, in fp32
arithmetic whatever the stored type, and runs the same tokens through both models:

    max |exported - factored|  ≤  tolerance · scale,     scale = max |factored - its mean|

with the mean over the vocabulary, since only differences between logits matter.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from model.huggingface import huggingface_config, huggingface_shapes, huggingface_tensors
from model.process_groups import device, single_process
from pretrain.checkpoint_format import write_blocks
from pretrain.consolidated import INDEX_NAME, ConsolidatedModel, plan_files
from pretrain.consolidated_model import load_model
from pretrain.errors import CheckpointError
from pretrain.tokenizer import Tokenizer
from pretrain.tokenizer_export import export_tokenizer

_SAFETENSORS_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.08, torch.float16: 0.01}
"""Largest difference of a logit, in units of the logits' scale: some four times and more of what random models of 2 to
24 layers give, which is 4e-6, 0.02 and 0.002. A tensor out of place gives about 1."""

_SEQUENCES = 2
_MOST_LOGITS = 2**26
"""The comparison takes as long sequences as keep one model's logits under 256 MiB."""


@dataclass(frozen=True)
class Comparison:
    """What the factored model and the written folder said to the same tokens."""

    difference: float
    """Largest absolute difference of a logit."""
    scale: float
    tolerance: float
    sequences: int
    tokens: int
    """Positions compared, each over the whole vocabulary."""
    same_greedy_tokens: int
    """Positions at which both find the same token most probable."""

    @property
    def relative_difference(self) -> float:
        return self.difference / self.scale if self.difference else 0.0


def dense_bytes(consolidated: ConsolidatedModel, dtype: torch.dtype) -> int:
    """Size of all weights of the export."""
    return sum(math.prod(shape) * dtype.itemsize for shape in huggingface_shapes(consolidated.config).values())


def write_dense_export(
    consolidated: ConsolidatedModel, folder: Path, *, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """Writes weights, settings and tokenizer into `folder`, which is there and empty."""
    tokenizer = _trained_tokenizer(consolidated)
    write_weights(consolidated, folder, dtype=dtype, max_shard_bytes=max_shard_bytes)
    end = tokenizer.end_of_document
    huggingface_config(consolidated.config, end_of_document=end, dtype=dtype).save_pretrained(folder)
    GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end).save_pretrained(folder)
    export_tokenizer(tokenizer, folder, consolidated.config.sequence_length)


def write_weights(consolidated: ConsolidatedModel, folder: Path, *, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """Writes `model.safetensors`, or numbered files of at most `max_shard_bytes` (or one tensor) and their index."""
    shapes = huggingface_shapes(consolidated.config)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    files = plan_files(sizes, max_shard_bytes)
    tensors = huggingface_tensors(consolidated.config, consolidated.ranks, consolidated.read)
    for file, names in files.items():
        header = _header({name: shapes[name] for name in names}, dtype)
        write_blocks(folder / file, _blocks(header, names, tensors, dtype))
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        write_blocks(folder / INDEX_NAME, [json.dumps(index, indent=2).encode()])


def compare_with_export(consolidated: ConsolidatedModel, folder: Path, *, dtype: torch.dtype) -> Comparison:
    """Runs a fixed batch through the factored model and through the export in `folder`.

    Raises `CheckpointError` when the logits differ by more than the `dtype`'s tolerance, or are no numbers.
    """
    tokens = comparison_tokens(consolidated)
    ours = _factored_logits(consolidated, tokens)
    theirs = _exported_logits(folder, tokens)
    comparison = Comparison(
        difference=(theirs - ours).abs().max().item(),
        scale=(ours - ours.mean(-1, keepdim=True)).abs().max().item(),
        tolerance=TOLERANCES[dtype],
        sequences=tokens.shape[0],
        tokens=tokens.numel(),
        same_greedy_tokens=int((ours.argmax(-1) == theirs.argmax(-1)).sum()),
    )
    # Written so that NaN, which compares as false, is refused as well.
    if not comparison.difference <= comparison.tolerance * comparison.scale:
        remedy = "" if dtype == torch.float32 else ", try --dtype float32"
        raise CheckpointError(
            f"the export does not compute what the factored model computes: logits differ by up to "
            f"{comparison.difference:.3g} at a scale of {comparison.scale:.3g}, and {comparison.tolerance:g} of the "
            f"scale is allowed for {_type_name(dtype)} (same greedy token at {comparison.same_greedy_tokens} of "
            f"{comparison.tokens} positions): nothing was exported{remedy}"
        )
    return comparison


def comparison_tokens(consolidated: ConsolidatedModel) -> Tensor:
    """Fixed tokens `(sequences, length)` from all over the vocabulary, with the end of a document first in one sequence
    and in the middle of another."""
    vocabulary = consolidated.config.vocabulary
    length = min(consolidated.config.sequence_length, max(16, _MOST_LOGITS // (_SEQUENCES * vocabulary)))
    tokens = torch.randint(vocabulary, (_SEQUENCES, length), generator=torch.Generator().manual_seed(0))
    end = Tokenizer(consolidated.tokenizer_path).end_of_document
    tokens[0, 0] = tokens[1, length // 2] = end
    return tokens


@torch.no_grad()
def _factored_logits(consolidated: ConsolidatedModel, tokens: Tensor) -> Tensor:
    """`(sequences, length, vocabulary)` of our own model; it is gone from memory afterwards."""
    with single_process():
        model = load_model(consolidated).eval()
        positions = torch.arange(tokens.shape[1], device=device()).expand_as(tokens)
        logits = model(tokens.to(device()), positions, None)
        return logits[..., : consolidated.config.vocabulary].float().cpu()


@torch.no_grad()
def _exported_logits(folder: Path, tokens: Tensor) -> Tensor:
    """`(sequences, length, vocabulary)` of what transformers makes of the folder."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    # transformers fills what it misses with random numbers and goes on.
    problems = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if problems:
        raise CheckpointError(f"transformers does not find the exported weights in order: {problems}")
    model = model.eval().to(device())
    tokens = tokens.to(device())
    return model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits.float().cpu()


def _trained_tokenizer(consolidated: ConsolidatedModel) -> Tokenizer:
    """The folder's tokenizer, if it is the one the model was trained with."""
    tokenizer = Tokenizer(consolidated.tokenizer_path)
    trained = consolidated.facts["tokenizer"].get("fingerprint")
    if tokenizer.fingerprint != trained:
        raise CheckpointError(
            f"{consolidated.tokenizer_path} is not the tokenizer of the run: its fingerprint is "
            f"{tokenizer.fingerprint[:12]} and should be {str(trained)[:12]}: consolidate the checkpoint again"
        )
    if tokenizer.vocabulary > consolidated.config.vocabulary:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocabulary} tokens and the model only {consolidated.config.vocabulary}: "
            "consolidate the checkpoint again"
        )
    return tokenizer


def _header(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """The head of a safetensors file; `format` tells transformers that no tensor needs transposing."""
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        content[name] = {"dtype": _SAFETENSORS_TYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _blocks(
    header: bytes, names: list[str], tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[bytes | memoryview]:
    """The bytes of one file; takes its tensors off `tensors`, which has them in the same order."""
    yield header
    for name in names:
        found, tensor = next(tensors)
        if found != name:
            raise ValueError(f"{found} came where {name} belongs")
        rounded = tensor.to(dtype).contiguous()
        if not rounded.isfinite().all():
            if tensor.isfinite().all():
                raise CheckpointError(
                    f"{name} has values up to {tensor.abs().max().item():.3g}, and {_type_name(dtype)} ends at "
                    f"{torch.finfo(dtype).max:.3g}: use --dtype bfloat16 or float32"
                )
            raise CheckpointError(f"{name} holds NaN or an infinity: export an earlier checkpoint")
        yield rounded.flatten().view(torch.uint8).numpy().data


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
