"""Stop tokens and stop strings of a model and its chat template."""

from typing import Any

from pipeline.common.errors import UserError, first_line

_RESPONSE = "response"


def stop_token_ids(model_eos: int | list[int] | None, tokenizer: Any) -> list[int] | None:
    """Return the ids of all tokens that end a response, sorted, or None if there are none.

    They are the `eos_token_id` of the model's generation config, that of the tokenizer, and the token with which the
    chat template ends an assistant turn. The last may differ from both: in some models eos is `<|endoftext|>` and a
    turn ends with `<|im_end|>`.

    Raises:
        UserError: the chat template cannot be rendered.
    """
    own = model_eos if isinstance(model_eos, list) else [model_eos]
    return sorted({tokenizer.eos_token_id, end_of_turn_id(tokenizer), *own} - {None}) or None


def stop_strings(tokenizer: Any) -> list[str] | None:
    """Return the texts that end a response, for `GenerationConfig.stop_strings`, or None if there are none.

    If the chat template ends an assistant turn with plain text and without a token of its own, such as "### End", a
    model trained on the template generates this text.

    Raises:
        UserError: the chat template cannot be rendered.
    """
    text = _after_response(tokenizer).strip()
    return [text] if text and end_of_turn_id(tokenizer) is None else None


def end_of_turn_id(tokenizer: Any) -> int | None:
    """Return the id of the token that the chat template writes after an assistant turn.

    It is the first added token after the response that is not whitespace (Gemma's tokenizer has added tokens of
    whitespace). A model trained on the template ends its responses with it. None if there is no chat template, or it
    writes no such token.

    Raises:
        UserError: the chat template cannot be rendered.
    """
    after = tokenizer(_after_response(tokenizer), add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    return next((token for token in after if token in added and added[token].content.strip()), None)


def _after_response(tokenizer: Any) -> str:
    """Return the text that the chat template writes after the last response, empty if there is no chat template.

    Raises:
        UserError: the chat template cannot be rendered.
    """
    if not tokenizer.chat_template:
        return ""
    turn = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _RESPONSE}]
    try:
        text = str(tokenizer.apply_chat_template(turn, tokenize=False))
    except Exception as error:  # a template can raise any type of exception
        raise UserError(
            f"{tokenizer.name_or_path}: the chat template rejects a question with its answer ({first_line(error)})"
        ) from None
    return text.rpartition(_RESPONSE)[2]
