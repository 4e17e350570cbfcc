"""A reward model over HTTP, for this machine only: JSON in, scores out, requests that come together scored together.

``POST /score`` with ``{"examples": [{"prompt": ..., "responses": [...]}]}`` gives ``{"scores": [[...], ...]}``;
``GET /schema`` says both in JSON Schema, ``GET /health`` whether it is ready. All but ``/health`` need
``Authorization: Bearer TOKEN``.
"""

from __future__ import annotations

import hmac
import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from posttrain.data.formats import parse_rows
from posttrain.errors import ConfigError, DataError, PosttrainError
from posttrain.types import Example

Scores = Callable[[Sequence[Example], Sequence[Sequence[bool]]], list[list[float | None]]]
"""Examples, and which of their responses were cut by length, to a score a response; None = too long to score."""

MAX_BYTES, MAX_ANSWERS = 4 << 20, 1024  # of one request
_GATHER = 0.005  # seconds in which requests join one batch
_PATIENCE = 30.0  # seconds a client may take to send what it announced

SCHEMA: dict[str, Any] = {
    "request": {
        "type": "object",
        "required": ["examples"],
        "additionalProperties": False,
        "properties": {
            "examples": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "required": ["prompt", "responses"],
                    "description": "a row of the format 'example' (docs/data.md), or texts in place of turns",
                    "properties": {
                        "prompt": {"type": ["string", "array"]},
                        "responses": {"type": "array", "minItems": 1, "items": {"type": ["string", "object"]}},
                    },
                },
            },
            "truncated": {
                "description": "for each response whether it was cut by length",
                "type": "array",
                "items": {"type": "array", "items": {"type": "boolean"}},
            },
        },
    },
    "response": {
        "type": "object",
        "required": ["scores"],
        "properties": {
            "scores": {"type": "array", "items": {"type": "array", "items": {"type": ["number", "null"]}}},
            "model": {"type": "string"},
        },
    },
}


@dataclass
class _Job:
    """One request on its way: what came in, what went out, and whether it is done."""

    examples: list[Example]
    truncated: list[list[bool]]
    done: threading.Event = field(default_factory=threading.Event)
    scores: list[list[float | None]] = field(default_factory=list[list[float | None]])
    error: str = ""

    @property
    def answers(self) -> int:
        return sum(len(e.responses) for e in self.examples)


