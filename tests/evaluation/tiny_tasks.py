"""Three small tasks for lm_eval, one of each kind of request."""

import json
from pathlib import Path

_TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
fewshot_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}metric_list:
  - {{metric: {metric}, aggregation: {aggregation}, higher_is_better: true}}
metadata: {{version: 2.5}}
"""
# Kind of request -> the rest of the task.
_KINDS = {
    "multiple_choice": ("{{question}}", "right", 'doc_to_choice: "{{choices}}"\n', "acc", "mean"),
    "generate_until": (
        "{{question}}",
        "{{choices[right]}}",
        'generation_kwargs: {until: ["e", "("], max_gen_toks: 8}\n',
        "exact_match",
        "mean",
    ),
    "loglikelihood_rolling": ("", "{{text}}", "", "bits_per_byte", "bits_per_byte"),
}


def write_tasks(folder: Path, questions: int = 12) -> dict[str, Path]:
    """Kind of request -> the file of a task of so many questions, some longer than 32 tokens, with three choices."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "questions.jsonl"
    lines = [
        {
            "question": f"{'value + ' * (number % 5 * 4)}def function_{number}(value):",
            "choices": [f" return value + {number}", " return", f" value {number}"],
            "right": number % 3,
            "text": f"def function_{number}(value): return value + {number} " * (1 + number % 4),
        }
        for number in range(questions)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {}
    for kind, (text, target, more, metric, aggregation) in _KINDS.items():
        files[kind] = folder / f"{kind}.yaml"
        parts = {"text": text, "target": target, "more": more, "metric": metric, "aggregation": aggregation}
        files[kind].write_text(_TASK.format(name=f"tiny_{kind}", data=data, kind=kind, **parts))
    return files
