"""The helpers notice what they are there to notice: a test that cannot fail proves nothing."""

import pathlib

import pytest

from .lab import NotebookError, fresh_copy, open_notebook, write_notebook


@pytest.mark.browser
def test_what_goes_wrong_is_noticed(tmp_path: pathlib.Path) -> None:
    source = write_notebook(tmp_path / "wrong.ipynb", ["x = 1", "raise KeyError('lost')", "x = 2"])
    folder = tmp_path / "copy"
    folder.mkdir()
    with open_notebook(fresh_copy(source, folder)) as notebook:
        assert notebook.problems == []
        with pytest.raises(NotebookError, match="KeyError"):
            notebook.run_all()
        assert notebook.python("print(x)") == "1"
        with pytest.raises(NotebookError, match="ZeroDivisionError"):
            notebook.python("1 / 0")

        # No other host is reached; who asks for one is named.
        reached = "url => fetch(url, { mode: 'no-cors' }).then(() => true, () => false)"
        assert notebook.page.evaluate(reached, "https://example.org/widget.js") is False
        assert any("https://example.org/widget.js" in problem for problem in notebook.problems)
        notebook.page.evaluate("() => console.error('a widget failed')")
        assert any("a widget failed" in problem for problem in notebook.problems)
