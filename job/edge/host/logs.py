"""Log events: JSON lines for machines, pleasant lines on a terminal; no secrets, and no noise from libraries."""

import logging
import math
import numbers
import re
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Mapping, MutableMapping
from functools import partial
from typing import Any
from urllib.parse import quote

import structlog
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, Processor

from job.edge.host.console import Console
from job.edge.host.output import Lines, terminal_width

HIDDEN = "[hidden]"
_SHORTEST_SECRET = 8
_DEEPEST = 12
_LIBRARIES = (
    "transformers",
    "huggingface_hub",
    "accelerate",
    "bitsandbytes",
    "peft",
    "boto3",
    "botocore",
    "s3transfer",
    "urllib3",
    "httpx",
    "httpx2",
    "matplotlib",
    "py.warnings",
)
_SECRET_SHAPES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"AWS4-HMAC-SHA256\s+Credential=[^\s,]+(?:,\s*SignedHeaders=[^\s,]+)?(?:,\s*Signature=\w+)?"), HIDDEN),
    # Queries of presigned URLs: S3, Google, CloudFront, Azure.
    (
        re.compile(
            r"\b((?:X-(?:Amz|Goog)-(?:Signature|Security-Token|Credential)|Signature|AWSAccessKeyId|sig)=)[^&\s\"'<>\\]+",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{8,}", re.IGNORECASE), rf"\1 {HIDDEN}"),
    (re.compile(r"\bhf_(?:[a-z]+_)?[A-Za-z0-9]{16,}"), HIDDEN),
    # User and password, or one token, before a host. AWS's secret half may hold a slash; a port is no password.
    (re.compile(r"(?<=://)[^/\s'\"@:]*:(?!\d+/)[^\s'\"@]*@(?:[^/\s'\"@]*@)*"), f"{HIDDEN}@"),
    (re.compile(r"(?<=://)[^/\s'\"]+@"), f"{HIDDEN}@"),
)
_SECRET_NAMES = re.compile(
    r"(?i)(?:.*[_-])?(?:password|passwd|secret|secret[_-](?:access[_-])?key|api[_-]?key|authorization"
    r"|(?:access|session|security|hf|auth)[_-]token)"
)
# What these say is either decided on purpose by this job or nothing that its user can act on.
_HARMLESS = re.compile(
    r"torch_dtype. is deprecated|unauthenticated requests to the HF Hub|use_cache=True. is incompatible"
    r"|Setting .pad_token_id. to .eos_token_id|sequence length is longer than the specified maximum"
    r"|generation flags are not valid and may be ignored|compiled without GPU support"
    r"|inputs will be cast from|Xet Storage is enabled for this repo, but"
    r"|Failed to load CPU gemm_4bit_forward|Paged optimizers are not supported on CPU"
    r"|Please use the new API settings to control TF32|torch\.cpu\.amp\.autocast"
)
_HARMLESS_CATEGORIES = frozenset(
    {"DeprecationWarning", "PendingDeprecationWarning", "FutureWarning", "ResourceWarning", "ImportWarning"}
)
_PYTHON_WARNING = re.compile(r"(?s)(?P<where>.*?:\d+): (?P<category>\w+): (?P<text>.*)")


def redact(text: str) -> str:
    """The text without anything that has the shape of a secret: signatures, tokens, credentials, passwords in URLs."""
    for shape, replacement in _SECRET_SHAPES:
        text = shape.sub(replacement, text)
    return text


def configure(
    *, secrets: Collection[str], json: bool | None = None, colours: bool = False, in_place: bool = True
) -> Callable[[str], str]:
    """Send events, and the libraries' warnings, to stdout.

    Args:
        secrets: values that never appear; shorter ones than 8 characters are ignored (they would hide common words).
        json: JSON lines, or lines for people; None: JSON unless stdout is a terminal.
        colours: whether lines for people are painted.
        in_place: whether one line stays in place for steps and progress, where stdout is a terminal.

    Returns:
        What hides the secrets in a text that is kept elsewhere.
    """
    redaction = _Redaction(secrets)
    stream = sys.stdout
    as_json = not stream.isatty() if json is None else json
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 must not end the job
    last: list[Processor] = (
        [
            structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False)),
            redaction,
            _first_things_first,
            structlog.processors.JSONRenderer(),
        ]
        if as_json
        else [
            structlog.processors.format_exc_info,
            redaction,
            Console(colours=colours, in_place=in_place and stream.isatty(), width=partial(terminal_width, stream)),
        ]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=lambda *_names: Lines(stream),
        cache_logger_on_first_use=False,
    )
    logging.captureWarnings(capture=True)
    logging.basicConfig(level=logging.WARNING, handlers=[_FromLibraries()], force=True)
    _let_through_root()
    return redaction.text


