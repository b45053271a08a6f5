"""Run one of llama.cpp's converters on a model whose made-up tokenizer it does not know.

    to_gguf.py CONVERTER ARGUMENTS...

The converters tell tokenizers apart by a hash of what they make of a text, and refuse strangers. Prompts are given as
token ids in these benchmarks, so that any known kind of byte-level BPE will do.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    script = Path(sys.argv[1])
    sys.path.insert(0, str(script.parent))
    try:
        from conversion.base import TextModel
    except ModuleNotFoundError:
        from convert_hf_to_gguf import TextModel
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    sys.argv = sys.argv[1:]
    if script.stem == "convert_hf_to_gguf" and "convert_hf_to_gguf" in sys.modules:
        sys.modules["convert_hf_to_gguf"].main()
    else:
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
