"""The backbone: a stock VLM, held and never subclassed, with K trained compression rows beside its vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from tokenizers import AddedToken
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from comatch.backbones.attention import TEXT, VISION
from comatch.backbones.registry import family, resolve
from comatch.core.batch import Batch
from comatch.core.masks import dense
from comatch.errors import ModelError
from comatch.recipe import Recipe, Visibility


@dataclass(frozen=True)
class Vision:
    """Features of a batch's pictures. tokens: [visual tokens, dim]. deep: for deepstack families, one such tensor per early layer."""

    tokens: torch.Tensor
    deep: tuple[torch.Tensor, ...] = ()


class Backbone(nn.Module):
    """A stock Qwen-VL model with compression rows; maps a Batch to hidden states.

    `rows`: [K, dim] float32, the only part of the vocabulary that is trained. Their token ids follow the tokenizer's last id.
    """

    def __init__(self, model: Any, tokenizer: Any, processor: Any, recipe: Recipe | None = None, source: str = "", seed: int = 0) -> None:
        super().__init__()
        self.hf, self.tokenizer, self.processor, self.source = model, tokenizer, processor, source
        self.family = family(model.config)
        # Set after construction: transformers takes a new name with "flash" in it for a kernel to import.
        model.model.visual.config._attn_implementation = VISION
        model.model.language_model.config._attn_implementation = TEXT
        self.image_id: int = model.config.image_token_id
        names = [recipe.token_name.format(i) for i in range(recipe.tokens)] if recipe else []
        self.first_token, trained = self._add_tokens(names)
        self.rows = nn.Parameter(self._first_rows(len(names), trained, seed))
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.tensor(processor.image_mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(processor.image_std, dtype=torch.float32), persistent=False)

    @classmethod
    def load(
        cls,
        name: str | Path,
        recipe: Recipe | None = None,
        *,
        dtype: torch.dtype | str = "auto",
        revision: str | None = None,
        seed: int = 0,
    ) -> Backbone:
        """Load a shipped name, a folder or a hub id; every weight must come from the file.

        Raises ModelError where a weight is missing, unexpected or of another shape, or the folder is unsafe.
        """
        folder = resolve(name, revision)
        try:
            config = AutoConfig.from_pretrained(folder)
            family(config)
            model, info = AutoModelForImageTextToText.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # not ignored: `check_loaded` names them, transformers does not
            )
            tokenizer = AutoTokenizer.from_pretrained(folder)
            processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"{folder} is not a complete model folder: {error}") from error
        check_loaded(folder, info)
        return cls(model, tokenizer, processor, recipe, source=str(name), seed=seed)

    @property
    def stock(self) -> Any:
        """The stock transformers model, below an adapter where there is one."""
        return self.hf.get_base_model() if isinstance(self.hf, PeftModel) else self.hf

    @property
    def text(self) -> Any:
        """The language model below the head."""
        return self.stock.model.language_model

    @property
    def vision_tower(self) -> Any:
        """The vision tower with its merger."""
        return self.stock.model.visual

    @property
    def dim(self) -> int:
        """Width of the hidden states."""
        return int(self.stock.config.text_config.hidden_size)

    @property
    def window(self) -> int:
        """Longest row of tokens that the language model's positions allow."""
        return int(self.stock.config.text_config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.rows.device

    def see(self, batch: Batch) -> Vision | None:
        """Run the vision tower over a batch's pictures; None where it has none. The result may be shared between passes."""
        if not len(batch.grids):
            return None
        side = self.processor.patch_size
        pixels = batch.patches.reshape(-1, 3, 1, side, side).float() / 255
        pixels = (pixels - self.mean.view(3, 1, 1, 1)) / self.std.view(3, 1, 1, 1)
        pixels = pixels.expand(-1, -1, self.processor.temporal_patch_size, -1, -1).flatten(1)
        # On a CPU the patch convolution's bf16 backward takes eight times as long as float32's, so autocast stays outside.
        with torch.autocast(pixels.device.type, enabled=pixels.device.type != "cpu" and torch.is_autocast_enabled()):
            out = self.stock.model.get_image_features(pixels, batch.grids)
        deep = tuple(torch.cat(layer) for layer in out.deepstack_features) if self.family.deepstack else ()
        return Vision(torch.cat(tuple(out.pooler_output)), deep)

    def forward(self, batch: Batch, visibility: Visibility, vision: Vision | None = None) -> torch.Tensor:
        """Hidden states after the final norm: [rows, seq, dim]. `vision`: features from `see`, computed here where not given."""
        vision = vision if vision is not None else self.see(batch)
        states = self.embed(batch.ids)
        extra: dict[str, Any] = {}
        if vision is not None:
            place = batch.ids == self.image_id
            if int(place.sum()) != len(vision.tokens):
                raise ModelError(f"{int(place.sum())} picture tokens in the text but {len(vision.tokens)} from the vision tower")
            states = states.masked_scatter(place.unsqueeze(-1), vision.tokens.to(states.dtype))
            if vision.deep:
                extra = {"visual_pos_masks": place, "deepstack_visual_embeds": list(vision.deep)}
        # Our mask travels as an extra keyword down to our attention function; the stock mask code then builds none.
        extra["visibility_mask"] = dense(batch.roles, batch.example, visibility)
        out = self.text(inputs_embeds=states, position_ids=batch.positions, use_cache=False, **extra)
        hidden: torch.Tensor = out.last_hidden_state
        return hidden

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings [rows, seq, dim]; ids of compression tokens take our trained rows instead of the vocabulary's."""
        ours = (ids >= self.first_token) & (ids < self.first_token + len(self.rows))
        states: torch.Tensor = self.text.embed_tokens(ids.masked_fill(ours, 0))
        if len(self.rows):
            states = states.masked_scatter(ours.unsqueeze(-1), self.rows[(ids - self.first_token)[ours]].to(states.dtype))
        return states

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [n, vocabulary] of hidden states [n, dim]."""
        logits: torch.Tensor = self.stock.lm_head(hidden)
        return logits

    def publish_rows(self) -> None:
        """Copy the compression rows into the vocabulary's own table, so that any stock loader finds them there."""
        with torch.no_grad():
            table = self.text.embed_tokens.weight
            table[self.first_token : self.first_token + len(self.rows)] = self.rows.to(table.dtype)

    def _add_tokens(self, names: list[str]) -> tuple[int, bool]:
        known = [name for name in names if name in self.tokenizer.get_vocab()]
        if known and len(known) < len(names):
            raise ModelError(f"the checkpoint has {len(known)} compression tokens, the recipe wants {len(names)}; set tokens={len(known)}")
        if not known:
            self.tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
        ids = self.tokenizer.convert_tokens_to_ids(names)
        first = ids[0] if ids else len(self.tokenizer)
        if ids != list(range(first, first + len(names))):
            raise ModelError(f"the compression tokens {names[:2]}... have ids {ids[:4]}... that do not follow one another")
        rows = len(self.text.embed_tokens.weight)
        if first + len(names) > rows:
            raise ModelError(
                f"{len(names)} compression tokens from id {first} on do not fit the embedding table of {rows} rows; "
                f"use at most {rows - first}"
            )
        return first, bool(known)

    def _first_rows(self, tokens: int, trained: bool, seed: int) -> torch.Tensor:
        """The checkpoint's rows where it has them, else the vocabulary's mean plus a tenth of its spread in noise."""
        table: torch.Tensor = self.text.embed_tokens.weight.detach().float()
        if trained:
            return table[self.first_token : self.first_token + tokens].clone()
        table = table[: self.first_token]
        noise = torch.randn(tokens, table.shape[1], generator=torch.Generator().manual_seed(seed)).to(table.device)
        return table.mean(0) + 0.1 * table.std(0) * noise


def check_loaded(folder: Path, info: dict[str, Any]) -> None:
    """Raise ModelError unless every weight came from the file, none was left over and none had another shape (row 26)."""
    faults = {kind: sorted(map(str, info.get(kind) or ())) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    faults |= {"conversion_errors": sorted(map(str, info.get("conversion_errors") or ()))}
    if any(faults.values()):
        told = "; ".join(f"{kind}: {len(keys)}, {keys[:10]}" for kind, keys in faults.items() if keys)
        raise ModelError(
            f"{folder} does not fit its architecture, nothing was loaded: {told}. Loading it anyway would leave random weights"
        )
