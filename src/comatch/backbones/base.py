"""The backbone: a stock VLM, held and never subclassed, with K trained compression rows beside its vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from tokenizers import AddedToken
from torch import nn
from transformers import Cache

from comatch.backbones.attention import TEXT, VISION, warn_once
from comatch.backbones.folder import read_model, read_processor, read_tokenizer
from comatch.backbones.registry import family, resolve
from comatch.backbones.stills import still
from comatch.backbones.store import DiskStore, Store, recall
from comatch.backbones.tower import lookups
from comatch.backbones.unread import leaving_out
from comatch.core.batch import BARE_IMAGE, Batch
from comatch.core.masks import dense
from comatch.core.segments import Segments, compile_segments
from comatch.devices import moved
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
    A recipe that hides text has one more row, the last: the mask token's. `tokens` is K.
    `store`: features of pictures on disk, for a vision tower that does not train (`keep_features`).
    `dense_mask`: set it to compute attention by the dense mask, the oracle; otherwise that is for tables without another form.
    """

    dense_mask = False
    store: DiskStore | None = None

    def __init__(self, model: Any, tokenizer: Any, processor: Any, recipe: Recipe | None = None, source: str = "", seed: int = 0) -> None:
        super().__init__()
        self.hf, self.tokenizer, self.processor, self.source = model, tokenizer, processor, source
        self.family = family(model.config)
        # Set after construction: transformers takes a new name with "flash" in it for a kernel to import.
        model.model.visual.config._attn_implementation = VISION
        model.model.language_model.config._attn_implementation = TEXT
        self.image_id: int = model.config.image_token_id
        names = list(recipe.token_names) if recipe else []
        self.tokens = recipe.tokens if recipe else 0
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
        model = read_model(folder, dtype)
        return cls(model, read_tokenizer(folder), read_processor(folder), recipe, source=str(name), seed=seed)

    @property
    def stock(self) -> Any:
        """The stock transformers model, below an adapter where there is one."""
        return self.hf.get_base_model() if isinstance(self.hf, PeftModel) else self.hf

    @property
    def text(self) -> Any:
        """The language model below the head."""
        return self.stock.model.language_model

    @property
    def _no_split_modules(self) -> list[str]:
        """Classes of decoder layers and vision blocks; Accelerate asks for them by this name and shards each on its own (FSDP2)."""
        return list(self.stock._no_split_modules)

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

    @property
    def vision_trains(self) -> bool:
        """Whether any part of the vision tower learns; its output may then not be kept beyond a step."""
        return any(parameter.requires_grad for parameter in self.vision_tower.parameters())

    def keep_features(self, folder: str | Path, *, max_bytes: int, dtype: torch.dtype | None = None) -> DiskStore:
        """From now on keep the features of named pictures (`Batch.pictures`) on disk, in `dtype` or as the model gives them.

        Raises ModelError where the folder cannot be used; `see` raises it where the vision tower trains.
        """
        self.store = DiskStore(folder, self.vision_tower, self._vision_settings, max_bytes=max_bytes, dtype=dtype)
        return self.store

    def see(self, batch: Batch, memory: Store | None = None) -> Vision | None:
        """Features of a batch's pictures; None where it has none. The result may be shared between passes.

        A named picture (`batch.pictures`) runs through the tower once, and not at all where `memory` or `store` has it.
        Raises ModelError where there is a store and the tower trains.
        """
        return self._see(batch, memory)

    def _see(self, batch: Batch, memory: Store | None = None) -> Vision | None:
        # Apart from `see`, which gathers sharded weights (FSDP2) when called from outside, and must not within `forward`.
        if not len(batch.grids):
            return None
        learns = torch.is_grad_enabled() and self.vision_trains
        if learns and self.store is not None:
            raise ModelError("the vision tower trains, so its features cannot come from a store; take out the store, or freeze the tower")
        names = batch.pictures or (b"",) * len(batch.grids)
        stores = [store for store in (memory, self.store) if store is not None]
        with torch.set_grad_enabled(learns):
            found = recall(names, stores, self.device, lambda places: self._features(batch, places))
        tokens, *deep = torch.cat([found[i] for i in range(len(names))], dim=1)
        return Vision(tokens, tuple(deep))

    def _features(self, batch: Batch, places: Sequence[int]) -> list[torch.Tensor]:
        """What the vision tower makes of some of a batch's pictures: [1 + deepstack layers, visual tokens, dim] each."""
        patches, grids = batch.patches, batch.grids
        if len(places) < len(grids):
            each = torch.split(patches, grids.prod(1).tolist())
            patches, grids = torch.cat([each[i] for i in places]), grids[list(places)]
        side = self.processor.patch_size
        pixels = self.pixels(patches).view(-1, 3, 1, side, side).expand(-1, -1, self.processor.temporal_patch_size, -1, -1).flatten(1)
        # On a CPU the patch convolution's bf16 backward takes eight times as long as float32's, so autocast stays outside.
        low = torch.autocast(pixels.device.type, enabled=pixels.device.type != "cpu" and torch.is_autocast_enabled())
        with low, still(self.vision_tower.patch_embed.proj):
            # Not by way of get_image_features: which of its features are cut apart by picture differs between releases of transformers.
            known = lookups(self.vision_tower, grids, self.device)
            out = self.vision_tower(pixels.to(self.vision_tower.dtype), grid_thw=grids, **known)
        layers = [out.pooler_output, *(out.deepstack_features if self.family.deepstack else ())]
        counts = grids.prod(1) // self.vision_tower.spatial_merge_size**2
        return list(torch.split(torch.stack(layers), counts.tolist(), dim=1))

    def pixels(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches as the processor normalises them: uint8 in host memory to float32 on the device, both [patches, 3 * patch * patch]."""
        pixels = moved(patches, self.device).reshape(-1, 3, self.processor.patch_size**2).float() / 255
        return ((pixels - self.mean.view(3, 1)) / self.std.view(3, 1)).flatten(1)

    def _vision_settings(self) -> list[str]:
        """What besides its weights decides the vision tower's output for given patches."""
        low = torch.get_autocast_dtype(self.device.type) if torch.is_autocast_enabled(self.device.type) else None
        settings = self.processor.image_mean, self.processor.image_std, self.processor.temporal_patch_size, str(low)
        return [json.dumps(settings), self.vision_tower.config.to_json_string()]

    def forward(
        self,
        batch: Batch,
        visibility: Visibility,
        vision: Vision | None = None,
        read: np.ndarray | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Hidden states after the final norm: [rows, seq, dim].

        vision: features from `see`, computed here where not given. read: bool array [rows, seq], where the states are read; elsewhere they
        are not computed to the end and unusable. None is everywhere. cache: an empty one, which takes the keys and values of all places.
        """
        vision = vision if vision is not None else self._see(batch)
        states = self.embed(batch.ids)
        extra: dict[str, Any] = {}
        if vision is not None:
            place = batch.ids == self.image_id
            if int(place.sum()) != len(vision.tokens):
                raise ModelError(f"{int(place.sum())} picture tokens in the text but {len(vision.tokens)} from the vision tower")
            states = _with(states, place, vision.tokens)
            if vision.deep:
                extra = {"visual_pos_masks": moved(place, self.device), "deepstack_visual_embeds": list(vision.deep)}
        # What may see what travels as an extra keyword down to our attention function; the stock mask code then builds no mask.
        extra |= self.visible(batch, visibility)
        with leaving_out(self.text.layers, batch, visibility, read, self.device):
            extra |= {"past_key_values": cache, "use_cache": cache is not None}
            out = self.text(inputs_embeds=states, position_ids=moved(batch.positions, self.device), **extra)
        hidden: torch.Tensor = out.last_hidden_state
        return hidden

    def further(self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Hidden states of text that goes on where `cache` ends, which takes in its keys and values: [rows, seq, dim].

        ids, positions: [rows, seq] int64. mask: bool [rows, 1, seq, cached + seq], True where a query sees a key. All in host memory.
        """
        axes, mask = (moved(x, self.device) for x in (positions.expand(3, *positions.shape), mask))
        out = self.text(inputs_embeds=self.embed(ids), position_ids=axes, past_key_values=cache, use_cache=True, visibility_mask=mask)
        hidden: torch.Tensor = out.last_hidden_state
        return hidden

    def visible(self, batch: Batch, visibility: Visibility) -> dict[str, Any]:
        """What our attention function is to be handed: segments where the table has that form, else the dense mask, with one warning."""
        if not self.dense_mask:
            segments = compile_segments(batch.roles, batch.example, visibility, batch.loans, self.device)
            if isinstance(segments, Segments):
                return {"segments": segments}
            warn_once(f"visibility {list(visibility.table)} runs on the slow dense mask, because {segments}")
        roles, example = (moved(x, self.device) for x in (batch.roles, batch.example))
        return {"visibility_mask": dense(roles, example, visibility, batch.loans)}

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings [rows, seq, dim]; ids of compression tokens take our trained rows instead of the vocabulary's.

        ids: [rows, seq] int64 in host memory.
        """
        ours = (ids >= self.first_token) & (ids < self.first_token + len(self.rows))
        plain = ids.masked_fill(ours, 0).masked_fill(ids == BARE_IMAGE, self.image_id)
        states: torch.Tensor = self.text.embed_tokens(moved(plain, self.device))
        if len(self.rows):
            states = _with(states, ours, self.rows[moved((ids - self.first_token)[ours], self.device)])
        return states

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [n, vocabulary] of hidden states [n, dim]."""
        logits: torch.Tensor = self.stock.lm_head(hidden)
        return logits

    def publish_rows(self) -> None:
        """Copy the compression rows into the vocabulary's own table, so that any stock loader finds them there."""
        with torch.no_grad():
            table = self.text.embed_tokens.weight
            theirs, ours = table[self.first_token : self.first_token + len(self.rows)], self.rows.to(table.dtype)
            if not torch.equal(theirs, ours):  # an equal copy would look like a change to the fingerprint
                theirs.copy_(ours)

    def _add_tokens(self, names: list[str]) -> tuple[int, bool]:
        known = [name for name in names if name in self.tokenizer.get_vocab()]
        if known and len(known) < len(names):
            told = f"the checkpoint has {len(known)} of the recipe's {len(names)} tokens of its own, {known[:2]}..."
            raise ModelError(f"{told}; set tokens to what it has, or begin from its base")
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


def _with(states: torch.Tensor, place: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The states with `values` [places, dim] in some places, in order. states: [rows, seq, dim]. place: bool [rows, seq] in host memory."""
    # The result is no view of another shape: a compiled first layer would be compiled apart from the others for that.
    at = tuple(moved(x, states.device) for x in place.nonzero(as_tuple=True))
    return states.index_put(at, values.to(states.dtype))
