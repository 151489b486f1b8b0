"""The suites of tasks that have a name here, and the paper's results."""

from typing import NamedTuple


class Benchmark(NamedTuple):
    """One task of lm_eval: examples in its prompts, the metric that is shown, and its folder in lm_eval."""

    num_fewshot: int
    metric: str
    folder: str


# The tasks of the paper (section 4 and appendix B.1), and LAMBADA. The paper states no number of examples. MMLU and
# TriviaQA have 5, as is usual; the others none. A metric is lm_eval's, with the filter of the task behind a comma.
PAPER: dict[str, Benchmark] = {
    "mmlu": Benchmark(5, "acc,none", "mmlu/default"),
    "triviaqa": Benchmark(5, "exact_match,remove_whitespace", "triviaqa"),
    "arc_easy": Benchmark(0, "acc_norm,none", "arc"),
    "arc_challenge": Benchmark(0, "acc_norm,none", "arc"),
    "piqa": Benchmark(0, "acc_norm,none", "piqa"),
    "hellaswag": Benchmark(0, "acc_norm,none", "hellaswag"),
    "openbookqa": Benchmark(0, "acc_norm,none", "openbookqa"),
    "winogrande": Benchmark(0, "acc,none", "winogrande"),
    "lambada_openai": Benchmark(0, "acc,none", "lambada"),
}
# Those of RULER's tasks that are made from nothing but the tokenizer: the others download texts whenever they run.
RULER_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
RULER: dict[str, Benchmark] = {
    name: Benchmark(0, "", "ruler")
    for name in ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
}
SUITES: dict[str, dict[str, Benchmark]] = {"paper": PAPER, "ruler": RULER}
BENCHMARKS: dict[str, Benchmark] = PAPER | RULER

# Table 3 of the paper: the mean over these, in percent. It is not said which accuracy is meant.
OF_TABLE_3 = ("mmlu", "triviaqa", "piqa", "hellaswag", "openbookqa", "winogrande")
TABLE_3: dict[str, dict[str, float]] = {
    "320M": {"Llama3": 43.99, "Mamba2": 43.07, "Jamba": 44.31, "TransXSSM": 45.22},
    "1.3B": {"Llama3": 50.36, "Mamba2": 49.07, "Jamba": 51.07, "TransXSSM": 52.44},
}
