"""Run by test_devices.py, in a process of its own: the same work in host memory and on a pretended device, as JSON.

    python on_pretended.py MODEL
"""

from __future__ import annotations

import json
import sys
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import varlen_stand_in
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from pretended import Pretended, There
from torch.nn.attention import varlen

from comatch.analysis.answers import answer
from comatch.analysis.carried import carried
from comatch.analysis.masks import mask_check
from comatch.analysis.redundancy import redundancy
from comatch.backbones import adapters, attention
from comatch.backbones.base import Backbone
from comatch.backbones.memory import recompute
from comatch.config import RunConfig
from comatch.content import Dialogue, as_message
from comatch.data.scenes import scene
from comatch.devices import HOST
from comatch.encoder import Encoder
from comatch.recipes import load_recipe
from comatch.training.beside import Beside
from comatch.training.loader import StageData
from comatch.training.plan import open_parameters, plan
from comatch.training.step import take_step

# Every kind of step: labels, hidden words, hidden patches with their decoder, a teacher, tokens apart, pairs in one pass and in several.
STEPS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "coma compress": ("coma", "compress", "lora", {}),
    "coma compress, recomputed": ("coma", "compress", "dora", {"checkpointing": "all"}),
    "coma compress, whole": ("coma", "compress", "full", {}),
    "coma match": ("coma", "match", "lora", {}),
    "coma match, one pass": ("coma", "match", "lora", {"tokens_per_pass": 9999}),
    "coma match, kept": ("coma", "match", "lora", {"keep_passes": 9}),
    "coma-kl compress": ("coma-kl", "compress", "lora", {}),
    "coma-apart compress": ("coma-apart", "compress", "lora", {}),
    "coma-rebuild compress": ("coma-rebuild", "compress", "lora", {}),
    "cocoa warmup": ("cocoa", "warmup", "lora", {}),
    "cocoa-strict bridge": ("cocoa-strict", "bridge", "lora", {}),
    "matching-bidirectional match": ("matching-bidirectional", "match", "lora", {}),
}


class On(Accelerator):
    """An accelerator of a device that Accelerate does not know."""

    device: torch.device = HOST  # type: ignore[assignment]


def held(x: torch.Tensor) -> torch.Tensor:
    """What a tensor holds, wherever it is."""
    return x.held if isinstance(x, There) else x


def kernel(*args: Any, **how: Any) -> torch.Tensor:
    """The stand-in, which reads bounds of segments as the kernel does: without the host."""
    return varlen_stand_in.stand_in(*args[:3], *map(held, args[3:5]), *args[5:], **how)


def step(model: str, case: str, device: torch.device, watch: Pretended | None) -> dict[str, Any]:
    """Loss and gradients of one step in several passes; what the host waited for, of the step and of its passes."""
    name, stage_name, kind, more = STEPS[case]
    recipe, checkpointing = load_recipe(name), more.get("checkpointing", "none")
    run_settings = {"steps": 1, "batch": 6, "tokens_per_pass": 300} | {k: v for k, v in more.items() if k != "checkpointing"}
    settings = {
        "name": "x", "model": model, "recipe": name, "precision": "fp32", "checkpointing": checkpointing,
        "tokens": 4 if recipe.tokens > 4 else None, "data": {"source": "scenes", "limit": 64},
        "adapter": {"kind": kind} | ({} if kind == "full" else {"r": 2, "alpha": 4, "dropout": 0.0}), "stages": {stage_name: run_settings},
    }  # fmt: skip
    config = RunConfig.model_validate(settings)
    torch.manual_seed(0)
    todo = plan(config)
    stage, run, mixture = todo.stages[0]
    backbone = todo.encoder.backbone
    samples = StageData(mixture, todo.encoder.preparer, stage, seed=0, batch=run.batch)[0]
    beside = Beside.of(backbone, stage, run, whole=kind == "full")
    open_parameters(config, backbone, stage)
    for parameter_name, parameter in backbone.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    recompute(backbone, len(backbone.text.layers) if checkpointing == "all" else 0)
    backbone.to(device).train()
    backbone.stock.tie_weights()  # moving to this device makes new parameters
    AcceleratorState._reset_state()
    accelerator = On(cpu=True)
    On.device = device  # type: ignore[assignment]
    beside.join(device, torch.optim.SGD(adapters.trainable(backbone).values(), lr=0.1), run.optim)
    before, passes = (len(watch.waits), watch.operations) if watch else (0, 0), list[None]()
    backbone.register_forward_pre_hook(lambda *_: passes.append(None))
    result = take_step(accelerator, backbone, samples, stage, run, seed=1, beside=beside)
    parts = {"": backbone, **beside.modules}
    grads = {n + m: held(p.grad).double() for n, part in parts.items() for m, p in part.named_parameters() if p.grad is not None}
    waits = watch.waits[before[0] :] if watch else []
    done = watch.operations - before[1] if watch else 0
    return {"loss": result.loss, "grads": grads, "waits": waits, "operations": done, "passes": len(passes)}


