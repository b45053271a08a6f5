"""transformers' `generate` with PEFT in a mixed batch, as a process of its own: a line of requests in, a line of counts out.

Run by the interpreter of the peers' own environment (benchmarks/peers.py): DTYPE MODEL ADAPTER ADAPTER.
"""

from __future__ import annotations

import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main() -> None:
    dtype, folder, *adapters = sys.argv[1:]
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model = PeftModel.from_pretrained(base, adapters[0], adapter_name="0")
    for number, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(adapter, adapter_name=str(number))
    model.eval()
    print("ready", flush=True)
    for line in sys.stdin:
        batch = json.loads(line)
        ids_BT = torch.tensor([request["ids"] for request in batch])  # all as long: nothing to pad
        names = ["__base__" if request["adapter"] is None else str(request["adapter"]) for request in batch]
        new = batch[0]["new"]
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                min_new_tokens=new,
                max_new_tokens=new,
                do_sample=False,
                adapter_names=names,
            )
        print(json.dumps({"tokens": out.shape[1] - ids_BT.shape[1]}), flush=True)


if __name__ == "__main__":
    main()
