"""Selection of the sites that a method's config names: tower, layers, projections, norms."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from torch import nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.sites.base import AttentionSite, FFNSite, Projection, Sites, base_layer
from mmpeft_ds.sites.find import family_names


@dataclass(frozen=True)
class Selection:
    """Sites of the chosen towers and layers."""

    towers: list[str]
    attention: list[AttentionSite]
    ffn: list[FFNSite]

    def projections(self, targets: Sequence[str]) -> dict[str, list[Projection]]:
        """Projections of each path, in the order q, k, v, out; a fused path has several."""
        of_path: dict[str, list[Projection]] = {}
        for site in self.attention:
            for name in ("q", "k", "v", "out"):
                if name in targets:
                    projection = getattr(site, name)
                    of_path.setdefault(projection.path, []).append(projection)
        return of_path

    def norms(self) -> list[str]:
        """Full paths of the norms of all selected sites, each once."""
        return list(dict.fromkeys(s.norm for s in (*self.attention, *self.ffn) if s.norm))


def select(
    sites: Sites, tower: str | Sequence[str] | None, layers: Sequence[int] | None, cross_only: bool = False
) -> Selection:
    """The sites of one tower, or of several.

    Args:
        tower: its path, or `text` or `image`; None takes the text tower, or the only tower. A list takes every tower
            that one of its entries names: `["text"]` is encoder and decoder of BART.
        layers: indices; None takes all.
        cross_only: of their attention sites, those of cross-attention alone.

    Raises:
        BadInput: no such tower, several that fit a single name, or a layer that none of them has.
    """
    paths = _towers(sites, tower)
    named = ", ".join(map(repr, paths))
    attention = [s for s in sites.attention if s.tower in paths]
    ffn = [s for s in sites.ffn if s.tower in paths]
    if layers is not None:
        have = {s.layer for s in attention}
        if missing := sorted(set(layers) - have):
            raise BadInput(f"layers: {missing} are not in tower {named}, which has layers 0 to {max(have)}.")
        attention = [s for s in attention if s.layer in layers]
        ffn = [s for s in ffn if s.layer in layers]
    if cross_only:
        attention = [s for s in attention if s.cross]
        if not attention:
            raise BadInput(f"condition: encoder states need cross-attention, which tower {named} has not.")
    if not attention:
        raise BadInput(f"layers: {list(layers or [])} leaves no layer of tower {named}.")
    return Selection(paths, attention, ffn)


def default_selection(sites: Sites, layers: Sequence[int] | None = None) -> Selection:
    """The text towers (encoder and decoder, where there are both), or the only tower. For configs of peft's own, which
    cannot name a tower. Raises BadInput as `select`."""
    return select(sites, ["text"] if "text" in sites.towers.values() else None, layers)


def stored_in_by_out(model: nn.Module, paths: Collection[str]) -> bool:
    """Whether the weights at `paths` are stored in x out (Conv1D), which peft calls `fan_in_fan_out`."""
    return any(type(base_layer(model.get_submodule(path))).__name__ == "Conv1D" for path in paths)


def norms_like(model: nn.Module, patterns: Sequence[str], key: str = "train_norms") -> list[str]:
    """Full paths of the norms of `model` that match one of the shell-style `patterns`; `key` names them in errors.

    Raises:
        BadInput: if a pattern matches no norm.
    """
    norms = [path for path, module in _of_the_model(model) if "Norm" in type(base_layer(module)).__name__]
    return _matching(key, "norm", norms, patterns)


def biases_like(model: nn.Module, patterns: Sequence[str] | None, key: str = "train_biases") -> list[str]:
    """Full paths of the Linear, Conv1D and norm modules of `model` that have a bias and match one of `patterns`.

    Args:
        patterns: shell-style patterns of full module paths; None takes all that there are.
        key: the config's name for `patterns`, said in errors.

    Raises:
        BadInput: if a pattern matches no such module.
    """
    idle = never_called(model)
    biased = [path for path, module in _of_the_model(model) if has_bias(base_layer(module)) and path not in idle]
    return biased if patterns is None else _matching(key, "module with a bias", biased, patterns)


def has_bias(module: nn.Module) -> bool:
    """Whether `module` is a Linear, a Conv1D or a norm that adds a bias to its output."""
    adds = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" or "Norm" in type(module).__name__
    return adds and isinstance(getattr(module, "bias", None), nn.Parameter)


def never_called(model: nn.Module) -> list[str]:
    """Paths of the output projections of `nn.MultiheadAttention`, which reads their weights and never calls them.

    What is attached to one trains nothing and changes nothing. peft's layer around the whole attention does work.
    SigLIP's pooling head holds such an attention.
    """
    return [
        f"{path}.out_proj".lstrip(".")
        for path, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and not path.endswith(".base_layer")
    ]


def refuse_never_called(model: nn.Module) -> None:
    """Raise BadInput if `model` holds adapters in modules that are never called; see `never_called`."""
    idle = [path for path in never_called(model) if isinstance(model.get_submodule(path), BaseTunerLayer)]
    if idle:
        names = [".".join(path.split(".")[-3:]) for path in idle]
        raise BadInput(
            f"target_modules: {idle[0]} is inside nn.MultiheadAttention, which never calls it, so an adapter "
            f"there would train nothing. Leave it out: exclude_modules: [{', '.join(names)}]"
        )


def inside(path: str, parents: Collection[str]) -> bool:
    """Whether the module at `path` is one of `parents` or below one."""
    while path and path not in parents:
        path = path.rpartition(".")[0]
    return path in parents


def _of_the_model(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules of the frozen model in order, not those that adapters brought: copies, whole heads, wrapped bases."""
    found, brought = [], ()
    for path, module in model.named_modules():
        if brought and path.startswith(brought):
            continue
        found.append((path, module))
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            brought += (f"{path}.",)
    return found


