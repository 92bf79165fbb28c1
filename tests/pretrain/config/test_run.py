"""Configs: which of two settings wins, and that every mistake is one clear sentence."""

from pathlib import Path

import pytest

from pretrain.config.parallel import ParallelLayout
from pretrain.config.run import RunConfig, check_same_architecture, dump_config, load_config, parse_config
from pretrain.errors import ConfigError

DATA = "data: {prefix: corpus, tokenizer: tokenizer.model}\n"


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def configured(**sections: object) -> RunConfig:
    return parse_config({"data": {"prefix": "corpus", "tokenizer": "tokenizer.model"}, **sections})


# Files and overrides --------------------------------------------------------------------------------------------------


def test_defaults_are_a_valid_run(tmp_path):
    config = load_config(write(tmp_path, "run.yaml", DATA))
    assert config.run.folder == "runs/default"
    assert config.deepspeed.stage == 1
    assert config.parallel_layout(1) == ParallelLayout(tensor=1, data=1, accumulation=4)
    assert set(config.initial_ranks().values()) == {64}


def test_file_wins_over_its_base_and_overrides_win_over_both(tmp_path):
    write(tmp_path, "root.yaml", DATA + "train: {steps: 10, clip: 0.5, log_every: 3}\n")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", "middle.yaml", "extends: ../root.yaml\ntrain: {steps: 20, clip: 0.6}\n")
    leaf = write(tmp_path, "leaf.yaml", "extends: sub/middle.yaml\ntrain: {steps: 30}\n")
    config = load_config(leaf, ["train.steps=40", "train.steps=50"])
    assert (config.train.steps, config.train.clip, config.train.log_every) == (50, 0.6, 3)


def test_lists_are_replaced_and_none_takes_away(tmp_path):
    path = write(
        tmp_path,
        "run.yaml",
        DATA + "rank: {policy: schedule, initial: 16, schedule: [{step: 1, rank: 32}, {step: 2, rank: 48}]}\n"
        "train: {batch_ramp: {start: 8, increment: 8, steps: 10}}\n",
    )
    config = load_config(path, ["rank.schedule=[{step: 5, rank: 32}]", "train.batch_ramp=null"])
    assert [(event.step, event.rank) for event in config.rank.schedule] == [(5, 32)]
    assert config.train.batch_ramp is None


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("2", 2.0), (".5", 0.5), ("1.5E-2", 0.015), ("6.0e-4", 6e-4)]
)
def test_numbers_may_be_written_as_people_write_them(tmp_path, text, value):
    config = load_config(write(tmp_path, "run.yaml", DATA), [f"optimizer.learning_rate={text}"])
    assert config.optimizer.learning_rate == value


@pytest.mark.parametrize("name", ["2024_01", "on", "12:30", "2024-01-01"])
def test_names_that_look_like_something_else_stay_names(tmp_path, name):
    assert load_config(write(tmp_path, "run.yaml", DATA), [f"run.folder={name}"]).run.folder == name


def test_installed_configs_go_by_their_name():
    assert load_config("quickstart").run.folder == "runs/quickstart"


def test_a_dumped_config_reads_back_the_same(tmp_path):
    config = configured(
        rank={"policy": "schedule", "initial": 16, "schedule": [{"step": 3, "rank": 32}]},
        train={"batch_ramp": {"start": 8, "increment": 8, "steps": 9}},
    )
    assert load_config(write(tmp_path, "again.yaml", dump_config(config))) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {steps: 1, steps: 2}", "key 'steps' appears twice"),
        ("train: !!python/object:os.system {}", "tags and aliases are not allowed"),
        ("train: &a {steps: 1}\nrank: *a", "tags and aliases are not allowed"),
        ("train: {steps: 1", "not valid YAML"),
        ("- 1\n- 2", "holds a list where sections"),
        ("extends: missing.yaml", "missing.yaml, which does not exist"),
        ("extends: run.yaml", "extends itself (run.yaml -> run.yaml)"),
        ("extends: [a, b]", "give one file name"),
        ("# " + 300_000 * "x", "has 300002 bytes"),
    ],
)
def test_files_that_are_no_configs_are_refused(tmp_path, text, words):
    path = write(tmp_path, "run.yaml", text)
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_extending_in_a_circle_is_refused(tmp_path):
    write(tmp_path, "a.yaml", "extends: b.yaml")
    path = write(tmp_path, "b.yaml", "extends: a.yaml")
    with pytest.raises(ConfigError, match=r"b\.yaml -> a\.yaml -> b\.yaml"):
        load_config(path)


