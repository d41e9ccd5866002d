"""What a saved notebook keeps of a panel: an output beside the live view, of HTML alone, which is brought up to date
while one works.

The live view's own output could be renewed as well, but JupyterLab then draws the view anew: focus, scroll position and
what is half typed are gone. The live view hides this one (``hideKept`` in panel.ts).
"""

import logging
import threading
import uuid
from collections.abc import Callable
from typing import Any

from sae_lab.results import Html, tag

log = logging.getLogger(__name__)

WAIT = 1.0  # seconds between two renewals: one click changes several traits


class KeptForm:
    """The HTML output of one panel.

    form: gives its HTML. published: hears how often it was published; the page has that number too, as a class: a page
    that was loaded anew gets no renewals. Attribute: ``key``, its class in the page.
    """

    def __init__(self, form: Callable[[], Html], published: Callable[[int], object]) -> None:
        self.key = f"saelab-kept-{uuid.uuid4().hex[:12]}"
        self._form, self._published, self._times = form, published, 0
        self._shown: Html | None = None  # None: in no notebook
        self._due = False

    def show(self) -> None:
        """Display it in the cell that runs."""
        from IPython import get_ipython

        if self._shown is None and (shell := get_ipython()) is not None:  # a last cell has no second to wait
            shell.events.register("post_run_cell", self.renew)
        self._publish(self._form(), update=False)

    def changed(self, _: object = None) -> None:
        """The panel has changed: renew it soon."""
        if self._shown is None or self._due:
            return
        self._due = True
        timer = threading.Timer(WAIT, self.renew)
        timer.daemon = True
        timer.start()

    def renew(self, _: object = None) -> None:
        """Bring it up to date now."""
        if not self._due:
            return
        self._due = False  # first: a change from here on is due again
        try:
            if (html := self._form()) != self._shown:
                self._publish(html, update=True)
        except Exception:
            log.exception("the saved form of a panel could not be renewed")

    def close(self) -> None:
        from IPython import get_ipython

        self.renew()
        if self._shown is not None and (shell := get_ipython()) is not None:
            shell.events.unregister("post_run_cell", self.renew)
        self._shown = None

    def _publish(self, html: Html, update: bool) -> None:
        from IPython.display import publish_display_data

        self._shown, self._times = html, self._times + 1
        data: dict[str, Any] = {"text/html": tag("div", html, **{"class": f"{self.key} saelab-at-{self._times}"})}
        publish_display_data(data, transient={"display_id": self.key}, update=update)
        self._published(self._times)
