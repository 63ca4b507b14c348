"""JSON over HTTP to one server, with retries, from several threads, and closed at once when nobody wants the answers any more."""

import json
import logging
import socket
from concurrent.futures import CancelledError
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from threading import Event
from typing import Any
from urllib.parse import urlsplit

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds before the first retry, doubled before each further one
_LOG = logging.getLogger(__name__)


class Server:
    """A server.

    Args:
        url: For example ``http://localhost:8000``; a trailing ``/v1`` is accepted.
        timeout: Seconds to wait for one answer.
        retries: How often a request is repeated when the connection fails or the server is overloaded (status 429 or 5xx).
        key: Sent as a bearer token; None for none.

    Raises:
        ValueError: The URL is none.
    """

    def __init__(self, url: str, timeout: float, retries: int, key: str | None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url: got {url!r}, expected the address of a server, for example 'http://localhost:8000'")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._root = urlsplit(self.url).path
        self._kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._address = (parts.hostname, parts.port)
        self._timeout, self._retries = timeout, retries
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._closed = Event()
        self._open: set[HTTPConnection] = set()

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer to a GET, or to a POST of `body`.

        Raises:
            ValueError: The server cannot be reached, refuses the request, or does not answer in JSON.
            CancelledError: The server was closed meanwhile.
        """
        pause, problem = FIRST_PAUSE, ""
        for attempt in range(self._retries + 1):
            if attempt:
                _LOG.warning("%s%s: %s; trying again in %g s", self.url, path, problem, pause)
                self._closed.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            try:
                status, text = self._exchange(path, body)
            except TimeoutError as error:  # not repeated: the work would only be done twice
                way_out = "raise timeout, or lower concurrency or max_length"
                raise ValueError(f"timeout: got no answer from {self.url}{path} in {self._timeout:g} s; {way_out}") from error
            except (OSError, HTTPException) as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if status == 200:
                return _parsed(text, path)
            problem = f"status {status}, {_message(text)}"
            if status != 429 and status < 500:
                raise ValueError(f"url: {self.url}{path} refused the request: {problem}; {_way_out(status)}")
        raise ValueError(f"url: {self.url}{path} failed {self._retries + 1} times, at last with {problem}; is the server running?")

    def close(self) -> None:
        """Cut all connections; calls under way raise CancelledError."""
        self._closed.set()
        for connection in list(self._open):
            sock = connection.sock  # once: its own thread sets it to None when it is done
            if sock is not None:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _exchange(self, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        """(status, text) of one request."""
        connection = self._kind(*self._address, timeout=self._timeout)
        self._open.add(connection)
        try:
            if not self._closed.is_set():
                connection.connect()
            if self._closed.is_set():  # asked again once there is a socket, so that close() finds either the socket or us
                raise CancelledError
            data = None if body is None else json.dumps(body).encode()
            connection.request("GET" if data is None else "POST", self._root + path, data, self._headers)
            with connection.getresponse() as response:
                return response.status, response.read()
        except (OSError, HTTPException) as error:
            if self._closed.is_set():
                raise CancelledError from error
            raise
        finally:
            self._open.discard(connection)
            connection.close()


def brief(answer: object) -> str:
    """An answer short enough for an error message."""
    text = answer.decode(errors="replace") if isinstance(answer, bytes) else repr(answer)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _parsed(text: bytes, path: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"url: got {brief(text)!r} from {path}, expected JSON; is this an OpenAI-compatible server?") from error


def _message(text: bytes) -> str:
    """What the server says is wrong: {"error": {"message": ...}}, {"message": ...} in older versions of vLLM, or anything else."""
    with suppress(ValueError, KeyError, TypeError):
        answer = json.loads(text)
        return repr(brief(str(answer.get("error", answer)["message"]).encode()))
    return repr(brief(text))


def _way_out(status: int) -> str:
    if status in (401, 403):
        return "name the environment variable that holds the server's key in api_key"
    if status == 404:
        return "is this the address of an OpenAI-compatible server?"
    return "change what it complains of; `vllm serve` takes --max-logprobs for logits and --max-model-len for max_length"
