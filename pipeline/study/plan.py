"""The jobs of a study: which directories they read and write, their arguments, and what each one waits for.

`python -m pipeline.study run` executes them on one machine, slurm/experiment.sh submits them.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from data_prep.readers import read_file
from pipeline.common.atomic_io import read_json_or_none, sha256_file, write_json
from pipeline.common.errors import UserError
from pipeline.compare import MEAN
from pipeline.evaluation.dataset import read_examples
from pipeline.study.continuation import continue_study, is_trained
from pipeline.study.settings import CHOICES, RESULTS_FILE, SETTINGS_FILE, StudySettings

VARIANTS_FILE = Path(__file__).with_name("variants.yaml")


@dataclass(frozen=True)
class Variant:
    """A variant of the recipe; see variants.yaml.

    Attributes:
        tuned: dotted key of the setting that differs between trials.
        settings: settings that differ from the recipe, by dotted key.
        data: `records`, or a data set derived from them (`python -m data_prep derive`).
    """

    name: str
    tuned: str
    settings: dict[str, Any] = field(default_factory=dict)
    data: str = "records"


@dataclass(frozen=True)
class Job:
    """A step of a study.

    Attributes:
        kind: prepare, train, evaluate, choose or compare. The Slurm scripts have these names.
        name: unique name.
        after: names of the jobs that must have succeeded.
        variables: variables of the Slurm script.
        arguments: arguments of the program that the job runs.
        done: whether its results exist.
    """

    kind: str
    name: str
    after: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    done: bool = False


def read_variants() -> tuple[str, list[float], dict[str, Variant]]:
    """Return the name of the baseline, the factors of the trials, and the variants by name."""
    tree = yaml.safe_load(VARIANTS_FILE.read_text(encoding="utf-8"))
    variants = {name: Variant(name, **(entry or {})) for name, entry in tree["variants"].items()}
    return tree["baseline"], tree["factors"], variants


def begin_study(study: StudySettings) -> StudySettings:
    """Check the settings and record them in the output directory, or compare them with those recorded there.

    Returns:
        The settings, with the variants and seeds of earlier calls.

    Raises:
        UserError: a file is missing, a path has whitespace, a variant is unknown or does not fit the recipe, the splits
            share questions, or a setting that may not change has changed.
    """
    baseline, _, variants = read_variants()
    for name in study.variants:
        if name not in variants:
            raise UserError(f"--variants: no variant {name!r}; choose from {', '.join(variants)}")
    if baseline not in study.variants:
        raise UserError(f"--variants: must include the baseline {baseline}")
    for option, path in (("output", study.output), ("model", study.model), *(("train", path) for path in study.train)):
        if any(map(str.isspace, path or "")):  # the job scripts split arguments and INPUT there
            raise UserError(f"--{option}: {path!r} has whitespace, at which the jobs split it; rename it")
    if study.model is None:
        _check_without_model(study, [variants[name] for name in study.variants])
    elif not Path(study.model, "config.json").is_file():
        raise UserError(f"{study.model}: no model there; --model is a Hugging Face directory")
    for path in (study.recipe, *study.train, study.test, study.dev, study.answers):
        if path is not None and not Path(path).is_file():
            raise UserError(f"{path}: no such file")
    _check_splits(study)
    if study.dev:
        recipe_seed = _recipe_value(study, [], "seed")
        if recipe_seed in study.seeds:
            raise UserError(f"--seeds: {recipe_seed} is the seed of the trials (that of the recipe); choose others")
    hashes = {name: sha256_file(Path(path)) for name, path in (("test", study.test), ("dev", study.dev)) if path}
    recorded = read_json_or_none(study.root / SETTINGS_FILE)
    if recorded:
        study = continue_study(study, recorded, hashes)
    for name in study.variants:
        _check_variant(study, variants[name])
    (study.root / CHOICES).mkdir(parents=True, exist_ok=True)
    if study.base and study.model and not (link := study.base / "hf").is_symlink():
        study.base.mkdir(exist_ok=True)
        link.symlink_to(Path(study.model).resolve())
    write_json(study.root / SETTINGS_FILE, {**asdict(study), "sha256": hashes})
    return study


def _check_without_model(study: StudySettings, variants: list[Variant]) -> None:
    """Check that the recipe builds a model, and that no variant needs the vocabulary weights of an existing one."""
    if path := _recipe_value(study, [], "model.path"):
        raise UserError(f"--model: is missing; {study.recipe} does not build a model but loads {path}")
    for variant in variants:
        if _needs_weights(variant):
            raise UserError(f"--model: is missing; the variant {variant.name} has vocabulary weights of a model")


def _check_variant(study: StudySettings, variant: Variant) -> None:
    """Check that the recipe accepts the settings of a variant, and that trials can vary the tuned one."""
    try:
        tuned = _recipe_value(study, variant_arguments(study, variant), variant.tuned)
    except UserError as error:
        raise UserError(f"--variants: {variant.name}: {error}; leave it out, or change the recipe") from None
    if not tuned:
        raise UserError(
            f"--variants: {variant.name}: {study.recipe}: {variant.tuned} is 0, so it would be plain fine-tuning; "
            "leave it out, or change the recipe"
        )


def _check_splits(study: StudySettings) -> None:
    """Check that both splits can be evaluated and have the primary languages, and that they share no question."""
    if MEAN in study.primary and len(study.primary) > 1:
        raise UserError(f"--primary: give either {MEAN} or languages")
    questions = []
    for path in filter(None, (study.test, study.dev)):
        languages = {example.lang for example in read_examples(Path(path))}
        if missing := [lang for lang in study.primary if lang not in (MEAN, *languages)]:
            raise UserError(f"{path}: no records in {missing[0]}, which --primary names")
        rows = [row.value for row in read_file(Path(path))]
        keys = ("lang", "question", "messages")
        questions.append({json.dumps([row.get(key) for key in keys], default=str) for row in rows})
    if common := len(set.intersection(*questions)) if len(questions) > 1 else 0:
        raise UserError(f"{study.dev}: {common} questions are in {study.test} too; settings must be chosen on others")


def common_arguments(study: StudySettings, run: Path, data: str = "records") -> list[str]:
    """Return the arguments of the training command that do not depend on the variant's loss."""
    shards = study.root / f"shards-{data}"
    model = ["--model.path", study.model] if study.model else []
    return [*model, "--data.shards", str(shards), "--output_dir", str(run), *study.train_args.split()]


