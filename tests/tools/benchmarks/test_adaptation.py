"""The adaptation benchmark: what it compares, what it reports, and (slow) a whole small one."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.run import parse_config
from pretrain.errors import ConfigError
from tools.benchmarks import adaptation, adaptation_report
from tools.benchmarks.adaptation import GROWTH, LAST_RANK, Case, all_cases, rank_section, run_settings
from tools.benchmarks.adaptation_report import BEGIN, END, best_of_each_way, table, write_page, write_picture

IMPORTED = {**adaptation.MODEL, "parametrization": "additive", "vocabulary": 1024, "trained": "factors"}


def _record(way: str, method: str, rate: float, loss: float | None, parameters: int, **facts: Any) -> dict[str, Any]:
    common = {"way": way, "method": method, "learning_rate": rate, "validation_loss": loss, "policy": "fixed"}
    return {**common, "trained_parameters": parameters, "rank": 4, **facts}


RECORDS = [
    _record("full", "full", 1e-3, 2.5, 1000, rank=None),
    _record("lora_rank_4", "lora", 1e-3, 3.1, 100),
    _record("lora_rank_4", "lora", 2e-3, 3.0, 100),
    _record("lora_rank_4", "lora", 4e-3, None, 100),
    _record("growing_gradient", "growing", 1e-3, 2.8, 200, policy="gradient", mean_rank=9.5),
    _record("peft_rank_4", "peft", 1e-3, 3.2, 150, validation_loss_before=4.5),
]


@pytest.mark.parametrize("steps", [20, 240])
def test_every_case_is_a_valid_run(steps: int) -> None:
    cases = all_cases()
    assert len({case.name for case in cases}) == len(cases)
    assert {case.policy for case in cases} == {"fixed", *GROWTH}
    for case in cases:
        sections: dict[str, Any] = {"model": IMPORTED}
        if case.rank is not None:
            sections["rank"] = rank_section(case, IMPORTED, steps)
        config = run_settings({"prefix": "p", "tokenizer": "t"}, Path("run"), steps, case.learning_rate, sections)
        assert config.optimizer.learning_rate == case.learning_rate
        assert config.rank.policy == case.policy


def test_budget_is_what_the_last_rank_costs() -> None:
    rank = rank_section(Case("growing", 4, 1e-3, "gradient"), IMPORTED, 240)
    data = {"prefix": "p", "tokenizer": "t"}
    largest = {"policy": "gradient", "initial": LAST_RANK, "quantum": 4, "probe": 8}
    parse_config({"model": IMPORTED, "rank": {**largest, "budget": rank["budget"]}, "data": data})
    with pytest.raises(ConfigError, match=r"rank\.budget"):
        parse_config({"model": IMPORTED, "rank": {**largest, "budget": rank["budget"] * 0.99}, "data": data})


def test_the_best_learning_rate_counts() -> None:
    best = best_of_each_way(RECORDS)
    assert [record["way"] for record in best] == ["lora_rank_4", "peft_rank_4", "growing_gradient", "full"]
    assert (best[0]["validation_loss"], best[0]["at_edge"], best[1]["at_edge"]) == (3.0, False, True)
    lines = list(table(best))
    assert "| fixed rank | 4 | 100 | 0.002 | 3.0000 |" in lines
    assert "| growing rank, gradient | 4 to 9.5 | 200 | 0.001 (end of the grid) | 2.8000 |" in lines


def test_figures_get_their_place_in_a_page(tmp_path: Path) -> None:
    arguments = {"base_steps": 5, "steps": 3, "batch": 16, "model": adaptation.MODEL}
    facts = adaptation_report.facts_of_benchmark(RECORDS, arguments)
    assert facts["not_adapted"] == 4.5
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        write_page(facts, page)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert text.count("| full fine-tuning |") == 1
    assert facts["commit"] in text
    assert f"peft {facts['versions']['peft']}" in text
    write_picture(facts, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    page.write_text("no marks")
    with pytest.raises(ConfigError, match="has no place for the figures"):
        write_page(facts, page)


def test_the_page_of_the_product_has_a_place_for_the_figures() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "adaptation.md").read_text()
    assert text.index(BEGIN) < text.index(END)


@pytest.mark.slow
def test_small_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("ast", "argparse", "calendar", "dis", "enum", "inspect", "string", "typing", "random", "zipfile"):
        (texts / f"{name}.py").write_bytes(Path(__import__(name).__file__ or "").read_bytes())
    monkeypatch.setattr(adaptation, "VALIDATION_SEQUENCES", 16)
    monkeypatch.setattr(adaptation, "RATES", dict.fromkeys(adaptation.RATES, (1e-3,)))
    arguments = [
        "--corpus-from",
        texts,
        "--adapt-to",
        texts,
        "--output",
        tmp_path / "out",
        "--json",
        tmp_path / "j.json",
    ]
    arguments += ["--json", tmp_path / "j.json", "--base-steps", "20", "--steps", "20"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    for _ in range(2):  # the second finds everything there
        adaptation.main()
    facts = json.loads((tmp_path / "j.json").read_text())
    losses = {record["way"]: record["validation_loss"] for record in facts["runs"]}
    assert len(losses) == 8
    assert all(loss < facts["not_adapted"] for loss in losses.values())
    sizes = {record["way"]: record["trained_parameters"] for record in facts["runs"]}
    assert sizes["lora_rank_4"] < sizes["growing_schedule"] == sizes["lora_rank_16"] < sizes["peft_rank_16"]
    assert sizes["growing_gradient"] <= sizes["lora_rank_16"]
