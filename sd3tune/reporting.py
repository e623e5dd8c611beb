"""All output: messages and progress bars go to the current reporter, which can be replaced.

A line that begins with `note: `, `warning: ` or `error: ` has that kind, also if a command returns it.
"""

from __future__ import annotations

import html
import json
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypeVar, overload

from sd3tune import terminal

if TYPE_CHECKING:
    from tqdm import tqdm

    Bar = tqdm[Any]

T = TypeVar("T")

Kind = Literal["line", "note", "warning", "error", "result"]

_KINDS: tuple[Kind, ...] = ("note", "warning", "error")
_QUIET: tuple[Kind, ...] = ("warning", "error", "result")
_HIDDEN = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab, line and paragraph separators, bidirectional overrides, and surrogates."""
_SHORT = {"\n": r"\n", "\r": r"\r"}


def escaped(text: str) -> str:
    r"""Return the text with each control character escaped: `\x1b`, `\n`, `\u202e`.

    A file name byte that is not UTF-8, which Python stores as a surrogate, becomes `\xe9`. All other text, backslashes
    included, is unchanged, so that escaping twice is the same as escaping once.
    """
    return _HIDDEN.sub(lambda found: _escape(found[0]), text)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte, in `surrogateescape`'s form
        code -= 0xDC00
    return _SHORT.get(character) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


class Lines(tuple[str, ...]):
    """Lines of a report; `print` and notebooks show them as the command line does."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(escaped, self))

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


class Reporter:
    """Reporter that prints to a terminal. Subclasses send the same messages and progress elsewhere.

    With `quiet`, it prints only warnings, errors and results: no other lines, notes or progress.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def message(self, kind: Kind, text: str, values: dict[str, Any], aside: bool) -> None:
        """Print one escaped line; `values` are its numbers and paths; `aside` lines go to standard error."""
        if aside or kind == "error":
            _write(f"{terminal.coloured(text, kind, sys.stderr)}\n", sys.stderr)
        else:
            _write_above_bars(terminal.coloured(text, kind, sys.stdout))

    def picture(self, text: str, png: Callable[[], bytes]) -> None:
        """Show a picture on a terminal that can; on another one, the line `text`; elsewhere, nothing."""
        if self.quiet or not sys.stdout.isatty():
            return
        protocol = terminal.picture_protocol(os.environ)
        _write_above_bars(terminal.picture(png(), protocol) if protocol else text)

    def bar_of(self, bar: type[Bar]) -> type[Bar]:
        """Return the progress bar class to use instead of `bar`: a subclass, or a class with the same interface."""
        return _silent(bar) if self.quiet else bar

    @property
    def library_bars(self) -> bool:
        """True if libraries may draw their own progress bars, which cannot be replaced."""
        return not self.quiet

    def loading(self, text: str) -> AbstractContextManager[None]:
        """Return a context for an activity, described by `text`, that takes seconds without other output."""
        return nullcontext() if self.quiet else _counting_seconds(text)


class JsonReporter(Reporter):
    """Reporter that prints one JSON object per line to standard output, for other programs.

    Each has a `kind` (line, note, warning, error, result or progress) and a `text`. Progress has `done`, `total` (or
    null), `unit`, `seconds` and `seconds_left` (or null); results have additional values.
    """

    def message(self, kind: Kind, text: str, values: dict[str, Any], aside: bool) -> None:
        if text or values:
            self.object(kind, text.removeprefix(f"{kind}: "), values)

    def object(self, kind: str, text: str, values: dict[str, Any]) -> None:
        """Print one object in a single write, so that it does not mix with output of other processes."""
        _write(json.dumps({"kind": kind, "text": text, **values}, default=str) + "\n", sys.stdout)

    def picture(self, text: str, png: Callable[[], bytes]) -> None:
        pass

    def bar_of(self, bar: type[Bar]) -> type[Bar]:
        return _silent(bar) if self.quiet else _as_json(bar, self)

    @property
    def library_bars(self) -> bool:
        return False

    def loading(self, text: str) -> AbstractContextManager[None]:
        if not self.quiet:
            self.object("progress", text, {"done": 0, "total": None, "unit": "it", "seconds": 0, "seconds_left": None})
        return nullcontext()


class NotebookReporter(Reporter):
    """Reporter that prints to a notebook cell, with notebook progress bars if ipywidgets is there."""

    def bar_of(self, bar: type[Bar]) -> type[Bar]:
        from tqdm import TqdmWarning, std

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TqdmWarning)  # without ipywidgets, bars are text
            from tqdm.auto import tqdm as auto
        return super().bar_of(auto if bar is std.tqdm else bar)


_current: Reporter | None = None


def current() -> Reporter:
    """Return the current reporter; by default a NotebookReporter in a notebook, else a terminal Reporter."""
    if _current is not None:
        return _current
    return NotebookReporter() if "ipykernel" in sys.modules else Reporter()


@contextmanager
def using(reporter: Reporter) -> Iterator[Reporter]:
    """Send all messages and progress of this process to `reporter`, in every thread, until the context ends."""
    global _current
    before, _current = _current, reporter
    try:
        yield reporter
    finally:
        _current = before


def say(*lines: object, aside: bool = False) -> None:
    """Report lines, escaped: a line break inside one of them begins no new line.

    `aside` marks lines that are not part of a command's output, such as its progress.
    """
    for line in lines:
        _report("line", line, {}, aside)


def result(*lines: object, **values: Any) -> None:
    """Report result lines; `values` are the same results for programs, each a number, a text or a path."""
    for line in lines:
        _report("result", line, values, aside=False)


def show_picture(text: str, png: Callable[[], bytes]) -> None:
    """Show a new picture in a terminal: the PNG that `png` makes, where it can be drawn, else the line `text`."""
    current().picture(escaped(text), png)


def _report(kind: Kind, line: object, values: dict[str, Any], aside: bool) -> None:
    text, reporter = escaped(str(line)), current()
    if isinstance(line, str):  # not for paths, which may begin with a prefix
        kind = next((prefix for prefix in _KINDS if text.startswith(f"{prefix}: ")), kind)
    if kind in _QUIET or not reporter.quiet:
        reporter.message(kind, text, values, aside)


@overload
def progress_bar(*, desc: str, **options: Any) -> Bar: ...
@overload
def progress_bar(iterable: Iterable[T], *, desc: str, **options: Any) -> tqdm[T]: ...
def progress_bar(iterable: Any = None, *, desc: str, **options: Any) -> Any:
    """Return a progress bar, with tqdm's options, that shows the progress and the time left."""
    from tqdm import tqdm

    return current().bar_of(tqdm)(iterable, desc=escaped(desc), **options)