def encoder_of(model: str, device: torch.device) -> Encoder:
    """An encoder with random compression rows."""
    recipe = load_recipe("coma").with_tokens(4)
    torch.manual_seed(0)
    encoder = Encoder(Backbone.load(model, recipe, dtype=torch.float32), recipe)
    encoder.backbone.to(device).eval()
    return encoder


def uses(encoder: Encoder) -> dict[str, Callable[[], np.ndarray]]:
    """What else runs on a device, as numbers."""
    pictures = [scene(3, i).draw() for i in range(3)]
    items = [*pictures, "a red circle", {"image": pictures[0], "text": "what is on the left?"}]
    talks = [Dialogue(as_message(picture), (("what?", f"a red circle and {i}"),)) for i, picture in enumerate(pictures)]
    stage = encoder.recipe.stages[0]
    asked = [(as_message(pictures[i % 2]), ("what color?", "how many things are there?")[i // 2]) for i in range(4)]

    def leaks() -> np.ndarray:
        report = mask_check(encoder, talks)
        return np.concatenate([report.leak.ravel(), report.mass.ravel(), [report.gradient, report.gradient_cut]])

    def answered() -> np.ndarray:
        return np.array([zlib.crc32(text.encode()) for text in answer(encoder, asked, stage)])

    return {
        "encode": lambda: encoder.encode(items),
        "mask_check": leaks,
        "carried": lambda: np.array(list(carried(encoder, stage, talks).to_dict().values())),
        "redundancy": lambda: np.array([redundancy(encoder, pictures).mean_cosine]),
        "answers": answered,
    }


def main(model: str) -> None:
    warnings.simplefilter("ignore")
    varlen.varlen_attn = kernel
    attention.why_no_kernel = lambda *_: ""
    found: dict[str, Any] = {"steps": {}, "uses": {}}
    for case in STEPS:
        here = step(model, case, HOST, None)
        with Pretended() as watch:
            there = step(model, case, watch.device, watch)
        scale = max(float(g.abs().max()) for g in here["grads"].values())
        off = max(float((g - there["grads"][name]).abs().max()) for name, g in here["grads"].items()) / scale
        found["steps"][case] = {
            "losses": [here["loss"], there["loss"]],
            "same_names": here["grads"].keys() == there["grads"].keys(),
            "gradients": len(here["grads"]),
            "off": off,
            "operations": there["operations"],
            "passes": there["passes"],
            "waits": there["waits"],
        }
    plain = {name: run() for name, run in uses(encoder_of(model, HOST)).items()}
    with Pretended() as watch:
        for name, run in uses(encoder_of(model, watch.device)).items():
            before = len(watch.waits)
            value = run()
            off = float(np.abs(np.nan_to_num(value) - np.nan_to_num(plain[name])).max())
            largest = float(np.abs(plain[name]).max())
            found["uses"][name] = {"off": off, "numbers": value.size, "largest": largest, "waits": watch.waits[before:]}
    print(json.dumps(found))  # noqa: T201 - what it is for


if __name__ == "__main__":
    main(sys.argv[1])
