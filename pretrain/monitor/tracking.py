"""Watches how a run learns (`rank.track`): spectra of cumulative updates, gradients and representations.

At every validation, and at the end, the singular values

    update            of D = W - W0, what training has added to each projection (for factors D = B·A - B0·A0)
    gradient          of each dense projection's gradient in the step just taken, before clipping
    representation    of the residual stream behind each layer, over the tokens of the first validation micro-batch of
                      every data-parallel process: square roots of the eigenvalues of their covariance

These spectra test two claims: updates have a low rank that grows in the course of training (Zhao et al., InRank, arXiv
2306.11250), and gradients are of low rank (Zhao et al., GaLore, arXiv 2403.03507). Gradients of factors are left out,
since their rank is at most that of the factors.

Nothing as large as a whole weight is gathered: hidden x hidden Gram matrices travel, one layer at a time. W0 is drawn
again from seed and name, one layer at a time. Between `watch_gradients` and `measure` each process holds one fp32 copy
of the gradients of its dense projections; outside measuring steps nothing is held. A run with tracking computes the
same numbers, to the bit, as one without.
"""

import time
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from model.collectives import all_gathered
from model.config import projections
from model.factor_algebra import is_sharded
from model.gpt import EspalierModel, tensor_layouts
from model.process_groups import data_group, data_size
from model.spectrum import gram_singular_values, matrix_singular_values, update_grams
from pretrain.checkpoint.format import Fragment
from pretrain.config.run import RunConfig
from pretrain.data.corpus import model_inputs
from pretrain.engine.build import evaluating
from pretrain.engine.optimizer_state import gather, optimizer_state
from pretrain.engine.zero3 import shape_of
from pretrain.growth.initial_values import InitialValues
from pretrain.growth.spectra import Solver
from pretrain.monitor.spectrum_report import Measurement


class Tracker:
    """Measures a run: `watch_gradients` before a step, `measure` after it. All processes call both together."""

    def __init__(self, config: RunConfig) -> None:
        # A frozen weight has neither update nor gradient; the frozen part of an additive layer has factors beside it.
        learning = [layer for layer in projections(config.model) if layer.factored or config.model.trained == "all"]
        self._projections, self._hidden = learning, config.model.hidden
        self._config, self._start = config, InitialValues(config)
        self._gradients: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def watch_gradients(self, engine: DeepSpeedEngine) -> None:
        """Starts to sum the gradients of the next step's micro-steps, before ZeRO partitions or frees them."""
        loss_scale = float(getattr(engine.optimizer, "cur_scale", 1.0))
        for projection in self._projections:
            if not projection.factored:
                weight = engine.module.get_submodule(projection.name).weight
                self._hooks.append(weight.register_hook(partial(self._add, projection.name, 1.0 / loss_scale)))

    def _add(self, name: str, unscale: float, gradient: Tensor) -> None:
        """Adds one micro-step's gradient. DeepSpeed has divided the loss by the number of micro-steps, and multiplied
        it by the loss scale, which `unscale` undoes."""
        unscaled = gradient.detach().float() * unscale
        self._gradients[name] = self._gradients[name] + unscaled if name in self._gradients else unscaled

    @torch.no_grad()
    def measure(self, engine: DeepSpeedEngine, batch: Mapping[str, Tensor] | None) -> Measurement:
        """Measures spectra after the step; those of representations only with a `batch` of validation samples."""
        start = time.perf_counter()
        gradient = self._gradient_spectra(engine.module)
        update = self._update_spectra(engine)
        representation = {} if batch is None else self._representation_spectra(engine, batch)
        return Measurement(
            _finite(update), _finite(gradient), _finite(representation), seconds=time.perf_counter() - start
        )

    def _gradient_spectra(self, model: EspalierModel) -> dict[str, Tensor]:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        layouts, spectra = tensor_layouts(model), {}
        for name in [projection.name for projection in self._projections if projection.name in self._gradients]:
            mean = self._gradients.pop(name) / data_size()
            if data_size() > 1:
                dist.all_reduce(mean, group=data_group())
            spectra[name] = matrix_singular_values(mean, layouts[f"{name}.weight"])
        return spectra

    def _update_spectra(self, engine: DeepSpeedEngine) -> dict[str, Tensor]:
        """Spectra of the updates, from the masters: a 16-bit weight is rounded more coarsely than a short run changes
        it."""
        masters = _master_fragments(engine)
        parameters, layouts = dict(engine.module.named_parameters()), tensor_layouts(engine.module)

        def now_and_then(name: str) -> tuple[Tensor, Tensor]:
            parameter = parameters[name]
            now = gather(masters.pop(name, []), shape_of(parameter), parameter.device)
            now.tensor_model_parallel = is_sharded(parameter)  # type: ignore[attr-defined]  # `update_grams` asks
            return now, self._start.shard(name, layouts[name]).to(parameter.dtype).to(now)

        dense, solver = {}, Solver(engine.module)
        for projection in self._projections:
            name = projection.name
            if projection.factored:
                (A, A0), (B, B0) = now_and_then(f"{name}.A"), now_and_then(f"{name}.B")
                solver.add(name, update_grams(A, B, A0, B0))
            else:
                now, then = now_and_then(f"{name}.weight")
                dense[name] = matrix_singular_values(now - then, layouts[f"{name}.weight"])
        found = dense | solver.solve()
        return {projection.name: found[projection.name] for projection in self._projections}

    def _representation_spectra(self, engine: DeepSpeedEngine, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        spectra: dict[str, Tensor] = {}

        def behind(layer: str, _module: object, _inputs: object, outputs: tuple[Tensor, Tensor | None]) -> None:
            spectra[layer] = self._principal_deviations(outputs[0])

        layers = enumerate(engine.module.decoder.layers)
        hooks = [layer.register_forward_hook(partial(behind, f"layer_{index:02d}")) for index, layer in layers]
        with evaluating(engine):
            engine(*model_inputs(self._config, batch))
        for hook in hooks:
            hook.remove()
        return spectra

    def _principal_deviations(self, hidden: Tensor) -> Tensor:
        """Standard deviations `(hidden,)` along the principal directions of `hidden (seq, batch, hidden)`, or of this
        process's `hidden/tp` of it; a collective."""
        whole = hidden if hidden.shape[-1] == self._hidden else all_gathered(hidden)
        tokens = whole.flatten(0, 1).double()
        mean = tokens.mean(dim=0) / data_size()
        dist.all_reduce(mean, group=data_group())
        centred = tokens - mean
        covariance = centred.t() @ centred / (tokens.shape[0] * data_size())
        dist.all_reduce(covariance, group=data_group())
        return gram_singular_values(covariance)


def _master_fragments(engine: DeepSpeedEngine) -> dict[str, list[Fragment]]:
    """What this process owns of each parameter's fp32 master, as views."""
    masters: dict[str, list[Fragment]] = {}
    for fragment in optimizer_state(engine).fragments():
        if fragment.key == "master":
            masters.setdefault(fragment.name, []).append(fragment)
    return masters


def _finite(spectra: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The spectra without those that are not finite, such as gradients of a step that fp16 skips. All processes have
    the same numbers, so they leave out the same ones."""
    if not spectra:
        return {}
    everything = torch.cat(list(spectra.values())).cpu().split([len(values) for values in spectra.values()])
    return {name: values.numpy() for name, values in zip(spectra, everything, strict=True) if values.isfinite().all()}
