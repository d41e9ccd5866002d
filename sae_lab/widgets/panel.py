"""What all widgets share. Each kind of thing has one channel between the screen and Python:

- State (what is shown, what is chosen, a setting) is a trait: the screen sets it, Python checks and observes it.
- Work (reading a text, generating, patching, an edit) is a request: a call with an answer, which can be cancelled.
"""

import contextlib
import logging
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakMethod

import anywidget
import torch
import traitlets
from IPython.utils.generics import complete_object

from sae_lab import cache, noting
from sae_lab.arguments import as_annotated
from sae_lab.results import Html
from sae_lab.spelling import near

from .kept_form import KeptForm
from .standalone import page
from .static_html import Snapshot

log = logging.getLogger(__name__)

STATIC = pathlib.Path(__file__).parent / "static"


class Refused(traitlets.TraitError, ValueError):
    """A value that a trait does not take. traitlets puts the old value back for a TraitError; everywhere else in this
    library a refusal is a ValueError."""


def checked(*traits: str) -> Callable[[Callable[[Any, Any], Any]], Any]:
    """Decorates the check of these traits, a method ``(self, value) -> value``: its ValueError refuses the value."""

    def mark(check: Callable[[Any, Any], Any]) -> Any:
        def validate(panel: Any, proposal: Any) -> Any:
            try:
                return check(panel, proposal["value"])
            except ValueError as error:
                raise Refused(str(error)) from error

        return traitlets.validate(*traits)(validate)

    return mark


class Cancelled(Exception):
    """The screen no longer wants the answer of a job."""


class Job:
    """One call from the screen that takes a while. ``partial`` sends a piece of the answer; ``check`` raises Cancelled
    once the screen has cancelled."""

    def __init__(self, panel: "Panel", number: int):
        self._panel, self._number, self._stop = panel, number, threading.Event()

    def cancel(self) -> None:
        self._stop.set()

    def check(self) -> None:
        if self._stop.is_set():
            raise Cancelled

    def partial(self, value: Any) -> None:
        self.check()
        self._panel._reply(self._number, "partial", value)


def quick(method: Callable[..., Any]) -> Callable[..., Any]:
    """The screen may call this method, which answers at once on the thread that the message arrives on."""
    method.__dict__["_from_screen"] = "quick"
    return method


def beside(method: Callable[..., Any]) -> Callable[..., Any]:
    """The screen may call this method, which takes a while: it runs on a new thread, and its first argument is a
    ``Job``."""
    method.__dict__["_from_screen"] = "beside"
    return method


