"""The arms of the accuracy study and the jobs of its stages: what is run, at which budget, rate, size and seed."""

from typing import Any

__all__ = ["ARMS", "BUDGET", "COMPARISONS", "STAGES", "STEPS", "TASKS", "job"]

TASKS = ("movies", "rating", "tweets", "news", "authors")
BUDGET = 38_400  # a soft prompt of 100 tokens at d = 384
HEAD_RATE = 0.005
HALF = {"prompt_length": 2, "num_spaces": 0, "token_rank": 24}  # 19,200 parameters; the best of the variants looked at
DEEP = {"prompt_length": 2, "num_spaces": 0, "token_rank": 4, "deep_layers": 5, "token_dropout": 0.0}  # 19,200
DROPOUT = {"token_dropout": 0.25}
STEPS = 150  # of 32 rows
ALL_ROWS = 1_000_000  # more than any task has

Job = dict[str, Any]


def job(arm: str, method: str, rate: float, task: str, rows: int, seed: int, **more: Any) -> Job:
    if method == "EPT":  # said in every job, since a preset moves on: the stages before `final` had no dropout
        more["settings"] = {"token_dropout": 0.0} | more.get("settings", {})
    common = {"budget": BUDGET, "steps": STEPS, "reads_test": False, "dtype": "bfloat16", "head_rate": HEAD_RATE}
    return {"arm": arm, "method": method, "rate": rate, "task": task, "rows": rows, "seed": seed} | common | more


def _looked_at(variants: dict[str, dict[str, Any]], **more: Any) -> list[Job]:
    """EPT with each variant's changes, on the dev parts of three tasks at one seed."""
    common = dict[str, Any](method="EPT", rate=1.0, rows=2000, seed=0) | more
    return [
        job(name, **common | {"task": task} | changes)
        for name, changes in variants.items()
        for task in ("movies", "tweets", "authors")
    ]


def explore() -> list[Job]:
    """EPT's variants on the dev parts: which parts, how many rows, which rates."""
    variants: dict[str, dict[str, Any]] = {
        "default": {},
        "s=2 q=49": {"settings": {"prompt_length": 2, "num_spaces": 0, "token_rank": 49}},
        "LoRA .005": {"method": "LoRA", "rate": 0.005},
        "s=2 q=24": {"settings": HALF},
        "rate 0.5": {"rate": 0.5},
        "head .005": {"head_rate": 0.005},
        "s=8 q=46": {"settings": {"prompt_length": 8, "num_spaces": 0, "token_rank": 46}},
        "prompt .3": {"rates": {"prompt_learning_rate": 0.3}},
        "down .004": {"rates": {"down_learning_rate": 0.004}},
        "up .009": {"rates": {"learning_rate": 0.009}},
    }
    return _looked_at(variants, head_rate=0.02)


def regularise() -> list[Job]:
    """What keeps the token-conditioned update from learning the training rows by heart."""
    variants: dict[str, dict[str, Any]] = {
        "head only": {"method": "head only", "rate": 0.02},
        "prompt tuning 20": {"method": "prompt tuning 20", "rate": 0.005},
        "q=24 up .0045": {"settings": HALF, "rates": {"learning_rate": 0.0045}},
        "q=24 up .0045 head .005": {"settings": HALF, "rates": {"learning_rate": 0.0045}, "head_rate": 0.005},
        "q=24 rate .25 head .005": {"settings": HALF, "rate": 0.25, "head_rate": 0.005},
        "q=8": {"settings": HALF | {"token_rank": 8}},
        "q=8 up .0045": {"settings": HALF | {"token_rank": 8}, "rates": {"learning_rate": 0.0045}},
    }
    return _looked_at(variants, head_rate=0.02)


