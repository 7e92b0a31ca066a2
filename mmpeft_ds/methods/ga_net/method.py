"""The peft tuner of GA-Net, and its entry."""

from __future__ import annotations

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.head import HeadMethod, HeadTuner, feature_site
from mmpeft_ds.methods.ga_net.config import GaNetConfig
from mmpeft_ds.methods.ga_net.head import GaNetHead
from mmpeft_ds.methods.ga_net.options import GaNetOptions
from mmpeft_ds.sites.base import Sites


class GaNetModel(HeadTuner):
    """Tuner with the verbs of every peft tuner; see `GaNetConfig`."""

    prefix = "ga_net_"
    head_class = GaNetHead


class GaNet(HeadMethod):
    """The method entry: what recipes and the engine use."""

    Options = GaNetOptions
    Config = GaNetConfig
    Tuner = GaNetModel

    @classmethod
    def check(cls, config: GaNetConfig, sites: Sites, condition_width: int | None) -> None:
        """Refuse what these features cannot give.

        Raises:
            BadInput: features that the node needs are not there, or a fusion of unequal widths.
        """
        super().check(config, sites, condition_width)
        site = feature_site(config, sites)
        for name, width in (("text", site.text_width), ("image", site.image_width)):
            if config.inputs in (name, "both") and not width:
                other = "image" if name == "text" else "text"
                raise BadInput(f"inputs: {config.inputs} needs {name} features, which are not there. Set {other}.")
        if config.up == "image" and not site.image_width:
            raise BadInput("up: image needs image features, which are not there. Set up: joined.")
        if config.fusion and site.text_width != site.image_width:
            raise BadInput(
                f"fusion: adds text features of width {site.text_width} to image features of width "
                f"{site.image_width}. Set fusion: false, or choose encoders of one width."
            )


ENTRY = GaNet
