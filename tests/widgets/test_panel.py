"""What all widgets share, on the smallest of them: calls, work beside the kernel, closing, pages, static form."""

import json
import threading
import time

import nbformat
import pytest
import torch
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient
from nbconvert import HTMLExporter

import sae_lab as sl
from sae_lab.widgets import EditStack
from sae_lab.widgets.coding import coder_line, expression, name_of
from sae_lab.widgets.panel import Job, beside, quick


class Counter(EditStack):
    """A panel with calls of every kind."""

    @quick
    def grad(self) -> bool:
        return torch.is_grad_enabled()

    @beside
    def count(self, job: Job, to: int) -> int:
        for i in range(to):
            job.partial(i)
            time.sleep(0.002)
        return to

    @beside
    def thread(self, job: Job) -> bool:
        return threading.current_thread() is threading.main_thread() or torch.is_grad_enabled()

    @quick
    def fail(self) -> None:
        raise KeyError("inside")


@pytest.fixture
def counter():
    return Counter()


def test_a_call_brings_pieces_then_its_end(counter, screen):
    view = screen(counter)
    number = view.start("count", to=3)
    assert view.wait(number) == ("done", 3)
    assert [r["value"] for r in view.of(number, "partial")] == [0, 1, 2]
    assert counter._jobs == {}


def test_work_runs_on_another_thread_without_gradients(counter, screen):
    assert torch.is_grad_enabled()
    assert screen(counter).call("grad") == ("done", False)
    assert screen(counter).call("thread") == ("done", False)
    assert torch.is_grad_enabled()


def test_a_cancelled_call_stops(counter, screen):
    view = screen(counter)
    number = view.start("count", to=100_000)
    while not view.of(number, "partial"):
        time.sleep(0.002)
    view.cancel(number)
    assert view.wait(number) == ("cancelled", None)
    assert len(view.of(number, "partial")) < 1000


def test_an_error_is_told_and_breaks_nothing(counter, screen, caplog):
    view = screen(counter)
    assert view.call("fail") == ("error", "KeyError: 'inside'")
    assert "a call from the screen failed" in caplog.text
    assert view.call("count", to=1) == ("done", 1)
    assert view.call("count", wrong=1)[0] == "error"
    counter._on_message(counter, "nonsense", [])
    counter._on_message(counter, {"cancel": 99}, [])


def test_closing_stops_what_runs(counter, screen):
    view = screen(counter)
    view.start("count", to=100_000)
    time.sleep(0.02)
    counter.close()
    end = time.monotonic() + 5
    while counter._jobs and time.monotonic() < end:
        time.sleep(0.005)
    assert counter._jobs == {}
    counter.close()  # twice does no harm
    assert "EditStack(0 of 0 on)" in repr(counter.snapshot())  # what it was can still be read


def test_two_calls_at_once(counter, screen):
    view = screen(counter)
    numbers = [view.start("count", to=20) for _ in range(5)]
    assert [view.wait(n) for n in numbers] == [("done", 20)] * 5


def test_the_page_escapes_what_it_holds(lab, tmp_path):
    stack = EditStack([sl.Ablate(lab.sae, 1)])
    stack.rows = [stack.rows[0] | {"code": "</script><b>\u2028"}]
    page = stack.to_html(tmp_path / "edits.html").read_text(encoding="utf-8")
    state = page.split('id="state">')[1].split("</script>")[0]
    assert json.loads(state)["rows"][0]["code"] == "</script><b>\u2028" and "<b>" not in state
    assert set(json.loads(state)) == {"rows", "error"}


def test_code_names_what_it_needs(lab, tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_LAB_CACHE", str(tmp_path))
    assert coder_line(lab.sae, "mine") == f"mine = sl.load({lab.sae.path!r})"
    fresh = sl.TopK(48, 96, 5).eval()
    scope = {"sl": sl}
    exec(coder_line(fresh), scope)  # from a copy in the cache
    assert scope["sae"].fingerprint() == fresh.fingerprint() and fresh.path is None
    fresh.save(tmp_path / "own")
    assert coder_line(fresh) == f"sae = sl.load({str(tmp_path / 'own')!r})"
    with torch.no_grad():
        fresh.b_dec += 1  # what was saved is another coder now
    exec(coder_line(fresh), scope)
    assert scope["sae"].fingerprint() == fresh.fingerprint() and not fresh.is_saved
    assert [entry.kind for entry in sl.cache.list()] == ["coders", "coders"]
    assert name_of(lab, "lab") == "lab"  # outside a notebook there are no variables to find
    edit = sl.Steer(lab.sae, [1, 2], strength=0.5, positions=slice(2, 4), rows=[0])
    assert expression(edit) == "sl.Steer(sae, [1, 2], positions=slice(2, 4, None), rows=[0], strength=0.5)"
    assert repr(eval(expression(edit), {"sl": sl, "sae": lab.sae})) == repr(edit)


CELLS = [
    """from sae_lab.widgets import EditStack
stack = EditStack()
stack""",
    """import sae_lab as sl
sae = sl.TopK(8, 16, k=2).eval()
sae.f_scale += 1
stack.add(sl.Steer(sae, 7, strength=1.5))
stack._html = lambda: 1 / 0""",
    """del stack._html
_ = stack.add(sl.Steer(sae, 7, strength=2.5))""",
]


def test_a_notebook_that_ran_holds_the_last_state():
    """On a real kernel. The last cell changes the panel, and nobody waits behind it. A form that fails ends nothing."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    NotebookClient(notebook, timeout=120).execute()
    live, form = notebook.cells[0].outputs
    assert live.data["text/html"] == "" and live.data["text/plain"] == "EditStack(0 of 0 on)"
    assert set(form.data) == {"text/html"} and "<script" not in form.data["text/html"]
    assert "strength=1.5" in form.data["text/html"] and "strength=2.5" in form.data["text/html"]
    notebook.metadata.pop("widgets", None)  # nbclient keeps their state, JupyterLab does not
    page, _ = HTMLExporter(exclude_input=True).from_notebook_node(notebook)
    assert page.count("strength=2.5") == 1


def test_a_slip_in_a_name_is_answered_with_its_own_traits(counter):
    """As a plain attribute it would change nothing on the screen, and nobody would know why."""
    with pytest.raises(AttributeError, match=r"^Counter has no trait 'row'; did you mean rows\?$"):
        counter.row = []
    with pytest.raises(AttributeError, match=r"^Counter has no attribute 'rwos'; did you mean rows\?$"):
        counter.rwos  # noqa: B018
    with pytest.raises(AttributeError, match=r"^Counter has no attribute '_repr_nothing_'$"):
        counter._repr_nothing_  # noqa: B018  # as IPython asks of everything that is shown
    counter.mine = counter.entries_of_mine = 3  # what is like no trait is the user's own
    assert counter.mine == 3 and not hasattr(counter, "_mine")


def test_a_dot_and_tab_give_its_own_names(counter):
    own = {"rows", "error", "add", "code", "data", "to_html", "observe", "close"}
    assert own <= set(dir(counter)) and not {"add_traits", "keys", "set_state", "comm"} & set(dir(counter))
    assert counter.has_trait("rows")  # what is not listed is still there
    shell = InteractiveShell()
    shell.user_ns["counter"] = counter
    for jedi in (True, False):
        shell.Completer.use_jedi = jedi
        with provisionalcompleter():
            found = [c.text.lstrip(".") for c in shell.Completer.completions("counter.", 8)]
        assert found == dir(counter)
