"""DeepSpeed's dictionary: what the run fills in, what a file may contain, and what is refused."""

import json
from pathlib import Path

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from pretrain.config.run import RunConfig, dump_config, load_config, parse_config
from pretrain.engine.deepspeed_config import _TAKEN_INSIDE, deepspeed_dict, with_deepspeed_file
from pretrain.errors import ConfigError


def configured(precision: str = "fp32", stage: int = 1, file: object = None, offload: bool = False) -> RunConfig:
    return parse_config(
        {
            "data": {"prefix": "corpus", "tokenizer": "tokenizer.model"},
            "train": {"micro_batch": 4, "global_batch": 32, "precision": precision, "clip": 0.5},
            "deepspeed": {
                "stage": stage,
                "offload_optimizer": offload,
                "config": str(file) if isinstance(file, Path) else file,
            },
        }
    )


def resolved(config: RunConfig) -> dict:
    return deepspeed_dict(config, config.parallel_layout(2))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_keys_follow_from_the_run(stage):
    found = resolved(configured(stage=stage))
    assert found["train_micro_batch_size_per_gpu"] == 4
    assert found["gradient_accumulation_steps"] == 4
    assert found["train_batch_size"] == 32
    assert found["gradient_clipping"] == 0.5
    assert found["zero_optimization"]["stage"] == stage
    assert found["bf16"] == {"enabled": False}
    assert found["fp16"] == {"enabled": False}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_follows_from_the_run(precision):
    found = resolved(configured(precision))
    assert {name: found[name]["enabled"] for name in ("bf16", "fp16")} == {
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
    }


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_installed_files_go_by_their_name_and_suit_every_precision(stage, precision):
    found = resolved(configured(precision, stage, f"zero{stage}"))
    assert found["zero_optimization"]["stage"] == stage
    assert found["zero_optimization"]["reduce_bucket_size"] == 200_000_000
    assert found["train_batch_size"] == 32
    assert "auto" not in json.dumps(found)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("installed", [True, False])
def test_deepspeed_takes_what_we_write(stage, precision, installed):
    config = configured(precision, stage, f"zero{stage}" if installed else None)
    taken = DeepSpeedConfig(deepspeed_dict(config, config.parallel_layout(1)))
    assert taken.zero_optimization_stage == stage
    assert taken.train_batch_size == 32
    assert taken.gradient_accumulation_steps == 8
    assert taken.float16_config.enabled == (precision == "fp16")
    assert taken.bfloat16_config.enabled == (precision == "bf16")


def test_what_the_file_says_is_kept(tmp_path):
    file = tmp_path / "mine.json"
    given = {
        "train_batch_size": 32,
        "gradient_clipping": "auto",
        "wall_clock_breakdown": True,
        "communication_data_type": "fp32",
        "tensorboard": {"enabled": False},
        "zero_optimization": {"stage": 1, "overlap_comm": True, "offload_optimizer": {"device": "none"}},
        "fp16": {"enabled": True, "initial_scale_power": 8},
    }
    file.write_text(json.dumps(given))
    found = resolved(configured("fp16", 1, file))
    assert found["wall_clock_breakdown"] is True
    assert found["communication_data_type"] == "fp32"
    assert found["zero_optimization"]["overlap_comm"] is True
    assert found["fp16"] == {"enabled": True, "initial_scale_power": 8}
    assert found["gradient_clipping"] == 0.5
    assert json.loads(file.read_text()) == given


def test_a_run_keeps_what_its_file_said(tmp_path):
    """The config that a run writes holds the file's content, so the file is not needed again; keys of unused accounts
    are left out."""
    file = tmp_path / "mine.json"
    zero = {"stage": 1, "overlap_comm": True, "reduce_bucket_size": 1000, "zenflow": None}
    given = {"zero_optimization": zero, "wandb": {"enabled": False, "api_key": "secret"}, "steps_per_print": 5}
    file.write_text(json.dumps(given))
    config = configured(file=file)
    expected = resolved(config)
    kept = with_deepspeed_file(config, config.parallel_layout(2))
    file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 7}}))
    (tmp_path / "run.yaml").write_text(dump_config(kept))
    assert "secret" not in dump_config(kept)
    again = load_config(str(tmp_path / "run.yaml"))
    assert resolved(kept) == resolved(again) == expected
    assert with_deepspeed_file(again, again.parallel_layout(2)) == kept
    resolved(kept)["zero_optimization"]["reduce_bucket_size"] = 8
    assert resolved(kept) == expected