def bind(**values: str | int) -> None:
    """Put values, such as run_id and attempt, on every event from here on."""
    structlog.contextvars.bind_contextvars(**values)


def only_warnings() -> None:
    """Leave out what only reports progress, for commands whose own output is what is asked for."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


def to_stderr() -> None:
    """Send events to stderr from here on, for commands whose output a script reads."""
    structlog.configure(logger_factory=lambda *_names: Lines(sys.stderr))


def quiet_libraries() -> None:
    """Switch off progress bars and own log handlers of the libraries; call it once they are imported.

    It looks only at what is loaded: it loads nothing itself.
    """
    loaded = sys.modules
    # A bar forced on by the user's environment stays on, and warns about it: nobody needs that warning.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "huggingface_hub" in loaded:
            loaded["huggingface_hub.utils"].disable_progress_bars()
        if "transformers" in loaded:
            loaded["transformers.utils.logging"].disable_progress_bar()
    _let_through_root()


def _let_through_root() -> None:
    for name in _LIBRARIES:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)


class _FromLibraries(logging.Handler):
    """Each distinct warning of a library becomes one event."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._seen: set[tuple[str, str]] = set()
        self._seen_lock = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage().strip()
        except (TypeError, ValueError):
            text = str(record.msg)  # a library's own slip in its format string
        if record.name == "py.warnings" and (match := _PYTHON_WARNING.match(text)):
            if match["category"] in _HARMLESS_CATEGORIES:
                return
            text = match["text"].splitlines()[0]
        if _HARMLESS.search(text) or not self._is_new(record.name, text):
            return
        structlog.get_logger().log(
            record.levelno, "library_warning", logger=record.name, text=text, exc_info=record.exc_info
        )

    def _is_new(self, name: str, text: str) -> bool:
        with self._seen_lock:
            if (name, text) in self._seen:
                return False
            self._seen.add((name, text))
            return True


class _Redaction:
    """Hides secrets everywhere in an event, and makes every value one that JSON can hold."""

    def __init__(self, secrets: Collection[str]) -> None:
        long_enough = {secret for secret in secrets if len(secret) >= _SHORTEST_SECRET}
        spellings = (
            long_enough | {quote(secret, safe="") for secret in long_enough} | {repr(s)[1:-1] for s in long_enough}
        )
        # The longest first: one secret may begin with another.
        self._known = (
            re.compile("|".join(map(re.escape, sorted(spellings, key=len, reverse=True)))) if spellings else None
        )

    def __call__(self, _logger: object, _method: str, event: MutableMapping[str, Any]) -> EventDict:
        return {str(key): self._clean(value, name=str(key)) for key, value in event.items()}

    def text(self, text: str) -> str:
        """The text without secrets."""
        return redact(text if self._known is None else self._known.sub(HIDDEN, text))

    def _clean(self, value: object, *, name: str = "", depth: int = 0) -> Any:
        if isinstance(value, str):
            return HIDDEN if value and _SECRET_NAMES.fullmatch(name) else self.text(value)
        if value is None or isinstance(value, bool | numbers.Real):
            return _plain(value)
        if depth < _DEEPEST and isinstance(value, Mapping):
            return {
                self.text(str(key)): self._clean(each, name=str(key), depth=depth + 1) for key, each in value.items()
            }
        if depth < _DEEPEST and isinstance(value, list | tuple | set | frozenset):
            return [self._clean(each, name=name, depth=depth + 1) for each in value]
        return self.text(str(value))


def _plain(value: bool | numbers.Real | None) -> bool | int | float | str | None:  # noqa: FBT001 a value, not a flag
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else str(number)  # NaN is no JSON


def _first_things_first(_logger: object, _method: str, event: MutableMapping[str, Any]) -> EventDict:
    first = {key: event.pop(key) for key in ("timestamp", "level", "event") if key in event}
    return {**first, **event}
