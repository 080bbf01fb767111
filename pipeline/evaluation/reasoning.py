"""Separate the reasoning of a thinking model from its answer."""

THINK, END_OF_THINKING = "<think>", "</think>"


def split_reasoning(text: str, is_open: bool = False) -> tuple[str, str | None]:
    """Return the answer in a response, and the reasoning before it without its tags, or None if there is none.

    Args:
        text: the response. Without `</think>` it is reasoning if it has begun to think, because it was cut.
        is_open: whether the prompt ends with `<think>`, so that the response begins with reasoning.
    """
    thoughts, end, answer = text.partition(END_OF_THINKING)
    if not (end or is_open or text.lstrip().startswith(THINK)):
        return text, None
    return answer.lstrip(), thoughts.strip().removeprefix(THINK).strip() or None
