"""The model: megatron-core's `GPTModel` with the layer spec of the chosen parametrization.

| parametrization          | stream between layers | attention             | MLP                   |
|--------------------------|-----------------------|-----------------------|-----------------------|
| dense                    | whole                 | megatron-core's       | megatron-core's       |
| additive                 | whole                 | megatron-core's + B A | megatron-core's + B A |
| factored, all layers     | split along hidden    | factored, norm fused  | factored, norm fused  |
| factored, MLPs only      | split along hidden    | dense, gather/scatter | factored, norm fused  |
"""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from model.collectives import all_gathered
from model.config import (
    ModelConfig,
    NormKind,
    Projection,
    Recompute,
    check_recompute,
    factored_projections,
    projections,
)
from model.initialization import initial_tensor
from model.layers.additive_linear import AdditiveColumnParallelLinear, AdditiveRowParallelLinear
from model.layers.attention import ScaledDotProductAttention, prefer_fast_kernels
from model.layers.cross_entropy import HiddenPadding, split_vocabulary_losses, whole_vocabulary_losses
from model.layers.dense_in_stream import StreamColumnParallelLinear, StreamRowParallelLinear
from model.layers.dropout import BiasDropoutAdd, CounterDropout, DropoutCounter
from model.layers.embedding import StreamEmbedding
from model.layers.factored_linear import FactoredLinear
from model.layers.recomputation import RecomputedLayer
from model.layers.rotary import RotaryPositions
from model.layers.sharded_norm import ShardedNorm, mark_sharded
from model.layers.swiglu import SwiGLU
from model.process_groups import tensor_index, tensor_size
from model.sharding import TensorLayout

LayerWithFactors = FactoredLinear | AdditiveColumnParallelLinear | AdditiveRowParallelLinear
"""What has `A`, `B`, `rank`, `set_factors` and `probe`."""


def _transformer_config(config: ModelConfig) -> TransformerConfig:
    return TransformerConfig(
        num_layers=config.layers,
        hidden_size=config.hidden,
        num_attention_heads=config.heads,
        num_query_groups=config.groups,
        ffn_hidden_size=config.ffn_width,
        attention_dropout=config.attention_dropout,
        hidden_dropout=config.hidden_dropout,
        layernorm_epsilon=config.norm_epsilon,
        normalization="RMSNorm" if config.norm == "rmsnorm" else "LayerNorm",
        activation_func=nn.functional.silu if config.gated else _tanh_gelu,
        use_te_activation_func=config.gated,  # megatron-core's word for a module of the spec's in its place: `SwiGLU`
        gated_linear_unit=config.gated,
        add_bias_linear=config.biases,
        tensor_model_parallel_size=tensor_size(),
        use_cpu_initialization=True,
        perform_initialization=False,  # `_initialize` below fills every parameter by name
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
    )


def _tanh_gelu(values: Tensor) -> Tensor:
    return nn.functional.gelu(values, approximate="tanh")


