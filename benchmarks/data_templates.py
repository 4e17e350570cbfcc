"""Rows a second from a file of prompt and completion to token ids: this library beside `datasets`, same template.

    python -m benchmarks.data_templates [--rows 2000000] [--tokenizer DIRECTORY] [--folder DIRECTORY] [--freeze]

``posttrain`` reads, checks, renders and masks 250 rows at a time and keeps none. ``datasets`` loads the file into an
empty cache and maps ``apply_chat_template(tokenize=True)`` over batches of 1,000, which gives ids without a mask, into
its cache, once with one process and once with two; streamed, it reads the file itself and keeps nothing.
``tokenizer alone`` encodes the rendered texts, nothing else. One word in `RARE` is two words in one, which hardly ever
comes again, as about that many words of a text are new. Every measurement is a line appended to
benchmarks/results/data_reading.jsonl.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path

if __package__:
    from benchmarks.data_reading import keep
else:
    from data_reading import keep

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTENDERS = ("posttrain", "datasets, streamed", "datasets, 1 process", "datasets, 2 processes", "tokenizer alone")
RARE = 20


def write_files(folder: Path, rows: int) -> list[Path]:
    """Write the same demonstrations, about 40 words each, as JSON lines and as Parquet; return the two files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    draw = random.Random(0)
    words = known_words()
    weights = [1 / (k + 3) for k in range(len(words))]  # as words of a language: the k-th most frequent in 1/k
    lines, table = folder / "demonstrations.jsonl", folder / "demonstrations.parquet"
    schema = pa.schema([(column, pa.string()) for column in ("prompt", "completion")])
    with lines.open("w", encoding="utf-8") as out, pq.ParquetWriter(table, schema) as writer:
        for start in range(0, rows, 10_000):
            made = []
            for _ in range(min(10_000, rows - start)):
                said = draw.choices(words, weights, k=draw.randint(25, 55))
                said = [w if draw.randrange(RARE) else w + draw.choice(words) for w in said]
                cut = draw.randint(8, 20)
                made.append({"prompt": " ".join(said[:cut]), "completion": " ".join(said[cut:])})
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
            writer.write_table(pa.Table.from_pylist(made, schema))
    return [lines, table]


def known_words() -> list[str]:
    """The words of the demonstrations that come with the library, most frequent first."""
    from collections import Counter

    from posttrain.data import read, resolve_data

    examples = read(resolve_data("default")["demonstrations"])
    counts = Counter(w for e in examples for m in (*e.prompt, *e.responses[0].messages) for w in m.content.split())
    return [word for word, _ in counts.most_common()]


def load_tokenizer(path: str):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def posttrain(path: str, tokenizer) -> dict[str, int]:
    from posttrain.data import demonstration_rows, stream

    found = {"rows": 0, "tokens": 0, "trained": 0}
    examples = stream(path)
    while some := list(islice(examples, 250)):
        for row in demonstration_rows(tokenizer, some, max_length=4096)[0]:
            found["rows"] += 1
            found["tokens"] += len(row.prompt) + len(row.branches[0].ids)
            found["trained"] += sum(row.branches[0].masks["loss"])
    return found


def peer(path: str, tokenizer, processes: int) -> dict[str, int]:
    """With ``processes`` 0 streamed, else mapped into a cache by so many."""
    import datasets

    datasets.disable_progress_bars()
    builder = "parquet" if path.endswith(".parquet") else "json"
    cache = tempfile.mkdtemp(dir=Path(path).parent)
    rows = datasets.load_dataset(builder, data_files=path, split="train", cache_dir=cache, streaming=not processes)

    def encode(batch):
        talks = [
            [{"role": "user", "content": p}, {"role": "assistant", "content": c}]
            for p, c in zip(batch["prompt"], batch["completion"], strict=True)
        ]
        return {"input_ids": tokenizer.apply_chat_template(talks, tokenize=True, return_dict=True)["input_ids"]}

    columns = ["prompt", "completion"]
    if not processes:
        return {"rows": sum(1 for _ in rows.map(encode, batched=True, batch_size=1000, remove_columns=columns))}
    made = rows.map(encode, batched=True, remove_columns=columns, num_proc=processes if processes > 1 else None)
    return {"rows": len(made)}


