"""Dense exports of both families: right for transformers, verified before they get their name, nothing left behind."""

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretrain.convert.consolidated import ConsolidatedModel
from pretrain.convert.huggingface_export import compare_with_export, write_dense_export
from pretrain.convert.logit_comparison import TOLERANCES, comparison_tokens
from pretrain.errors import CheckpointError, run_command
from pretrain.tokenizer.load import open_tokenizer
from tests.support.consolidated_folder import FAMILIES, PARAMETRIZATIONS, TEXT, random_consolidated, small_tokenizer
from tests.support.reference import reference_logits
from tools import densify_checkpoint

Maker = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def consolidated_folder(tokenizer_path: Path, tmp_path: Path) -> Maker:
    return partial(random_consolidated, tmp_path / "merged", tokenizer_path)


def densify(monkeypatch: pytest.MonkeyPatch, source: Path, output: Path, *flags: str) -> None:
    """Runs the tool as its command line does."""
    monkeypatch.setattr(sys, "argv", ["densify_checkpoint.py", "--input", str(source), "--output", str(output), *flags])
    densify_checkpoint.main()


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_export_computes_what_the_factored_model_computes(
    family: str, parametrization: str, consolidated_folder: Maker, tmp_path, monkeypatch, capsys
) -> None:
    source, output = consolidated_folder(family, parametrization), tmp_path / "exports" / "dense"
    densify(monkeypatch, source, output)
    summary = capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(output)
    consolidated = ConsolidatedModel(source)
    tokens = comparison_tokens(consolidated)
    tensors = {name: consolidated.read(name) for name in consolidated.names}
    with torch.no_grad():
        expected = reference_logits(consolidated.config, consolidated.ranks, tensors, tokens)
        found = model(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)

    facts = json.loads((output / "espalier.json").read_text())
    assert facts["kind"] == "dense_export"
    assert facts["train"]["step"] == 40
    assert facts["ranks"] == consolidated.ranks
    assert facts["source"] == str(source)
    assert facts["verified"]["relative_difference"] < 1e-5
    assert facts["verified"]["same_greedy_tokens"] == facts["verified"]["tokens"] == tokens.numel()
    assert f"{model.num_parameters():,} dense" in summary
    assert f"from_pretrained('{output}')" in summary
    assert [path.name for path in output.parent.iterdir()] == ["dense"]


def test_tokenizer_and_generation_settings_come_along(consolidated_folder: Maker, tmp_path, monkeypatch) -> None:
    source, output = consolidated_folder("llama"), tmp_path / "dense"
    densify(monkeypatch, source, output)
    ours, theirs = open_tokenizer(source / "tokenizer.model"), AutoTokenizer.from_pretrained(output)
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT)
    assert theirs.model_max_length == 32
    settings = AutoModelForCausalLM.from_pretrained(output).generation_config
    end = ours.end_of_document
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (end, end, end)


@pytest.mark.parametrize("family", FAMILIES)
def test_small_shards_hold_the_same_tensors(family: str, consolidated_folder: Maker, tmp_path, monkeypatch) -> None:
    source = consolidated_folder(family)
    densify(monkeypatch, source, tmp_path / "whole")
    densify(monkeypatch, source, tmp_path / "sharded", "--max-shard-size", "20KB")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert not (tmp_path / "sharded" / "model.safetensors").exists()
    found: dict[str, torch.Tensor] = {}
    for file in files:
        tensors = load_file(tmp_path / "sharded" / file)
        sizes = [tensor.nbytes for tensor in tensors.values()]
        assert sum(sizes) <= 20_000 or len(sizes) == 1
        assert all(index["weight_map"][name] == file for name in tensors)
        found |= tensors
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_exports_are_the_rounded_ones(
    family: str, dtype: str, consolidated_folder: Maker, tmp_path, monkeypatch
) -> None:
    source = consolidated_folder(family)
    densify(monkeypatch, source, tmp_path / "full")
    densify(monkeypatch, source, tmp_path / "half", "--dtype", dtype)
    full = load_file(tmp_path / "full" / "model.safetensors")
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert full.keys() == half.keys()
    assert all(torch.equal(full[name].to(getattr(torch, dtype)), half[name]) for name in full)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == getattr(torch, dtype)
    verified = json.loads((tmp_path / "half" / "espalier.json").read_text())["verified"]
    assert 1e-4 < verified["relative_difference"] < verified["tolerance"] == TOLERANCES[getattr(torch, dtype)]