def combine() -> list[Job]:
    """The head's rate, for EPT and its peers, with what helped before."""
    fast = {"down_learning_rate": 0.004}
    variants: dict[str, dict[str, Any]] = {
        "s=2 q=24": {"settings": HALF},
        "s=2 q=24, down .004": {"settings": HALF, "rates": fast},
        "LoRA .005": {"method": "LoRA", "rate": 0.005},
        "s=4 q=47, down .004": {"settings": HALF | {"prompt_length": 4, "token_rank": 47}, "rates": fast},
        "default, down .004": {"rates": fast},
        "s=2 q=49": {"settings": HALF | {"token_rank": 49}},
        "prompt tuning 20": {"method": "prompt tuning 20", "rate": 0.005},
        "LoRA .002": {"method": "LoRA", "rate": 0.002},
        "s=2 q=24, down .004, prompt .3": {"settings": HALF, "rates": fast | {"prompt_learning_rate": 0.3}},
        "s=2 q=24, down .016": {"settings": HALF, "rates": {"down_learning_rate": 0.016}},
        "s=2 q=24, relu": {"settings": HALF | {"activation": "relu"}, "rates": fast},
    }
    return _looked_at(variants)


def precision() -> list[Job]:
    """Whether a bfloat16 encoder changes what is learnt."""
    return [
        job(f"{method} {dtype}", method, rate, "movies", 2000, seed, dtype=dtype)
        for seed in (0, 1)
        for method, rate in (("EPT", 1.0), ("LoRA", 0.005))
        for dtype in ("float32", "bfloat16")
    ]


def search() -> list[Job]:
    """Three learning rates for each method, on the dev parts of two tasks."""
    rates = {
        "LoRA": (0.005, 0.002, 0.01), "prompt tuning 20": (0.005, 0.0025, 0.01), "EPT": (1.0, 0.5, 2.0),
        "EPT paper": (1.0, 0.5, 2.0), "BitFit": (0.002, 0.001, 0.005), "head only": (0.005, 0.02, 0.05),
    }  # fmt: skip
    return [
        job(f"{method} {rate:g}", method, rate, task, 2000, 0, dtype="float32" if method == "BitFit" else "bfloat16")
        for method, tried in rates.items()
        for rate in tried
        for task in ("movies", "tweets")
    ]


def rates() -> list[Job]:
    """Whether EPT's default rates are the best of three on the tasks that `search` left out, and with its dropout."""
    return [
        job(f"EPT, {shape} {rate:g}", "EPT", rate, task, 2000, 0, settings=settings)
        for shape, settings in (("half", HALF | DROPOUT), ("deep", DEEP))
        for task in TASKS
        for rate in (1.0, 0.5, 2.0)
    ]


def few_steps() -> list[Job]:
    """Whether 40 steps want higher rates: dev parts of two tasks, two seeds of no final run."""
    arms: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
        "EPT, deep": ({"method": "EPT", "settings": DEEP}, (1.0, 2.0, 4.0)),
        "LoRA r=2": ({"method": "LoRA", "budget": 18_432}, (0.005, 0.01, 0.02)),
    }
    common = dict[str, Any](rows=2000, steps=40)
    return [
        job(f"{arm}, 40 steps {rate:g}", **common | told | {"task": task, "seed": seed, "rate": rate})
        for seed in (5, 6)
        for task in ("movies", "tweets")
        for arm, (told, tried) in arms.items()
        for rate in tried
    ]


