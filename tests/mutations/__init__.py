"""Ways to break a training script that leave it running: each is a text of the script and what it is changed to.

The learning tests must fail on every one of them; `load_mutant` gives the broken script as a module.
"""

import sys
import types

from helpers import ROOT, read_script

# name: (text, what it becomes); the text stands in both scripts, once
MUTATIONS = {
    "the sign of the velocity": (
        "errors_BLC = (velocity_BLC.float() - (noise_BLC - clean_BLC)).square()",
        "errors_BLC = (velocity_BLC.float() + (noise_BLC - clean_BLC)).square()",
    ),
    "sigma reversed": ("timestep_B, guided = (sigmas_B * 1000)", "timestep_B, guided = ((1 - sigmas_B) * 1000)"),
    "captions shuffled": (
        'prompt_embeds_BLD = tensors["noise"], tensors["prompt_embeds"]',
        'prompt_embeds_BLD = tensors["noise"], tensors["prompt_embeds"].roll(1, 0)',
    ),
    "latents not normalised": (
        "return ((patches - mean_C.view(1, -1, 1, 1)) / std_C.view(1, -1, 1, 1)).flatten(2).transpose(1, 2)",
        "return patches.flatten(2).transpose(1, 2)",
    ),
}


def load_mutant(script: str, name: str) -> types.ModuleType:
    """The training script with one mutation, as a module of its own."""
    source, (old, new) = read_script(script), MUTATIONS[name]
    assert source.count(old) == 1, f"{name}: the text to change stands {source.count(old)} times in {script}"
    module = types.ModuleType(f"mutant_{list(MUTATIONS).index(name)}")
    module.__file__ = str(ROOT / script)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(source.replace(old, new), module.__file__, "exec"), module.__dict__)
    return module
