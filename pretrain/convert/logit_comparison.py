"""Compares the logits of two models: the test that an import or export must pass before it gets its name.

    max |theirs - ours|  ≤  tolerance · scale,     scale = max |ours - its mean|

with the mean over the vocabulary, since only differences between logits matter. Both run in fp32 arithmetic, whatever
type is stored, one after the other. Weights of a Hugging Face folder stay on disk until a module needs them: the dense
form of a model need not fit into memory.

The training model comes out of a consolidated folder, also for tools that run it without a launcher:

    with single_process():
        model = load_model(ConsolidatedModel(folder)).eval()
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from model.gpt import EspalierModel, build_model
from model.process_groups import device, single_process
from pretrain.convert.consolidated import ConsolidatedModel
from pretrain.convert.source import DenseSource
from pretrain.errors import CheckpointError
from pretrain.tokenizer.load import open_tokenizer

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.08, torch.float16: 0.01}
"""Largest allowed difference of a logit, in units of the logits' scale. Random models of 2 to 24 layers give 4e-6, 0.02
and 0.002, so the limits are at least four times as high. A tensor out of place gives about 1."""

_SEQUENCES = 2
_MOST_LOGITS = 2**26
"""Most logits of one model in a comparison, 256 MiB in fp32: longer sequences are cut."""


@dataclass(frozen=True)
class Comparison:
    """How far the logits of two models differ on the same tokens."""

    difference: float
    """Largest absolute difference of a logit."""
    scale: float
    sequences: int
    tokens: int
    """Positions compared, each over the whole vocabulary."""
    same_greedy_tokens: int
    """Positions at which both find the same token most probable."""

    @property
    def relative_difference(self) -> float:
        return self.difference / self.scale if self.difference else 0.0

    def within(self, tolerance: float) -> bool:
        """Whether the difference is within `tolerance` times the scale; False for NaN."""
        return self.difference <= tolerance * self.scale

    def facts(self, tolerance: float) -> dict[str, Any]:
        """Facts for the marker of an export."""
        return {
            "largest_logit_difference": self.difference,
            "logit_scale": self.scale,
            "relative_difference": self.relative_difference,
            "tolerance": tolerance,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "same_greedy_tokens": self.same_greedy_tokens,
        }


def compare_logits(ours: Tensor, theirs: Tensor) -> Comparison:
    """Compares logits `(sequences, length, vocabulary)` of two models on the same tokens."""
    return Comparison(
        difference=(theirs - ours).abs().max().item(),
        scale=(ours - ours.mean(-1, keepdim=True)).abs().max().item(),
        sequences=ours.shape[0],
        tokens=ours.shape[0] * ours.shape[1],
        same_greedy_tokens=int((ours.argmax(-1) == theirs.argmax(-1)).sum()),
    )


def compare_with_written(
    consolidated: ConsolidatedModel, load: Callable[[], torch.nn.Module], *, dtype: torch.dtype
) -> Comparison:
    """Runs a fixed batch through the model that was trained, and then through what `load` finds in the written files.

    Raises `CheckpointError` when the logits differ by more than the `dtype`'s tolerance, or are no numbers.
    """
    tokens = comparison_tokens(consolidated)
    ours = training_logits(consolidated, tokens)
    comparison = compare_logits(ours, transformers_logits(load(), tokens))
    if not comparison.within(TOLERANCES[dtype]):
        remedy = "" if dtype == torch.float32 else ", try --dtype float32"
        raise CheckpointError(
            f"the export does not compute what the {consolidated.config.parametrization} model computes: logits differ "
            f"by up to {comparison.difference:.3g} at a scale of {comparison.scale:.3g}, and {TOLERANCES[dtype]:g} of "
            f"the scale is allowed for {type_name(dtype)} (same greedy token at {comparison.same_greedy_tokens} of "
            f"{comparison.tokens} positions): nothing was exported{remedy}"
        )
    return comparison


def type_name(dtype: torch.dtype) -> str:
    """`bfloat16` and the like."""
    return str(dtype).removeprefix("torch.")


def comparison_tokens(consolidated: ConsolidatedModel) -> Tensor:
    """Fixed tokens `(sequences, length)` from all over the vocabulary, with the end of a document first in one sequence
    and in the middle of another."""
    vocabulary = consolidated.config.vocabulary
    length = min(consolidated.config.sequence_length, max(16, _MOST_LOGITS // (_SEQUENCES * vocabulary)))
    tokens = torch.randint(vocabulary, (_SEQUENCES, length), generator=torch.Generator().manual_seed(0))
    end = open_tokenizer(consolidated.tokenizer_path).end_of_document
    tokens[0, 0] = tokens[1, length // 2] = end
    return tokens


@torch.no_grad()
def training_logits(consolidated: ConsolidatedModel, tokens: Tensor) -> Tensor:
    """Logits `(sequences, length, vocabulary)` of our own model, which is freed afterwards."""
    with single_process():
        return _logits(load_model(consolidated), tokens)


@torch.no_grad()
def dense_logits(source: DenseSource, tokens: Tensor) -> Tensor:
    """Logits `(sequences, length, vocabulary)` of `source` in our dense model, before it is converted."""
    with single_process():
        model = build_model(source.config, {}, seed=0)
        for name, parameter in model.named_parameters():
            parameter.copy_(source.read(name))
        return _logits(model.to(device()), tokens)


def _logits(model: EspalierModel, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1], device=device()).expand_as(tokens)
    logits = model.eval()(tokens.to(device()), positions, None)
    return logits[..., : model.model_config.vocabulary].float().cpu()


def load_transformers(folder: Path, *, foreign: bool = False, in_memory: bool = False) -> torch.nn.Module:
    """The model that transformers loads from a folder.

    Raises `CheckpointError` if weights are missing, or if there are weights too many. A `foreign` folder may have more:
    old versions of transformers stored constants as well. Unless `in_memory`, accelerate reads a module's weights when
    the module runs, and frees them afterwards.
    """
    place = None if in_memory else {"": "disk"}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            device_map=place,
        )
    except Exception as error:  # whatever a foreign setting leads to inside transformers
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"transformers cannot load {folder}: {reason}") from error
    # transformers fills what it misses with random numbers and goes on.
    ignored = {"unexpected_keys"} if foreign else set()
    problems = {kind: sorted(map(str, names)) for kind, names in report.items() if names and kind not in ignored}
    if problems:
        raise CheckpointError(f"transformers does not find the weights of {folder} in order: {problems}")
    return model.eval()


@torch.no_grad()
def transformers_logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Logits `(sequences, length, vocabulary)` of `model`, computed on the CPU, where weights come from disk."""
    return model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits.float()


@torch.no_grad()
def load_model(consolidated: ConsolidatedModel) -> EspalierModel:
    """The whole model in fp32 on this process; process groups of one process must be there (`single_process`).

    Raises `CheckpointError` when the folder's tensors are not exactly those of its own settings.
    """
    model = build_model(consolidated.config, consolidated.ranks, seed=0)
    parameters = dict(model.named_parameters())
    odd = sorted(parameters.keys() ^ set(consolidated.names))
    if odd:
        verb = "lacks" if odd[0] in parameters else "holds a superfluous"
        raise CheckpointError(f"the consolidated model {verb} {odd[0]} ({len(odd)} such names): consolidate it again")
    for name, parameter in parameters.items():
        tensor = consolidated.read(name)
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"{name} is {tuple(tensor.shape)} in the consolidated model and its settings ask for "
                f"{tuple(parameter.shape)}: consolidate it again"
            )
        parameter.copy_(tensor)
    return model.to(device())
