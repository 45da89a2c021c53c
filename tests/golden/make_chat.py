"""Writes chat.json: what transformers renders, tokenises and masks for the templates of tests/chat_formats.py.

Run it where transformers is installed (nothing of jrlhf is needed): `python tests/golden/make_chat.py`
"""

import json
import sys
import tempfile
from pathlib import Path

import jinja2
import tokenizers
import transformers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from chat_formats import CALLS, FORMATS, TURNS, write_tokenizer  # noqa: E402


def main() -> None:
    golden = {"versions": {m.__name__: m.__version__ for m in (transformers, tokenizers, jinja2)}}
    for name, (template, specials, names) in FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(Path(folder), template, specials, names)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            found = {}
            conversations = {"turns": TURNS, **({"calls": CALLS} if name == "chatml_marked" else {})}
            for kind, messages in conversations.items():
                marked = name == "chatml_marked"
                whole = tokenizer.apply_chat_template(
                    messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=marked
                )
                found[kind] = {
                    "text": tokenizer.apply_chat_template(messages, tokenize=False),
                    "prompt": tokenizer.apply_chat_template(
                        messages[:-1], tokenize=False, add_generation_prompt=True
                    ),
                    "ids": whole["input_ids"],
                    "mask": whole["assistant_masks"] if marked else None,
                }
            golden[name] = found
    (HERE / "chat.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
