"""The settings of a run in TensorBoard's files."""

from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # type: ignore[import-untyped]

from pretrain.monitor.monitor import Monitor
from tests.pretrain.monitor.test_monitor import CONFIG, RANKS, tensorboard


def test_the_table_of_settings_begins_with_those_of_ranks(tmp_path):
    config = CONFIG.model_copy(update={"rank": CONFIG.rank.model_copy(update={"budget": 0.5})})
    Monitor(tmp_path, config, RANKS, active=True).close()
    written = tensorboard(tmp_path).SummaryMetadata("_hparams_/experiment").plugin_data.content
    settings = HParamsPluginData.FromString(written).experiment.hparam_infos
    first = {setting.name for setting in settings if setting.differs}
    assert first == {
        "model.parametrization", "optimizer.learning_rate", "rank.budget", "rank.initial", "rank.policy",
    }  # fmt: skip
    assert len(settings) > len(first)