def no_known_family(key: str) -> BadInput:
    """The error for a model in which no site was found; `key` names the option that chooses towers."""
    return BadInput(
        f"{key}: the model has no layers of a known family. Known: {', '.join(family_names())}. Another family is one "
        "file in mmpeft_ds/sites/families, see docs/extending.md."
    )


def check_whole_modules(names: Collection[str] | None, model: nn.Module, key: str = "modules_to_save") -> None:
    """Refuse names of modules to be trained in full that fit no module; peft itself would train nothing and say
    nothing.

    Args:
        names: ends of module paths, as peft's `modules_to_save`.
        key: what the names are called in errors.

    Raises:
        BadInput: if a name fits no module.
    """
    paths = [path for path, _ in _of_the_model(model) if path]
    for name in names or ():
        if not any(path.endswith(name) for path in paths):
            near = difflib.get_close_matches(name, [p.rpartition(".")[2] for p in paths] + paths, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise BadInput(f"{key}: no module of the model is named {name!r}.{hint} Name a module, or leave it out.")


def check_tokens(config: PeftConfig, model: nn.Module, key: Callable[[str], str]) -> None:
    """Refuse tokens to be trained that are no row of their embedding, with which peft ends in a traceback.

    Args:
        config: of any method; those of peft name tokens in two ways.
        key: option -> what it is called in errors.

    Raises:
        BadInput: naming the token.
    """
    for option in {"trainable_token_indices", "token_indices"} & vars(config).keys():
        given = getattr(config, option)
        if not given:
            continue
        names = getattr(config, "target_modules", None) if option == "token_indices" else None
        for name, tokens in given.items() if isinstance(given, dict) else {"": given}.items():
            ends = [name] if name else [names] if isinstance(names, str) else names or []
            default = None if ends else _embedding(model)
            for path, module in model.named_modules():
                meant = any(path.endswith(end) for end in ends) if ends else module is default
                rows = getattr(module, "num_embeddings", None) if meant else None
                if rows is not None and (wrong := [token for token in tokens if not 0 <= token < rows]):
                    raise BadInput(
                        f"{key(option)}: {wrong[0]} is no token of {path}, which has 0 to {rows - 1}. Leave it out."
                    )


def _embedding(model: nn.Module) -> nn.Module | None:
    """Of the tokens; None for a model with several towers, such as a stock CLIP, which peft refuses itself."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def check_named(config: PeftConfig, model: PeftModel, key: Callable[[str], str]) -> None:
    """Refuse names of peft's options that fit nothing beside others that fit; peft leaves them aside without a word.

    Args:
        model: with the adapter attached.
        key: option -> what it is called in errors.

    Raises:
        BadInput: naming the first of them.
    """
    every = [path for path, _ in _of_the_model(model.get_base_model()) if path]
    adapted = [path for path, module in model.get_base_model().named_modules() if isinstance(module, BaseTunerLayer)]
    layers = vars(config).get("layers_to_transform")
    names: dict[str, tuple[Iterable[str], list[str], Callable[[str, str], bool]]] = {
        "target_modules": (_listed(config, "target_modules"), every, _ends),
        "exclude_modules": (_listed(config, "exclude_modules"), every, _ends),
        "rank_pattern": (vars(config).get("rank_pattern") or (), adapted, _fits),
        "alpha_pattern": (vars(config).get("alpha_pattern") or (), adapted, _fits),
        "layers_to_transform": (map(str, layers) if isinstance(layers, list) else (), adapted, _numbered),
    }
    for option, (given, paths, meant) in names.items():
        for name in given:
            if not any(meant(name, path) for path in paths):
                problem = "fits no module" if paths is every else "fits no adapted layer"
                near = difflib.get_close_matches(name, [path.rpartition(".")[2] for path in every], n=1)
                hint = f" Did you mean {near[0]!r}?" if near else f" They are named like {', '.join(adapted[:3])}."
                raise BadInput(f"{key(option)}: {name!r} {problem}.{hint} Mend it, or leave it out.")


def _listed(config: PeftConfig, option: str) -> Collection[str]:
    given = vars(config).get(option) or ()
    return () if isinstance(given, str) else sorted(given)


def _ends(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _fits(pattern: str, path: str) -> bool:
    return get_pattern_key([pattern], path) == pattern


def _numbered(number: str, path: str) -> bool:
    return number in path.split(".")


def _matching(key: str, what: str, paths: list[str], patterns: Sequence[str]) -> list[str]:
    if not patterns:
        raise BadInput(f"{key}: the list is empty. Name at least one pattern, or leave it out.")
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise BadInput(f"{key}: {pattern!r} matches no {what}. They are named like {', '.join(paths[:3])}.")
    return [path for path in paths if any(fnmatchcase(path, p) for p in patterns)]


def _towers(sites: Sites, wanted: str | Sequence[str] | None) -> list[str]:
    towers = sites.towers
    if not towers:
        raise no_known_family("tower")
    if wanted is not None and not isinstance(wanted, str):
        if not wanted:
            raise BadInput(f"tower: the list is empty. Known: {_known(towers)}.")
        chosen = {path for name in wanted for path in _fitting(towers, name)}
        return [path for path in towers if path in chosen]
    if wanted is None:
        fitting = [path for path, kind in towers.items() if kind == "text"] or list(towers)
        if sites.unread and "text" not in towers.values():
            tower, layer = next(iter(sites.unread.items()))
            raise BadInput(
                f"tower: the layers of text tower {tower!r} ({layer}) have no separate projections of queries, keys "
                "and values, so adapters find no place there by themselves. Use method lora with target_modules, or "
                f"name one of {_known(towers)}."
            )
    else:
        fitting = _fitting(towers, wanted)
    if len(fitting) > 1:
        raise BadInput(f"tower: several towers fit. Name one of {_known(towers)}, or give a list of those you mean.")
    return fitting


def _fitting(towers: dict[str, str], wanted: str) -> list[str]:
    """The tower of that path, or all of that modality."""
    fitting = [wanted] if wanted in towers else [path for path, kind in towers.items() if kind == wanted]
    if not fitting:
        raise BadInput(f"tower: no tower {wanted!r}. Known: {_known(towers)}.")
    return fitting


def _known(towers: dict[str, str]) -> str:
    return ", ".join(f"{path!r} ({kind})" for path, kind in towers.items())
