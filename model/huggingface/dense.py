"""One model as another parametrization: names and shapes of all its parameters, and their values from dense weights.

    dense       W              = W of a dense model, B A of a factored one, W0 + B A of an additive one
    factored    A = √S Vᵀ,  B = U √S,  with U, S, V the leading `rank` singular triplets of W: the product of this rank
                that is nearest to W (Eckart and Young 1936), split as evenly as spectral initialization does
                (Khodak et al., arXiv 2105.01029)
    additive    W0 = W, A with orthonormal rows, B = 0: the same function (Hu et al., arXiv 2106.09685)

Tensors are full, and one projection's exist at a time: a model of any size passes through.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from model.config import ModelConfig, Projection, ProjectionKind, projections
from model.initialization import initial_factor

TensorReader = Callable[[str], Tensor]
"""Gives the full logical tensor of a name."""


def norm_module(layer: int, kind: ProjectionKind) -> str:
    """The norm in front of qkv or fc1, where it is a module of its own."""
    return f"decoder.layers.{layer}." + {"qkv": "input_layernorm.", "fc1": "pre_mlp_layernorm."}[kind]


def dense_tensor(config: ModelConfig, ranks: Mapping[str, int], read: TensorReader, name: str) -> Tensor:
    """The tensor `name` of the dense model that computes the same function; `read` knows the names of the model it is
    made of.

    Raises `ValueError` when factors do not have the rank that `ranks` says.
    """
    for projection in projections(config):
        if not projection.factored:
            continue
        if name == projection.name + ".weight":
            rank = ranks[projection.name]
            A, B = read(projection.name + ".A").float(), read(projection.name + ".B").float()
            expected = (rank, projection.in_features), (projection.out_features, rank)
            if (tuple(A.shape), tuple(B.shape)) != expected:
                raise ValueError(
                    f"{projection.name} has factors A {tuple(A.shape)} and B {tuple(B.shape)}, "
                    f"and rank {rank} needs {expected[0]} and {expected[1]}"
                )
            return read(name).float() + B @ A if projection.additive else B @ A
        norm = norm_module(projection.layer, projection.kind) if projection.fused_norm else None
        if norm is not None and name.startswith(norm):
            return read(f"{projection.name}.norm_{name.removeprefix(norm)}")
    return read(name)


def parameter_shapes(config: ModelConfig, ranks: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Name and full shape of every parameter, in the order of execution."""
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (config.padded_vocabulary, config.hidden)}
    if config.learned_positions:
        shapes["embedding.position_embeddings.weight"] = (config.sequence_length, config.hidden)
    for projection in projections(config):
        name = projection.name
        if projection.normed:
            prefix = f"{name}.norm_" if projection.fused_norm else norm_module(projection.layer, projection.kind)
            shapes |= {prefix + leaf: (config.hidden,) for leaf in config.norm_parameters}
        if projection.additive or not projection.factored:
            shapes[f"{name}.weight"] = (projection.out_features, projection.in_features)
        if projection.factored:
            shapes[f"{name}.A"] = (ranks[name], projection.in_features)
            shapes[f"{name}.B"] = (projection.out_features, ranks[name])
        if config.biases:
            shapes[f"{name}.bias"] = (projection.out_features,)
    shapes |= {f"decoder.final_layernorm.{leaf}": (config.hidden,) for leaf in config.norm_parameters}
    if not config.tied_embeddings:
        shapes["output_layer.weight"] = (config.padded_vocabulary, config.hidden)
    return shapes


class FromDense:
    """The parameters of a model of any parametrization out of a dense one's tensors."""

    def __init__(self, config: ModelConfig, ranks: Mapping[str, int], read_dense: TensorReader, seed: int) -> None:
        """`read_dense` knows the names of the dense model; `seed` is that of an additive model's A."""
        self._config, self._ranks, self._read, self._seed = config, ranks, read_dense, seed
        self.kept_energy: dict[str, float] = {}
        """Share of ‖W‖² that a factored projection keeps, by `Projection.name`; complete behind `tensors`."""

    def tensors(self) -> Iterator[Tensor]:
        """All parameters in fp32, in the order of `parameter_shapes`."""
        owners = {projection.name: projection for projection in projections(self._config) if projection.factored}
        fused = {f"{name}.norm_": norm_module(p.layer, p.kind) for name, p in owners.items() if p.fused_norm}
        pair: tuple[Tensor, Tensor] | None = None
        for name in parameter_shapes(self._config, self._ranks):
            module, _, leaf = name.rpartition(".")
            if module in owners and leaf in ("A", "B"):
                pair = self._factors(owners[module]) if pair is None else pair
                yield pair[0 if leaf == "A" else 1]
                pair = None if leaf == "B" else pair
                continue
            prefix = f"{module}.norm_"
            yield self._read(fused[prefix] + name.removeprefix(prefix) if name.startswith(prefix) else name)

    def _factors(self, projection: Projection) -> tuple[Tensor, Tensor]:
        """`A (rank, in)` and `B (out, rank)`."""
        rank = self._ranks[projection.name]
        if projection.additive:
            A, B = (initial_factor(self._config, projection, side, rank, self._seed) for side in "AB")
            return A, B
        A, B, kept = truncated_factors(self._read(f"{projection.name}.weight"), rank)
        self.kept_energy[projection.name] = kept
        return A, B


def truncated_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """`A (rank, in)`, `B (out, rank)` and the share of ‖W‖² that their product keeps of `weight (out, in)`."""
    U, S, Vt = torch.linalg.svd(weight, full_matrices=False)
    roots = S[:rank].sqrt()
    energy = S.double().square()
    kept = float(energy[:rank].sum() / energy.sum()) if energy.sum() > 0.0 else 1.0
    return roots.unsqueeze(1) * Vt[:rank], U[:, :rank] * roots, kept
