"""Architecture and parametrization of one model, validated, and the list of its linear projections.

`ModelConfig` is all that is needed, together with the ranks, to build a model, to count its parameters, and to name its
tensors: checkpoints and exports carry it. Sizes are the full ones; how they are split over processes is not its
business.
"""

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Family = Literal["llama", "gpt2"]
NormKind = Literal["rmsnorm", "layernorm"]
Parametrization = Literal["dense", "factored", "additive"]
ProjectionKind = Literal["qkv", "proj", "fc1", "fc2"]
Recompute = Literal["none", "factors", "layers"]
"""What a layer computes again in its backward pass (`model/layers/recomputation.py`)."""


@dataclass(frozen=True)
class Architecture:
    """What distinguishes one family of models from the others; all other code asks the properties of `ModelConfig`."""

    norm: NormKind
    learned_positions: bool
    """Position embeddings are trained; otherwise queries and keys are rotated."""
    grouped_queries: bool
    """Several query heads may share one key/value head."""
    gated: bool
    """The MLP is a SwiGLU; otherwise it has one tanh-GELU."""
    biases: bool
    """Linear layers have biases."""
    tied_embeddings: bool
    """The output layer is the word embedding."""


ARCHITECTURES: dict[Family, Architecture] = {
    "llama": Architecture(
        norm="rmsnorm",
        learned_positions=False,
        grouped_queries=True,
        gated=True,
        biases=False,
        tied_embeddings=False,
    ),
    "gpt2": Architecture(
        norm="layernorm",
        learned_positions=True,
        grouped_queries=False,
        gated=False,
        biases=True,
        tied_embeddings=True,
    ),
}
"""The families. The one place that says what they are; `docs/extending.md` says what a new one needs besides."""


