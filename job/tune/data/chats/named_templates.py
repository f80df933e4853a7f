"""The chat templates that ship: for bases that have none of their own."""

from job.core.recipe.data_section import NAMED_TEMPLATES

_CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + END + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
_LLAMA3 = """\
{%- for message in messages -%}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + END }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"""
_GEMMA = """\
{%- set first = namespace(text='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{%- set first.text = first.text + message.content | trim + '\\n\\n' -%}
{%- else -%}
{%- set role = 'model' if message.role == 'assistant' else 'user' -%}
{{ '<start_of_turn>' + role + '\\n' + first.text + message.content | trim + END + '\\n' }}
{%- set first.text = '' -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""
_ALPACA = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{ '### Response:\\n' + message.content | trim + END }}{{ '\\n\\n' if not loop.last else '' }}
{%- elif message.role == 'system' -%}
{{ message.content | trim + '\\n\\n' }}
{%- else -%}
{{ '### Instruction:\\n' + message.content | trim + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}"""
_NO_TOOLS = """\
{%- set calls = messages | selectattr('tool_calls', 'defined') | list -%}
{%- set results = messages | selectattr('role', 'equalto', 'tool') | list -%}
{%- if tools or calls or results -%}
{{ raise_exception('the simple templates know no tools; give a template that does with data.chat_template') }}
{%- endif -%}
"""
_TEXTS = dict(zip(NAMED_TEMPLATES, (_CHATML, _LLAMA3, _GEMMA, _ALPACA), strict=True))
_END_OF_TURN = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}


def named_template(name: str, *, control: frozenset[str], puts_bos: bool) -> str:
    """A template's text for a tokenizer.

    A base whose tokenizer lacks the template's token for the end of a turn ends turns with its own end of sequence:
    spelled letter by letter it could not stop a model.

    Args:
        name: one of NAMED_TEMPLATES.
        control: the tokenizer's control tokens.
        puts_bos: whether the tokenizer begins a text with BOS: the template then does.
    """
    own = _END_OF_TURN.get(name)
    end = f"'{own}'" if own in control else "eos_token"
    begin = "{{- bos_token -}}\n" if puts_bos else ""
    return _NO_TOOLS + begin + _TEXTS[name].replace("END", end)