# Arm -> method and what it is built with; the rates are those that `search` chose.
ARMS: dict[str, dict[str, Any]] = {
    "EPT": {"method": "EPT", "rate": 1.0, "settings": DROPOUT},
    "LoRA r=4": {"method": "LoRA", "rate": 0.005},
    "prompt tuning 20": {"method": "prompt tuning 20", "rate": 0.005},
    "EPT, half": {"method": "EPT", "rate": 1.0, "settings": HALF | DROPOUT},
    "head only": {"method": "head only", "rate": 0.02},
    "EPT, deep": {"method": "EPT", "rate": 1.0, "settings": DEEP},
    "EPT, deep q=8": {"method": "EPT", "rate": 1.0, "settings": DEEP | {"token_rank": 8}},
    "LoRA r=2": {"method": "LoRA", "rate": 0.005, "budget": 18_432},
    "EPT, no dropout": {"method": "EPT", "rate": 1.0},
    "EPT, half, no dropout": {"method": "EPT", "rate": 1.0, "settings": HALF},
    "EPT paper": {"method": "EPT paper", "rate": 2.0},
    "LoRA, a tenth": {"method": "LoRA", "rate": 0.005, "budget": 3_840},
    "EPT, a tenth": {"method": "EPT", "rate": 1.0, "budget": 3_840, "settings": DROPOUT},
    "prompt tuning 10": {"method": "prompt tuning 10", "rate": 0.005},
    "BitFit": {"method": "BitFit", "rate": 0.005, "dtype": "float32"},
    "prompt tuning 100": {"method": "prompt tuning 100", "rate": 0.005},
    "DePT": {"method": "DePT", "rate": 2.0},
    "full fine-tuning": {"method": "full", "rate": 0.0001, "dtype": "float32"},
}
FIRST = 8  # arms whose runs with three seeds and both sizes come first
COMPARISONS = [
    ("EPT", "prompt tuning 20"), ("EPT", "prompt tuning 100"), ("EPT", "DePT"), ("EPT", "EPT paper"),
    ("EPT", "LoRA r=4"), ("EPT", "EPT, half"), ("EPT", "head only"),
    ("EPT, half", "LoRA r=4"), ("EPT, half", "LoRA"), ("EPT, half", "prompt tuning 20"),
    ("EPT, deep", "LoRA r=4"), ("EPT, deep", "LoRA r=2"), ("EPT, deep", "EPT, half"), ("EPT, deep", "prompt tuning 20"),
    ("EPT, deep", "prompt tuning 100"), ("EPT, deep", "prompt tuning 10"), ("EPT, deep", "DePT"), ("EPT, deep", "EPT paper"),
    ("EPT, deep", "BitFit"), ("EPT, deep", "LoRA"), ("EPT, deep q=8", "LoRA r=4"), ("EPT, deep q=8", "EPT, deep"),
    ("EPT, deep q=8", "full fine-tuning"),
    ("EPT", "EPT, no dropout"), ("EPT, half", "EPT, half, no dropout"), ("EPT", "prompt tuning 10"),
    ("EPT, a tenth", "LoRA, a tenth"), ("EPT, a tenth", "prompt tuning 10"),
]  # fmt: skip


def final() -> list[Job]:
    """Five seeds, the test parts; what matters most first."""
    arms = list(ARMS)
    order = [(arm, rows, seed) for rows in (2000, 500) for seed in range(3) for arm in arms[:FIRST]]
    order += [(arm, rows, seed) for rows in (2000, 500) for seed in range(3) for arm in arms[FIRST:]]
    order += [(arm, rows, seed) for rows in (2000, 500) for seed in (3, 4) for arm in arms]
    return [
        job(arm, **dict[str, Any](task=task, rows=rows, seed=seed, reads_test=True) | ARMS[arm])
        for arm, rows, seed in order
        for task in TASKS
    ]


# As many steps as fit into the input-only preset's time for 150, where that is fewer: bench/results/accuracy/step_time.json.
EQUAL_TIME_STEPS = {
    "prompt tuning 20": 104, "prompt tuning 10": 129, "prompt tuning 100": 36, "DePT": 73, "EPT paper": 71, "BitFit": 89,
    "full fine-tuning": 52,
}  # fmt: skip


def equal_time() -> list[Job]:
    """One seed, the test parts: the slower arms with fewer steps, the others as they are."""
    arms = [*EQUAL_TIME_STEPS, "EPT", "EPT, half", "EPT, deep", "LoRA r=4"]
    return [
        job(arm, **dict[str, Any](task=task, rows=2000, seed=0, reads_test=True) | ARMS[arm])
        | {"steps": EQUAL_TIME_STEPS.get(arm, STEPS)}
        for arm in arms
        for task in TASKS
    ]


def whole_sets() -> list[Job]:
    """One seed, the test parts, all training rows (up to 9,105; of news the 2,000 rows are all), 300 steps."""
    arms = ("LoRA r=4", "EPT, deep", "prompt tuning 20", "EPT, half")
    return [
        job(arm, **dict[str, Any](task=task, rows=ALL_ROWS, seed=0, steps=300, reads_test=True) | ARMS[arm])
        for arm in arms
        for task in TASKS
        if task != "news"
    ]


