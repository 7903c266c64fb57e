"""What upstream adapts under `layers_to_transform` and `layers_pattern`: run with upstream installed, in this folder."""

import itertools
import json

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

PATHS = """lm_head model.lm_head q_proj layers.0.q_proj model.layers.0.self_attn.q_proj model.layers.1.self_attn.q_proj
model.layers.10.self_attn.q_proj model.layers.1.experts.0.q_proj model.encoder.layers.0.q_proj
model.decoder.layers.1.q_proj model.h.1.q_proj transformer.h.0.q_proj h.0.q_proj h.1.attn.q_proj model.xlayers.1.q_proj
model.layersx.1.q_proj model.blocks.0.layers.1.q_proj model.layers.1.blocks.0.q_proj model.vision.q_proj model.h2.1.q_proj
0.q_proj a.1.q_proj""".split()
TARGETS = (["q_proj", "lm_head"], ["model.layers.0.self_attn.q_proj", "q_proj"], ["self_attn.q_proj"])
LAYERS = ([0], 1, [1, 10], [])
PATTERNS = (None, "layers", "h", ["h", "layers"], "layer.", "l.*", "encoder.layers", r"h\d?", "[hx]", "xlayers")

cases = []
for targets, layers, pattern in itertools.product(TARGETS, LAYERS, PATTERNS):
    config = LoraConfig(target_modules=list(targets), layers_to_transform=layers, layers_pattern=pattern)
    adapted = [i for i, path in enumerate(PATHS) if check_target_module_exists(config, path)]
    fields = {"target_modules": targets, "layers_to_transform": layers, "layers_pattern": pattern}
    cases.append({**fields, "adapted": adapted})

with open("layers_to_transform.json", "w", encoding="utf-8") as f:
    f.write('{"paths": ' + json.dumps(PATHS, indent=0) + ', "cases": [\n')
    f.write(",\n".join(map(json.dumps, cases)) + "\n]}\n")
