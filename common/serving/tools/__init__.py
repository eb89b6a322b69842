"""Tools: what the model is told of them, and the calls in its answers. A module for each family of formats."""

import json
from collections.abc import Sequence
from typing import Any

from common.serving.tools.enforced import grammar, must_call
from common.serving.tools.hermes import Hermes
from common.serving.tools.llama3_json import Llama3Json
from common.serving.tools.parser import Piece, ToolParser
from common.text.chat_template import Templates, pick

__all__ = ["PARSERS", "Piece", "ToolParser", "choose", "grammar", "in_plain_text", "must_call"]
PARSERS: dict[str, type[ToolParser]] = {"hermes": Hermes, "llama3_json": Llama3Json}
INSTRUCTIONS = """# Tools

You may call these functions:
{}

To call one, answer with its name and arguments:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""


def choose(templates: Templates | None, tools: Sequence[Any]) -> str | None:
    """The format that a template asks the model for, by name; None if it is none of these."""
    template = pick(templates, tools)
    if "tools" not in template or ("<tool_call>" in template and "<function=" not in template):
        return "hermes"
    return "llama3_json" if '"parameters"' in template and "<|start_header_id|>" in template else None


def in_plain_text(
    templates: Templates | None, messages: list[dict[str, Any]], tools: Sequence[Any]
) -> list[dict[str, Any]]:
    """The messages; for a template that knows no tools, with tools, calls and results as Hermes has them, in texts."""
    if "tools" in pick(templates, tools):
        return messages
    result: list[dict[str, Any]] = []
    for message in messages:
        content, role = message.get("content", ""), message["role"]
        for call in message.get("tool_calls", ()):
            content += f"\n<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        kept = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
        result.append({**kept, "role": role, "content": content.lstrip("\n")})
    if tools:
        said = INSTRUCTIONS.format("\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools))
        if result[0]["role"] == "system":
            said = f"{result.pop(0)['content']}\n\n{said}"
        result.insert(0, {"role": "system", "content": said})
    return result