# SmolLM2-135M: 100 steps of 16 rows of at most 24 tokens, which is what these machines have time for.
SMOLLM2 = {"backbone": "smollm2", "steps": 100, "batch_size": 16, "max_length": 24, "budget": 57_600, "rows": 2000}
SMOLLM2_DEEP = DEEP | {"token_rank": 1, "deep_layers": 29}  # 35,712 parameters
SMOLLM2_DEFAULT = {"settings": DEEP | {"deep_layers": 29}, "budget": 139_392}
SMOLLM2_ARMS: dict[str, dict[str, Any]] = {  # the rates are those that `smollm2` chose; EPT's is its default
    "EPT, default": {"method": "EPT", "rate": 1.0} | SMOLLM2_DEFAULT,
    "LoRA r=2": {"method": "LoRA", "rate": 0.008, "budget": 115_200},
    "EPT, deep": {"method": "EPT", "rate": 1.0, "settings": SMOLLM2_DEEP},
    "LoRA": {"method": "LoRA", "rate": 0.008},
    "prompt tuning 20": {"method": "prompt tuning 20", "rate": 0.024},
    "EPT, half": {"method": "EPT", "rate": 0.5, "settings": HALF | DROPOUT},
}


def _searched(shape: Job, arms: dict[str, dict[str, Any]], rates: dict[str, tuple[float, ...]]) -> list[Job]:
    """A language model's arms at each of their rates, on the dev part of tweets at one seed."""
    common = dict[str, Any](task="tweets", seed=0) | shape
    return [
        job(f"{arm} {rate:g}", **common | arms[arm] | {"rate": rate}) for arm, tried in rates.items() for rate in tried
    ]


def _finals(shape: Job, arms: dict[str, dict[str, Any]]) -> list[Job]:
    """A language model's arms on the test parts of two tasks: five seeds of what is compared, one of the others."""
    common = dict[str, Any](reads_test=True) | shape
    return [
        job(arm, **common | told | {"task": task, "seed": seed})
        for seed in range(5)
        for task in ("tweets", "movies")
        for arm, told in arms.items()
        if seed == 0 or arm in ("EPT, default", "LoRA r=2", "EPT, deep", "LoRA")
    ]


def smollm2() -> list[Job]:
    """Learning rates of other methods on the dev part of tweets: three, and more beyond the end where the best stood.

    EPT's are `smollm2_rates`. Those of prompt tuning are EPT's for P in this backbone's unit (e = 0.13); LoRA's are a language
    model's.
    """
    rates = {
        "EPT, half": (1.0, 0.5, 2.0, 0.25),
        "LoRA": (0.001, 0.0005, 0.002, 0.004, 0.008, 0.016),
        "LoRA r=2": (0.008, 0.004, 0.016),
        "prompt tuning 20": (0.012, 0.006, 0.024, 0.048),
    }
    slow_w = SMOLLM2_ARMS["EPT, half"] | {"rate": 1.0, "rates": {"learning_rate": 0.0045}}
    alone = job("EPT, half, W 0.25", **dict[str, Any](task="tweets", seed=0) | SMOLLM2 | slow_w)
    return [*_searched(SMOLLM2, SMOLLM2_ARMS, rates), alone]


def smollm2_final() -> list[Job]:
    """The test parts on SmolLM2-135M."""
    return _finals(SMOLLM2, SMOLLM2_ARMS)


# The paper's parts beside prompt tuning at equal parameters: budget 20 rows, 1,000 steps of 8 rows of at most 32 tokens.
# The low-rank pair covers 32 positions; the spaces are two of width 1.
LONG = {"steps": 1000, "batch_size": 8, "max_length": 32, "budget": 7_680, "rows": ALL_ROWS}
PAPER = {"max_text_length": 32, "num_spaces": 2, "space_dim": 1}


def _paper(prompt: float, others: float) -> Job:
    """The paper's form with its prompt's rate and those of all other parts as multiples of their defaults."""
    rates = {
        "prompt_learning_rate": 0.09 * prompt,
        "up_learning_rate": 0.018 * others,
        "down_learning_rate": 0.001 * others,
    }
    return {"method": "EPT paper", "rate": 1.0, "settings": PAPER, "rates": rates}