class Server(ThreadingHTTPServer):
    """Serves one scoring function; a single thread calls it, on all the requests that wait."""

    daemon_threads = False  # a request that was taken is answered before the process ends
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(
        self, scores: Scores, *, token: str, label: str = "", port: int = 0, max_bytes: int = MAX_BYTES
    ) -> None:
        """Bind to a port of 127.0.0.1; 0 = any that is free.

        Raises:
            ConfigError: a token under 16 characters, or a port that is taken.
        """
        if len(token) < 16 or not token.isascii() or not token.isprintable():
            raise ConfigError("the token needs at least 16 printable ASCII characters; leave it out to have one made")
        self.scores, self.token, self.label, self.max_bytes = scores, token, label, max_bytes
        self.jobs: queue.Queue[_Job | None] = queue.Queue()
        self.batches = 0
        self.closing = False
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"can't listen on port {port} ({error}); give another, or 0 for any that is free"
            ) from error
        self.worker = threading.Thread(target=self._work, name="scores")

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def run(self) -> None:
        """Serve until `stop`; every request that was taken is answered."""
        self.worker.start()
        try:
            self.serve_forever(poll_interval=0.1)
        finally:
            self.closing = True
            self.server_close()  # waits for the threads of open requests
            self.jobs.put(None)
            self.worker.join()

    def stop(self) -> None:
        """End `run`; may be called from a signal handler."""
        self.closing = True
        threading.Thread(target=self.shutdown, daemon=True).start()  # it waits for the loop, which may be this thread

    def _work(self) -> None:
        ended = False
        while not ended:
            first = self.jobs.get()
            if first is None:
                return
            batch = [first]
            time.sleep(_GATHER)
            while not self.jobs.empty() and sum(job.answers for job in batch) < MAX_ANSWERS:
                job = self.jobs.get()
                if job is None:
                    ended = True
                    break
                batch.append(job)
            self._score(batch)

    def _score(self, batch: list[_Job]) -> None:
        self.batches += 1
        try:
            found = self.scores([e for j in batch for e in j.examples], [t for j in batch for t in j.truncated])
        except Exception as error:  # one request's fault must not fail the others, nor the server
            if len(batch) > 1:
                for job in batch:
                    self._score([job])
                return
            batch[0].error = str(error) or type(error).__name__
            batch[0].done.set()
            return
        for job in batch:
            job.scores, found = found[: len(job.examples)], found[len(job.examples) :]
            job.done.set()


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = _PATIENCE

    def do_GET(self) -> None:
        if self.path == "/health":
            self._answer(200, {"ready": not self._server.closing, "model": self._server.label})
        elif self._allowed():
            found = self.path == "/schema"
            self._answer(200, SCHEMA) if found else self._answer(404, {"error": "expected /score, /schema or /health"})

    def do_POST(self) -> None:
        if not self._allowed():
            return
        if self.path != "/score":
            self._answer(404, {"error": "expected /score, /schema or /health"})
            return
        size = self.headers.get("Content-Length", "")
        if not (size.isascii() and size.isdigit()):
            self._answer(411, {"error": "no Content-Length"})
        elif int(size) > self._server.max_bytes:
            self._answer(413, {"error": f"{size} bytes, more than {self._server.max_bytes}; send fewer examples"})
        else:
            self._score(self.rfile.read(int(size)))

    def _score(self, body: bytes) -> None:
        try:
            job = _job(body)
        except PosttrainError as error:
            self._answer(413 if isinstance(error, _TooMany) else 400, {"error": str(error)})
            return
        if self._server.closing:
            self._answer(503, {"error": "the server is stopping"})
            return
        self._server.jobs.put(job)
        job.done.wait()
        if job.error:
            self._answer(422, {"error": job.error})
        else:
            self._answer(200, {"scores": job.scores, "model": self._server.label})

    def _allowed(self) -> bool:
        """Whether the request comes with the token, and to this machine's own name: a page in a browser has neither."""
        host = self.headers.get("Host", "").rpartition(":")[0]
        given = self.headers.get("Authorization", "")
        if host not in ("127.0.0.1", "localhost"):
            self._answer(403, {"error": "wrong Host; expected 127.0.0.1 or localhost"})
            return False
        if not hmac.compare_digest(given.encode("utf-8", "replace"), f"Bearer {self._server.token}".encode()):
            self._answer(401, {"error": "expected the header Authorization: Bearer TOKEN"})
            return False
        return True

    @property
    def _server(self) -> Server:
        return cast(Server, self.server)

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
        self.close_connection = self.close_connection or status != 200 or self._server.closing  # its body may be unread
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Content-Type-Options", "nosniff")
        if self.close_connection:
            self.send_header("Connection", "close")
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: prompts and tokens stay out of logs."""


class _TooMany(ConfigError):
    """A request with more answers than the server takes at once."""


def _job(body: bytes) -> _Job:
    """Read a request.

    Raises:
        DataError, ConfigError: not what the schema says.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the request is not JSON ({str(error)[:80]})") from error
    if not isinstance(given, dict) or not isinstance(given.get("examples"), list) or not given["examples"]:
        raise DataError("expected {'examples': [{'prompt': ..., 'responses': [...]}]}, at least one; see /schema")
    if unknown := sorted(given.keys() - {"examples", "truncated"}):
        raise DataError(f"unknown field '{unknown[0][:40]}'; expected examples and truncated")
    examples = [_example(row, i) for i, row in enumerate(given["examples"], 1)]
    counts = [len(e.responses) for e in examples]
    if sum(counts) > MAX_ANSWERS:
        raise _TooMany(f"{sum(counts)} responses, more than {MAX_ANSWERS} in one request; send fewer at once")
    truncated = given.get("truncated", [[False] * n for n in counts])
    right = isinstance(truncated, list) and [len(t) if isinstance(t, list) else -1 for t in truncated] == counts
    if not right or not all(isinstance(x, bool) for t in truncated for x in t):
        raise DataError("'truncated' must hold true or false for each response of each example")
    return _Job(examples, truncated)


def _example(row: Any, number: int) -> Example:
    """A row of the request; texts stand for a user's turn and an assistant's."""
    if not isinstance(row, dict) or not isinstance(row.get("responses"), list) or not row["responses"]:
        raise DataError(f"request row {number}: expected an object with 'prompt' and 'responses', at least one")
    prompt = row.get("prompt")
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    said = [{"messages": [{"role": "assistant", "content": r}]} if isinstance(r, str) else r for r in row["responses"]]
    (found,) = parse_rows({**row, "prompt": turns, "responses": said}, "request", number, format="example")
    return found
