"""Low-rank adaptation with the `peft` library in a plain PyTorch loop, on the batches that a run of ours sees.

The comparison for `tools/benchmarks/adaptation.py`: same samples in the same order, same AdamW, learning rate, clipping
and validation sequences; the model is transformers' and the adapter PEFT's, with its own initialization.
"""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pretrain.config.run import RunConfig
from pretrain.data.corpus import Corpus, batch_at, open_corpus
from pretrain.schedule import learning_rate

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def train_with_peft(config: RunConfig, base: Path, rank: int) -> dict[str, Any]:
    """Trains an adapter of this rank for the model in `base` as `config` says; its size and validation losses."""
    train, steps = config.train, config.train.steps
    corpus = open_corpus(
        config.data,
        config.model,
        training_samples=steps * train.global_batch,
        validation_samples=train.validation_sequences,
        seed=config.run.seed,
        cache=Path(config.run.folder) / "cache",
    )
    torch.manual_seed(config.run.seed)
    model = AutoModelForCausalLM.from_pretrained(
        base, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=MODULES))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(
        trained,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.epsilon,
        weight_decay=0.0,
    )
    before = _validation_loss(model, corpus, config)
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = learning_rate(step, config.schedule, config.optimizer, steps)
        batch = batch_at(corpus.train, step * train.global_batch, train.global_batch)
        _losses(model, batch).mean().backward()
        nn.utils.clip_grad_norm_(trained, train.clip)
        adam.step()
        adam.zero_grad()
    return {
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "validation_loss": _validation_loss(model, corpus, config),
        "validation_loss_before": before,
    }


def _losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Loss of every token, `(sequences * length,)`."""
    logits = model(input_ids=batch["tokens"], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")


@torch.no_grad()
def _validation_loss(model: nn.Module, corpus: Corpus, config: RunConfig) -> float:
    model.eval()
    size, sequences = config.train.micro_batch, config.train.validation_sequences
    batches = [batch_at(corpus.validation[""], first, size) for first in range(0, sequences, size)]
    losses = torch.cat([_losses(model, batch).double() for batch in batches])
    model.train()
    return float(losses.mean())