def _damage(path: Path, name: str) -> None:
    """Overwrites the first number of one tensor in a safetensors file with 30."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    record = json.loads(content[8 : 8 + size])[name]
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[record["dtype"]]
    with path.open("r+b") as file:
        file.seek(8 + size + record["data_offsets"][0])
        file.write(torch.tensor([30.0], dtype=dtype).view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_one_wrong_number_in_the_written_file_is_noticed(
    dtype: torch.dtype, consolidated_folder: Maker, tmp_path
) -> None:
    consolidated = ConsolidatedModel(consolidated_folder("llama"))
    output = tmp_path / "dense"
    output.mkdir()
    write_dense_export(consolidated, output, dtype=dtype, max_shard_bytes=10**9)
    assert compare_with_export(consolidated, output, dtype=dtype).relative_difference < TOLERANCES[dtype]
    _damage(output / "model.safetensors", "model.layers.1.mlp.down_proj.weight")
    with pytest.raises(CheckpointError, match=r"logits differ by up to .* of 64 positions"):
        compare_with_export(consolidated, output, dtype=dtype)


def test_refused_export_leaves_nothing_and_an_earlier_one_as_it_was(
    consolidated_folder: Maker, tmp_path, monkeypatch, capsys
) -> None:
    source, output = consolidated_folder("gpt2"), tmp_path / "dense"
    densify(monkeypatch, source, tmp_path / "earlier")
    before = {path.name: path.read_bytes() for path in (tmp_path / "earlier").iterdir()}

    def write_and_damage(consolidated: ConsolidatedModel, folder: Path, **settings: object) -> None:
        write_dense_export(consolidated, folder, **settings)  # type: ignore[arg-type]
        _damage(folder / "model.safetensors", "transformer.h.0.attn.c_attn.weight")

    monkeypatch.setattr(densify_checkpoint, "write_dense_export", write_and_damage)
    for folder, flags in ((output, ()), (tmp_path / "earlier", ("--overwrite",))):
        with pytest.raises(SystemExit) as ended:
            run_command(partial(densify, monkeypatch, source, folder, *flags))
        assert ended.value.code == 3
        assert "error: the export does not compute what the factored model computes" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier", "merged"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "earlier").iterdir()} == before


def test_numbers_that_do_not_fit_are_refused(consolidated_folder: Maker, tmp_path, monkeypatch) -> None:
    source = consolidated_folder("llama")
    name = "decoder.layers.0.mlp.linear_fc2.B"
    tensors = load_file(source / "model.safetensors")
    tensors[name][0, 0] = 1e7
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj.weight has values up to .*, and float16 ends at 6.55e\+04"):
        densify(monkeypatch, source, tmp_path / "dense", "--dtype", "float16")
    tensors[name][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj\.weight holds NaN"):
        densify(monkeypatch, source, tmp_path / "dense")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_output_folder_is_only_replaced_when_it_is_ours(consolidated_folder: Maker, tmp_path, monkeypatch) -> None:
    source, output = consolidated_folder("llama"), tmp_path / "dense"
    output.mkdir()
    densify(monkeypatch, source, output)  # an empty folder is nobody's
    with pytest.raises(CheckpointError, match="pass --overwrite"):
        densify(monkeypatch, source, output)
    densify(monkeypatch, source, output, "--overwrite", "--dtype", "bfloat16")
    with safe_open(output / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for folder in (foreign, output):
        (folder / "thesis.tex").write_text("irreplaceable")
        with pytest.raises(CheckpointError, match=r"holds thesis\.tex, which is not part of a dense export"):
            densify(monkeypatch, source, folder, "--overwrite")
        assert (folder / "thesis.tex").read_text() == "irreplaceable"
    with pytest.raises(CheckpointError, match="lie inside each other"):
        densify(monkeypatch, source, source, "--overwrite")
    with pytest.raises(CheckpointError, match="lie inside each other"):
        densify(monkeypatch, source, tmp_path, "--overwrite")
    with pytest.raises(CheckpointError, match="is a dense export already: give a consolidated model"):
        densify(monkeypatch, output, tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "foreign", "merged"]


def test_full_disk_is_refused_before_anything_is_written(consolidated_folder: Maker, tmp_path, monkeypatch) -> None:
    source = consolidated_folder("llama")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"needs 0\.00 GB and the disk of .* has 0\.00 GB free"):
        densify(monkeypatch, source, tmp_path / "dense")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_another_tokenizer_than_the_run_had_is_refused(consolidated_folder: Maker, tmp_path, monkeypatch) -> None:
    source = consolidated_folder("llama")
    facts = json.loads((source / "espalier.json").read_text())
    facts["tokenizer"]["fingerprint"] = "0" * 64
    (source / "espalier.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=r"its fingerprint is .* and should be 000000000000"):
        densify(monkeypatch, source, tmp_path / "dense")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]
