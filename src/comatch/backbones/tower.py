"""What a vision tower looks up of its pictures' sizes: positions, windows, bounds. Made in host memory and handed to the stock tower.

Left to itself the tower makes these from sizes on the device, and waits for the device picture by picture to read them. The functions are
transformers' own, and so is the way in: a value that is passed under its name is taken as it is (`transformers.vision_utils`).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from comatch.devices import moved


def lookups(tower: Any, grids: torch.Tensor, device: torch.device) -> dict[str, Any]:
    """Keyword arguments for a stock Qwen tower's forward. grids: [pictures, 3] int64 in host memory, (time, height, width) in patches."""
    merge = tower.spatial_merge_size
    bounds = get_vision_cu_seqlens(grids)
    found = {"position_ids": get_vision_position_ids(grids, merge), "cu_seqlens": bounds}
    longest = {"max_seqlen": int(bounds.diff().max())}
    if hasattr(tower, "window_size"):
        index, edges = get_vision_window_index(grids, merge, tower.window_size, tower.patch_size)
        found |= {"window_index": index, "cu_window_seqlens": edges}
        longest["max_window_seqlen"] = int(edges.diff().max())
    if hasattr(tower, "num_grid_per_side"):
        how = {"mode": tower.interpolation_mode, "align_corners": tower.interpolation_align_corners}
        places, weights = get_vision_interpolation_indices_and_weights(grids, tower.num_grid_per_side, spatial_merge_size=merge, **how)
        found |= {"interp_indices": places, "interp_weights": weights}
    return {name: moved(value, device) for name, value in found.items()} | longest