@pytest.mark.parametrize("name", ["nothing", "no/such/file.yaml"])
def test_a_config_that_is_not_there_is_refused_with_what_is(name):
    with pytest.raises(ConfigError, match=f"there is no config {name}: .*quickstart"):
        load_config(name)


# Mistakes in settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stpes=5", "there is no setting train.stpes: did you mean train.steps?"),
        ("trian.steps=5", "there is no setting trian: did you mean train?"),
        ("rank.events=[{step: 5, rank: 32}]", "rank.events is called rank.schedule now: write that"),
        ("train.seed=5", "there is no setting train.seed: did you mean run.seed?"),
        ("train.batch_ramp={start: 8, increments: 8, steps: 5}", "did you mean train.batch_ramp.increment?"),
        ("rank.schedule=[{step: 1, ranks: 2}]", "no setting rank.schedule.0.ranks: did you mean rank.schedule.rank?"),
        ("rank.schedule=[{step: 1}]", "rank.schedule.0.rank is missing: set it"),
        ("train=5", "'train=5' is not an override: write section.key=value"),
        ("train.steps", "is not an override"),
        ("train..steps=1", "is not an override"),
        ("rank={", "is not an override"),
        ("rank.schedule=[", "the value in 'rank.schedule=[' is not valid YAML"),
        ("train.steps=many", "train.steps is 'many': input should be a valid integer"),
        ("train.steps=0", "train.steps is 0: input should be greater than or equal to 1"),
        ("train.steps=1.5", "train.steps is 1.5: input should be a valid integer"),
        ("train.precision=fp8", "train.precision is 'fp8': input should be 'fp32', 'bf16' or 'fp16'"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate is 'nan': input should be a finite number"),
        ("model.heads=3", "hidden 256 is not divisible by 3 heads"),
        ("deepspeed.stage=4", "deepspeed.stage is 4: set it to 0, 1, 2 or 3"),
        ("schedule.warmup_steps=1000", "schedule.warmup_steps 1000 leaves nothing of train.steps 1000"),
        ("rank.initial=129", "rank.initial 129 is above the break-even rank 128"),
        ("model.parametrization=sparse", "model.parametrization is 'sparse'"),
        ("model.trained=factors", "this one is factored: set model.parametrization=additive, or leave model.trained"),
    ],
)
def test_mistakes_in_settings_are_one_sentence_with_path_and_value(tmp_path, override, words):
    path = write(tmp_path, "run.yaml", DATA)
    with pytest.raises(ConfigError) as refused:
        load_config(path, [override])
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_section_that_is_a_number_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"train is 5, and it is a section: write train\.key=value"):
        load_config(write(tmp_path, "run.yaml", DATA + "train: 5\n"))


