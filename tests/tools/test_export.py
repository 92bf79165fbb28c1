"""Train, grow, consolidate, densify: `transformers` computes what the training model computed."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretrain.tokenizer.load import open_tokenizer
from tests.support.distributed import run
from tests.support.training_runs import probe_tokens, train_and_probe, write_config
from tools import consolidate_checkpoint, densify_checkpoint

NEW_TOKENS = 12


VARIANTS = [("llama", "factored", "all"), ("gpt2", "factored", "all"), ("gpt2", "factored", "mlp")]
VARIANTS += [("llama", "additive", "all"), ("gpt2", "additive", "all"), ("gpt2", "additive", "mlp")]
LAYOUTS = [(1, 1, False), (2, 2, False), (1, 3, True), (2, 3, False), (2, 1, True)]
"""Tensor-parallel size of two processes, ZeRO stage, optimizer offloaded."""
CASES = list(zip(VARIANTS, [*LAYOUTS[:2], *LAYOUTS[:2]], strict=False))
CASES += [(VARIANTS[1], LAYOUTS[2]), (VARIANTS[3], LAYOUTS[3])]
ALL_CASES = [
    *CASES,
    *(
        pytest.param(variant, layout, marks=pytest.mark.matrix)
        for variant in VARIANTS
        for layout in LAYOUTS
        if (variant, layout) not in CASES
    ),
]


@pytest.mark.parametrize(("variant", "layout"), ALL_CASES)
def test_dense_export_is_the_training_model(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variant: tuple[str, str, str],
    layout: tuple[int, int, bool],
) -> None:
    (family, parametrization, factored_layers), (tensor, stage, offload) = variant, layout
    sections: dict[str, dict[str, Any]] = {
        "model": {"family": family, "parametrization": parametrization, "factored_layers": factored_layers},
        "deepspeed": {"stage": stage, "offload_optimizer": offload},
    }
    config = write_config(tmp_path / "run.yaml", corpus, tmp_path / "run", **sections)
    logits, greedy = run(train_and_probe, 2, str(config), [f"parallel.tensor={tensor}"], NEW_TOKENS)[0]

    merged, dense = tmp_path / "merged", tmp_path / "dense"
    for tool, arguments in (
        (consolidate_checkpoint, ["--checkpoint", tmp_path / "run", "--output", merged]),
        (densify_checkpoint, ["--input", merged, "--output", dense]),
    ):
        monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, arguments)])
        tool.main()

    model = AutoModelForCausalLM.from_pretrained(dense)
    vocabulary = model.config.vocab_size
    tokens = probe_tokens(vocabulary, logits.shape[1])
    with torch.no_grad():
        exported = model(tokens).logits
    assert (exported - logits[..., :vocabulary]).abs().max() <= 1e-4 * logits[..., :vocabulary].abs().max()
    continued = model.generate(
        tokens[:, : tokens.shape[1] // 2], max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert continued[0].tolist() == greedy

    tokenizer = AutoTokenizer.from_pretrained(dense)
    text = "def __init__(self):\n\treturn <s> None\r\n"
    assert tokenizer(text)["input_ids"] == open_tokenizer(corpus / "tokenizer.model").encode(text)