def test_settings_in_the_place_of_a_file_are_checked_alike():
    with pytest.raises(ConfigError, match=r"train_batch_size is 64 in deepspeed\.config, and 32 follows"):
        resolved(configured(file={"train_batch_size": 64}))
    with pytest.raises(
        ConfigError, match=r"^deepspeed\.config is 5: name a DeepSpeed JSON file, or write what it says$"
    ):
        configured(file=5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"train_batch_size": 64},
            "train_batch_size is 64 in mine.json, and 32 follows from train.global_batch = train.micro_batch 4 x "
            "accumulation 4 x 2 data-parallel processes",
        ),
        ({"train_micro_batch_size_per_gpu": 8}, "is 8 in mine.json, and 4 follows from train.micro_batch"),
        ({"gradient_accumulation_steps": 1}, "is 1 in mine.json, and 4 follows from train.global_batch 32"),
        ({"gradient_clipping": 1.0}, "is 1.0 in mine.json, and 0.5 follows from train.clip"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is 2 in mine.json, and 1 follows"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3 in mine.json, and 1 follows"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True in mine.json, and False follows from train"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is False in mine.json, and True follows from"),
        ({"bf16": {"check_grad_overflow": False}}, "poison the weights"),
        ({"bf16": {"immediate_grad_update": True}}, "bf16.immediate_grad_update"),
        ({"bf16": True}, "bf16 in mine.json is True: write an object"),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, "data_types.grad_accum_dtype fp32"),
        ({"optimizer": {"type": "Muon"}}, "optimizer in mine.json is not supported: the run builds AdamW itself"),
        ({"scheduler": {"type": "WarmupLR"}}, "use the schedule section"),
        ({"tensor_parallel": {"autotp_size": 2}}, "set parallel.tensor"),
        ({"tensorboard": {"enabled": True}}, "tensorboard in mine.json is not supported"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer is on in mine.json, and deepspeed.offload_optimizer is false",
        ),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "masters and moments can be offloaded to"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "zero_optimization.offload_param"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow"),
        ({"zero_optimization": {"round_robin_gradients": True}}, "zero_optimization.round_robin_gradients"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, "not tested together with growing ranks"),
        (
            {"zero_optimization": {"compute_grad_norm": False}},
            "compute_grad_norm in mine.json is not supported: the run clips by the gradient's norm",
        ),
        ({"zero_optimization": {"override_module_apply": False}}, "not tested together with growing ranks"),
        ({"zero_optimization": {"load_from_fp32_weights": None}}, "zero_optimization.load_from_fp32_weights"),
        ({"compression_training": {"x": 1}}, "compression_training in mine.json is not supported"),
        ({"gradient_allreduce_op": "sum"}, "gradients are averaged"),
    ],
)
def test_conflicts_and_what_cannot_grow_are_refused_by_name(tmp_path, given, words):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(given))
    with pytest.raises(ConfigError) as refused:
        resolved(configured("bf16", 1, file))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"train_batch_size": 32, "train_batch_size": 64}', "the key 'train_batch_size' occurs twice"),
        ("{", "is not valid JSON"),
        ("[]", "is not a JSON object but a list"),
        ('{"fp16": {"loss_scale": NaN}}', "NaN is not a number"),
        ('{"fp16": {"loss_scale": 1e999}}', "1e999 is too large for a number"),
    ],
)
def test_files_that_are_no_objects_are_refused(tmp_path, text, words):
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        resolved(configured(file=file))
    assert words in str(refused.value)


def test_a_file_that_is_not_there_is_refused_with_what_is():
    with pytest.raises(ConfigError, match=r"no config zero9: .*zero1, zero2"):
        resolved(configured(file="zero9"))


def test_what_deepspeed_does_by_default_is_known(tmp_path):
    """Each switch of DeepSpeed that is on by default is one that a file may set, or one that it may not switch off."""
    file = tmp_path / "mine.json"
    sections = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
    }
    for section, model in sections.items():
        for name, field in model.model_fields.items():
            setting = field.alias or name
            if field.default is True and setting not in _TAKEN_INSIDE[section]:
                file.write_text(json.dumps({section: {setting: True}}))
                resolved(configured("bf16", file=file))
                file.write_text(json.dumps({section: {setting: False}}))
                with pytest.raises(ConfigError, match=f"{section}.{setting} in mine.json is not supported"):
                    resolved(configured("bf16", file=file))


def test_the_file_says_how_to_offload_and_the_run_whether(tmp_path):
    assert resolved(configured(offload=True))["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}}))
    found = resolved(configured(stage=3, file=file, offload=True))
    assert found["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert found["zero_force_ds_cpu_optimizer"] is False
    file.write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "none"}}}))
    with pytest.raises(ConfigError, match=r"switched off in mine\.json, and deepspeed\.offload_optimizer is true"):
        resolved(configured(stage=3, file=file, offload=True))
