"""Find the sites of any model made of known layers: stock, composed, already wrapped, partitioned or on meta."""

from __future__ import annotations

from functools import cache

from torch import nn

from mmpeft_ds import registry
from mmpeft_ds.sites import families
from mmpeft_ds.sites.base import Block, Family, Sites
from mmpeft_ds.sites.common import structure


def find_sites(model: nn.Module) -> Sites:
    """All sites of `model` in module order, with full paths below `model`. Empty if it has no layer that can be read.

    A layer is read as the family that names its class says, or else by its structure.
    """
    sites_of_model = Sites()
    modules = dict(model.named_modules())
    for path, module in modules.items():
        reader = next((f for f in _families() if _named(module, f.layers)), None)
        if reader is not None:
            tower, modality = _tower(path, modules, reader)
            read = reader.layers[_named(module, reader.layers)]
        elif path.rpartition(".")[2].isdigit() and structure.is_layer(module):
            tower, modality = structure.tower(path, modules)
            read = structure.read
        else:
            if path.rpartition(".")[2].isdigit() and structure.has_attention(module):
                tower, modality = structure.tower(path, modules)
                if modality == "text":
                    sites_of_model.unread.setdefault(tower, type(module).__name__)
            continue
        sites = read(Block(path, module, tower, modality, _index(path)))
        sites_of_model.attention.extend(sites.attention)
        sites_of_model.ffn.extend(sites.ffn)
        sites_of_model.features.extend(sites.features)
    for tower in sites_of_model.towers:
        sites_of_model.unread.pop(tower, None)
    return sites_of_model


def family_names() -> list[str]:
    """Names of the families of transformers models that adapters attach to, sorted."""
    return [name for name in registry.names(families) if name != "feature_model"]


@cache
def _families() -> tuple[Family, ...]:
    return tuple(registry.load(families, name, "sites") for name in registry.names(families))


def _named(module: nn.Module, table: dict) -> str | None:
    # A wrapper may subclass the layer (FSDP2 does), so the names of base classes count as well.
    return next((c.__name__ for c in type(module).__mro__ if c.__name__ in table), None)


def _tower(path: str, modules: dict[str, nn.Module], family: Family) -> tuple[str, str]:
    """Path and modality of the innermost tower around `path`."""
    parent = path
    while parent:
        parent = parent.rpartition(".")[0]
        name = _named(modules[parent], family.towers)
        if name is not None:
            return parent, family.towers[name]
    # A bare stack of layers: the first modality the family knows.
    return path.rpartition(".")[0].rpartition(".")[0], next(iter(family.towers.values()))


def _index(path: str) -> int:
    last = path.rpartition(".")[2]
    return int(last) if last.isdigit() else 0
