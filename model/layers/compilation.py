"""Transformer layers through `torch.compile`: one compilation for all layers of a kind, at any rank.

A layer is compiled as it stands, so parameters keep their names; it is one graph if it is factored and whole on one
process (in megatron-core 0.16.1's own linear layers a warning breaks it eight times). Ranks are the one size that
changes in a run, and they differ from layer to layer: the rank of each factor is a number of its own in the compiled
code, and a growth compiles nothing anew.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch.fx.experimental._config
from torch import nn

from model.layers.factored_linear import FactoredLinear

_COMPILATIONS = 64
"""Times one function may be compiled before torch gives up on it: training, validation and probes each have theirs."""


def compile_layers(layers: nn.ModuleList, backend: str | Callable[..., Any] = "inductor") -> None:
    """Has each of `layers` compiled at its next call; after a growth it is called again, for the new factors."""
    settings = torch._dynamo.config
    settings.force_parameter_static_shapes = False  # else a parameter's sizes are constants, whatever is marked
    settings.recompile_limit = max(settings.recompile_limit, _COMPILATIONS)
    torch.fx.experimental._config.use_duck_shape = False  # else ranks that are equal by chance must stay so
    for layer in layers:
        for module in layer.modules():
            # torch makes a constant of a rank of 1, and refuses the mark.
            if isinstance(module, FactoredLinear) and module.rank > 1:
                torch._dynamo.mark_dynamic(module.A, 0)
                torch._dynamo.mark_dynamic(module.B, 1)
        layer.compile(backend=backend)
