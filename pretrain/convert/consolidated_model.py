"""The training model from a consolidated folder, for tools that compare with it or run it without a launcher.

with single_process():
    model = load_model(ConsolidatedModel(folder)).eval()
"""

import torch

from model.gpt import EspalierModel, build_model
from model.process_groups import device
from pretrain.convert.consolidated import ConsolidatedModel
from pretrain.errors import CheckpointError


@torch.no_grad()
def load_model(consolidated: ConsolidatedModel) -> EspalierModel:
    """The whole model in fp32 on this process; process groups of one process must be there (`single_process`).

    Raises `CheckpointError` when the folder's tensors are not exactly those of its own settings.
    """
    model = build_model(consolidated.config, consolidated.ranks, seed=0)
    parameters = dict(model.named_parameters())
    odd = sorted(parameters.keys() ^ set(consolidated.names))
    if odd:
        verb = "lacks" if odd[0] in parameters else "holds a superfluous"
        raise CheckpointError(f"the consolidated model {verb} {odd[0]} ({len(odd)} such names): consolidate it again")
    for name, parameter in parameters.items():
        tensor = consolidated.read(name)
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"{name} is {tuple(tensor.shape)} in the consolidated model and its settings ask for "
                f"{tuple(parameter.shape)}: consolidate it again"
            )
        parameter.copy_(tensor)
    return model.to(device())
