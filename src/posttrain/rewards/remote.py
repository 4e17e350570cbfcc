"""A reward whose model runs in another process: the client of `posttrain.rewards.serve`."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from posttrain.data.write import row_of
from posttrain.errors import ConfigError, RewardError
from posttrain.rewards.base import Completion, Reward, Score
from posttrain.rewards.panel import as_examples
from posttrain.types import Example

_AT_ONCE = 128  # answers a request


def remote_scores(
    url: str,
    token: str,
    examples: Sequence[Example],
    truncated: Sequence[Sequence[bool]] | None = None,
    *,
    timeout: float = 300.0,
    tries: int = 3,
) -> list[list[float | None]]:
    """Ask a server for the score of every response, one list an example; None = too long for its model.

    A connection that fails is tried again after 1, 2, 4 ... seconds; an answer that refuses is not.

    Raises:
        RewardError: no answer within ``timeout`` seconds after ``tries`` tries, a refusal, or an answer of another form.
        ConfigError: a url that is not http.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"got url '{url}'; expected http://HOST:PORT as `posttrain serve` prints it")
    cut = truncated if truncated is not None else [[False] * len(e.responses) for e in examples]
    out: list[list[float | None]] = []
    start = 0
    while start < len(examples):
        stop, answers = start, 0
        while stop < len(examples) and (stop == start or answers + len(examples[stop].responses) <= _AT_ONCE):
            answers += len(examples[stop].responses)
            stop += 1
        body = {"examples": [_row(e) for e in examples[start:stop]], "truncated": [list(t) for t in cut[start:stop]]}
        found = _post(url.rstrip("/") + "/score", token, body, timeout, tries)
        out += _checked(found, examples[start:stop], url)
        start = stop
    return out


def remote_reward(url: str, token: str, *, timeout: float = 300.0, tries: int = 3) -> Reward:
    """A reward that `posttrain serve` computes; completions go as text, so the model there may be of any tokenizer and size.

    It abstains where an answer is too long for that model. Arguments and errors as `remote_scores`.
    """

    def reward(completions: Sequence[Completion]) -> list[Score]:
        examples, truncated, places = as_examples(completions)
        found = remote_scores(url, token, examples, truncated, timeout=timeout, tries=tries)
        values = [found[r][b] for r, b in places]
        return [Score(v) for v in values]

    return reward


def _row(example: Example) -> dict[str, Any]:
    """What the score depends on: the prompt, its tools and domain, the answers' turns and steps."""
    row = row_of(example)
    kept = {key: row[key] for key in ("prompt", "tools", "kind") if key in row}
    return kept | {"responses": [{key: r[key] for key in ("messages", "steps") if key in r} for r in row["responses"]]}


def _post(url: str, token: str, body: dict[str, Any], timeout: float, tries: int) -> Any:
    data = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    for attempt in range(tries):
        try:
            request = urllib.request.Request(url, data, headers)
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise RewardError(f"{url} refused ({error.code}): {_reason(error)}") from error
        except (OSError, ValueError) as error:  # no connection, too slow, cut off
            if attempt + 1 == tries:
                raise RewardError(
                    f"{url} gave no answer in {tries} tries ({error}); is `posttrain serve` running?"
                ) from error
            time.sleep(2.0**attempt)
    raise ConfigError(f"got tries={tries}; expected at least 1")


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read()).get("error", ""))[:500]
    except (ValueError, OSError, AttributeError):
        return error.reason


def _checked(found: Any, examples: Sequence[Example], url: str) -> list[list[float | None]]:
    scores = found.get("scores") if isinstance(found, dict) else None
    shape = [len(row) if isinstance(row, list) else -1 for row in scores] if isinstance(scores, list) else None
    numbers = lambda row: all(x is None or (isinstance(x, (int, float)) and not isinstance(x, bool)) for x in row)  # noqa: E731
    if scores is None or shape != [len(e.responses) for e in examples] or not all(map(numbers, scores)):
        raise RewardError(f"{url} answered with scores of another form; expected one number a response")
    return scores
