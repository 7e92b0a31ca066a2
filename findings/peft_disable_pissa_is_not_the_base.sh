#!/usr/bin/env bash
# peft: with init_lora_weights "pissa" or "olora", disable_adapter() and unload() do not give the base model back.
#
# A good guess: the adapter is what was added; switched off or unloaded, the untouched base remains.
# What happens: these initialisations take the adapter's share out of the base weight. Switched off, what remains is the
#   residual, which is another model; outputs of the whole are right, so nothing looks wrong.
# Source: peft.tuners.lora.layer.LoraLayer.pissa_init and olora_init, which write into the base layer's weight.
# Who is hurt: reference models by disable_adapter() (DPO, KL terms, "before and after" tables), several adapters on one base,
#   and whoever saves the unloaded model.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 peft==0.21.2 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import copy, torch
from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(64, 64))
x = torch.randn(8, 64)
expected = base(x)
far = lambda outputs: ((outputs - expected).norm() / expected.norm()).item()
for init in (True, "pissa", "olora"):
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, target_modules=["0"], init_lora_weights=init))
    whole = far(model(x))
    with model.disable_adapter():
        disabled = far(model(x))
    unloaded = far(model.unload()(x))
    print(f"init_lora_weights {init!s:5}: relative distance to the base: with the fresh adapter {whole:.1e}, "
          f"disabled {disabled:.3f}, unloaded {unloaded:.3f}")
    assert whole < 1e-5 and (disabled == unloaded == 0.0 if init is True else min(disabled, unloaded) > 0.1)
PY
