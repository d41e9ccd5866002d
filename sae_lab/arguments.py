"""What callers pass: shared checks, each with one sentence that says the rule, the value and the remedy."""

REPAIR = 'text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")'


def check_text(text: str, what: str) -> None:
    """ValueError for half a surrogate pair: no tokenizer, file or page takes one. (Cut emoji and damaged JSON hold
    them.)"""
    try:
        text.encode()
    except UnicodeEncodeError as err:
        raise ValueError(
            f"{what} holds half a surrogate pair at character {err.start} ({text[err.start]!a}), which is no "
            f"character: repair it with {REPAIR}"
        ) from None
