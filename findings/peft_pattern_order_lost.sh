#!/usr/bin/env bash
# peft: of several alpha_pattern or rank_pattern entries that fit a layer another one may count after saving.
#
# A good guess: an adapter that is saved and loaded computes what it computed. As the first fitting entry of the dictionary counts,
#   one writes the special name before the general one, and that order is kept.
# What happens: the configuration is written with its names sorted. {"vision.q_proj": 4, "q_proj": 16} is read back as
#   {"q_proj": 16, "vision.q_proj": 4}: the general entry now counts for both layers. With alpha_pattern nothing is said and every
#   output differs; with rank_pattern the weights do not fit (RuntimeError), and the file cannot be loaded as it is.
# Source: peft.config.PeftConfigMixin.save_pretrained (json.dumps(..., sort_keys=True)) and peft.utils.other.get_pattern_key.
# Who is hurt: vision-language models whose towers have layers of one name, tuned with a strength or a rank of their own.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 peft==0.21.2

observe <<'PY'
import copy
import torch
from peft import LoraConfig, PeftModel, get_peft_model


class Tower(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.q_proj(x)


torch.manual_seed(0)
base = torch.nn.Sequential()
base.add_module("vision", Tower())
base.add_module("text", Tower())
x = torch.randn(2, 4)
special_first = {"vision.q_proj": 4, "q_proj": 16}


def trained(**pattern):
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], init_lora_weights=False, **pattern)
    return get_peft_model(copy.deepcopy(base), config)


def scales(model):
    towers = model.base_model.model
    return towers.vision.q_proj.scaling["default"], towers.text.q_proj.scaling["default"]


model = trained(alpha_pattern=special_first)
model.save_pretrained("alpha")
loaded = PeftModel.from_pretrained(copy.deepcopy(base), "alpha")
difference = float((loaded(x) - model(x)).detach().abs().max())
print(f"alpha_pattern {special_first}: scale of (vision, text) {scales(model)}, after loading {scales(loaded)}; "
      f"the outputs differ by {difference:.2f}")
assert scales(model) == (2, 8) and scales(loaded) == (8, 8) and difference > 0.1
assert list(loaded.peft_config["default"].alpha_pattern) == ["q_proj", "vision.q_proj"]

one_each = {"text.q_proj": 16, "vision.q_proj": 4}  # names that do not fit each other's layers are safe
model = trained(alpha_pattern=one_each)
model.save_pretrained("apart")
assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), "apart")(x), model(x))

trained(rank_pattern=special_first).save_pretrained("rank")
try:
    PeftModel.from_pretrained(copy.deepcopy(base), "rank")
except RuntimeError as error:
    print("rank_pattern with the same names:", str(error).splitlines()[1].strip())
    assert "size mismatch for base_model.model.vision.q_proj" in str(error)
else:
    raise SystemExit("the ranks were read back as they were")
PY