class Panel(anywidget.AnyWidget):
    """Base of the lab's widgets.

    A subclass names its bundle, ``_esm`` and ``_css``, and says what it shows without scripts (``_html``), as code
    (``code``) and in one line (``__repr__``). Methods marked ``quick`` or ``beside`` are the requests of the screen:

        -> {"call": number, "method": name, "args": {...}}      {"cancel": number}
        <- {"reply": number, "kind": "partial" | "done" | "error" | "cancelled", "value": ...}

    A message may arrive on another thread than that of the running cell (ipykernel 7): ``_lock`` guards the state. The
    work of a request runs without gradients. ``error``: why the last action failed, "" where it did not.
    """

    error = traitlets.Unicode("").tag(sync=True)
    _kept_key = traitlets.Unicode("").tag(sync=True)
    _kept_at = traitlets.Int(0).tag(sync=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        as_annotated(cls)

    def __init__(self, *, lock: Any = None, **state: Any) -> None:
        self._jobs: dict[int, Job] = {}
        self._lock = lock or threading.RLock()
        self._kept_form = KeptForm(self._locked_html, lambda times: self.set_trait("_kept_at", times))
        super().__init__(_kept_key=self._kept_form.key, **state)
        self.on_msg(self._on_message)
        self.observe(self._kept_form.changed)

    def _html(self) -> Html:
        """What it shows, as HTML without scripts or style sheets."""
        raise NotImplementedError

    def _locked_html(self) -> Html:
        with self._lock:
            return self._html()

    def code(self) -> str:
        """The Python that computes what is shown now, without the widget."""
        raise NotImplementedError

    def _frozen(self) -> dict[str, Any]:
        """State beyond the traits for the page of ``to_html``, which has no kernel to ask."""
        return {}

    def snapshot(self) -> Snapshot:
        """What is shown now as plain HTML, which stays when the kernel is gone."""
        return Snapshot(self._html(), repr(self))

    @as_annotated
    def to_html(self, path: str | pathlib.Path) -> pathlib.Path:
        """Write what is shown now as one HTML file that needs no kernel and no network. Hovering and sorting work; what
        would ask the model is left out. Returns the path."""
        path = pathlib.Path(path)
        with cache.atomic(path) as temporary:
            temporary.write_text(self._page(), encoding="utf-8")
        return path

    def _page(self) -> str:
        esm, css = (str(getattr(self, name)) for name in ("_esm", "_css"))
        return page(repr(self), esm, css, self._state() | self._frozen(), self._html())

    def _state(self) -> dict[str, Any]:
        """The traits that are its own."""
        return {name: getattr(self, name) for name in self._state_names()}

    @classmethod
    def _state_names(cls) -> list[str]:
        ours = set(cls.class_traits(sync=True)) - set(anywidget.AnyWidget.class_traits(sync=True))
        return sorted(name for name in ours if not name.startswith("_"))

    def data(self) -> dict[str, Any]:
        """What is shown now as plain data for a JSON file: the traits by their names."""
        return self._state()

    @beside
    def export(self, job: Job, what: str) -> Any:
        """For the screen: the text of the "page" that ``to_html`` writes, or the "data"."""
        return self._page() if what == "page" else self.data()

    @quick
    def copy_code(self) -> str:
        return self.code()

    def __dir__(self) -> list[str]:
        """Its own traits and methods, which a name behind a dot completes; what ipywidgets brings works as ever."""
        own = {name for name in object.__dir__(self) if not name.startswith("_")} - set(dir(anywidget.AnyWidget))
        return sorted(own | {"close", "observe", "unobserve"})

    def __getattr__(self, name: str) -> Any:
        meant = "" if name.startswith("_") else near(name, dir(self))
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{meant}")

    def __setattr__(self, name: str, value: Any) -> None:
        """A name close to a trait's is a slip: as a new attribute it would change nothing on the screen, silently."""
        known = name.startswith("_") or hasattr(type(self), name) or name in self.__dict__
        if not known and (meant := near(name, self._state_names(), 0.8)):
            raise AttributeError(f"{type(self).__name__} has no trait {name!r}{meant}")
        super().__setattr__(name, value)

    def _on_message(self, _: Any, content: Any, __: Any) -> None:
        if not isinstance(content, dict):
            return
        if (job := self._jobs.get(content.get("cancel", -1))) is not None:
            job.cancel()
        if "call" not in content:
            return
        number, args = content["call"], content.get("args") or {}
        method = getattr(self, str(content.get("method")), None)
        kind = getattr(method, "_from_screen", None)
        if method is None or kind is None:
            self._reply(number, "error", f"{type(self).__name__} has no call {content.get('method')!r}")
        elif kind == "quick":
            self._answer(number, lambda: method(**args))
        else:
            job = self._jobs[number] = Job(self, number)
            # A daemon: a kernel that ends does not wait for a generation.
            threading.Thread(target=self._answer, args=(number, lambda: method(job, **args)), daemon=True).start()

    def _hear_names(self, show: Callable[..., Any]) -> None:
        """Call this method now, and whenever somebody writes on features, for as long as the panel lives."""
        noting.HEAR.append(WeakMethod(show))
        show()

    def _answer(self, number: int, call: Callable[[], Any]) -> None:
        try:
            with torch.no_grad():  # a thread's own
                value = call()
        except Cancelled:
            self._reply(number, "cancelled", None)
        except Exception as error:
            if not isinstance(error, ValueError):
                log.exception("%s: a call from the screen failed", type(self).__name__)
            self._reply(number, "error", in_words(error))
        else:
            self._reply(number, "done", value)
        finally:
            self._jobs.pop(number, None)

    def _reply(self, number: int, kind: str, value: Any) -> None:
        if self.comm is not None:  # a closed output has none
            self.send({"reply": number, "kind": kind, "value": value})

    def close(self) -> None:
        """Take the widget off the page; what still runs for it stops."""
        for job in list(getattr(self, "_jobs", {}).values()):  # an __init__ that raised has made none
            job.cancel()
        if hasattr(self, "_kept_form"):
            self._kept_form.close()
        super().close()

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """Take state from the screen. A refusal is shown in the panel, and the screen gets the old values back."""
        with self._lock:
            self.error = ""  # first, so that the same refusal is a change again
            try:
                super().set_state(sync_data)
            except traitlets.TraitError as error:
                self.error = str(error)
                self.send_state(list(sync_data))

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Shows an exception in the panel before the cell or the log gets it."""
        self.error = ""
        try:
            yield
        except Exception as error:
            self.error = in_words(error)
            raise

    def _ipython_display_(self) -> None:
        """Two outputs: the live view, and beside it the form that a saved notebook keeps."""
        from IPython.display import publish_display_data

        data, metadata = self._repr_mimebundle_() or ({"text/plain": repr(self)}, {})
        publish_display_data({**data, "text/html": ""}, metadata)
        self._kept_form.show()

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is None:  # it has no view
            return None
        data, metadata = bundle
        return {**data, "text/html": self._html(), "text/plain": repr(self)}, metadata


@complete_object.register(Panel)
def _completions(panel: Panel, _: Any) -> list[str]:
    """IPython without Jedi asks here: it would add the names of the class."""
    return dir(panel)


def in_words(error: BaseException) -> str:
    """An exception as a panel shows it; the message of a ValueError is enough."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
