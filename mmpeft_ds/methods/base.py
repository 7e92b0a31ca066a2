"""The contract of a method: its options, its peft config and tuner, its checks on sites, and hooks of the engine.

A method is a folder `methods/NAME/` with its options in `options.py` and its `ENTRY`, a subclass of `SiteMethod`, in
`method.py`. Every hook has a documented default here.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from mmpeft_ds.errors import BadInput
from mmpeft_ds.recipe.parse import choices, hints, type_name, typed, validated

if TYPE_CHECKING:  # options are read without torch and peft
    from peft import PeftConfig, PeftModel
    from torch import Tensor, nn

    from mmpeft_ds.recipe.parse import Origin
    from mmpeft_ds.sites import Sites

KINDS = ("peft", "norm", "bias", "head")
_EMBEDDINGS = (".lora_embedding_", ".trainable_tokens_")  # of peft


class MethodOptions:
    """Base of a method's options, which are what the recipe's `method` section may set.

    A subclass is a dataclass of plain values, each with a `help` text in its metadata, named after the method:
    `RoutedLoraOptions` for `RoutedLoraConfig`. Its `__post_init__` calls `super().__post_init__()`, which checks the
    types, and refuses with BadInput the values that cannot work.

    Attributes:
        scores_features: the method is a head on the features of a frozen model, not a change inside it.
    """

    scores_features: ClassVar[bool] = False

    @property
    def couples_samples(self) -> bool:
        """Whether what the model says of a sample depends on others of its batch. Default: no."""
        return False

    @property
    def gradient_free(self) -> bool:
        """Whether nothing is trained by gradient: zero-shot, closed form, or a cache as it is. Default: no."""
        return False

    @property
    def needs_validation(self) -> bool:
        """Whether something is searched on a validation split; a recipe without one is refused. Default: no."""
        return False

    @property
    def reads_captions(self) -> bool:
        """Whether a head reads the texts of samples, which the task then has to bring. Default: no."""
        return False

    def check_training(self, dtype: str, stage: int) -> None:  # noqa: B027 (an empty default is meant)
        """Refuse options with which a run would not end in an adapter that loads. Default: none.

        Called before a run, and not when an adapter is loaded, so that those of earlier versions stay readable.

        Args:
            dtype: of the frozen model, as `engine.dtype`.
            stage: ZeRO stage.

        Raises:
            BadInput: in one line, beginning with the option.
        """

    def __post_init__(self) -> None:
        # In a config, which is a dataclass of peft as well, peft's turn comes first.
        if after := getattr(super(), "__post_init__", None):
            after()
        self._check_types()

    @classmethod
    def own_fields(cls) -> dict[str, dataclasses.Field]:
        """The options by name; of a config, without the fields that are peft's own."""
        ours = [base for base in cls.__mro__ if issubclass(base, MethodOptions)]
        names = {name for base in ours for name in vars(base).get("__annotations__", {})}
        return {f.name: f for f in dataclasses.fields(cls) if f.name in names}

    def _check_types(self) -> None:
        # peft builds configs from whatever a call or a file says, and a text in place of a list of patterns would
        # match letter by letter.
        types_of = hints(type(self))
        for name in self.own_fields():
            value, hint = getattr(self, name), types_of[name]
            try:
                validated(hint, value)
            except (ValueError, TypeError):
                if known := choices(hint):
                    self._refuse(name, f"{value!r} is unknown. Known: {', '.join(map(str, known))}.")
                self._refuse(name, f"expected {type_name(hint)}, got {value!r}.")

    def _check_whole_modules(self, modules: list[str] | None, dtype: str) -> None:
        """Refuse `modules_to_save` of peft's own methods in half precision: peft trains copies of that precision."""
        if modules and dtype != "float32":
            self._refuse(
                "modules_to_save",
                f"peft would train the copies of {', '.join(modules)} in {dtype}, where small updates are lost. Use "
                "engine.dtype: float32, or leave it out: heads of the backbone train in float32 by themselves.",
            )

    def _refuse(self, key: str, problem: str) -> typing.NoReturn:
        raise BadInput(f"{key}: {problem}")

    def _one_of(self, key: str, known: Sequence[str]) -> None:
        given = getattr(self, key)
        for value in [given] if isinstance(given, str) else given:
            if value not in known:
                self._refuse(key, f"{value!r} is unknown. Known: {', '.join(known)}.")

    def _some_of(self, key: str, known: Sequence[str]) -> None:
        self._one_of(key, known)
        given = getattr(self, key)
        if not given or len(set(given)) != len(given):
            self._refuse(key, f"{given} must name at least one of {', '.join(known)}, each once.")

    def _at_least(self, key: str, least: float) -> None:
        if not least <= getattr(self, key) < float("inf"):
            self._refuse(key, f"must be {least:g} or more, got {getattr(self, key)}.")

    def _share(self, key: str, below: bool = False) -> None:
        """Refuse what is not in [0, 1], or, if `below`, in [0, 1)."""
        value = getattr(self, key)
        if not (0 <= value < 1 if below else 0 <= value <= 1):
            self._refuse(key, f"must lie in [0, 1{')' if below else ']'}, got {value}.")