def test_a_missing_setting_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.tokenizer is missing: set it"):
        load_config(write(tmp_path, "run.yaml", "data: {prefix: corpus}\n"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_stage_0_in_16_bits_is_refused_and_the_rest_of_the_matrix_is_not(precision):
    with pytest.raises(ConfigError, match=r"stage 0 trains in fp32 only.* set deepspeed\.stage=1"):
        configured(deepspeed={"stage": 0}, train={"precision": precision})
    configured(deepspeed={"stage": 0}, train={"precision": "fp32"})
    for stage in (1, 2, 3):
        assert configured(deepspeed={"stage": stage}, train={"precision": precision}).deepspeed.stage == stage


def test_offload_without_zero_is_refused():
    with pytest.raises(
        ConfigError, match=r"offload_optimizer is true, and without ZeRO .* set deepspeed\.stage to 1, 2"
    ):
        configured(deepspeed={"stage": 0, "offload_optimizer": True})


@pytest.mark.parametrize(
    "model", [{"parametrization": "dense"}, {"parametrization": "additive"}, {"factored_layers": "mlp"}]
)
def test_only_wholly_factored_models_keep_bottlenecks_alone(model):
    assert configured(model=model, train={"recompute": "layers"}).train.recompute == "layers"
    with pytest.raises(ConfigError, match=r"^train\.recompute factors keeps .* set train\.recompute=layers$"):
        configured(model=model, train={"recompute": "factors"})


def test_layers_that_no_graph_holds_are_not_compiled():
    assert configured(train={"compile": True}).train.compile
    for sections, setting in (
        ({"model": {"parametrization": "dense"}}, "model.parametrization=factored"),
        ({"deepspeed": {"stage": 3}}, "deepspeed.stage 0, 1 or 2"),
        ({"parallel": {"tensor": 2}}, "parallel.tensor=1"),
        ({"model": {"hidden_dropout": 0.1}}, "model.hidden_dropout=0"),
    ):
        with pytest.raises(ConfigError, match=rf"^train\.compile needs {setting}.*or leave train\.compile out$"):
            configured(train={"compile": True}, **sections)


# Layout ---------------------------------------------------------------------------------------------------------------


def test_layout_counts_micro_steps():
    config = configured(parallel={"tensor": 2}, train={"micro_batch": 4, "global_batch": 96})
    assert config.parallel_layout(8) == ParallelLayout(tensor=2, data=4, accumulation=6)


@pytest.mark.parametrize(
    ("sections", "processes", "words"),
    [
        ({"parallel": {"tensor": 2}}, 3, "3 processes do not divide into groups of parallel.tensor 2"),
        ({"parallel": {"tensor": 8}}, 8, "parallel.tensor 8 does not divide model.heads, 4"),
        (
            {"parallel": {"tensor": 4}, "model": {"heads": 4, "ffn": 258}},
            4,
            "parallel.tensor 4 does not divide model.ffn, 258",
        ),
        (
            {"parallel": {"tensor": 4}, "model": {"heads": 12, "hidden": 384, "query_groups": 6}},
            4,
            "6 query groups and parallel.tensor 4 do not divide one another",
        ),
        (
            {"parallel": {"tensor": 4}, "model": {"vocabulary": 9, "vocabulary_multiple": 2}},
            4,
            "does not divide the padded vocabulary (model.vocabulary_multiple 2), 10",
        ),
        (
            {"train": {"micro_batch": 8, "global_batch": 100}},
            4,
            "train.global_batch 100 is not a whole number of micro-steps: micro_batch 8 x 4 data-parallel processes = "
            "32 sequences each; set train.global_batch to 96 or 128",
        ),
        ({"train": {"micro_batch": 8, "global_batch": 4}}, 1, "set train.global_batch to 8, or"),
        (
            {"train": {"micro_batch": 8, "global_batch": 64, "batch_ramp": {"start": 24, "increment": 8, "steps": 90}}},
            2,
            "train.batch_ramp.start 24 is not a whole number",
        ),
        (
            {"train": {"micro_batch": 8, "global_batch": 64, "batch_ramp": {"start": 16, "increment": 8, "steps": 90}}},
            2,
            "train.batch_ramp.increment 8 is not a whole number",
        ),
    ],
)
def test_layouts_that_do_not_come_out_even_show_the_arithmetic(sections, processes, words):
    with pytest.raises(ConfigError) as refused:
        configured(**sections).parallel_layout(processes)
    assert words in str(refused.value)


def test_fewer_query_groups_than_processes_are_fine():
    config = configured(parallel={"tensor": 4}, model={"heads": 4, "query_groups": 2})
    assert config.parallel_layout(4).data == 1


# Tokenizer and checkpoint ---------------------------------------------------------------------------------------------


def test_vocabulary_comes_from_the_tokenizer_and_must_not_contradict():
    config = configured().with_vocabulary(1000)
    assert config.model.vocabulary == 1000
    assert config.with_vocabulary(1000) == config
    assert config.with_vocabulary(990) == config  # more rows than ids are allowed
    with pytest.raises(ConfigError, match=r"model\.vocabulary is 1000, and the tokenizer .* has 1001 tokens"):
        config.with_vocabulary(1001)


def test_a_checkpoint_of_another_architecture_is_refused():
    saved = configured(model={"layers": 4, "hidden": 256}).with_vocabulary(500).model.model_dump()
    check_same_architecture(saved, configured(model={"hidden_dropout": 0.1}).with_vocabulary(500))
    check_same_architecture(saved, configured())
    with pytest.raises(ConfigError) as refused:
        check_same_architecture(saved, configured(model={"layers": 5, "hidden": 512}).with_vocabulary(500))
    assert "model.hidden is 256 there and 512 here, model.layers is 4 there and 5 here" in str(refused.value)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_width_may_be_written_out_or_left_to_its_default(family):
    left = {"family": family, "hidden": 128}
    written = left | {"query_groups": 4, "ffn": configured(model=left).model.ffn_width}
    for saved, own in (written, left), (left, written):
        check_same_architecture(configured(model=saved).model.model_dump(), configured(model=own))
    with pytest.raises(ConfigError, match=rf"model\.ffn is {written['ffn']} there and 192 here"):
        check_same_architecture(configured(model=left).model.model_dump(), configured(model=left | {"ffn": 192}))


def test_a_dense_model_has_no_ranks():
    assert configured(model={"parametrization": "dense"}).initial_ranks() == {}


def test_every_setting_is_described():
    for name, section in RunConfig.model_fields.items():
        assert section.annotation is not None
        fields = section.annotation.model_fields
        undescribed = [f"{name}.{key}" for key, field in fields.items() if not field.description]
        assert name == "model" or not undescribed
