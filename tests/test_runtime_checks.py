"""The checks of ``runtime_checks.py`` refuse what jaxtyping's own refuse, and the library wears them."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import beartype
import pytest
import runtime_checks
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.lm.observing import Atom
from sae_lab.saes import kernels, losses


@pytest.fixture(params=["here", "jaxtyping"])
def checked(request):
    """A decorator: ours, or jaxtyping's own, which is the control."""
    made = {"here": runtime_checks.jaxtyped, "jaxtyping": runtime_checks.WHOLE}[request.param]
    return made(typechecker=beartype.beartype(conf=beartype.BeartypeConf(violation_type=TypeError)))


def refuses(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except TypeError as err:  # of the checks, and not of what the function then did
        return "violates type hint" in str(err) or type(err).__module__.startswith("jaxtyping")
    return False


def test_types(checked):
    @checked
    def repeat(word: str, times: "int" = 2, *more: int, sep: str | None = None) -> str:
        return word * times if times else None

    assert repeat("a") == "aa" and repeat("a", 1, 2, 3, sep="") == "a"
    assert refuses(repeat, 3) and refuses(repeat, "a", "b") and refuses(repeat, "a", 1, "c")
    assert refuses(repeat, "a", sep=1)
    assert refuses(repeat, "a", 0), "what it returns"


def test_axes(checked):
    @checked
    def product(a: Float[Tensor, "n k"], b: Float[Tensor, "k m"], right: bool = True) -> Float[Tensor, "n m"]:
        return a @ b if right else (a @ b).T

    a, b = torch.ones(2, 3), torch.ones(3, 4)
    assert product(a, b).shape == (2, 4)
    assert product(torch.ones(5, 1), torch.ones(1, 7)).shape == (5, 7), "names of axes live for one call"
    assert refuses(product, a, b.T), "k is 3 and 4"
    assert refuses(product, a[0], b) and refuses(product, a.long(), b)
    assert refuses(product, a, b, right=False), "n and m change places"


def test_an_inner_call_has_axes_of_its_own(checked):
    @checked
    def inner(x: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return x

    @checked
    def outer(x: list[Float[Tensor, "n"]], other: Tensor) -> Float[Tensor, "n"] | None:
        inner(other)
        return x[0]

    assert len(outer([torch.ones(2)], torch.ones(5))) == 2


def test_classes(checked):
    @checked
    @dataclass
    class Pair:
        x: Float[Tensor, "n d"]
        y: Float[Tensor, "n d"]
        names: list[str] = field(default_factory=list)

        @checked
        def shifted(self, by: float) -> "Pair":
            return Pair(self.x + by, self.y)

    x = torch.ones(2, 3)
    assert Pair(x, x).shifted(1.0).names == []
    assert refuses(Pair, x, x.T) and refuses(Pair, x, x, "a") and refuses(Pair(x, x).shifted, "a")


def test_what_a_generator_is_given(checked):
    @checked
    def count(to: int) -> Iterator[int]:
        yield from range(to)

    assert list(count(3)) == [0, 1, 2] and refuses(count, "3")


def test_a_name_that_is_not_there_yet_is_anything(checked):
    @checked
    def later(x: "NotYet", y: int) -> "NotYet":
        return x

    assert later(1, 2) == 1 and refuses(later, 1, "2")


def test_the_library_is_checked():
    assert refuses(kernels.top_per_row, torch.ones(3), 2), "one axis"
    assert refuses(losses.fvu, torch.ones(3, 2), torch.ones(4, 2)), "two lengths of one axis"
    assert refuses(Atom, softmax="yes"), "a dataclass"