@dataclasses.dataclass(frozen=True)
class StartData:
    """Training data for a start that reads it before the first step; the same on every rank and for any rank count.

    Attributes:
        batches: of the training data, without end, on the device of the model, in the form that the functions take.
        run: forward of a model for a batch.
        loss: mean loss of a model for a batch, 0-dimensional.
        lost: gives for paths of quantised layers what their weights have lost, (out, in) float32; not collective.
    """

    batches: Iterator[Any]
    run: Callable[[nn.Module, Any], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    lost: Callable[[list[str]], dict[str, Tensor]]


class SiteMethod:
    """Base of the `ENTRY` of a method.

    Attributes:
        Options: what a recipe may set.
        Config: the peft config, a dataclass that inherits `Options`, except for methods of peft's own.
        Tuner: the peft `BaseTuner`; None where peft has it already.
        prefix: what the names of trained parameters contain, by which peft finds them; default that of the tuner.
        peft_type: key of the tuner in peft; default that of the config. None: the options name it.
        tables: parts of the names of trained matrices whose rows are vectors of their own, such as prompts.
        reads_names: a head that scores texts of class names, whose trained matrices are those of all classes.
    """

    Options: ClassVar[type[MethodOptions]]
    Config: ClassVar[type[PeftConfig]]
    Tuner: ClassVar[type | None] = None
    prefix: ClassVar[str]
    peft_type: ClassVar[str | None]
    tables: ClassVar[tuple[str, ...]] = ()
    reads_names: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.Tuner is not None:
            cls.prefix, cls.peft_type = cls.Tuner.prefix, cls.Config.PEFT_TYPE

    @classmethod
    def config(cls, options: MethodOptions, origin: Origin) -> PeftConfig:
        """The peft config of these options; `origin` says in errors where they came from. Raises BadInput."""
        given = {name: getattr(options, name) for name in options.own_fields()}
        if issubclass(cls.Config, MethodOptions):
            return cls.Config(**given)
        # peft's own: another release may lack fields, so only those that are set
        defaults = type(options)()
        return typed(cls.Config, {k: v for k, v in given.items() if v != getattr(defaults, k)}, "method", origin)

    @classmethod
    def check(cls, config: PeftConfig, sites: Sites, condition_width: int | None) -> None:
        """Refuse a config that cannot work on these sites: no such layer, unequal widths, no condition.

        Default: everything works.

        Args:
            condition_width: width of the condition that the backbone publishes; None where it publishes none.

        Raises:
            BadInput: in one line, beginning with the option.
        """

    @classmethod
    def prepare(cls, config: PeftConfig, model: nn.Module, sites: Sites) -> PeftConfig:
        """The config that peft gets, with what depends on the model filled in.

        Default: as it is; the tuner finds its places by itself.
        """
        return config

    @classmethod
    def attach(cls, config: PeftConfig, model: nn.Module) -> PeftModel:
        """`model` with the layers of the method in it; `config` is what `prepare` gave.

        Default: as peft does it, and refused where no forward would read the layers (BadInput). It must leave the
        frozen weights as they are: an adapter is loaded onto those.
        """
        import peft

        from mmpeft_ds.methods.common.select import refuse_never_called
        from mmpeft_ds.methods.common.tuner import heads_in_float32

        wrapped = peft.get_peft_model(model, config)
        heads_in_float32(wrapped, wrapped.active_adapter)  # copies of what ZeRO-3 holds in parts have its dtype
        refuse_never_called(model)
        return wrapped

    @classmethod
    def reads_batches(cls, config: PeftConfig) -> bool:
        """Whether `start` has to be called before the first step of a new run. Default: no."""
        return False

    @classmethod
    def start(cls, model: PeftModel, data: StartData) -> None:
        """Give an attached adapter the start that follows from data; only where `reads_batches`. Collective."""

    @classmethod
    def restart(cls, model: PeftModel, shapes: Mapping[str, Sequence[int]]) -> None:
        """Give an attached adapter the form in which a checkpoint was saved; only where `reads_batches`.

        Its values are read afterwards.

        Args:
            shapes: name -> shape of each trained parameter of the checkpoint.
        """

    @classmethod
    def saved_tensors(cls, model: PeftModel, trained: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of an adapter directory, with which peft makes of the frozen model what `model` is.

        Default: what was trained.

        Args:
            trained: name -> whole tensor of each trained parameter, on the CPU.
        """
        return trained

    @classmethod
    def file_tensors(cls, model: PeftModel, trained: dict[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
        """Name of each tensor in an adapter file -> its name in `model`, and the tensor.

        Default: what was trained, by the names of peft.

        Args:
            trained: name -> tensor of each trained parameter.
        """
        from mmpeft_ds.methods.common.fit import file_names

        return {name: (inside, trained[inside]) for name, inside in file_names(model, trained).items()}

    @classmethod
    def saved_fields(cls, config: PeftConfig) -> dict[str, Any]:
        """Fields of adapter_config.json that differ from `config`, with which the adapter trained. Default: none."""
        return {}

    @classmethod
    def unmergeable(cls, config: PeftConfig) -> str | None:
        """Reason why such an adapter cannot be folded into the frozen weights, in a sentence; None where it can.

        Default: what the tuner says; peft's own tuners merge.
        """
        return cls.Tuner.unmergeable(config) if cls.Tuner is not None else None

    @classmethod
    def no_lora(cls, config: PeftConfig) -> str | None:
        """Reason why such an adapter cannot be written as a LoRA, in a sentence; None where `lora_pairs` can give one.

        Default: what the tuner says; peft's own tuners have not this form.
        """
        from mmpeft_ds.methods.common.low_rank import NO_PRODUCT

        return cls.Tuner.no_lora(config) if cls.Tuner is not None else NO_PRODUCT

    @classmethod
    def lora_pairs(cls, model: PeftModel, adapter_name: str) -> dict[str, tuple[Tensor, Tensor]]:
        """The adapter as a LoRA whose scale is 1: full path of each adapted module of `model` -> `lora_A` (r, in) and
        `lora_B` (out, r), with which the frozen model computes what this adapter does in evaluation.

        Default: `lora_factors` of the layers.

        Raises:
            BadInput: naming the layer that has not this form.
        """
        from mmpeft_ds.methods.common.layers import SiteLayer

        layers = {path: m for path, m in model.named_modules() if isinstance(m, SiteLayer)}
        for path, layer in layers.items():
            if not layer.supports_lora_conversion(adapter_name):
                raise BadInput(f"{path}: a {type(layer).__name__} is no low-rank change of a weight.")
        pairs = {path: layer.lora_pair(adapter_name) for path, layer in layers.items()}
        return {path: pair for path, pair in pairs.items() if pair is not None}

    @classmethod
    def observes_attention(cls, config: PeftConfig) -> bool:
        """Whether it reads queries, keys or scores of attention, which only SDPA and eager show. Default: not."""
        return False

    @classmethod
    def reads_kinds(cls, config: PeftConfig) -> bool:
        """Whether its layers read `Condition.kinds`, which tokens of a sequence are of an image. Default: no.

        It is then refused on backbones whose condition does not say so (`BackboneBase.publishes_kinds`).
        """
        return False

    @classmethod
    def unpackable(cls, config: PeftConfig, attention: str) -> str | None:
        """Reason why several texts cannot stand in one row of a language model (`data.pack`), in a sentence; None
        where they can.

        Default: none. A layer that mixes tokens, or reads the condition, has to follow `Condition.segments`.

        Args:
            attention: implementation that the model is loaded with.
        """
        return None

    @classmethod
    def decays(cls, config: PeftConfig, name: str) -> bool:
        """Whether weight decay reaches the trained vector of this name. The engine decays matrices; default: not."""
        return False

    @classmethod
    def is_map(cls, name: str) -> bool:
        """Whether the trained matrix of this name maps hidden vectors to others, so that Muon steps it.

        Default: those of the adapter, without tables of vectors (`tables`); heads and embeddings are left to AdamW.
        """
        return cls.kind(name) == "peft" and not any(part in name for part in (*_EMBEDDINGS, *cls.tables))

    @classmethod
    def kind(cls, name: str) -> str:
        """The member of `KINDS` to which the trained parameter of this name belongs.

        Default: a name with the method's prefix is `peft`, or `norm` or `bias` for a trained copy of one; others,
        such as those of `modules_to_save`, are `head`.
        """
        own = f".{cls.prefix}"
        if ".modules_to_save." in name or own not in name:
            return "head"
        return next((kind for kind in ("norm", "bias") if f"{own}_{kind}." in name), "peft")

    @classmethod
    def kinds(cls, names: list[str]) -> dict[str, list[str]]:
        """Names of trained parameters by kind, for the summary; every one of `KINDS` is a key."""
        return {kind: [name for name in names if cls.kind(name) == kind] for kind in KINDS}

    @classmethod
    def bank_parts(cls, config: PeftConfig) -> tuple[str, ...]:
        """Parts of the bank of features that a head reads, of `text`, `negative`, `support`. Default: none."""
        return ()
