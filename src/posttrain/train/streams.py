"""The global random streams, as JSON. The library draws by keys; a reward or a hook may draw from these."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch


def random_streams() -> dict[str, Any]:
    """Where Python's, NumPy's and torch's global generators stand."""
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {
        "python": [version, _text(np.array(words, dtype=np.uint32)), gauss],
        "numpy": [legacy[0], _text(legacy[1]), int(legacy[2]), int(legacy[3]), float(legacy[4])],
        "torch": _text(torch.get_rng_state().numpy()),
        "cuda": [_text(state.numpy()) for state in cuda],
    }


def restore_streams(state: dict[str, Any]) -> None:
    """Set them as `random_streams` found them; streams of accelerators that are not there are left out."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(int(w) for w in _array(words, np.uint32)), gauss))
    name, keys, place, has_gauss, cached = state["numpy"]
    np.random.set_state((name, _array(keys, np.uint32), place, has_gauss, cached))
    torch.set_rng_state(torch.from_numpy(_array(state["torch"], np.uint8)))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([torch.from_numpy(_array(text, np.uint8)) for text in state["cuda"]])


def _text(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _array(text: str, kind: Any) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=kind).copy()