class _LayerSpecs:
    """Builds one layer spec after the other; they differ in ranks and dropout sites."""

    def __init__(
        self, config: ModelConfig, ranks: Mapping[str, int], counter: DropoutCounter, recompute: Recompute
    ) -> None:
        self.config, self.ranks, self.counter, self.recompute = config, ranks, counter, recompute
        self.in_stream = config.parametrization == "factored"
        self.rotary = None if config.learned_positions else RotaryPositions(config.rope_base, config.head_size)

    def block(self) -> TransformerBlockSubmodules:
        by_layer: list[list[Projection]] = [[] for _ in range(self.config.layers)]
        for projection in projections(self.config):
            by_layer[projection.layer].append(projection)
        return TransformerBlockSubmodules(
            layer_specs=[self._layer(*four) for four in by_layer], layer_norm=self._norm()
        )

    def _layer(self, qkv: Projection, proj: Projection, fc1: Projection, fc2: Projection) -> ModuleSpec:
        number = qkv.layer + 1  # megatron-core counts layers from 1
        attention = ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.no_mask if self.config.bidirectional else AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=self._linear(qkv),
                core_attention=ModuleSpec(
                    module=ScaledDotProductAttention, params={"counter": self.counter, "rotary": self.rotary}
                ),
                linear_proj=self._linear(proj),
            ),
        )
        mlp = ModuleSpec(
            module=MLP,
            submodules=MLPSubmodules(
                linear_fc1=self._linear(fc1),
                activation_func=SwiGLU if self.config.gated else None,
                linear_fc2=self._linear(fc2),
            ),
        )
        recomputed = {"recompute": self.recompute, "counter": self.counter}
        return ModuleSpec(
            module=TransformerLayer if self.recompute == "none" else RecomputedLayer,
            params={} if self.recompute == "none" else recomputed,
            submodules=TransformerLayerSubmodules(
                input_layernorm=IdentityOp if qkv.fused_norm else self._norm(),
                self_attention=attention,
                self_attn_bda=self._residual_add(number, "attention_output"),
                pre_mlp_layernorm=IdentityOp if fc1.fused_norm else self._norm(),
                mlp=mlp,
                mlp_bda=self._residual_add(number, "mlp_output"),
            ),
        )

    def _linear(self, projection: Projection) -> ModuleSpec:
        if projection.additive:
            layer = AdditiveColumnParallelLinear if projection.normed else AdditiveRowParallelLinear
            return ModuleSpec(module=layer, params={"rank": self.ranks[projection.name]})
        if projection.factored:
            norm = self.config.norm if projection.normed else None
            return ModuleSpec(module=FactoredLinear, params={"rank": self.ranks[projection.name], "norm": norm})
        column = projection.normed
        if self.in_stream:
            return ModuleSpec(module=StreamColumnParallelLinear if column else StreamRowParallelLinear)
        return self._megatron_linear(column)

    @staticmethod
    def _megatron_linear(column: bool) -> ModuleSpec:
        attention = get_gpt_layer_local_spec().submodules.self_attention.submodules
        return ModuleSpec(module=attention.linear_qkv if column else attention.linear_proj)

    def _norm(self) -> ModuleSpec:
        if not self.in_stream:
            return ModuleSpec(module=WrappedTorchNorm)
        return ModuleSpec(module=_BlockNorm, params={"kind": self.config.norm})

    def _residual_add(self, layer: int, site: str) -> ModuleSpec:
        dropout = CounterDropout(self.counter, self.config.hidden_dropout, layer, site, sharded=self.in_stream)
        return ModuleSpec(module=BiasDropoutAdd, params={"dropout": dropout})


class _BlockNorm(ShardedNorm):
    """`ShardedNorm` with the constructor that megatron-core's block expects."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, kind: NormKind) -> None:
        super().__init__(kind, hidden_size, eps)


class EspalierModel(GPTModel):
    """`GPTModel` whose embedding and output layer fit the stream, and whose loss ignores padded vocabulary rows.

    `forward(tokens, position_ids, None, labels=labels)` gives the loss of each token `(batch, seq)`; without labels the
    logits `(batch, seq, padded_vocabulary/tp)`.
    """

    def __init__(self, config: ModelConfig, ranks: Mapping[str, int], seed: int, recompute: Recompute) -> None:
        counter = DropoutCounter(seed)
        if torch.cuda.is_available():
            prefer_fast_kernels()
        super().__init__(
            config=_transformer_config(config),
            transformer_layer_spec=_LayerSpecs(config, ranks, counter, recompute).block(),
            vocab_size=config.padded_vocabulary,
            max_sequence_length=config.sequence_length,
            # Rotary positions are applied in core attention (`model/layers/attention.py`).
            position_embedding_type="learned_absolute" if config.learned_positions else "none",
            share_embeddings_and_output_weights=config.tied_embeddings,
        )
        self.model_config, self.dropout_counter = config, counter
        in_stream = config.parametrization == "factored"
        dropout = CounterDropout(counter, config.hidden_dropout, 0, "embedding", sharded=in_stream)
        if in_stream:
            positions = config.sequence_length if config.learned_positions else None
            self.embedding = StreamEmbedding(config.padded_vocabulary, config.hidden, positions, dropout)
            self.output_layer = StreamColumnParallelLinear(
                config.hidden,
                config.padded_vocabulary,
                config=self.config,
                init_method=self.config.init_method,
                bias=False,
                skip_weight_param_allocation=config.tied_embeddings,
                tp_group=self.pg_collection.tp,
            )
            self.setup_embeddings_and_output_layer()
        else:
            self.embedding.embedding_dropout = dropout
        _mark_megatron_shards(self, config)
        _initialize(self, config, seed)
        if config.trained == "factors":
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(name.endswith((".A", ".B")))  # which freezes all others

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy `(batch, seq)` of `logits (seq, batch, padded_vocabulary/tp)` over the real vocabulary: rows
        that only pad it get no probability. Logits that have a gradient are overwritten: a copy of them would cost more
        than the loss."""
        vocabulary = self.model_config.vocabulary
        if logits.is_cuda and tensor_size() == 1:
            return whole_vocabulary_losses(labels, logits, vocabulary)
        if logits.requires_grad:
            real = max(vocabulary - tensor_index() * logits.shape[-1], 0)
            logits = HiddenPadding.apply(logits, real)
        else:
            logits = self._over_real_vocabulary(logits)
        if logits.is_cuda and logits.dtype == torch.bfloat16:
            return split_vocabulary_losses(labels, logits)
        return super().compute_language_model_loss(labels, logits)

    def likeliest_tokens(self, logits: Tensor) -> Tensor:
        """The token with the largest of `logits (..., padded_vocabulary/tp)`, over all processes' shards: `(...)`."""
        largest, row = self._over_real_vocabulary(logits).max(dim=-1)
        token = row + tensor_index() * logits.shape[-1]
        # Both in one collective: fp64 holds token ids exactly.
        best = all_gathered(torch.stack([largest.double(), token.double()], dim=-1)).unflatten(-1, (tensor_size(), 2))
        shard = best[..., 0].argmax(dim=-1, keepdim=True)
        return best[..., 1].gather(-1, shard).squeeze(-1).long()

    def _over_real_vocabulary(self, logits: Tensor) -> Tensor:
        rows = logits.shape[-1]
        padding = torch.arange(rows, device=logits.device) + tensor_index() * rows >= self.model_config.vocabulary
        return logits.masked_fill(padding, float("-inf"))

    def factored_layers(self) -> dict[str, LayerWithFactors]:
        """The layers that have a rank, by `Projection.name`."""
        return {p.name: self.get_submodule(p.name) for p in factored_projections(self.model_config)}

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that get gradients, by name; the others keep their initial values."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def ranks(self) -> dict[str, int]:
        """The present rank of every factored layer."""
        return {name: layer.rank for name, layer in self.factored_layers().items()}