def paper_search() -> list[Job]:
    """Rates on SST-2's dev part: the prompt's and the other parts' apart, and those of prompt tuning."""
    tried = ((4, 0.4), (1, 0.4), (4, 0.1), (4, 0.02), (4, 0.004))
    common = dict[str, Any](task="sst2", seed=9) | LONG
    jobs = [
        job(f"EPT paper, prompt {prompt:g}, others {others:g}", **common | _paper(prompt, others))
        for prompt, others in tried
    ]
    rates = (0.005, 0.01, 0.02, 0.04)
    peers = [
        job(f"prompt tuning 20 {rate:g}", **common | {"method": "prompt tuning 20", "rate": rate}) for rate in rates
    ]
    return jobs + peers


PAPER_ARMS: dict[str, dict[str, Any]] = {  # at the rates that `paper_search` chose
    "EPT paper": _paper(4, 0.02),
    "prompt tuning 20": {"method": "prompt tuning 20", "rate": 0.02},
    "prompt tuning 6": {"method": "prompt tuning 6", "rate": 0.02},  # the paper's form's own prompt alone
}


def paper_final() -> list[Job]:
    """Five seeds, SST-2's test part, then CoLA's."""
    common = dict[str, Any](reads_test=True) | LONG
    return [
        job(arm, **common | told | {"task": task, "seed": seed})
        for task in ("sst2", "cola")
        for arms in (("EPT paper", "prompt tuning 20"), ("prompt tuning 6",))
        for seed in range(5)
        for arm, told in PAPER_ARMS.items()
        if arm in arms
    ]


# LoRA on all linear layers: r = 1 is 41,472 parameters.
LORA_ALL: Job = {"method": "LoRA all", "budget": 41_472}


def lora_all() -> list[Job]:
    """Rates of LoRA on all linear layers, as `search` has them: ten times full fine-tuning's (0.001) among them."""
    return [
        job(f"LoRA, all linear {rate:g}", task=task, rows=2000, seed=0, rate=rate, **LORA_ALL)
        for rate in (0.005, 0.0025, 0.01, 0.001)
        for task in ("tweets", "movies")
    ]


def lora_all_final() -> list[Job]:
    """Five seeds, the test parts, beside the default preset with as many parameters of stage `final`."""
    arms = {"LoRA, all linear": LORA_ALL | {"rate": 0.005}}
    return [
        job(arm, **dict[str, Any](task=task, rows=2000, seed=seed, reads_test=True) | told)
        for task in ("tweets", "movies", "rating", "authors", "news")
        for seed in range(5)
        for arm, told in arms.items()
    ]


def glue() -> list[Job]:
    """GLUE's three tasks on MiniLM, five seeds, the test parts; rates as in `final`."""
    arms = {
        arm: ARMS[arm]
        for arm in ("EPT, deep", "EPT, deep q=8", "LoRA r=2", "LoRA r=4", "prompt tuning 20", "head only")
    }
    arms["LoRA, all linear"] = LORA_ALL | {"rate": 0.005}
    return [
        job(arm, **dict[str, Any](task=task, rows=2000, seed=seed, reads_test=True) | told)
        for seed in range(5)
        for task in ("sst2", "cola", "mrpc")
        for arm, told in arms.items()
    ]


def glue_rates() -> list[Job]:
    """Whether GLUE's tasks want other rates than sentiment, from which those of `final` come: dev parts, seeds of no final
    run, two on CoLA, whose rows are short."""
    tried: dict[str, tuple[float, ...]] = {"EPT, deep": (1.0, 2.0, 4.0), "LoRA r=2": (0.005, 0.01, 0.02)}
    return [
        job(f"{arm} {rate:g}", **dict[str, Any](task=task, rows=2000, seed=seed) | ARMS[arm] | {"rate": rate})
        for task, seed in (("cola", 5), ("cola", 6), ("mrpc", 5))
        for arm, rates in tried.items()
        for rate in rates
    ]


# Gemma 3 270M, as SmolLM2: with q = 2 EPT has 47,360 parameters, LoRA r = 1 on query and value 46,080.
GEMMA3 = SMOLLM2 | {"backbone": "gemma3", "budget": 47_360}
GEMMA3_DEFAULT = {"settings": DEEP | {"deep_layers": 17}, "budget": 93_440}
GEMMA3_ARMS: dict[str, dict[str, Any]] = {  # EPT's default, LoRA's as `gemma3` chose, prompt tuning's is SmolLM2's
    "EPT, default": {"method": "EPT", "rate": 1.0} | GEMMA3_DEFAULT,
    "LoRA r=2": {"method": "LoRA", "rate": 0.004, "budget": 92_160},
    "EPT, deep": {"method": "EPT", "rate": 1.0, "settings": DEEP | {"token_rank": 2, "deep_layers": 17}},
    "LoRA": {"method": "LoRA", "rate": 0.004},
    "prompt tuning 20": {"method": "prompt tuning 20", "rate": 0.024},
}


