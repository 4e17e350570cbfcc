"""Peak memory of DPO in a process of its own: ``python -m benchmarks.preference.memory full|adapter SEED``, MiB beyond the imports."""

from __future__ import annotations

import io
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path


def main() -> None:
    """Two steps of four pairs on SmolLM2 in fp32; prints one line of JSON."""
    import torch
    from benchmarks.preference.lab import peak_memory
    from benchmarks.preference.table import best_and_another, default_rows
    from rich.console import Console

    from posttrain.data.collate import ranking_rows
    from posttrain.machine import deterministic_kernels, keep_freed_memory
    from posttrain.models.load import find_model, load_policy, load_tokenizer
    from posttrain.models.lora import Lora
    from posttrain.train.loop import Run, fit
    from posttrain.train.objectives import Preference
    from posttrain.train.optim import Optim
    from posttrain.train.reference import row_logp
    from posttrain.train.sources import ranking_source

    deterministic_kernels()
    keep_freed_memory()
    before = peak_memory()
    seed = int(sys.argv[2])
    lora = Lora(rank=32, alpha=16) if sys.argv[1] == "adapter" else None
    path = find_model("smollm2").path
    examples = best_and_another(default_rows("rankings", 96))[8 * (seed % 12) : 8 * (seed % 12) + 8]
    rows, _ = ranking_rows(load_tokenizer(path), examples, max_length=512, overlong="drop")
    policy = load_policy(path, dtype=torch.float32, lora=lora, train=True, seed=seed)
    ref = row_logp(replace(policy, adapter=None, trained=False), rows, max_tokens=512)
    source = ranking_source(rows, [[0, 1]] * len(rows), per_step=4, seed=seed, ref_logp=ref)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            directory=Path(folder), steps=2, max_tokens=512, save_every=10**9, console=Console(file=io.StringIO())
        )
        fit({"policy": policy}, Preference("dpo"), source, optim=Optim(lr=1e-6), run=run)
    print(json.dumps({"memory": peak_memory() - before, "imports": before}))


if __name__ == "__main__":
    main()