def build_model(
    config: ModelConfig, ranks: Mapping[str, int], *, seed: int, recompute: Recompute = "none"
) -> EspalierModel:
    """The shard of this process, in host memory, with initial values that do not depend on the number of processes.

    `ranks` names the rank of every factored projection, `recompute` what layers compute again in the backward pass
    of each step. Raises `ValueError` if the vocabulary is not known yet, or if the model cannot recompute so.
    """
    if config.vocabulary == 0:
        raise ValueError("the vocabulary is not known: set model.vocabulary or data.tokenizer")
    check_recompute(config, recompute)
    return EspalierModel(config, ranks, seed, recompute)


def tensor_layouts(model: nn.Module) -> dict[str, TensorLayout]:
    """Full shape and split of every parameter, from the marks megatron-core and our layers leave on it.

    ZeRO 3 empties parameters outside the forward pass and keeps their shape in `ds_shape`.
    """
    layouts = {}
    parameters: list[tuple[str, Any]] = list(model.named_parameters())
    for name, parameter in parameters:
        shape = list(getattr(parameter, "ds_shape", parameter.shape))
        if not getattr(parameter, "tensor_model_parallel", False):
            layouts[name] = TensorLayout(tuple(shape))
            continue
        dim, stride = parameter.partition_dim, parameter.partition_stride
        shape[dim] *= tensor_size()
        layouts[name] = TensorLayout(tuple(shape), dim, stride)
    return layouts


def _mark_megatron_shards(model: EspalierModel, config: ModelConfig) -> None:
    """megatron-core 0.16.1 marks the weights of its own layers only while it initializes them, which we do
    ourselves."""
    for name, module in model.named_modules():
        if isinstance(module, ColumnParallelLinear) and module.weight is not None:
            mark_sharded(module.weight, dim=0, stride=2 if config.gated and name.endswith("linear_fc1") else 1)
        elif isinstance(module, RowParallelLinear):
            mark_sharded(module.weight, dim=1)
        elif isinstance(module, VocabParallelEmbedding):
            mark_sharded(module.weight, dim=0)


@torch.no_grad()
def _initialize(model: EspalierModel, config: ModelConfig, seed: int) -> None:
    layouts = tensor_layouts(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:  # shapes alone are wanted
            continue
        full = initial_tensor(config, name, layouts[name].full_shape, seed)
        parameter.copy_(layouts[name].shard(full, tensor_index(), tensor_size()))
