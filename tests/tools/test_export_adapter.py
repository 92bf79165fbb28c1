"""Adapters of additive models: PEFT computes from base and adapter what the training model and the dense export do."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretrain.convert.adapter_export import write_adapter_export
from pretrain.convert.consolidated import ConsolidatedModel
from pretrain.errors import CheckpointError, run_command
from pretrain.tokenizer.load import open_tokenizer
from tests.support.consolidated_folder import FAMILIES, TEXT, random_consolidated, small_tokenizer
from tests.support.reference import reference_logits
from tools import densify_checkpoint, export_adapter


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _call(tool: Any, monkeypatch: pytest.MonkeyPatch, source: Path, output: Path, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", [tool.__name__, "--input", str(source), "--output", str(output), *flags])
    tool.main()


@pytest.mark.parametrize(
    ("family", "factored_layers"), [("llama", "all"), ("gpt2", "all"), ("llama", "mlp"), ("gpt2", "mlp")]
)
def test_peft_computes_what_the_training_model_computes(
    family: str, factored_layers: str, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"factored_layers": factored_layers}
    merged = random_consolidated(tmp_path / "merged", tokenizer_path, family, "additive", **changes)
    consolidated, output = ConsolidatedModel(merged), tmp_path / "adapted"
    assert len(set(consolidated.ranks.values())) > 2
    _call(export_adapter, monkeypatch, merged, output)
    _call(densify_checkpoint, monkeypatch, merged, tmp_path / "dense")

    config = consolidated.config
    tokens = torch.randint(config.vocabulary, (2, 32), generator=torch.Generator().manual_seed(8))
    tensors = {name: consolidated.read(name) for name in consolidated.names}
    expected = reference_logits(config, consolidated.ranks, tensors, tokens)
    base = AutoModelForCausalLM.from_pretrained(output / "base")
    with torch.no_grad():
        without = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, output / "adapter").eval()
        found = adapted(tokens).logits
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(tokens).logits
        by_name = AutoPeftModelForCausalLM.from_pretrained(output / "adapter")(tokens).logits
        merged_logits = adapted.merge_and_unload()(tokens).logits
    tolerance = 2e-6 * float(expected.abs().max())
    for logits in (found, dense, by_name, merged_logits):
        torch.testing.assert_close(logits, expected, rtol=0, atol=max(tolerance, 3e-5))
    assert (without - expected).abs().max() > 0.1

    held = sum(tensor.numel() for tensor in load_file(output / "adapter" / "adapter_model.safetensors").values())
    factors = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith((".A", ".B")))
    assert held >= factors  # A is repeated for q, k, v and for gate, up
    assert AutoTokenizer.from_pretrained(output / "base")(TEXT)["input_ids"] == open_tokenizer(tokenizer_path).encode(
        TEXT
    )
    facts = json.loads((output / "espalier.json").read_text())
    assert facts["kind"] == "adapter_export"
    assert facts["verified"]["relative_difference"] < 1e-5
    assert set(facts["files"]) == {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}


@pytest.mark.parametrize("family", FAMILIES)
def test_base_may_be_stored_in_half_precision(
    family: str, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = random_consolidated(tmp_path / "merged", tokenizer_path, family, "additive")
    _call(export_adapter, monkeypatch, merged, tmp_path / "adapted", "--dtype", "bfloat16")
    base = load_file(tmp_path / "adapted" / "base" / "model.safetensors")
    assert {tensor.dtype for tensor in base.values()} == {torch.bfloat16}


@pytest.mark.parametrize("parametrization", ["all", "dense"])
def test_only_additive_models_have_an_adapter(
    parametrization: str, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = random_consolidated(tmp_path / "merged", tokenizer_path, "llama", parametrization)
    with pytest.raises(CheckpointError, match=r"has no frozen weights .* tools/densify_checkpoint\.py"):
        _call(export_adapter, monkeypatch, merged, tmp_path / "adapted")
    assert not (tmp_path / "adapted").exists()


def test_wrong_factors_are_noticed_and_an_earlier_export_stays(
    tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    merged, output = random_consolidated(tmp_path / "merged", tokenizer_path, "llama", "additive"), tmp_path / "adapted"
    _call(export_adapter, monkeypatch, merged, output)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="pass --overwrite"):
        _call(export_adapter, monkeypatch, merged, output)

    def write_and_damage(consolidated: ConsolidatedModel, folder: Path, *others: Any, **settings: Any) -> None:
        write_adapter_export(consolidated, folder, *others, **settings)
        path = folder / "adapter" / "adapter_model.safetensors"
        factors = load_file(path)
        factors[next(name for name in factors if "k_proj.lora_B" in name)][0, 0] += 10.0
        save_file(factors, path)

    monkeypatch.setattr(export_adapter, "write_adapter_export", write_and_damage)
    with pytest.raises(SystemExit) as ended:
        run_command(partial(_call, export_adapter, monkeypatch, merged, output, "--overwrite"))
    assert ended.value.code == 3
    assert "error: the export does not compute what the additive model computes" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_others_files_are_never_replaced(tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged, output = random_consolidated(tmp_path / "merged", tokenizer_path, "llama", "additive"), tmp_path / "adapted"
    _call(export_adapter, monkeypatch, merged, output)
    (output / "base" / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(CheckpointError, match=r"holds base/thesis\.tex, which is not part of an adapter export"):
        _call(export_adapter, monkeypatch, merged, output, "--overwrite")
    shutil.rmtree(output)
    _call(densify_checkpoint, monkeypatch, merged, output)
    with pytest.raises(CheckpointError, match="which is not part of an adapter export"):
        _call(export_adapter, monkeypatch, merged, output, "--overwrite")
