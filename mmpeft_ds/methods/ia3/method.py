"""(IA)^3 from peft itself, placed by the sites: its adapter loads with stock peft alone (arXiv 2205.05638)."""

from __future__ import annotations

from peft import IA3Config
from torch import nn

from mmpeft_ds.methods.base import SiteMethod
from mmpeft_ds.methods.common.select import default_selection, stored_in_by_out
from mmpeft_ds.methods.ia3.options import IA3Options
from mmpeft_ds.sites import Sites


class IA3(SiteMethod):
    """k and v of every layer of the text towers, and what the feed-forward block narrows, unless `target_modules` says
    otherwise. Where q, k and v are one projection, q is scaled as well, as peft does."""

    Options = IA3Options
    Config = IA3Config
    peft_type = "IA3"
    prefix = "ia3_"
    tables = (".ia3_l.",)  # a scale for each unit, kept as one row or column

    @classmethod
    def check(cls, config: IA3Config, sites: Sites, condition_width: int | None) -> None:
        """Raise BadInput when there is no tower to attach to."""
        if config.target_modules is None:
            default_selection(sites)

    @classmethod
    def prepare(cls, config: IA3Config, model: nn.Module, sites: Sites) -> IA3Config:
        """Fill `target_modules` and `feedforward_modules` with full paths."""
        if config.target_modules is None:
            chosen = default_selection(sites)
            config.feedforward_modules = {site.down.path for site in chosen.ffn}
            config.target_modules = set(chosen.projections(("k", "v"))) | config.feedforward_modules
            config.fan_in_fan_out = stored_in_by_out(model, config.target_modules)
        return config


ENTRY = IA3