def variant_arguments(study: StudySettings, variant: Variant) -> list[str]:
    """Return the training arguments that override recipe settings for a variant."""
    arguments = []
    for key, value in variant.settings.items():
        # No spaces, at which the Slurm scripts split arguments.
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        arguments += [f"--{key}", text.replace("{weights}", str(study.root / "weights.safetensors"))]
    return arguments


def trial_arguments(study: StudySettings, variant: Variant, factor: float) -> list[str]:
    """Return the arguments of a trial: the tuned setting, its value multiplied by `factor`."""
    value = _recipe_value(study, variant_arguments(study, variant), variant.tuned)
    return [f"--{variant.tuned}", f"{value * factor:.6g}"]


def _recipe_value(study: StudySettings, arguments: list[str], key: str) -> Any:
    """Return a setting of the recipe as changed by the arguments of all variants and by `arguments`."""
    from pipeline.config.fields import value_of  # these import torch, which takes seconds
    from pipeline.config.recipe import load_config

    return value_of(load_config(study.recipe, common_arguments(study, study.root) + arguments), key)


def plan_jobs(study: StudySettings) -> list[Job]:
    """Return all jobs of a study in an order in which they can run one after another."""
    _, factors, all_variants = read_variants()
    variants = [all_variants[name] for name in study.variants]
    jobs = _prepare_jobs(study, variants)
    base = [_evaluate_job(study, study.base, study.test, ())] if study.base else []
    jobs += base
    before_final: tuple[str, ...] = ()
    if study.dev:
        trials = []
        for variant in variants:
            for number, factor in enumerate(factors, start=1):
                run = study.trial(variant.name, number)
                arguments = tuple(trial_arguments(study, variant, factor))
                jobs_of_trial = _train_and_evaluate(study, variant, run, study.dev, (), {}, arguments)
                is_chosen = study.choice(variant.name).is_file()  # the trials may have been deleted since
                trials += [replace(job, done=job.done or is_chosen) for job in jobs_of_trial]
        waits = tuple(job.name for job in trials if job.kind == "evaluate")
        done = all(study.choice(variant.name).is_file() for variant in variants)
        jobs += [*trials, Job("choose", "choose", waits, {"OUTPUT": study.output}, done=done)]
        before_final = ("choose",)
    final = []
    for variant in variants:
        chosen = {"CHOICE": str(study.choice(variant.name))} if study.dev else {}
        for seed in study.seeds:
            run, arguments = study.run(variant.name, seed), ("--seed", str(seed))
            final += _train_and_evaluate(study, variant, run, study.test, before_final, chosen, arguments)
    jobs += final
    waits = tuple(job.name for job in [*base, *final] if job.kind == "evaluate")
    variables = {"OUTPUT": study.output, "ANSWERS": study.answers or ""}
    done = all(job.done for job in jobs) and _is_compared(study)
    return [*jobs, Job("compare", "compare", waits, variables, done=done)]


