"""Tensors that layers of peft's own bring besides what trains, such as VeRA's random projections."""

from __future__ import annotations

from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mmpeft_ds.methods.common.layers import SiteLayer, kept_buffers
from mmpeft_ds.methods.common.select import inside

_BASE = "base_model.model"  # of the frozen model in a PeftModel; the tuner around it may hold tensors as well


def brought(model: nn.Module) -> dict[str, Tensor]:
    """Buffers of peft's layers and tuner by their names, each once; of the frozen model there are none among them.

    Methods of this package say by themselves which buffers they keep (`KeepsBuffers`, `Calibrated`).
    """
    if not isinstance(model, PeftModel):
        return {}
    layers, bases = set(), set()
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            # a trained token keeps a copy of the frozen one
            (bases if isinstance(module, SiteLayer | TrainableTokensLayer) else layers).add(path)
            bases.add(f"{path}.base_layer")
    found, kept = {}, kept_buffers(model)  # the latter travel with checkpoints, and need not be made again
    for name, buffer in model.named_buffers():
        path = name.rpartition(".")[0]
        if name in kept:
            continue
        if not path.startswith(_BASE) or (inside(path, layers) and not inside(path, bases)):
            found[name] = buffer
    return found


def shared_names(model: nn.Module) -> set[str]:
    """Names of parameters that `model` has under several names, of which a file needs one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for several in names.values() if len(several) > 1 for name in several}


def file_tensors(model: PeftModel, trained: dict[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """Name in an adapter file -> its name in `model`, and the tensor: those of `trained`, and what peft adds.

    A parameter that several layers share is in the file under each name that peft gives it.

    Args:
        trained: by the first name of each parameter, such as `named_parameters` gives it.
    """
    values = {id(p): trained[name] for name, p in model.named_parameters() if name in trained}
    own = {id(buffer) for buffer in brought(model).values()}
    # a view for each name, so that names of one tensor can be told apart
    state = {
        name: values.get(id(tensor), tensor).detach().view_as(values.get(id(tensor), tensor))
        for name, tensor in model.state_dict(keep_vars=True).items()
        if id(tensor) in values or id(tensor) in own
    }
    names = {id(tensor): name for name, tensor in state.items()}
    written = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    return {file_name: (names.get(id(tensor), file_name), tensor) for file_name, tensor in written.items()}
