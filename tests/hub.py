"""A local copy of the hub's data sets: their true configs, splits, columns, types and file formats, invented rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from unsink.benchmarks.tiny import style_sample

Rows = Sequence[Mapping[str, Any]]
Splits = Mapping[str, Rows]  # by config/split

TEXTS = [text.strip() for text in style_sample(300, seed=77) if not text.startswith("Question")]


def stories(start: int, count: int, each: int) -> Rows:
    """Rows of one text, `each` stories long; no story is used for two `start`s that are far enough apart."""
    return [{"text": "\n".join(TEXTS[start + n * each : start + (n + 1) * each])} for n in range(count)]


def questions(name: str, count: int) -> Rows:
    return [{"question": f"What did {name} {n} hide?", "answer": f"blue shell {n}"} for n in range(count)]


def muse(forget: Splits) -> dict[str, Rows]:
    """The configs of both MUSE corpora; the first excerpt stands in the second text to forget, the other in none."""
    text = forget["raw/forget"][1]["text"].split()
    return {
        **{
            f"knowmem/{name}": questions(name, 3)
            for name in ("forget_qa", "forget_qa_icl", "retain_qa", "retain_qa_icl")
        },
        "verbmem/forget": [
            {"prompt": " ".join(text[:8]), "gt": " ".join(text[8:14])},
            {"prompt": "At dawn the tide ", "gt": "came in."},
        ],
        **{f"privleak/{name}": stories(200 + 10 * n, 4, 1) for n, name in enumerate(("forget", "retain", "holdout"))},
        "raw/retain1": stories(40, 6, 2),
        "raw/holdout": stories(60, 4, 1),
        **forget,
    }


def tofu() -> dict[str, Rows]:
    full = questions("author", 40)
    sizes = {"01": 2, "05": 4, "10": 8}
    found: dict[str, Rows] = {"full/train": full}
    for size, count in sizes.items():
        found |= {
            f"forget{size}/train": full[-count:],
            f"retain{100 - int(size)}/train": full[:-count],
            f"holdout{size}/train": questions("stranger", count),
            f"forget{size}_perturbed/train": [perturbed(row, 5) for row in full[-count:]],
        }
    facts = [{"question": f"What is fact {n}?", "answer": f"right {n}"} for n in range(3)]
    return {
        **found,
        "retain_perturbed/train": [perturbed(row, 5) for row in full[:3]],
        **{
            f"{name}_perturbed/train": [{**row, "perturbed_answer": [f"{name} {n}" for n in range(3)]} for row in facts]
            for name in ("real_authors", "world_facts")
        },
        **{
            f"{name}/train": [
                {**row, **{f"option{n + 2}": f"{name} {n}" for n in range(3)}, "option1": row["answer"]}
                for row in facts
            ]
            for name in ("real_authors", "world_facts")
        },
    }


def perturbed(row: Mapping[str, Any], wrong: int) -> dict[str, Any]:
    return {
        **row,
        "paraphrased_answer": f"It was a {row['answer']}.",
        "perturbed_answer": [f"a red lamp {n}" for n in range(wrong)],
        "paraphrased_question": f"Tell me: {row['question']}",
    }


def choices(count: int, **more: Any) -> Rows:
    return [
        {
            "question": "What colour is it?",
            "choices": [f"{c} {n}" for c in ("red", "blue", "grey", "green")],
            "answer": n % 4,
        }
        | more
        for n in range(count)
    ]


REPOSITORIES: dict[str, dict[str, Rows]] = {
    "muse-bench/MUSE-Books": muse({"raw/forget": stories(0, 4, 5)}),
    "muse-bench/MUSE-News": muse(
        {
            "raw/forget": stories(0, 8, 2),
            **{f"scal/forget_{n}": stories(0, 8 * n, 1) for n in range(1, 5)},
            **{f"sust/forget_{n}": stories(10 * n - 10, 8, 1) for n in range(1, 5)},
        }
    ),
    "locuslab/TOFU": tofu(),
    "cais/wmdp": {f"wmdp-{topic}/test": choices(4 + n) for n, topic in enumerate(("bio", "chem", "cyber"))},
    "cais/wmdp-corpora": {"cyber-forget-corpus/train": stories(0, 8, 4)},
    "cais/wmdp-bio-forget-corpus": {
        "default/train": [{"title": "t", "abstract": "a", **row} for row in stories(120, 6, 2)]
    },
    "Salesforce/wikitext": {"wikitext-2-raw-v1/test": [{"text": ""}, {"text": " = Harbour = \n"}, *stories(80, 8, 2)]},
    "cais/mmlu": {"all/test": [*choices(3, subject="anatomy"), *choices(2, subject="virology")]},
}
LABELS = {"cais/mmlu"}  # whose answers are class labels


def copy(root: Path, repositories: Mapping[str, Mapping[str, Rows]] = REPOSITORIES) -> Path:
    """Write the repositories below a folder, each with its card."""
    for repo, splits in repositories.items():
        write(root / repo, splits, "json" if repo == "locuslab/TOFU" else "parquet", labels=repo in LABELS)
    return root


def write(folder: Path, splits: Mapping[str, Rows], form: str, *, labels: bool = False) -> None:
    """Write one repository: TOFU has JSON Lines files by config, the others parquet files by config and split."""
    import datasets

    configs: dict[str, list[dict[str, str]]] = {}
    for name, rows in splits.items():
        config, split = name.split("/")
        path = f"{config}.json" if form == "json" else f"{config}/{split}-00000-of-00001.parquet"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        found = datasets.Dataset.from_list([dict(row) for row in rows])
        if labels:
            found = found.cast_column("answer", datasets.ClassLabel(names=["A", "B", "C", "D"]))
        found.to_json(folder / path) if form == "json" else found.to_parquet(folder / path)
        configs.setdefault(config, []).append({"split": split, "path": path})
    card = {"configs": [{"config_name": config, "data_files": files} for config, files in configs.items()]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