def loading(text: str) -> AbstractContextManager[None]:
    """Return a context for an activity that takes seconds, described by `text`; only rank 0 reports it."""
    return nullcontext() if os.environ.get("RANK", "0") != "0" else current().loading(escaped(text))


@contextmanager
def _counting_seconds(text: str) -> Iterator[None]:
    """Print the text to standard error, on a terminal with the elapsed seconds."""
    if not sys.stderr.isatty():
        _write(f"{text} ...\n", sys.stderr)
        yield
        return
    done, start = threading.Event(), time.monotonic()

    def tick() -> None:
        while not done.is_set():
            _write(f"\r{text} {time.monotonic() - start:.0f} s", sys.stderr)
            done.wait(1)

    clock = threading.Thread(target=tick, daemon=True)
    clock.start()
    try:
        yield
    finally:
        done.set()
        clock.join()
        _write("\n", sys.stderr)


def _write_above_bars(text: str) -> None:
    """Print a line to standard output, above the progress bars if there are any."""
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(text)
        sys.stdout.flush()
    else:
        _write(f"{text}\n", sys.stdout)


def _write(text: str, to: TextIO) -> None:
    print(text, end="", file=to, flush=True)


def _silent(bar: type[Bar]) -> type[Bar]:
    """Return a bar class that counts but displays nothing."""

    class Silent(bar):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})

    return Silent


def _as_json(bar: type[Bar], reporter: JsonReporter) -> type[Bar]:
    """Return a bar class that prints JSON objects as often as `bar` would be drawn."""

    class Objects(bar):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._postfix: dict[str, Any] = {}
            super().__init__(*arguments, **{**options, "file": _Nowhere(), "dynamic_ncols": False})

        def set_postfix(self, ordered_dict: Any = None, refresh: bool = True, **values: Any) -> None:
            self._postfix = {name: _number(value) for name, value in {**(ordered_dict or {}), **values}.items()}
            if refresh:
                self.refresh()

        def display(self, msg: str | None = None, pos: int | None = None) -> bool:
            state = self.format_dict
            done, total, rate = state["n"], state["total"], state["rate"]
            if rate is None and state["elapsed"]:
                rate = (done - state["initial"]) / state["elapsed"]
            left = round((total - done) / rate, 1) if total is not None and rate else None
            reporter.object(
                "progress",
                (state["prefix"] or "").removesuffix(": "),
                {"done": done, "total": total, "unit": state["unit"], "seconds": round(state["elapsed"], 1)}
                | {"seconds_left": left, **self._postfix},
            )
            return True

    return Objects


class _Nowhere:
    """A file that discards the line ends that a bar writes besides its display."""

    def write(self, text: str) -> None:
        pass

    def flush(self) -> None:
        pass


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return value
