"""DoRA through PEFT, with the norm of each adapted weight computed once per optimiser step instead of in every forward.

DoRA (arXiv 2402.09353) scales every row of W + s BA to a trained magnitude. PEFT multiplies an identity matrix through A and B and takes
the norm of the dense sum in each forward, at a cost that does not depend on the number of tokens. The norm needs neither:
|W + s BA|^2 = |W|^2 + 2 s <W, BA> + s^2 |BA|^2, row by row, with |W|^2 stored and the other two terms as cheap as `r` tokens.

Parameters, names and saved files are PEFT's own. The layer enters through PEFT's register of custom layers; nothing is patched.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0


def _count_step(*_: Any) -> None:
    global _steps
    _steps += 1


# FSDP and some optimisers write weights behind autograd's version counters; every optimiser of torch comes by here.
register_optimizer_step_post_hook(_count_step)


def with_dora(config: LoraConfig) -> LoraConfig:
    """Let a PEFT config make our layers wherever it makes DoRA ones; other adapters stay as they are."""
    if config.use_dora:
        config._register_custom_module({nn.Linear: DoraLinear})
    return config


def row_norms(square: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Norm of every row of W + scale * BA by the factored form, in at least float32.

    square: [out], |W|^2 of each row. weight: [out, in]. a: [r, in]. b: [out, r]. Returns [out].
    """
    kind = square.dtype
    w, a, b = weight.to(kind), a.to(kind), b.to(kind)
    cross = (b * (w @ a.T)).sum(1)
    own = (b * (b @ (a @ a.T))).sum(1)
    return (square + 2 * scale * cross + scale**2 * own).clamp_min(0).sqrt()


class FactoredDora(DoraLinearLayer):  # type: ignore[misc]
    """The magnitudes of one adapted layer, with its stored norm. `weight`: [out], PEFT's `lora_magnitude_vector`."""

    def __init__(self, fan_in_fan_out: bool = False) -> None:
        super().__init__(fan_in_fan_out)
        self.square: torch.Tensor | None = None
        self.norm: torch.Tensor | None = None
        self.base_state: tuple[Any, ...] = ()
        self.state: tuple[Any, ...] = ()

    def refresh(self, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        """The norm [out] of W + scale * BA; computed again only where a weight, the scale or the optimiser's step changed.

        Any write that autograd counts is seen, and any replaced tensor. After a write through `.data`, which nothing counts,
        call `train()` or `eval()` on the model.
        """
        known = not any(t.is_inference() for t in (weight, a, b))  # such tensors count no versions
        base_state = _state(weight) if known else ()
        state = (_steps, scale, _state(a), _state(b)) if known else ()
        with torch.no_grad(), torch.autocast("cpu" if weight.is_meta else weight.device.type, enabled=False):
            if self.square is None or not known or base_state != self.base_state:
                kind = torch.promote_types(weight.dtype, torch.float32)
                self.square, self.base_state = weight.to(kind).square().sum(1), base_state
                self.norm = None
            if self.norm is None or not known or state != self.state:
                self.norm, self.state = row_norms(self.square, weight, a, b, scale), state
        return self.norm

    def train(self, mode: bool = True) -> FactoredDora:
        """Forget the stored norm, like PEFT's own cache."""
        self.square = self.norm = None
        super().train(mode)
        return self


class FactoredVariant(DoraLinearVariant):  # type: ignore[misc]
    """PEFT's DoRA with the stored norm; merging and unmerging are PEFT's."""

    @staticmethod
    def init(module: Linear, adapter_name: str, **kwargs: Any) -> None:
        """Put our layer in the place of PEFT's. Its magnitudes start as the norms in float32, so that a new adapter changes nothing."""
        DoraLinearVariant.init(module, adapter_name, **kwargs)
        layer = FactoredDora()
        layer.weight = nn.Parameter(_refresh(module, adapter_name, layer).clone())
        module.lora_magnitude_vector[adapter_name] = layer

    @staticmethod
    def forward(module: Linear, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
        """x: [..., in]. result: [..., out], what the base layer gave, bias included. Returns [..., out]."""
        layer = module.lora_magnitude_vector[active_adapter]
        # In a compiled layer the norm is an input: versions cannot be read there, so `refresh_norms` runs before it.
        norm = layer.norm if torch.compiler.is_compiling() else _refresh(module, active_adapter, layer)
        ratio = layer.weight / norm
        base = module.get_base_layer()
        dropout, scale = module.lora_dropout[active_adapter], module.scaling[active_adapter]
        if module.training and not isinstance(dropout, nn.Identity):
            x = dropout(x)
            low = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
            # PEFT's semantics: the change of magnitude acts on the dropped input as well.
            plain = F.linear(x, base.weight.to(x.dtype))
            dropped: torch.Tensor = result + (ratio - 1) * plain + ratio * scale * low
            return dropped
        low = module.lora_B[active_adapter](module.lora_A[active_adapter](x))
        out: torch.Tensor = ratio * (result + scale * low)
        return out if base.bias is None else out + (1 - ratio) * base.bias


class DoraLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA linear layer whose DoRA is ours."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """PEFT's variants, with DoRA replaced."""
        return {**super().lora_variants, ("use_dora",): FactoredVariant}


def refresh_norms(root: nn.Module) -> None:
    """Bring the stored norms of all DoRA layers below `root` up to date."""
    for module, name, layer in _layers(root):
        _refresh(module, name, layer)


def _layers(root: nn.Module) -> Iterator[tuple[Any, str, FactoredDora]]:
    for module in root.modules():
        if isinstance(module, DoraLinear):
            for name, layer in module.lora_magnitude_vector.items():
                yield module, name, layer


def _refresh(module: Any, name: str, layer: FactoredDora) -> torch.Tensor:
    return layer.refresh(module.get_base_layer().weight, module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])


def _state(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Changes whenever the tensor's content may have: written in place, replaced, moved or cast."""
    return (tensor.data_ptr() if not tensor.is_meta else 0, tensor._version, tensor.dtype, tensor.device)