def gemma3() -> list[Job]:
    """Learning rates of other methods on the dev part of tweets, as `smollm2`; EPT's are `gemma3_rates`."""
    rates = {
        "LoRA": (0.008, 0.004, 0.016, 0.002),
        "LoRA r=2": (0.004, 0.002, 0.008),
        "prompt tuning 20": (0.024, 0.012, 0.048),
    }
    return _searched(GEMMA3, GEMMA3_ARMS, rates)


def gemma3_final() -> list[Job]:
    """The test parts on Gemma 3 270M."""
    return _finals(GEMMA3, GEMMA3_ARMS)


def _default_rates(common: Job, preset: dict[str, Any], more: dict[int, dict[str, dict[str, float]]]) -> list[Job]:
    """The default preset at its rates, twice and half of them: dev parts of two tasks, seeds of no final run.

    Args:
        more: seed -> arm -> its rates, where they stand for themselves.
    """
    told = dict[str, Any](method="EPT", rate=1.0) | common | preset
    jobs = [
        job(f"EPT, deep q=4 {rate:g}", **told | {"task": task, "seed": seed, "rate": rate})
        for seed in (5, 6)
        for task in ("movies", "tweets")
        for rate in (1.0, 0.5, 2.0)
    ]
    others = [
        job(arm, **told | {"task": task, "seed": seed, "rates": rates or None})
        for seed, arms in more.items()
        for task in ("movies", "tweets")
        for arm, rates in arms.items()
    ]
    return jobs + others


def gemma3_rates() -> list[Job]:
    """The default preset's rates on Gemma 3 270M; one more seed at half of MiniLM's, which were best at the first."""
    half = {"EPT, deep q=4, full rate, 0.5": {"deep_learning_rate": 0.0025, "prompt_learning_rate": 0.045}}
    return _default_rates(GEMMA3, GEMMA3_DEFAULT, {6: half})


def smollm2_rates() -> list[Job]:
    """The default preset's rates on SmolLM2-135M; one more seed at its own and at MiniLM's, which lie close."""
    two = {"EPT, deep q=4 1": {}, "EPT, deep q=4, full rate, 1": {"deep_learning_rate": 0.005}}
    return _default_rates(SMOLLM2, SMOLLM2_DEFAULT, {7: two})


def narrow_rates() -> list[Job]:
    """Whether fewer hidden units than four want a faster rate: two on Gemma 3 and one on SmolLM2 at the layers' default rate and
    above it, as multiples of MiniLM's. Dev parts, seeds of no final run."""
    tried = (
        ("Gemma 3, q = 2", GEMMA3, GEMMA3_ARMS, (0.3, 0.42, 0.5)),
        ("SmolLM2, q = 1", SMOLLM2, SMOLLM2_ARMS, (0.7, 1.0)),
    )
    return [
        job(
            f"{name}, {factor:g}",
            **dict[str, Any](shape)
            | arms["EPT, deep"]
            | {"task": task, "seed": seed, "rates": {"deep_learning_rate": 0.005 * factor}},
        )
        for name, shape, arms, factors in tried
        for seed in (5, 6)
        for task in ("movies", "tweets")
        for factor in factors
    ]


# GLUE's tasks as text that SmolLM2-135M writes: rows of at most 32 tokens, the default preset beside LoRA r = 2.
WRITTEN = SMOLLM2 | {"form": "written", "max_length": 32}
WRITTEN_ARMS: dict[str, dict[str, Any]] = {  # the rates are those that `written_search` chose
    "EPT, default, half its rate": SMOLLM2_ARMS["EPT, default"] | {"rate": 0.5},
    "LoRA r=2": SMOLLM2_ARMS["LoRA r=2"] | {"rate": 0.004},
}


