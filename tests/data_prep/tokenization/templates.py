"""Chat templates written for these tests, with the behaviors of model families in use."""

from transformers import PreTrainedTokenizerBase

END = {  # end of turn
    "qwen2.5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_thinking": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama3.2": "<|eot_id|>",
    "gemma3": "<end_of_turn>",
    "mistral": "</s>",
    "r1": "</s>",
    "phi3": "<|end|>",
    "smollm3": "<|im_end|>",
    "apertus": "<|assistant_end|>",
}
SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"),
    *("[INST]", "[/INST]", "<|end|>", "<|endoftext|>", "<|assistant_start|>", "<|assistant_end|>", "<|U|>", "<|A|>"),
]

# Keeps reasoning after the last question only, and writes an empty think block if the last response has none.
_QWEN3 = """
{%- set state = namespace(query=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set state.query = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set parts = m.content.split('</think>') %}
{%- set text = parts[-1].lstrip('\n') %}
{%- set thoughts = m.reasoning_content or (parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '') %}
{%- if loop.index0 > state.query and (loop.last or thoughts) %}
{{- '<|im_start|>assistant\n<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + text + '<|im_end|>\n' }}
{%- else %}
{{- '<|im_start|>assistant\n' + text + '<|im_end|>\n' }}
{%- endif %}
{%- else %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""

TEMPLATES = {
    # A default system prompt.
    "qwen2.5": """
{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}
{%- if tools %}{{- '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}""",
    "qwen3": _QWEN3,
    # The generation prompt opens the think block.
    "qwen3_thinking": _QWEN3.replace("assistant\n' }}", "assistant\n<think>\n' }}"),
    # Trims every message.
    "llama3": """
{{- bos_token }}
{%- for m in messages %}{{- '<|header|>' + m.role + '<|/header|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|/header|>\n\n' }}{% endif %}""",
    # Writes today's date into a system prompt.
    "llama3.2": """
{{- bos_token }}
{%- if date_string is not defined %}{%- set date_string = strftime_now('%d %b %Y') %}{% endif %}
{{- '<|header|>system<|/header|>\n\nToday: ' + date_string + '<|eot_id|>' }}
{%- for m in messages %}{{- '<|header|>' + m.role + '<|/header|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|/header|>\n\n' }}{% endif %}""",
    # No system role (its text precedes the first question), strict alternation, another name for the assistant.
    "gemma3": """
{{- bos_token }}
{%- set start = 1 if messages[0].role == 'system' else 0 %}
{%- for m in messages[start:] %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
{%- if loop.first and start %}{{- messages[0].content + '\n\n' }}{% endif %}
{{- m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{% endif %}""",
    # Moves the system prompt to the last question, so that the history depends on what follows. Strict alternation.
    "mistral": """
{{- bos_token }}
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- set turns = messages[1:] if system else messages %}
{%- set last = turns | selectattr('role', 'equalto', 'user') | list | length %}
{%- set state = namespace(users=0) %}
{%- for m in turns %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if m.role == 'user' %}
{%- set state.users = state.users + 1 %}
{{- '[INST] ' + (system + '\n\n' if system and state.users == last else '') + m.content + ' [/INST]' }}
{%- else %}{{- ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}""",
    # Drops the reasoning of every response, although the generation prompt opens a think block.
    "r1": """
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{- '<|A|>' + m.content.split('</think>')[-1] + eos_token }}
{%- elif m.role == 'user' %}{{- '<|U|>' + m.content }}
{%- else %}{{- m.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|A|><think>\n' }}{% endif %}""",
    # Writes the end of text after the whole conversation instead of a generation prompt.
    "phi3": """
{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{% else %}{{- '<|endoftext|>' }}{% endif %}""",
    # Generation markers around header, empty think block and end of turn; a switch in the system prompt; a date.
    "smollm3": """
{%- set think = not (messages[0].role == 'system' and '/no_think' in messages[0].content) %}
{{- '<|im_start|>system\n' + strftime_now("%d %B %Y") + '<|im_end|>\n' }}
{%- for m in messages %}
{%- if m.role == 'assistant' %}{% generation %}
{{- '<|im_start|>assistant\n' + ('' if think else '<think>\n\n</think>\n') + m.content.lstrip('\n') + '<|im_end|>\n' }}
{%- endgeneration %}
{%- elif m.role == 'user' %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' + ('' if think else '<think>\n\n</think>\n') }}
{%- endif %}""",
    # Closes a response when another role speaks or the conversation ends.
    "apertus": """
{{- bos_token }}
{%- set state = namespace(open=false) %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- if not state.open %}{{- '<|assistant_start|>' }}{% set state.open = true %}{% endif %}{{- m.content }}
{%- else %}
{%- if state.open %}{{- '<|assistant_end|>' }}{% set state.open = false %}{% endif %}
{{- '<|' + m.role + '|>' + m.content }}
{%- endif %}
{%- endfor %}
{%- if state.open %}{{- '<|assistant_end|>' }}{% endif %}
{%- if add_generation_prompt %}{{- '<|assistant_start|>' }}{% endif %}""",
}  # fmt: skip


def add_turn_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Add the special tokens of all templates to a tokenizer."""
    tokenizer.add_special_tokens({"extra_special_tokens": SPECIAL}, replace_extra_special_tokens=False)
    return tokenizer
