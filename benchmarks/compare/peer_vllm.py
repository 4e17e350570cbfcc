"""vLLM's side of ``benchmarks.decode``, in its own environment: ``python peer_vllm.py JOB``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
sys.path.insert(0, str(Path(__file__).parent))

import measure
import vllm
from decoding import timings

NAMES = {"bf16": "bfloat16", "fp32": "float32"}


def main() -> None:
    """Run a job."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    engine = vllm.LLM(
        job["model"],
        dtype=NAMES[job["dtype"]],
        max_model_len=1024,
        max_num_seqs=max(job["batches"]),
        enforce_eager=job["greedy"],
    )

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        heat = 0.0 if job["greedy"] else 1.0
        how = vllm.SamplingParams(temperature=heat, max_tokens=tokens, ignore_eos=True, seed=1)
        inputs = [vllm.TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        return [list(out.outputs[0].token_ids) for out in engine.generate(inputs, how, use_tqdm=False)]

    measure.measured(job, lambda clock: {**timings(job, generate, clock), "vllm": vllm.__version__})


if __name__ == "__main__":
    main()