def _is_compared(study: StudySettings) -> bool:
    """Return whether the results have all variants and seeds, and the report is not older than what it shows."""
    results, report = read_json_or_none(study.root / RESULTS_FILE), study.report / "report.html"
    names = ["evaluation.json", *(["representations.json"] if study.answers else [])]
    shown = [run / name for run in study.evaluated_runs() for name in names]
    if results is None or not all(path.is_file() for path in [report, *shown]):
        return False
    is_newer = report.stat().st_mtime >= max(path.stat().st_mtime for path in shown)
    return is_newer and results["seeds"] == list(study.seeds) and set(study.variants) <= set(results["variants"])


def _prepare_jobs(study: StudySettings, variants: list[Variant]) -> list[Job]:
    weights = study.root / "weights.safetensors"
    needs_weights = any(map(_needs_weights, variants))
    tokenizer = study.model or _recipe_value(study, [], "data.tokenizer")
    kinds = dict.fromkeys([*(["records"] if needs_weights else []), *(variant.data for variant in variants)])
    jobs = []
    for kind in kinds:
        shards = study.root / f"shards-{kind}"
        variables = {"INPUT": " ".join(study.train), "SHARDS": str(shards), "TOKENIZER": tokenizer}
        done = (shards / "manifest.json").is_file()
        if kind != "records":
            variables["DERIVE"] = kind
        elif needs_weights:
            variables |= {"WEIGHTS": str(weights), "MODEL": study.model or ""}
            done = done and weights.is_file()
        arguments = tuple(study.prepare_args.split())
        jobs.append(Job("prepare", f"prepare-{kind}", (), variables, arguments, done))
    return jobs


def _train_and_evaluate(
    study: StudySettings,
    variant: Variant,
    run: Path,
    data: str,
    after: tuple[str, ...],
    variables: dict[str, str],
    arguments: tuple[str, ...],
) -> list[Job]:
    fixed = common_arguments(study, run, variant.data) + variant_arguments(study, variant)
    train = Job(
        "train",
        f"train-{run.name}",
        (f"prepare-{variant.data}", *_weights_job(variant), *after),
        {"RECIPE": study.recipe, **variables},
        (*fixed, *arguments),
        is_trained(run),
    )
    return [train, _evaluate_job(study, run, data, (train.name,))]


def _needs_weights(variant: Variant) -> bool:
    return "{weights}" in str(variant.settings)


def _weights_job(variant: Variant) -> tuple[str, ...]:
    return ("prepare-records",) if _needs_weights(variant) and variant.data != "records" else ()


def _evaluate_job(study: StudySettings, run: Path, data: str, after: tuple[str, ...]) -> Job:
    done = (run / "evaluation.json").is_file()
    arguments = tuple(study.evaluate_args.split())
    return Job("evaluate", f"evaluate-{run.name}", after, {"RUN": str(run), "DATA": data}, arguments, done)