def written_search() -> list[Job]:
    """Rates on the dev part of SST-2 at a seed of no final run: EPT's default and half of it, three of LoRA."""
    rates = {"EPT, default": (1.0, 0.5), "LoRA r=2": (0.008, 0.004, 0.002)}
    return _searched(WRITTEN | {"task": "sst2", "seed": 5}, SMOLLM2_ARMS, rates)


def written() -> list[Job]:
    """Three seeds, the test parts."""
    return [
        job(arm, **dict[str, Any](WRITTEN) | told | {"task": task, "seed": seed, "reads_test": True})
        for task in ("sst2", "cola")
        for seed in range(3)
        for arm, told in WRITTEN_ARMS.items()
    ]


# BBC's headlines, from the first words of each article: all 963 training rows.
HEADLINES = WRITTEN | {"task": "headlines", "max_length": 64}
# Of twice EPT's default size, at which LoRA's form for all linear layers begins.
HEADLINES_LARGER: dict[str, dict[str, Any]] = {
    "EPT, q=8": {
        "method": "EPT", "rate": 1.0, "settings": DEEP | {"deep_layers": 29, "token_rank": 8}, "budget": 277_632,
    },
    "LoRA, all linear": {"method": "LoRA all", "rate": 0.004, "budget": 305_280},
}  # fmt: skip


def headlines_search() -> list[Job]:
    """Rates on the dev part at a seed of no final run, as many for both arms; and the larger arms'."""
    rates: dict[str, tuple[float, ...]] = {
        "EPT, default": (1.0, 0.5, 0.25), "LoRA r=2": (0.016, 0.008, 0.004), "EPT, q=8": (1.0, 0.5),
        "LoRA, all linear": (0.002, 0.008, 0.004),
    }  # fmt: skip
    return _searched(HEADLINES | {"seed": 5}, SMOLLM2_ARMS | HEADLINES_LARGER, rates)


def headlines() -> list[Job]:
    """Five seeds, the test part, at the rates that `headlines_search` chose: EPT's default and LoRA's for labels, then the larger
    arms."""
    return [*_over_seeds(HEADLINES, _of_one_size(SMOLLM2_ARMS)), *_over_seeds(HEADLINES, HEADLINES_LARGER)]


def _over_seeds(shape: Job, arms: dict[str, dict[str, Any]]) -> list[Job]:
    """Arms on the test part at five seeds."""
    return [
        job(arm, **shape | told | {"seed": seed, "reads_test": True}) for seed in range(5) for arm, told in arms.items()
    ]


def _of_one_size(arms: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A language model's default preset and LoRA of about its size."""
    return {name: arms[name] for name in ("EPT, default", "LoRA r=2")}


GEMMA3_HEADLINES = HEADLINES | {"backbone": "gemma3"}


def gemma3_headlines_search() -> list[Job]:
    """Rates on Gemma 3 270M, as `headlines_search`."""
    rates: dict[str, tuple[float, ...]] = {"LoRA r=2": (0.004, 0.008, 0.002), "EPT, default": (1.0, 0.5, 2.0)}
    return _searched(GEMMA3_HEADLINES | {"seed": 5}, GEMMA3_ARMS, rates)


def gemma3_headlines() -> list[Job]:
    """Five seeds, the test part, on Gemma 3 270M: EPT's default, and LoRA's for labels."""
    return _over_seeds(GEMMA3_HEADLINES, _of_one_size(GEMMA3_ARMS))


STAGES = {
    "explore": explore, "regularise": regularise, "combine": combine, "precision": precision,
    "search": search, "rates": rates, "final": final, "equal_time": equal_time, "whole_sets": whole_sets, "smollm2": smollm2,
    "smollm2_final": smollm2_final, "paper_search": paper_search, "paper_final": paper_final, "lora_all_final": lora_all_final,
    "lora_all": lora_all, "gemma3": gemma3, "gemma3_final": gemma3_final,
    "gemma3_rates": gemma3_rates, "smollm2_rates": smollm2_rates, "glue": glue, "glue_rates": glue_rates, "few_steps": few_steps,
    "narrow_rates": narrow_rates, "gemma3_headlines_search": gemma3_headlines_search, "gemma3_headlines": gemma3_headlines,
    "written_search": written_search, "written": written, "headlines_search": headlines_search, "headlines": headlines,
}  # fmt: skip
