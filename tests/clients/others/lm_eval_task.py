"""lm-eval: a task of choices, scored by the server through local-completions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

TASK = """
task: which
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


def main(url: str, name: str, tokenizer: str) -> None:
    folder = Path(tokenizer)
    file = folder / "which.jsonl"
    rows = [{"text": "aaa", "choices": ["a", "zzz"]}, {"text": "bb", "choices": ["b", "yyyy"]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "which.yaml").write_text(TASK.format(file=file))
    arguments: dict[str, Any] = {
        "model": name,
        "base_url": f"{url}/completions",
        "tokenizer": tokenizer,
        "tokenized_requests": False,
        "max_length": 512,
        "max_retries": 1,
        "num_concurrent": 2,
    }
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=arguments,
        tasks=["which"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    print(json.dumps([sample["filtered_resps"] for sample in found["samples"]["which"]]))
    print("all done")


main(*sys.argv[1:])
