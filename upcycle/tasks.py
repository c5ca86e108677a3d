"""Downstream tasks (ARC, GSM8K, MMLU, …) by EleutherAI's lm-eval, which most papers report with.

lm-eval is an optional dependency (`pip install 'upcycle[tasks]'`), imported only when a task is asked for. It is kept
silent, and what it sets for the whole process (random states, logging, progress bars) is put back after each call.
"""

import contextlib
import copy
import difflib
import functools
import importlib
import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from upcycle.errors import DataError, UpcycleError, did_you_mean

# lm-eval's own defaults, so that its command gives the same numbers.
_RANDOM_SEED: Final = 0  # Python's generator
_OTHER_SEED: Final = 1234  # numpy's, torch's and that of few-shot examples
# Resamples for the standard error of metrics without a formula for it (perplexity, F1). lm-eval takes 100,000, in
# processes forked beside torch's threads; 1,000 tell the error within about 2 %, in seconds and in this process.
_RESAMPLES: Final = 1000


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse what can be seen without data and model, before minutes go into loading them.

    The first call with a name takes some seconds: lm-eval reads its 14,000 task files. Files alone take none.

    Raises:
        DataError: no task, an unknown name, a task's file that is missing or damaged, a task that runs code which the
            model wrote, or one that needs images or sound.
        UpcycleError: lm-eval is not installed.
    """
    with _quiet():
        _find(tasks)


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    few_shot: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Evaluate a loaded transformers model, on the device where it is, and return each task's metrics.

    Prompts longer than the model's positions lose their beginning, as always in lm-eval; chat templates are not
    applied. The same call gives the same numbers: random states are seeded as by lm-eval's command, and put back after.

    Args:
        model: dense or a mixture; neither its weights nor its mode (training or not) are changed.
        tokenizer: the model's, with an end-of-text token; a copy is used.
        tasks: names that lm-eval knows (tasks, groups, tags; `lm-eval ls tasks`), or paths of a task's `.yaml` file.
            Its `include` and `!function` are relative to the file, its `data_files` to the working folder. Python
            files that it names are run.
        batch_size: sequences at once.
        limit: documents of each task, the first ones; all of them by default.
        few_shot: examples before each question; the task's own number by default, and always where that is set to 0.
        progress: called with the requests answered and all there are, after each one; stdout is closed to it.

    Returns:
        Task → metric → value, in the order of `tasks`, a group's row before those of its members. Metrics have
        lm-eval's names: `acc`, and `exact_match,strict-match` where a filter cut the answer out of the text; lm-eval's
        filter `none` is left away. The standard error of `m` is `m_stderr`, missing where there is none; accuracies
        are fractions of 1. `samples` is the number of documents.

    Raises:
        DataError: as `check_tasks`; also a task whose data cannot be had, options that do not fit, no tokenizer, or a
            task that cannot be run with this model.
        UpcycleError: lm-eval is not installed.
    """
    for name, value, least in (("batch size", batch_size, 1), ("limit", limit, 1), ("few-shot examples", few_shot, 0)):
        if value is not None and value < least:
            raise DataError(f"{name}: {value}; expected at least {least}")
    if tokenizer is None or tokenizer.eos_token_id is None:
        what = "no tokenizer" if tokenizer is None else "a tokenizer without an end-of-text token (eos_token)"
        raise DataError(f"tasks are text, but the model comes with {what}; add one to its folder")
    with _quiet(), _undisturbed(model):
        loaded, rows = _load(*_find(tasks))
        for task in loaded["tasks"].values():
            _set_few_shot(task, few_shot)
        results = _evaluate(model, tokenizer, loaded, batch_size, limit, progress)
    return {row: numbers for row in rows if (numbers := _numbers(results[row]))}


def _find(tasks: Sequence[str]) -> tuple[Any, list[str]]:
    """lm-eval's manager of tasks, and the names that it has for those asked for; all looked at, without their data."""
    if not tasks:
        raise DataError("no task is named; `lm-eval ls tasks` lists them")
    try:
        importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise UpcycleError(f"tasks need EleutherAI's lm-eval: pip install 'upcycle[tasks]' ({error})") from error
    files = {task: Path(task).expanduser().resolve() for task in tasks if Path(task).suffix in (".yaml", ".yml")}
    configs = {task: _read_file(path) for task, path in files.items()}
    # A file of one task needs nothing from the index of all, which takes seconds to read.
    names = len(configs) < len(set(tasks)) or any("group" in config for config in configs.values())
    manager = _manager(names)
    index: dict[str, Any] = manager.task_index
    for task, path in files.items():
        index[str(path)] = _entry(path, configs[task])
    for task in tasks:
        if task not in configs and task not in index:
            near = difflib.get_close_matches(task[:80], index, n=1, cutoff=0.5)
            hint = did_you_mean(task, near) if near else "; `lm-eval ls tasks` lists them, a file's name ends in .yaml"
            raise DataError(f"lm-eval has no task '{task}'{hint}")
        for name, config in _single_tasks(task, configs[task] if task in files else _config(index[task]), index):
            _refuse(name, unsafe=config.get("unsafe_code", False) is not False, multimodal=_multimodal(config))
    return manager, list(dict.fromkeys(str(files.get(task, task)) for task in tasks))