def round_up(number: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is not below `number`."""
    return -(-number // multiple) * multiple


class ModelConfig(BaseModel):
    """One transformer: `llama` (RMSNorm, RoPE, SwiGLU, grouped queries, no biases) or `gpt2` (LayerNorm, learned
    positions, tanh-GELU, biases, tied embeddings)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: Family = Field(
        "llama",
        description="llama (RMSNorm, rotary positions, SwiGLU, grouped queries, no biases) or gpt2 (LayerNorm, "
        "learned positions, GELU, biases, tied embeddings)",
    )
    layers: int = Field(4, ge=1, description="transformer blocks")
    hidden: int = Field(256, ge=8, description="width of the residual stream, a multiple of model.heads")
    heads: int = Field(4, ge=1, description="attention heads")
    query_groups: int = Field(
        0, ge=0, description="key/value heads (llama); 0: as many as heads. Fewer of them make generation cheaper"
    )
    ffn: int = Field(0, ge=0, description="inner width of the MLP; 0: 4 x hidden (gpt2), 8/3 x hidden up to 64 (llama)")
    sequence_length: int = Field(256, ge=2, description="longest sequence, and the one trained on")
    vocabulary: int = Field(
        0,
        ge=0,
        description="rows of the embedding before padding; 0: as many as data.tokenizer has tokens. Set it for a "
        "published model that has more",
    )
    vocabulary_multiple: int = Field(
        128, ge=1, description="the embedding is padded to a multiple of it, whatever the parallel layout"
    )
    parametrization: Parametrization = Field(
        "factored",
        description="factored: weights are B·A; additive: a frozen dense weight beside B·A; dense: "
        "megatron-core's own layers, the baseline",
    )
    factored_layers: Literal["all", "mlp"] = Field(
        "all", description="which linear layers are factored: all, or those of the MLPs alone, as in InRank's paper"
    )
    trained: Literal["all", "factors"] = Field(
        "all", description="factors: A and B alone, all else keeps its initial value, as LoRA does; for additive models"
    )
    bidirectional: bool = Field(
        False, description="attention in both directions. Set by train.objective mlm; leave it out"
    )
    attention_dropout: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="share of the attention weights that training sets to zero. For texts that are seen many times",
    )
    hidden_dropout: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="share of the embedding and of each block's outputs that training sets to zero. For texts "
        "that are seen many times",
    )
    initial_std: float = Field(
        0.02,
        gt=0.0,
        description="standard deviation of a dense weight's initial entries; factors begin as the decomposition "
        "of such a weight",
    )
    norm_epsilon: float = Field(
        1e-5, gt=0.0, description="number added to the variance in every norm. Only to match a published model"
    )
    rope_base: float = Field(
        10000.0,
        gt=1.0,
        description="base of the rotary positions' wavelengths (llama). Only to match a published model, or for "
        "long sequences",
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> "ModelConfig":
        if self.hidden % self.heads:
            raise ValueError(
                f"hidden {self.hidden} is not divisible by {self.heads} heads: change model.hidden or model.heads"
            )
        if not self.learned_positions and self.head_size % 2:
            raise ValueError(
                f"rotary positions need an even head size, and hidden {self.hidden} / {self.heads} heads is "
                f"{self.head_size}: change model.hidden or model.heads"
            )
        if self.query_groups not in (0, self.heads) and not ARCHITECTURES[self.family].grouped_queries:
            raise ValueError(
                f"{self.family} has no grouped queries: leave model.query_groups out, or set model.family=llama"
            )
        if self.heads % self.groups:
            raise ValueError(
                f"{self.heads} heads do not divide into {self.groups} query groups: "
                "change model.heads or model.query_groups"
            )
        return self

    @model_validator(mode="after")
    def _only_additive_models_freeze(self) -> "ModelConfig":
        if self.trained == "factors" and self.parametrization != "additive":
            raise ValueError(
                f"model.trained factors freezes all but the factors of an additive model, and this one is "
                f"{self.parametrization}: set model.parametrization=additive, or leave model.trained out"
            )
        return self

    @property
    def groups(self) -> int:
        """Key/value heads."""
        return self.query_groups or self.heads

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def ffn_width(self) -> int:
        """Inner width of the MLP."""
        if self.ffn:
            return self.ffn
        return round_up(8 * self.hidden // 3, 64) if self.gated else 4 * self.hidden

    @property
    def padded_vocabulary(self) -> int:
        """Rows of the embedding: a fixed multiple that does not depend on the tensor-parallel size."""
        return round_up(self.vocabulary, self.vocabulary_multiple)

    @property
    def gated(self) -> bool:
        """The MLP's first projection holds gate and up, one below the other."""
        return ARCHITECTURES[self.family].gated

    @property
    def biases(self) -> bool:
        """Linear layers have biases."""
        return ARCHITECTURES[self.family].biases

    @property
    def tied_embeddings(self) -> bool:
        """The output layer is the word embedding."""
        return ARCHITECTURES[self.family].tied_embeddings

    @property
    def learned_positions(self) -> bool:
        """Position embeddings are trained; otherwise queries and keys are rotated."""
        return ARCHITECTURES[self.family].learned_positions

    @property
    def norm(self) -> NormKind:
        return ARCHITECTURES[self.family].norm

    @property
    def norm_statistics(self) -> int:
        """Numbers that a norm computes for each token: the root mean square, or mean and standard deviation."""
        return 1 if self.norm == "rmsnorm" else 2

    @property
    def norm_parameters(self) -> tuple[str, ...]:
        """Names of the vectors that every norm holds."""
        return ("weight",) if self.norm == "rmsnorm" else ("weight", "bias")


@dataclass(frozen=True)
class Projection:
    """One linear layer of the transformer: `weight (out_features, in_features)`, its factors
    `B (out_features, rank)` and `A (rank, in_features)`, or (additive) all three."""

    name: str
    """Module path in the model, e.g. `decoder.layers.3.mlp.linear_fc1`: the key of every rank dictionary."""
    layer: int
    kind: ProjectionKind
    in_features: int
    out_features: int
    factored: bool
    """It has a rank: factors alone, or beside the frozen weight."""
    normed: bool
    """There is a norm in front of it."""
    residual: bool
    """Its output is added to the residual stream."""
    additive: bool = False
    """Its factors are added to a frozen `weight`."""

    @property
    def fused_norm(self) -> bool:
        """The norm in front of it is part of the layer: `norm_weight`, `norm_bias`."""
        return self.normed and self.factored and not self.additive

    @property
    def label(self) -> str:
        """Short name for people and TensorBoard, e.g. `layer_03/fc1`."""
        return f"layer_{self.layer:02d}/{self.kind}"

    @property
    def break_even_rank(self) -> int:
        """Largest rank at which two factors hold no more numbers than the dense weight: in*out / (in+out)."""
        return self.in_features * self.out_features // (self.in_features + self.out_features)


def projections(config: ModelConfig) -> list[Projection]:
    """Every linear layer of the stack in order of execution."""
    qkv_width = (config.heads + 2 * config.groups) * config.head_size
    fc1_width = config.ffn_width * (2 if config.gated else 1)
    factored = config.parametrization != "dense"
    attention = factored and config.factored_layers == "all"
    additive = config.parametrization == "additive"
    shapes: list[tuple[str, ProjectionKind, int, int, bool]] = [
        ("self_attention.linear_qkv", "qkv", config.hidden, qkv_width, attention),
        ("self_attention.linear_proj", "proj", config.hidden, config.hidden, attention),
        ("mlp.linear_fc1", "fc1", config.hidden, fc1_width, factored),
        ("mlp.linear_fc2", "fc2", config.ffn_width, config.hidden, factored),
    ]
    return [
        Projection(
            f"decoder.layers.{layer}.{module}",
            layer,
            kind,
            in_features,
            out_features,
            factored=has_rank,
            normed=kind in ("qkv", "fc1"),
            residual=kind in ("proj", "fc2"),
            additive=additive and has_rank,
        )
        for layer in range(config.layers)
        for module, kind, in_features, out_features, has_rank in shapes
    ]


def factored_projections(config: ModelConfig) -> list[Projection]:
    """The linear layers that have a rank."""
    return [projection for projection in projections(config) if projection.factored]


def check_recompute(config: ModelConfig, recompute: Recompute) -> None:
    """ValueError if layers of this model have no bottlenecks to keep in place of their activations."""
    if recompute == "factors" and (config.parametrization != "factored" or config.factored_layers != "all"):
        raise ValueError(
            "train.recompute factors keeps the bottlenecks of model.parametrization factored with "
            f"model.factored_layers all, and the model is {config.parametrization} in {config.factored_layers}: "
            "set train.recompute=layers"
        )