def alone(path: str, tokenizer) -> dict[str, int]:
    """Rendered texts are made first, outside the time, a part of the file at a time."""
    from posttrain.data import stream

    found = {"rows": 0, "tokens": 0}
    backend, seconds, busy = tokenizer.backend_tokenizer, 0.0, 0.0
    examples = stream(path)
    while some := list(islice(examples, 2000)):
        talks = [[{"role": m.role, "content": m.content} for m in (*e.prompt, *e.responses[0].messages)] for e in some]
        texts = tokenizer.apply_chat_template(talks, tokenize=False)
        began, before = time.perf_counter(), time.process_time()
        found["tokens"] += sum(len(e.ids) for e in backend.encode_batch_fast(texts, add_special_tokens=False))
        seconds += time.perf_counter() - began
        busy += time.process_time() - before
        found["rows"] += len(some)
    return {**found, "milliseconds": round(1000 * seconds), "busy": round(1000 * busy)}


def measure(contender: str, path: str, model: str, freeze: bool) -> None:
    """Run one contender on a file and print what it found, its seconds and its processes' peak memory as JSON."""
    for module in ("datasets", "posttrain.data.collate"):
        importlib.import_module(module)  # imports are timed by nobody
    tokenizer = load_tokenizer(model)
    if freeze:
        gc.collect()
        gc.freeze()
    peak = [0.0]
    threading.Thread(target=watch, args=(peak,), daemon=True).start()
    before, began = processor(), time.perf_counter()
    if contender == "posttrain":
        found = posttrain(path, tokenizer)
    elif contender == "tokenizer alone":
        found = alone(path, tokenizer)
    else:
        found = peer(path, tokenizer, {"streamed": 0, "1 process": 1}.get(contender.split(", ")[1], 2))
    seconds, busy = time.perf_counter() - began, processor() - before
    if "milliseconds" in found:
        seconds, busy = found.pop("milliseconds") / 1000, found.pop("busy") / 1000
    rates = {"rows_per_s": round(found["rows"] / seconds), "rows_per_cpu_s": round(found["rows"] / busy)}
    times = {"seconds": round(seconds, 3), "cpu_s": round(busy, 3)}
    print(json.dumps({**found, **times, **rates, "peak_mib": round(peak[0])}))


def processor() -> float:
    """Seconds of processor time of this process and of those it waited for."""
    return sum(
        t.ru_utime + t.ru_stime for t in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def watch(peak: list[float]) -> None:
    """Keep the greatest sum of memory of this process and its children that no file backs, in MiB."""
    while True:
        total = 0
        for child in Path("/proc").glob("[0-9]*"):
            try:
                status = (child / "status").read_text()
                mine = int(child.name) == os.getpid() or f"PPid:\t{os.getpid()}\n" in status
                if mine and "RssAnon:" in status:
                    total += int(status.split("RssAnon:")[1].split()[0])
            except (OSError, ValueError):
                continue
        peak[0] = max(peak[0], total / 1024)
        time.sleep(0.2)


def main() -> None:
    """Write the files, measure every contender on each, print and keep a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--tokenizer", default=os.path.expanduser("~/.cache/posttrain/SmolLM2-135M-Instruct"))
    parser.add_argument("--folder", default=None, help="where to write the files (default: a temporary directory)")
    parser.add_argument("--freeze", action="store_true", help="call gc.freeze() after imports, in every contender")
    parser.add_argument("--measure", nargs=2, metavar=("CONTENDER", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure, options.tokenizer, options.freeze)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for path in write_files(Path(folder), options.rows):
            print(f"{path.suffix[1:]}, {path.stat().st_size / 1e6:.0f} MB, {options.rows:,} rows")
            for contender in CONTENDERS:
                child = [sys.executable, __file__, "--tokenizer", options.tokenizer, "--measure", contender, str(path)]
                child += ["--freeze"] if options.freeze else []
                printed = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True).stdout
                found = json.loads(printed.splitlines()[-1])
                assert found["rows"] == options.rows
                keep("templates", path, contender, {**found, "frozen": options.freeze})


if __name__ == "__main__":
    main()