@functools.cache
def _manager(names: bool) -> Any:
    """lm-eval's manager of tasks, with those that it knows by name or with none; kept, for its index takes seconds."""
    return importlib.import_module("lm_eval.tasks").TaskManager(include_defaults=names)


def _read_file(path: Path) -> Mapping[str, Any]:
    """A task's or group's file with what it includes, its functions as text."""
    if not path.is_file():
        raise DataError(f"task file {path}: no such file")
    loader = importlib.import_module("lm_eval.tasks._yaml_loader")
    try:
        config: dict[str, Any] = loader.load_yaml(path, resolve_func=False)
    except Exception as error:  # whatever the parser meets, in this file or in one that it includes
        raise DataError(f"task file {path} cannot be read: {_reason(error)}") from error
    if not isinstance(config.get("group", config.get("task")), str):
        raise DataError(f"task file {path} names no task; expected a line 'task: NAME', or 'group: NAME' and a list")
    if "group" in config and not isinstance(config.get("task"), list):
        raise DataError(f"task file {path}: group '{config['group']}' needs a list of tasks under 'task:'")
    return config


def _entry(path: Path, config: Mapping[str, Any]) -> Any:
    """What lm-eval's index would hold of a file. Given a path, lm-eval takes a group's list of tasks for its name."""
    index = importlib.import_module("lm_eval.tasks._index")
    kind = index.TaskIndex._kind_of(config)
    return index.Entry(name=config.get("group", config.get("task")), kind=kind, yaml_path=path)


def _config(entry: Any) -> Mapping[str, Any]:
    """The config of an entry of lm-eval's index; a tag, which has none, is its tasks."""
    return {"task": sorted(entry.tags)} if entry.kind.name == "TAG" else entry.cfg or {}


def _single_tasks(
    name: str, config: Mapping[str, Any], index: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The names and configs of the tasks that a task, a group or a tag consists of."""
    members = config.get("task")
    if not isinstance(members, list):
        yield name, config
        return
    for member in members:
        changes = member if isinstance(member, dict) else {}
        of = changes.get("group", changes.get("task")) if changes else member
        if isinstance(of, str) and of in index:
            changed = {key: value for key, value in changes.items() if key not in ("task", "group")}
            yield from _single_tasks(of, {**_config(index[of]), **changed}, index)
        elif isinstance(of, str) and len(changes) > 1:  # written out in the group's own file
            yield from _single_tasks(of, changes, index)
        else:
            raise DataError(f"group '{name}' lists '{of}', which lm-eval does not know")


def _multimodal(config: Mapping[str, Any]) -> bool:
    return any(config.get(key) is not None for key in ("doc_to_image", "doc_to_audio"))


def _refuse(name: str, *, unsafe: bool, multimodal: bool) -> None:
    if unsafe:
        raise DataError(
            f"task '{name}' runs code that the model writes, which upcycle does not do; in a sandbox, lm-eval's own "
            "command does, with --confirm_run_unsafe_code"
        )
    if multimodal:
        raise DataError(f"task '{name}' shows images or plays sound, and the model reads text alone")


def _load(manager: Any, specs: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """lm-eval's tasks, their data read, with its groups; and the rows of the result in order."""
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    rows: list[str] = []
    for spec in specs:
        try:
            loaded = manager.load([spec])
        except Exception as error:  # a task's own functions run here, on data of any kind
            raise DataError(_why_not_loaded(spec, error)) from error
        members: dict[str, list[str]] = loaded.get("group_map", {})
        for name, task in loaded["tasks"].items():
            if name in tasks:
                raise DataError(f"task '{name}' is asked for twice, the second time by '{spec}'; leave one of them out")
            # A task in Python tells only now.
            _refuse(name, unsafe=getattr(task, "UNSAFE_CODE", False), multimodal=getattr(task, "MULTIMODAL", False))
        tasks |= loaded["tasks"]
        groups |= loaded.get("groups", {})
        inner = {child for children in members.values() for child in children}
        for name in (*members, *loaded["tasks"]):
            rows += _with_members(name, members) if name not in inner else []
    return {"tasks": tasks, "groups": groups}, rows


def _with_members(name: str, members: Mapping[str, Sequence[str]]) -> list[str]:
    return [name, *(row for child in members.get(name, ()) for row in _with_members(child, members))]


def _why_not_loaded(spec: str, error: Exception) -> str:
    datasets = importlib.import_module("datasets")
    if isinstance(error, ImportError):
        return f"task '{spec}' needs a Python package that is not installed: {error}"
    if isinstance(error, OSError | datasets.exceptions.DatasetsError):
        return (
            f"task '{spec}': its data cannot be had: {_reason(error)}; data of the Hub need the network, or a copy in "
            "the Hub's cache"
        )
    return f"task '{spec}' cannot be prepared, so its file or its data do not fit lm-eval: {_reason(error)}"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _set_few_shot(task: Any, few_shot: int | None) -> None:
    """The examples before a question: the number as lm-eval's command sets it, and which, from a named seed."""
    own = task.get_config("num_fewshot")
    if own is None or (few_shot is not None and own != 0):  # 0 is for prompts that hold their examples already
        task.set_config(key="num_fewshot", value=few_shot or 0)
    task.set_fewshot_seed(seed=_OTHER_SEED)


def _evaluate(
    model: Any,
    tokenizer: Any,
    loaded: Mapping[str, Mapping[str, Any]],
    batch_size: int,
    limit: int | None,
    progress: Callable[[int, int], None] | None,
) -> Mapping[str, Mapping[str, Any]]:
    """lm-eval's results, task by task and group by group."""
    import torch

    harness = importlib.import_module("lm_eval.evaluator")
    wrapper = importlib.import_module("lm_eval.models.huggingface")
    try:
        wrapped = wrapper.HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # it is given a padding token
            backend="causal",
            batch_size=batch_size,
            softmax_dtype="float32",  # that of a bf16 model's logits would cost two digits of each likelihood
        )
        if progress is not None:
            wrapped.set_cache_hook(_Counter(loaded["tasks"], progress))
        results: Mapping[str, Mapping[str, Any]] = harness.evaluate(
            lm=wrapped, task_dict=loaded, limit=limit, bootstrap_iters=_RESAMPLES, log_samples=False
        )["results"]
    except torch.OutOfMemoryError as error:
        raise DataError(f"tasks: not enough memory for a batch size of {batch_size}; give a smaller one") from error
    except Exception as error:  # a task's own functions, lm-eval's assertions, the model's refusals
        raise DataError(f"lm-eval cannot run {', '.join(loaded['tasks'])}: {_reason(error)}") from error
    return results


class _Counter:
    """Stands where lm-eval's cache of answers would, and so is told of each request that is answered."""

    def __init__(self, tasks: Mapping[str, Any], progress: Callable[[int, int], None]) -> None:
        self._tasks, self._progress = tasks, progress
        self._done = self._total = 0

    def add_partial(self, attr: str, req: object, res: object) -> None:
        """lm-eval's name for `this request got this answer`; every task's requests are made before the first."""
        self._total = self._total or sum(each.repeats for task in self._tasks.values() for each in task.instances)
        self._done += 1
        self._progress(self._done, self._total)


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """A row of lm-eval (`acc,none`, `acc_stderr,none`, `sample_len`, …) under plain names, its texts left out."""
    numbers: dict[str, float] = {}
    for key, value in row.items():
        metric, comma, cut = key.partition(",")
        try:
            number = float(value)
        except (TypeError, ValueError):  # names, and the 'N/A' of a standard error that does not exist
            continue
        if comma:
            name = metric.removesuffix("_stderr") + ("" if cut == "none" else f",{cut}")
            numbers[f"{name}_stderr" if metric.endswith("_stderr") else name] = number
    return {**numbers, "samples": float(row["sample_len"])} if numbers else {}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No prints, log lines, warnings and progress bars of lm-eval and what it calls; settings are put back after."""
    bar = importlib.import_module("tqdm.std").tqdm
    begin, disabled, pool = bar.__init__, logging.root.manager.disable, os.environ.get("DISABLE_MULTIPROC")

    def begin_disabled(self: Any, *args: Any, **options: Any) -> None:
        begin(self, *args, **{**options, "disable": True})

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        bar.__init__ = begin_disabled  # lm-eval has no switch for its bars
        os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval's switch for its pool of processes
        try:
            yield
        finally:
            bar.__init__ = begin
            logging.disable(disabled)
            os.environ.pop("DISABLE_MULTIPROC")
            if pool is not None:
                os.environ["DISABLE_MULTIPROC"] = pool


@contextlib.contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Random states as lm-eval's command sets them; afterwards these, and the model's mode, are as they were."""
    import numpy as np
    import torch

    python, numpy, training = random.getstate(), np.random.get_state(), model.training
    devices = range(torch.cuda.device_count()) if model.device.type == "cuda" else ()
    try:
        with torch.random.fork_rng(devices):
            random.seed(_RANDOM_SEED)
            np.random.seed(_OTHER_SEED)
            torch.manual_seed(_OTHER_SEED)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        model.train(training)
